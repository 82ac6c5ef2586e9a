"""Training data: text files, token ids, sequences."""
