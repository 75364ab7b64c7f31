"""Memory and arithmetic: what a training step needs, and what the machine has."""
