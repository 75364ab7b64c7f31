"""How a global batch is divided among ranks and micro-steps. Pure functions of numbers."""


def check_layout(
    global_batch_size: int, world_size: int, grad_accum_steps: int, pairs: bool = False
) -> int:
    """The local batch size: images of one rank in one micro-step.

    Args:
        pairs: Whether mixup or CutMix is on. They mix neighbours of the same rank, so that the
            local batch size must be even.

    Raises:
        ValueError: If the global batch does not divide; the message names the nearest layouts.
    """
    shares = world_size * grad_accum_steps
    local_batch_size, remainder = divmod(global_batch_size, shares)
    if remainder:
        layouts = _nearest_layouts(global_batch_size, world_size, grad_accum_steps)
        raise ValueError(
            f"train.global_batch_size is {global_batch_size}: it does not divide by {world_size} "
            f"ranks * {grad_accum_steps} train.grad_accum_steps = {shares}; nearest layouts: "
            f"{', or '.join(layouts)}"
        )
    if pairs and local_batch_size % 2:
        raise ValueError(
            "augment.mixup_alpha and augment.cutmix_alpha mix pairs of images, but the local batch "
            f"size is {global_batch_size} / {shares} = {local_batch_size}: make it even"
        )
    return local_batch_size


def _nearest_layouts(global_batch_size: int, world_size: int, grad_accum_steps: int) -> list[str]:
    """Batch sizes that fit the ranks, and numbers of ranks that fit the batch size, as text."""
    shares = world_size * grad_accum_steps
    below = max(1, global_batch_size // shares) * shares
    above = (global_batch_size // shares + 1) * shares
    batch_sizes = sorted({below, above})
    layouts = [f"--train.global_batch_size {' or '.join(map(str, batch_sizes))}"]

    world_sizes = [
        ranks
        for ranks in range(1, global_batch_size + 1)
        if global_batch_size % (ranks * grad_accum_steps) == 0
    ]
    nearest = sorted(world_sizes, key=lambda ranks: abs(ranks - world_size))[:2]
    if nearest:
        layouts.append(f"{' or '.join(map(str, sorted(nearest)))} ranks")
    return layouts
