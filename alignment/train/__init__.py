"""Floor 4, training: fine-tune a dual encoder and measure the gain."""
