"""A training run: options, rules, steps, checkpoints."""
