"""Random numbers as pure functions of what they are for: nothing here has a state that could be
lost.

`uniform` is the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), written over numpy arrays: the numbers of one sample cost no
generator object and depend neither on the other samples of the batch nor on the version of numpy.
"""

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = np.uint64(0xFFFFFFFF)


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for one purpose, for instance `derive_seed(seed, "step", step, rank)`.

    Equal arguments give equal seeds on every machine; different ones are unrelated (BLAKE2b).
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def philox4x32(counter: np.ndarray, key: int) -> np.ndarray:
    """Ten rounds of Philox4x32 on `counter` ([n, 4], each below 2**32) with a 64-bit `key`; [n, 4]
    of uint64.
    """
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & _LOW_32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & _LOW_32,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def epoch_of_repetition(epoch: int, repetition: np.ndarray) -> np.ndarray:
    """The `epoch` of `uniform` if an epoch shows a sample several times; int64 [n].

    Args:
        repetition: [n], counts from 0, below 256. The first time is the epoch itself.
    """
    return epoch + (np.asarray(repetition, dtype=np.int64) << 24)


def uniform(
    seed: int, purpose: str, epoch: int | np.ndarray, indices: np.ndarray, count: int
) -> np.ndarray:
    """`count` numbers in [0, 1) for each sample: float64 [len(indices), count], of 53 random bits
    each.

    `epoch` is one for all samples, or one for each ([len(indices)], see
    `epoch_of_repetition`). A row depends on
    (seed, purpose, epoch, index) alone; its first numbers do not depend on `count`.
    """
    indices = np.asarray(indices, dtype=np.uint64)
    blocks = (count + 1) // 2  # a block of 128 bits makes two numbers
    counter = np.empty((len(indices), blocks, 4), dtype=np.uint64)
    counter[..., 0] = np.arange(blocks, dtype=np.uint64)
    counter[..., 1] = (indices & _LOW_32)[:, None]
    counter[..., 2] = (indices >> np.uint64(32))[:, None]
    counter[..., 3] = np.asarray(epoch, dtype=np.uint64).reshape(-1, 1)
    words = philox4x32(counter.reshape(-1, 4), derive_seed(seed, purpose)).reshape(
        len(indices), blocks * 2, 2
    )
    bits = (words[..., 0] << np.uint64(21)) | (words[..., 1] >> np.uint64(11))  # 32 + 21 bits
    return (bits.astype(np.float64) * 2.0**-53)[:, :count]
