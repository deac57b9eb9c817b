"""The HTML pages, each beside the code that fills it."""
