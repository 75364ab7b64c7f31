"""Data sets in object stores: listing, ranged reads, index files and the cache on disk."""
