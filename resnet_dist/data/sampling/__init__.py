"""What a step shows: order, crops and augmentation, as pure functions of the seed and the step."""
