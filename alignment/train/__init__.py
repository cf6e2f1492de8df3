"""Floor 4, learning: fine-tune a dual encoder, and say honestly what it brought."""
