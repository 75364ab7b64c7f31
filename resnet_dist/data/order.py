"""Which rows of the data set each rank reads at each step: pure functions of (seed, step) and the layout.

Nothing here is state. A run that stops and goes on, on any number of ranks, reads the same samples at the same steps.
"""

import numpy as np

from resnet_dist.rng import derive_seed


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of `n` samples in `epoch`: int64 [n], every row once.

    It sorts the raw output of Philox (Salmon et al. 2011), which numpy promises to keep from version to version;
    `Generator.permutation` comes without that promise and a new numpy could change the samples of a resumed run.
    """
    words = np.random.Philox(key=derive_seed(seed, "order", epoch)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Whole global batches in `n` samples. The tail that is left over is dropped, a different one in every epoch.

    Raises ValueError when there is not even one.
    """
    if n < global_batch_size:
        raise ValueError(f"the training set has {n} images, fewer than train.global_batch_size = {global_batch_size}: "
                         f"an epoch would have no step. Set train.global_batch_size to {n} or less, or add images")
    return n // global_batch_size


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch, number of the step in that epoch), both from 0, of the update `step`, counted from 0."""
    return divmod(step, steps_per_epoch)


def micro_step_positions(
    step_in_epoch: int, micro_step: int, *, global_batch_size: int, grad_accum_steps: int, rank: int, world_size: int,
) -> slice:
    """The positions in the epoch's order that `rank` reads in one micro-step.

    A step is the run of `global_batch_size` positions from step_in_epoch * global_batch_size, cut into
    grad_accum_steps * world_size equal pieces: micro-steps outside, ranks inside.
    """
    pieces = grad_accum_steps * world_size
    assert global_batch_size % pieces == 0, f"{global_batch_size} images cannot be cut into {pieces} equal pieces"
    local = global_batch_size // pieces
    start = step_in_epoch * global_batch_size + (micro_step * world_size + rank) * local
    return slice(start, start + local)


def val_rounds(n: int, val_batch_size: int, world_size: int) -> int:
    """How many times every rank is asked for an evaluation batch, so that `n` images are covered."""
    return -(-n // (val_batch_size * world_size))


def val_batches(n: int, val_batch_size: int, rank: int, world_size: int) -> list[range | None]:
    """The rows of each evaluation round of `rank`: `val_rounds` items, None where there is no batch left for it.

    The validation set is cut into batches of `val_batch_size` consecutive rows (the last one shorter), dealt out to the
    ranks in turn. The cut is the same on any number of ranks, so that the logits of an image, which in the last bits
    may depend on the shape of its batch, are the same as well.
    """
    starts = ((turn * world_size + rank) * val_batch_size for turn in range(val_rounds(n, val_batch_size, world_size)))
    return [range(start, min(start + val_batch_size, n)) if start < n else None for start in starts]
