"""Memory: what a run takes, counted before it starts. It knows sizes, no layer and no op."""
