"""Using a model: text in, text out, at the terminal, in Python and over HTTP."""
