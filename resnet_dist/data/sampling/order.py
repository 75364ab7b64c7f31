"""Which rows of the data set each rank reads at each step.

All of this is computed by pure functions of the seed, the step and the layout. There is no state,
and no array has the size of the data set. A resumed run therefore reads the same samples at the
same steps, on any number of ranks.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet_dist.data.arrays import IntArray
from resnet_dist.rng import derive_seed

WordArray = np.ndarray[Any, np.dtype[np.uint64]]

# 12 rounds are not enough: the orders of a set of six samples would not be equally likely.
_ROUNDS = 16

# Constants of SplitMix64.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch of a step is divided between micro-steps and ranks."""

    global_batch_size: int
    """number of images of a step, of all ranks together"""
    grad_accum_steps: int = 1
    """number of micro-steps in a step"""
    rank: int = 0
    """this rank"""
    world_size: int = 1
    """number of ranks"""

    @property
    def local_batch_size(self) -> int:
        """Number of images of one micro-step on one rank."""
        pieces = self.grad_accum_steps * self.world_size
        assert self.global_batch_size % pieces == 0, (
            f"{self.global_batch_size} images cannot be divided into {pieces} equal pieces"
        )
        return self.global_batch_size // pieces

    def positions(self, micro_step: int) -> IntArray:
        """The positions in the global batch that this rank reads in a micro-step.

        The batch is divided by micro-steps first, then by ranks.

        Args:
            micro_step: the micro-step within the step, counted from 0.

        Returns:
            int64 [B], where B is `local_batch_size`.
        """
        local = self.local_batch_size
        piece = micro_step * self.world_size + self.rank
        return np.arange(local, dtype=np.int64) + piece * local


def rows_at(seed: int, epoch: int, n: int, positions: IntArray) -> IntArray:
    """The rows at some positions of the sample order of an epoch.

    The order is a keyed permutation, which is computed for each position alone. It is a generalised
    Feistel network (Luby and Rackoff 1988; Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"), which is a bijection for any round function. The network permutes the pairs in
    [0, a) x [0, b), where a * b is slightly more than n. If a result is not below n, the network is
    applied to it again until it is (cycle walking, also by Black and Rogaway). `a` is even, because
    with both sides odd only even permutations would occur. The round function is that of SplitMix64
    (Steele et al. 2014). It is integer arithmetic, so the order does not depend on the version of
    NumPy.

    Args:
        seed: the seed of the run.
        epoch: the epoch, counted from 0.
        n: number of samples.
        positions: integers [B] in [0, n).

    Returns:
        int64 [B] in [0, n).
    """
    root = math.isqrt(n - 1) + 1
    side_a = root + root % 2
    side_b = -(-n // side_a)
    a = np.uint64(side_a)
    b = np.uint64(side_b)
    first_key = np.uint64(derive_seed(seed, "order", epoch))
    round_numbers = np.arange(1, _ROUNDS + 1, dtype=np.uint64)
    keys = _mix(first_key + round_numbers * _GOLDEN)

    rows = np.array(positions, dtype=np.uint64)
    rows = _permute(rows, a, b, keys)
    while True:
        outside = np.flatnonzero(rows >= np.uint64(n))
        if not len(outside):
            return rows.astype(np.int64)
        rows[outside] = _permute(rows[outside], a, b, keys)


def _permute(numbers: WordArray, a: np.uint64, b: np.uint64, keys: WordArray) -> WordArray:
    """Permute [0, a * b): each round adds the round function of one half to the other half.

    The halves are combined by addition and not by XOR, with which odd permutations could not occur.

    Args:
        numbers: uint64 [B] in [0, a * b).
        a: number of values of the left half.
        b: number of values of the right half.
        keys: uint64 [rounds], an even number of round keys.

    Returns:
        uint64 [B] in [0, a * b).
    """
    left = numbers // b
    right = numbers % b
    for left_key, right_key in keys.reshape(-1, 2):
        left = (left + _mix(right + left_key)) % a
        right = (right + _mix(left + right_key)) % b
    return left * b + right


def _mix(words: WordArray) -> WordArray:
    """The finaliser of SplitMix64, without the lowest bit.

    The result has 63 bits, so that adding a half to it does not overflow.
    """
    words = (words ^ (words >> np.uint64(30))) * _MIX1
    words = (words ^ (words >> np.uint64(27))) * _MIX2
    words = words ^ (words >> np.uint64(31))
    upper: WordArray = words >> np.uint64(1)
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
    """The samples at some positions of the global batch of a step.

    With `repeats` above 1, the batch holds global_batch_size / repeats different images, and each
    of them occurs `repeats` times (repeated augmentation, Hoffer et al. 2019). The copies are as
    far apart as possible. An epoch has the same number of steps as without repetition, so it shows
    1 / repeats of the images, as with torchvision's RASampler.

    Args:
        seed: the seed of the run.
        epoch: the epoch, counted from 0.
        n: number of samples in the data set.
        step_in_epoch: the step within the epoch, counted from 0.
        positions: int64 [B], positions in the global batch.
        global_batch_size: number of images of a step.
        repeats: how often each image occurs in the batch.

    Returns:
        The rows, and for each the number of the repetition of its image; both int64 [B].
    """
    num_different = global_batch_size // repeats
    repetitions, places = np.divmod(positions, num_different)
    first = step_in_epoch * num_different
    rows = rows_at(seed, epoch, n, first + places)
    return rows, repetitions


def with_new_partners(positions: IntArray, num_different: int) -> IntArray:
    """Exchange positions so that each repetition of an image is in a pair with another image.

    Mixup mixes positions 2k and 2k + 1. The second image of each pair is taken from the pair that
    is r pairs further on, in repetition r. The images of each repetition stay the same.

    Args:
        positions: int64 [B], positions in the global batch.
        num_different: number of different images in the global batch; it is even.

    Returns:
        int64 [B]: the positions whose samples are shown in place of those at `positions`.
    """
    repetitions, places = np.divmod(positions, num_different)
    pairs = places // 2
    is_second = places % 2 == 1
    other_pairs = (pairs + repetitions) % (num_different // 2)
    new_places = np.where(is_second, 2 * other_pairs + 1, places)
    return repetitions * num_different + new_places


def steps_per_epoch(n: int, global_batch_size: int, repeats: int = 1) -> int:
    """Number of steps in an epoch, which is the number of complete global batches.

    The remaining samples are dropped. These are different samples in each epoch.

    Args:
        n: number of samples in the data set.
        global_batch_size: number of images of a step.
        repeats: how often each image occurs in a batch (see `samples_at`).

    Raises:
        ValueError: if there is not a single complete batch, or if `repeats` does not divide
            `global_batch_size`.
    """
    if global_batch_size % repeats:
        nearest = max(global_batch_size // repeats, 1) * repeats
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
    """The epoch of a step, and its number within the epoch.

    Args:
        step: the step, counted from 0.
        steps_per_epoch: number of steps in an epoch.

    Returns:
        (epoch, step in the epoch), both counted from 0.
    """
    return divmod(step, steps_per_epoch)


def val_batches(n: int, val_batch_size: int, rank: int, world_size: int) -> list[range | None]:
    """The rows of each evaluation batch of a rank.

    The validation set is divided into batches of `val_batch_size` consecutive rows, of which the
    last one may be smaller. The ranks take them in turn. The batches are the same for any number of
    ranks. So are the logits of each image, whose last bits may depend on the batch.

    Args:
        n: number of samples in the data set.
        val_batch_size: number of images in a batch of one rank.
        rank: the rank.
        world_size: number of ranks.

    Returns:
        A list of the same length on all ranks. An item is None if no batch is left for this rank
        while other ranks have one.
    """
    batches: list[range | None] = []
    images_per_round = val_batch_size * world_size
    for first_of_round in range(0, n, images_per_round):
        first = first_of_round + rank * val_batch_size
        stop = min(first + val_batch_size, n)
        if first < stop:
            batches.append(range(first, stop))
        else:
            batches.append(None)
    return batches
