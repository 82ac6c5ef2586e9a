"""The decoder: what a config asks for, and the model that computes it, made of ops."""
