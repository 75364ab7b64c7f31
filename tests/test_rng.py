"""Random numbers as pure functions."""

import itertools

import numpy as np
import pytest
from statistics_utils import deviation_from_uniform

from resnet_dist.rng import derive_seed, philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            [0x00000000, 0x00000000, 0x00000000, 0x00000000],
            0x0000000000000000,
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
            0xFFFFFFFFFFFFFFFF,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    """The known answers that Random123 ships for philox4x32 with ten rounds."""
    counters = np.array([counter], dtype=np.uint64)
    [numbers] = philox4x32(counters, key)
    assert numbers.tolist() == expected


def test_uniform_of_a_sample_does_not_depend_on_the_batch():
    whole_batch = np.arange(100)
    two_samples = np.array([42, 5])
    numbers = uniform(3, "crop", 7, whole_batch, 5)

    of_two_samples = uniform(3, "crop", 7, two_samples, 5)
    assert np.array_equal(of_two_samples, numbers[two_samples])

    fewer_numbers = uniform(3, "crop", 7, whole_batch, 2)
    assert np.array_equal(fewer_numbers, numbers[:, :2])


def test_uniform_differs_in_every_argument():
    index = np.array([1])
    # Differs from it in the upper 32 bits alone.
    distant_index = np.array([2**33 + 1])
    numbers = uniform(3, "crop", 7, index, 4)
    others = (
        uniform(4, "crop", 7, index, 4),
        uniform(3, "flip", 7, index, 4),
        uniform(3, "crop", 8, index, 4),
        uniform(3, "crop", 7, distant_index, 4),
    )
    for other_numbers in others:
        is_same = numbers == other_numbers
        assert not is_same.any()


def test_uniform_is_uniform():
    values = uniform(0, "test", 0, np.arange(50_000), 4)
    assert values.min() >= 0
    assert values.max() < 1

    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    # Standard deviations.
    assert deviation_from_uniform(counts) < 4

    correlations = np.corrcoef(values.T)
    errors = np.abs(correlations - np.eye(4))
    assert errors.max() < 0.02


def test_seeds_are_stable_and_distinct():
    first = derive_seed(0, "init")
    second = derive_seed(0, "init")
    assert first == second

    seeds = set()
    for base_seed, purpose, number in itertools.product(range(5), "ab", range(100)):
        seed = derive_seed(base_seed, purpose, number)
        assert 0 <= seed < 2**63
        seeds.add(seed)
    assert len(seeds) == 1000
