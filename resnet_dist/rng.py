"""Random numbers as pure functions of their purpose: no generator has a state that could be lost.

`uniform` is the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), written over numpy arrays. The numbers of one sample cost no
generator object, and depend neither on the other samples of the batch nor on the version of numpy.
"""

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = np.uint64(0xFFFFFFFF)


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for one purpose, for example `derive_seed(seed, "step", step, rank)`.

    Equal arguments give equal seeds on every machine. Seeds of different arguments are unrelated
    (BLAKE2b).
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Args:
        counter: [n, 4], each number below 2**32.
        key: 64 bits.

    Returns:
        [n, 4] of uint64, each number below 2**32.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0 = key & 0xFFFFFFFF
    k1 = key >> 32
    for _ in range(10):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c1 = product1 & _LOW_32
        c2 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c3 = product0 & _LOW_32
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def epoch_of_repetition(epoch: int, repetition: np.ndarray) -> np.ndarray:
    """The `epoch` of `uniform` if an epoch shows a sample several times; int64 [n].

    `repetition` [n] counts from 0, below 256. The first time is the epoch itself.
    """
    return epoch + (np.asarray(repetition, dtype=np.int64) << 24)


def uniform(
    seed: int, purpose: str, epoch: int | np.ndarray, indices: np.ndarray, count: int
) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample: float64 [len(indices), count].

    Each has 53 random bits. A row depends on (seed, purpose, epoch, index) alone. Its first numbers
    do not depend on `count`. `epoch` is one number for all samples, or one for each
    ([len(indices)], see `epoch_of_repetition`).
    """
    indices = np.asarray(indices, dtype=np.uint64)
    num_blocks = (count + 1) // 2  # a block of 128 bits makes two numbers
    counter = np.empty((len(indices), num_blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(num_blocks, dtype=np.uint64)
    counter[..., 1] = (indices & _LOW_32)[:, None]
    counter[..., 2] = (indices >> np.uint64(32))[:, None]
    counter[..., 3] = np.asarray(epoch, dtype=np.uint64).reshape(-1, 1)
    words = philox4x32(counter.reshape(-1, 4), derive_seed(seed, purpose))
    words = words.reshape(len(indices), num_blocks * 2, 2)
    # 32 bits of the first word and 21 of the second.
    bits = (words[..., 0] << np.uint64(21)) | (words[..., 1] >> np.uint64(11))
    numbers: np.ndarray = bits.astype(np.float64) * 2.0**-53
    return numbers[:, :count]
