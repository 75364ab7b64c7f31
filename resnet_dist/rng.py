"""Random numbers as pure functions of their purpose.

There is no generator with a state that a checkpoint would have to keep. `uniform` is the
counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), written with numpy arrays. The numbers of a sample depend neither on the other samples
of the batch nor on the version of numpy.
"""

import hashlib

import numpy as np

# Constants of Philox4x32, Salmon et al. 2011, section 3.3.
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_NUM_ROUNDS = 10

_LOW_32_BITS = 0xFFFFFFFF
_LOW_32 = np.uint64(_LOW_32_BITS)
_SHIFT_32 = np.uint64(32)

# A float64 has 53 bits: 32 bits of one word, and 21 bits of the next.
_SHIFT_21 = np.uint64(21)
_SHIFT_11 = np.uint64(11)
_FLOAT64_SCALE = 2.0**-53

# The argument `epoch` of `uniform` has the repetition in the bits above these of its `epoch`.
_BITS_OF_EPOCH = 24

Epochs = int | np.ndarray
"""One epoch for all samples, or one for each sample."""


def derive_seed(
    seed: int,
    purpose: str,
    *numbers: int,
) -> int:
    """Derive a seed for one purpose, for example `derive_seed(seed, "step", step, rank)`.

    Equal arguments give equal seeds on every machine. Different arguments give unrelated seeds,
    because they are hashed (BLAKE2b).

    Args:
        seed: The seed of the run.
        purpose: What the random numbers are for.
        *numbers: Anything else that the seed depends on.

    Returns:
        A seed of 63 bits.
    """
    parts = [seed, purpose, *numbers]
    text = "/".join(str(part) for part in parts)
    hasher = hashlib.blake2b(text.encode(), digest_size=8)
    number = int.from_bytes(hasher.digest(), "little")
    # torch takes signed numbers of 64 bits.
    return number >> 1


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Apply the ten rounds of Philox4x32.

    Args:
        counter: [n, 4], each number below 2**32.
        key: 64 bits.

    Returns:
        [n, 4] of uint64, each number below 2**32.
    """
    # Products of two numbers of 32 bits need 64 bits.
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0 = key & _LOW_32_BITS
    k1 = key >> 32
    for _ in range(_NUM_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        # The high halves are mixed with the counter and the key, the low halves only move.
        high_0 = product_0 >> _SHIFT_32
        high_1 = product_1 >> _SHIFT_32
        c0 = high_1 ^ c1 ^ np.uint64(k0)
        c1 = product_1 & _LOW_32
        c2 = high_0 ^ c3 ^ np.uint64(k1)
        c3 = product_0 & _LOW_32
        k0 = (k0 + _WEYL_0) & _LOW_32_BITS
        k1 = (k1 + _WEYL_1) & _LOW_32_BITS
    return np.stack([c0, c1, c2, c3], axis=1)


def epoch_of_repetition(epoch: int, repetition: np.ndarray) -> np.ndarray:
    """The argument `epoch` of `uniform` if an epoch shows a sample several times.

    Args:
        epoch: The epoch, from 0.
        repetition: [n], which repetition it is, from 0 and below 256.

    Returns:
        int64 [n]. Equal to `epoch` for repetition 0.
    """
    repetition = np.asarray(repetition, dtype=np.int64)
    return epoch + (repetition << _BITS_OF_EPOCH)


def uniform(
    seed: int,
    purpose: str,
    epoch: Epochs,
    indices: np.ndarray,
    count: int,
) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for each sample.

    A row depends only on (seed, purpose, epoch, index). Its first numbers do not depend on `count`.

    Args:
        seed: The seed of the run.
        purpose: What the numbers are for.
        epoch: One number for all samples, or one for each ([n], see `epoch_of_repetition`).
            Numbers count from 0.
        indices: [n], the indices of the samples in the data set.
        count: Number of random numbers per sample.

    Returns:
        float64 [n, count], each number with 53 random bits.
    """
    indices = np.asarray(indices, dtype=np.uint64)
    epochs = np.asarray(epoch, dtype=np.uint64)
    num_samples = len(indices)
    # A block of 128 bits makes two numbers.
    num_blocks = (count + 1) // 2
    num_numbers = 2 * num_blocks

    counter = np.empty((num_samples, num_blocks, 4), dtype=np.uint64)
    # The counter of a block: its number, the sample index in two words, and the epoch.
    counter[..., 0] = np.arange(num_blocks, dtype=np.uint64)
    counter[..., 1] = (indices & _LOW_32)[:, None]
    counter[..., 2] = (indices >> _SHIFT_32)[:, None]
    counter[..., 3] = epochs.reshape(-1, 1)
    key = derive_seed(seed, purpose)
    words = philox4x32(counter.reshape(-1, 4), key)

    pairs = words.reshape(num_samples, num_numbers, 2)
    high_bits = pairs[..., 0] << _SHIFT_21
    low_bits = pairs[..., 1] >> _SHIFT_11
    bits = high_bits | low_bits
    numbers: np.ndarray = bits.astype(np.float64) * _FLOAT64_SCALE
    return numbers[:, :count]


def integers_below(numbers: np.ndarray, limits: int | np.ndarray) -> np.ndarray:
    """Turn uniform numbers into integers of equal probability.

    Args:
        numbers: Numbers in [0, 1), of any shape.
        limits: The integers are 0 to `limits` - 1; one number, or an array that is broadcast.

    Returns:
        int64, of the shape of `numbers`.
    """
    scaled = numbers * limits
    integers: np.ndarray = np.floor(scaled).astype(np.int64)
    return integers
