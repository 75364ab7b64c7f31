"""Distributed ImageNet training: exact, honest, unkillable, fast, and small enough to read in an
hour.
"""

__version__ = "0.1.0"
