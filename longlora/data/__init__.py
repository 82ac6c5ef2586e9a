"""Training data: text, tokens, sequences."""
