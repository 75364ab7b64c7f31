"""What a run tells: console, metrics.jsonl, its history, and sinks such as W&B."""
