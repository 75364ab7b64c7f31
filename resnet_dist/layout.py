"""Divide a global batch among ranks and micro-steps. These are pure functions of numbers.

`train.global_batch_size` is part of the recipe and never changes. An elastic launcher may restart
with a number of ranks that does not divide it, and fewer ranks may not have the memory for their
larger share.
"""

from dataclasses import dataclass

from resnet_dist.config import TrainConfig


def check_layout(
    global_batch_size: int, world_size: int, grad_accum_steps: int, pairs: bool = False
) -> int:
    """Return the local batch size: the number of images of one rank in one micro-step.

    Args:
        global_batch_size: Number of images of one step of the optimizer, on all ranks.
        world_size: Number of ranks.
        grad_accum_steps: Number of micro-steps in one step of the optimizer.
        pairs: Whether mixup or CutMix is on. They mix neighbours of the same rank, so that the
            local batch size must be even.

    Raises:
        ValueError: If the global batch does not divide; the message names the nearest layouts.
    """
    shares = world_size * grad_accum_steps
    local_batch_size, remainder = divmod(global_batch_size, shares)
    if remainder:
        layouts = _nearest_layouts(global_batch_size, world_size, grad_accum_steps)
        listed = ", or ".join(layouts)
        raise ValueError(
            f"train.global_batch_size is {global_batch_size}: it does not divide by {world_size} "
            f"ranks * {grad_accum_steps} train.grad_accum_steps = {shares}; nearest layouts: "
            f"{listed}"
        )
    if pairs and local_batch_size % 2:
        raise ValueError(
            "augment.mixup_alpha and augment.cutmix_alpha mix pairs of images, but the local batch "
            f"size is {global_batch_size} / {shares} = {local_batch_size}: make it even"
        )
    return local_batch_size


def _nearest_layouts(global_batch_size: int, world_size: int, grad_accum_steps: int) -> list[str]:
    """List batch sizes that fit the ranks, and numbers of ranks that fit the batch size.

    Returns:
        Two texts, such as "--train.global_batch_size 96 or 128" and "2 or 4 ranks".
    """
    shares = world_size * grad_accum_steps
    local_batch_size = global_batch_size // shares
    below = max(1, local_batch_size) * shares
    above = (local_batch_size + 1) * shares
    batch_sizes = sorted({below, above})
    layouts = [f"--train.global_batch_size {_join_with_or(batch_sizes)}"]

    world_sizes = []
    for ranks in range(1, global_batch_size + 1):
        if global_batch_size % (ranks * grad_accum_steps) == 0:
            world_sizes.append(ranks)
    world_sizes.sort(key=lambda ranks: abs(ranks - world_size))
    nearest = sorted(world_sizes[:2])
    if nearest:
        layouts.append(f"{_join_with_or(nearest)} ranks")
    return layouts


def _join_with_or(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)


@dataclass(frozen=True)
class Layout:
    """The division of a global batch.

    Attributes:
        ranks: Number of the launcher's ranks that train; the others are spares.
        grad_accum_steps: Number of micro-steps in one step of the optimizer.
    """

    ranks: int
    grad_accum_steps: int


def fit_layout(train: TrainConfig, world_size: int, may_spare: bool, pairs: bool = False) -> Layout:
    """Choose the layout for the launcher's ranks.

    The layout of the config is kept where possible. `train.max_local_batch` raises the number of
    micro-steps until a micro-batch fits. With `may_spare`, ranks become spares until the global
    batch divides. If nothing fits, the layout of the config is returned: `check_layout` then raises
    an error with the nearest ones.

    Args:
        train: Batch size, number of micro-steps, and limit of a micro-batch.
        world_size: Number of ranks that the launcher has started.
        may_spare: Whether some of them may wait as spares.
        pairs: Whether the local batch size must be even, since images are mixed in pairs.
    """
    fewest = 1 if may_spare else world_size
    for ranks in range(world_size, fewest - 1, -1):
        steps = _micro_steps(train, ranks, pairs)
        if steps:
            return Layout(ranks, steps)
    return Layout(world_size, train.grad_accum_steps)


def _micro_steps(train: TrainConfig, ranks: int, pairs: bool) -> int:
    """Return the smallest possible number of micro-steps for `ranks` ranks; 0 if there is none.

    It is at least that of the config.
    """
    most = train.global_batch_size // ranks
    if not train.max_local_batch:
        most = min(most, train.grad_accum_steps)
    for steps in range(train.grad_accum_steps, most + 1):
        local, rest = divmod(train.global_batch_size, ranks * steps)
        if rest != 0:
            continue
        if train.max_local_batch and local > train.max_local_batch:
            continue
        is_odd = local % 2 == 1
        if pairs and is_odd:
            continue
        return steps
    return 0


def describe_layout(train: TrainConfig, world_size: int, layout: Layout) -> list[str]:
    """Say how a layout differs from the config and from the launcher's ranks.

    Args:
        train: Batch size, number of micro-steps, and limit of a micro-batch.
        world_size: Number of ranks that the launcher has started.
        layout: The result of `fit_layout`.

    Returns:
        A sentence for each difference.
    """
    sentences = []
    spares = world_size - layout.ranks
    if spares:
        sentences.append(
            f"train.global_batch_size {train.global_batch_size} does not divide by {world_size} "
            f"ranks: {layout.ranks} of them train, {spares} wait as spares"
        )
    if layout.grad_accum_steps != train.grad_accum_steps:
        shares = layout.ranks * layout.grad_accum_steps
        local = train.global_batch_size // shares
        sentences.append(
            f"train.grad_accum_steps is raised from {train.grad_accum_steps} to "
            f"{layout.grad_accum_steps}, so that a micro-batch of {local} images fits "
            f"train.max_local_batch {train.max_local_batch}; batch norm takes its statistics from "
            "each micro-step alone"
        )
    return sentences
