"""Evaluation: counts, results of each image, statistics, pictures and sets to evaluate on."""
