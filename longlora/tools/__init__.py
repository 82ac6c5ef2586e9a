"""Commands around a run: inspect, doctor, demo."""
