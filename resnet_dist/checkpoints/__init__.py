"""The state of a run in files: saving, loading, resuming, and weights of other programs."""
