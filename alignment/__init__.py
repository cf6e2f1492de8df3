"""Cross-modal retrieval: encode pictures and captions into one space, search, look and measure."""

__version__ = "0.1.0"
