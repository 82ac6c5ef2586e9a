"""Our speed against the peers', one file per op. `python -m benchmarks` runs all; each file also runs by itself."""
