"""Which rows of the data set each rank reads at each step: pure functions of (seed, step) and the
layout.

Nothing here is state, and nothing has the size of the data set. A run that stops and goes on, on
any number of ranks, reads the same samples at the same steps.
"""

import math

import numpy as np

from resnet_dist.rng import derive_seed

_ROUNDS = 16  # with 12, the orders of six samples are not quite equally likely
_GOLDEN, _MIX1, _MIX2 = (
    np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def rows_at(seed: int, epoch: int, n: int, positions: np.ndarray) -> np.ndarray:
    """The rows at `positions` (integers [B] in [0, n)) of the order of `n` samples in `epoch`:
    int64 [B].

    The order is a permutation that is computed by position: a Feistel network (Luby and Rackoff
    1988), which is one to one whatever its round function is, here on pairs of [0, a) x [0, b)
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel). a * b is
    hardly more than n; a result that is no row goes through the network again until it is one
    (their cycle walking). a is even: with both odd only even permutations came out. The round
    function is SplitMix64's (Steele et al. 2014), integer arithmetic that no version of numpy will
    change.
    """
    root = math.isqrt(n - 1) + 1
    a = root + root % 2
    b = -(-n // a)
    keys = _mixed(
        np.uint64(derive_seed(seed, "order", epoch))
        + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN
    )
    rows = np.array(positions, dtype=np.uint64)
    todo = slice(None)
    while True:
        rows[todo] = _network(rows[todo], np.uint64(a), np.uint64(b), keys)
        todo = np.flatnonzero(rows >= np.uint64(n))
        if not len(todo):
            return rows.astype(np.int64)


def _network(numbers: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, a * b): each round adds to one half of a number what the round function
    makes of the other.

    XOR in place of the sum could not make odd permutations either.
    """
    left, right = numbers // b, numbers % b
    for first, second in keys.reshape(-1, 2):
        left = (left + _mixed(right + first)) % a
        right = (right + _mixed(left + second)) % b
    return left * b + right


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, and its upper 63 bits, to which a half can be added."""
    words = (words ^ (words >> np.uint64(30))) * _MIX1
    words = (words ^ (words >> np.uint64(27))) * _MIX2
    return (words ^ (words >> np.uint64(31))) >> np.uint64(1)


def samples_at(
    seed: int,
    epoch: int,
    n: int,
    step_in_epoch: int,
    positions: np.ndarray,
    global_batch_size: int,
    repeats: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """What is shown at `positions` (int64 [B], in the global batch) of a step: (rows, repetitions),
    both int64 [B].

    With `repeats` above 1 a batch holds each of its global_batch_size / repeats images that often
    (repeated augmentation, Hoffer et al. 2019), the copies as far apart as can be. An epoch keeps
    its number of steps, and so shows the `repeats`-th part of the images, as torchvision's
    RASampler.
    """
    distinct = global_batch_size // repeats
    repetitions, places = np.divmod(positions, distinct)
    return rows_at(seed, epoch, n, step_in_epoch * distinct + places), repetitions


def steps_per_epoch(n: int, global_batch_size: int, repeats: int = 1) -> int:
    """Whole global batches in `n` samples. The tail that is left over is dropped, a different one
    in every epoch.

    Raises ValueError when there is not even one, or `repeats` (see `samples_at`) does not divide a
    batch.
    """
    if global_batch_size % repeats:
        raise ValueError(
            f"augment.repeats is {repeats}: it does not divide train.global_batch_size, "
            f"{global_batch_size}; take {global_batch_size // repeats * repeats or repeats} for that"
        )
    if n < global_batch_size:
        raise ValueError(
            f"the training set has {n} images, fewer than train.global_batch_size = {global_batch_size}: "
            f"an epoch would have no step. Set train.global_batch_size to {n} or less, or add images"
        )
    return n // global_batch_size


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch, number of the step in that epoch), both from 0, of the update `step`, counted from 0."""
    return divmod(step, steps_per_epoch)


def micro_step_positions(
    micro_step: int,
    *,
    global_batch_size: int,
    grad_accum_steps: int,
    rank: int,
    world_size: int,
) -> np.ndarray:
    """The positions in the global batch that `rank` reads in one micro-step: int64 [B].

    The batch is cut into grad_accum_steps * world_size equal pieces: micro-steps outside, ranks
    inside.
    """
    pieces = grad_accum_steps * world_size
    assert global_batch_size % pieces == 0, (
        f"{global_batch_size} images cannot be cut into {pieces} equal pieces"
    )
    local = global_batch_size // pieces
    return np.arange(local, dtype=np.int64) + (micro_step * world_size + rank) * local


def val_batches(n: int, val_batch_size: int, rank: int, world_size: int) -> list[range | None]:
    """The rows of each evaluation round of `rank`: on all ranks as many, None where there is no
    batch left for it.

    The validation set is cut into batches of `val_batch_size` consecutive rows (the last one
    shorter), dealt out to the ranks in turn. The cut is the same on any number of ranks, so that
    the logits of an image, which in the last bits may depend on the shape of its batch, are the
    same as well.
    """
    before = rank * val_batch_size  # rows of a round that other ranks have
    return [
        range(n)[first + before : first + before + val_batch_size] or None
        for first in range(0, n, val_batch_size * world_size)
    ]
