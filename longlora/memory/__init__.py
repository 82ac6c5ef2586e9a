"""Memory, planned: the layout of buffers and what a run takes."""
