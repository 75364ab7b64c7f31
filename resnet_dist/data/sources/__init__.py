"""What there is: class folders, tar shards and the embedded digits, as one index."""
