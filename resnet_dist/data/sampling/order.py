"""Which rows of the data set each rank reads at each step: pure functions of the seed, the step and
the layout.

Nothing here is state, and nothing has the size of the data set. A run that is resumed on any number
of ranks reads the same samples at the same steps.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet_dist.data.arrays import IntArray
from resnet_dist.rng import derive_seed

WordArray = np.ndarray[Any, np.dtype[np.uint64]]

# With 12 rounds, the orders of six samples are not quite equally likely.
_ROUNDS = 16

# Constants of SplitMix64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch of a step is divided, and which part is this rank's."""

    global_batch_size: int
    grad_accum_steps: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def local_batch_size(self) -> int:
        """Images of one micro-step on one rank."""
        pieces = self.grad_accum_steps * self.world_size
        assert self.global_batch_size % pieces == 0, (
            f"{self.global_batch_size} images cannot be divided into {pieces} equal pieces"
        )
        return self.global_batch_size // pieces

    def positions(self, micro_step: int) -> IntArray:
        """The positions in the global batch that this rank reads in a micro-step: int64 [B].

        The batch is divided by micro-steps first, then by ranks.
        """
        local = self.local_batch_size
        piece = micro_step * self.world_size + self.rank
        return np.arange(local, dtype=np.int64) + piece * local


def rows_at(seed: int, epoch: int, n: int, positions: IntArray) -> IntArray:
    """The rows at `positions` (integers [B] in [0, n)) of the order of `n` samples in `epoch`.

    The order is a keyed permutation that is computed position by position: a generalised Feistel
    network (Luby and Rackoff 1988; Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"), which is one to one for any round function. It works on pairs of [0, a) x [0, b),
    where a * b is hardly more than n. A result that is no row goes through the network again until
    it is one (Black and Rogaway's cycle walking). `a` is even, since with both odd only even
    permutations occur. The round function is SplitMix64's (Steele et al. 2014): integer arithmetic,
    which does not depend on the version of NumPy.

    Returns:
        int64 [B].
    """
    root = math.isqrt(n - 1) + 1
    a = root + root % 2
    b = -(-n // a)
    first_key = np.uint64(derive_seed(seed, "order", epoch))
    keys = _mix(first_key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)

    rows = np.array(positions, dtype=np.uint64)
    rows = _permute(rows, np.uint64(a), np.uint64(b), keys)
    while True:
        outside = np.flatnonzero(rows >= np.uint64(n))
        if not len(outside):
            return rows.astype(np.int64)
        rows[outside] = _permute(rows[outside], np.uint64(a), np.uint64(b), keys)


def _permute(numbers: WordArray, a: np.uint64, b: np.uint64, keys: WordArray) -> WordArray:
    """A permutation of [0, a * b): each round adds the round function of one half to the other.

    With XOR in place of the addition, odd permutations could not occur either.
    """
    left = numbers // b
    right = numbers % b
    for left_key, right_key in keys.reshape(-1, 2):
        left = (left + _mix(right + left_key)) % a
        right = (right + _mix(left + right_key)) % b
    return left * b + right


def _mix(words: WordArray) -> WordArray:
    """SplitMix64's finaliser. Only the upper 63 bits, so that a half can be added to them."""
    words = (words ^ (words >> np.uint64(30))) * _MIX1
    words = (words ^ (words >> np.uint64(27))) * _MIX2
    upper: WordArray = (words ^ (words >> np.uint64(31))) >> np.uint64(1)
    return upper


def samples_at(
    seed: int,
    epoch: int,
    n: int,
    step_in_epoch: int,
    positions: IntArray,
    global_batch_size: int,
    repeats: int = 1,
) -> tuple[IntArray, IntArray]:
    """What is shown at `positions` (int64 [B], in the global batch) of a step.

    With `repeats` above 1, each image occurs that often in the batch, which holds
    global_batch_size / repeats different ones (repeated augmentation, Hoffer et al. 2019). The
    copies are as far apart as possible. The number of steps in an epoch stays, so an epoch shows
    1 / repeats of the images, like torchvision's RASampler.

    Returns:
        The rows, and which repetition of its image each one is: int64 [B] both.
    """
    num_different = global_batch_size // repeats
    repetitions, places = np.divmod(positions, num_different)
    rows = rows_at(seed, epoch, n, step_in_epoch * num_different + places)
    return rows, repetitions


def steps_per_epoch(n: int, global_batch_size: int, repeats: int = 1) -> int:
    """Number of whole global batches in `n` samples.

    The samples that are left over are dropped; they are others in each epoch.

    Raises:
        ValueError: when there is not a single batch, or `repeats` (see `samples_at`) does not
            divide the batch.
    """
    if global_batch_size % repeats:
        nearest = global_batch_size // repeats * repeats or repeats
        raise ValueError(
            f"augment.repeats is {repeats}: it must divide train.global_batch_size, which is "
            f"{global_batch_size}. Set train.global_batch_size to {nearest}, for instance"
        )
    if n < global_batch_size:
        raise ValueError(
            f"the training set has {n} images, fewer than train.global_batch_size = "
            f"{global_batch_size}: an epoch would have no step. Set train.global_batch_size to {n} "
            f"or less, or add images"
        )
    return n // global_batch_size


def locate(step: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch, step in that epoch) of a step; all are counted from 0."""
    return divmod(step, steps_per_epoch)


def val_batches(n: int, val_batch_size: int, rank: int, world_size: int) -> list[range | None]:
    """The rows of each evaluation batch of `rank`: the same number of batches on all ranks, None
    where none is left for this one.

    The validation set is divided into batches of `val_batch_size` consecutive rows (the last one
    is shorter), which the ranks take in turn. The batches are the same on any number of ranks, so
    that the logits of an image are the same as well: their last bits may depend on the batch.
    """
    batches: list[range | None] = []
    for first_of_round in range(0, n, val_batch_size * world_size):
        first = first_of_round + rank * val_batch_size
        rows = range(first, min(first + val_batch_size, n))
        batches.append(rows if len(rows) > 0 else None)
    return batches
