"""How a global batch is divided among ranks and micro-steps. Pure functions of numbers.

`train.global_batch_size` is the recipe. An elastic launcher may come back with a number of ranks
that does not divide it, and fewer ranks may not have the memory for their larger share.
"""

from dataclasses import dataclass

from resnet_dist.config import TrainConfig


def check_layout(
    global_batch_size: int, world_size: int, grad_accum_steps: int, pairs: bool = False
) -> int:
    """The local batch size: images of one rank in one micro-step.

    `pairs`: mixup or CutMix is on. They mix neighbours of the same rank, so that the local batch
    size must be even.

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


@dataclass(frozen=True)
class Layout:
    """How many of the launcher's ranks train, and in how many micro-steps."""

    ranks: int
    grad_accum_steps: int


def fit_layout(train: TrainConfig, world_size: int, may_spare: bool, pairs: bool = False) -> Layout:
    """The layout for the launcher's `world_size` ranks.

    It is the one of the config where that is possible. `train.max_local_batch` raises the number of
    micro-steps until a micro-batch fits. With `may_spare`, ranks are left out as spares until the
    global batch divides. Where nothing fits, the config's own layout is returned, for
    `check_layout` to refuse with the nearest ones.

    Args:
        train: batch size, micro-steps and the limit of a micro-batch.
        world_size: number of ranks that the launcher started.
        may_spare: whether some of them may wait.
        pairs: whether the batch of a rank must be even, since images are mixed in pairs.
    """
    fewest = 1 if may_spare else world_size
    for ranks in range(world_size, fewest - 1, -1):
        steps = _micro_steps(train, ranks, pairs)
        if steps:
            return Layout(ranks, steps)
    return Layout(world_size, train.grad_accum_steps)


def _micro_steps(train: TrainConfig, ranks: int, pairs: bool) -> int:
    """The fewest micro-steps, from the config's number on, that `ranks` ranks can use; or 0."""
    most = train.global_batch_size // ranks
    if not train.max_local_batch:
        most = min(most, train.grad_accum_steps)
    for steps in range(train.grad_accum_steps, most + 1):
        local, rest = divmod(train.global_batch_size, ranks * steps)
        fits = not train.max_local_batch or local <= train.max_local_batch
        if rest == 0 and fits and not (pairs and local % 2):
            return steps
    return 0


def describe_layout(train: TrainConfig, world_size: int, layout: Layout) -> list[str]:
    """What differs from the config and from what the launcher started, one sentence each."""
    said = []
    spares = world_size - layout.ranks
    if spares:
        said.append(
            f"train.global_batch_size {train.global_batch_size} does not divide by {world_size} "
            f"ranks: {layout.ranks} of them train, {spares} wait as spares"
        )
    if layout.grad_accum_steps != train.grad_accum_steps:
        local = train.global_batch_size // (layout.ranks * layout.grad_accum_steps)
        said.append(
            f"train.grad_accum_steps is raised from {train.grad_accum_steps} to "
            f"{layout.grad_accum_steps}, so that a micro-batch of {local} images fits "
            f"train.max_local_batch {train.max_local_batch}; batch norm takes its statistics from "
            "each micro-step alone"
        )
    return said
