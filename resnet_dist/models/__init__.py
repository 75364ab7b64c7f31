"""The networks, their weights, and the batch norm over all ranks."""
