"""Our speed against that of peers, one file per op. `python -m benchmarks` runs them all."""
