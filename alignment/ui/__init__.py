"""UI: the page with one module per tab, its words and elements, and the API."""
