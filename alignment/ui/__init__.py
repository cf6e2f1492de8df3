"""Top floor, the page: its words, its parts and one module per tab. `app.py` puts them together."""
