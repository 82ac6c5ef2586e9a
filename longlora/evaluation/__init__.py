"""Evaluation: perplexity, and what a model finds in a long text."""
