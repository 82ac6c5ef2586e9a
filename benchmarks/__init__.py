"""Compares our speed with that of peers, one file per op. `python -m benchmarks` runs all of them."""
