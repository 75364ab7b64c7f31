"""Data sets for evaluation: their layouts, their classes, and what is counted on them."""
