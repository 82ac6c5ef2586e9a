"""Models, adapters and tokenizers on disk: read and checked, written."""
