"""The order of the samples: complete, as random as a permutation, the same on every layout, stable
for ever.
"""

import itertools
import math

import numpy as np
import pytest
from statistics_utils import deviation_from_uniform

from resnet_dist.data.sampling import order

MAX_DEVIATION = 4
"""A statistic may be this many of its standard deviations from what is expected."""


def permutation(seed, epoch, n):
    return order.rows_at(seed, epoch, n, np.arange(n))


def samples_of_step(step, n, global_batch_size, world_size, grad_accum_steps=1, repeats=1):
    """Rows and repetitions of one step: those of all ranks in the first micro-step, then those in
    the second, and so on.
    """
    steps_per_epoch = order.steps_per_epoch(n, global_batch_size, repeats)
    epoch, step_in_epoch = order.locate(step, steps_per_epoch)
    rows = []
    repetitions = []
    for micro_step in range(grad_accum_steps):
        for rank in range(world_size):
            layout = order.BatchLayout(global_batch_size, grad_accum_steps, rank, world_size)
            positions = layout.positions(micro_step)
            share = order.samples_at(
                3, epoch, n, step_in_epoch, positions, global_batch_size, repeats
            )
            rows.append(share[0])
            repetitions.append(share[1])
    return np.concatenate(rows), np.concatenate(repetitions)


def rows_of_step(step, n, global_batch_size, world_size, grad_accum_steps=1):
    rows, _ = samples_of_step(step, n, global_batch_size, world_size, grad_accum_steps)
    return rows


def correlation(first, second):
    return abs(np.corrcoef(first, second)[0, 1])


def test_order_is_complete_and_differs_by_epoch_and_seed():
    for n in [*range(1, 70), 1000, 1024, 4095, 4096, 4097, 5041]:
        rows = permutation(0, 0, n)
        assert rows.dtype == np.int64
        assert sorted(rows) == list(range(n))
        assert np.array_equal(rows, permutation(0, 0, n))

    first = permutation(0, 0, 5041)
    next_epoch = permutation(0, 1, 5041)
    next_seed = permutation(1, 0, 5041)
    # Unrelated orders agree at one position on average.
    assert (first == next_epoch).sum() < 8
    assert (first == next_seed).sum() < 8


def test_rows_do_not_depend_on_what_else_is_asked():
    whole = permutation(3, 1, 1000)
    positions = np.random.default_rng(0).integers(0, 1000, 37)
    assert np.array_equal(order.rows_at(3, 1, 1000, positions), whole[positions])
    assert order.rows_at(3, 1, 1000, positions[:0]).tolist() == []


@pytest.mark.parametrize("n", [1_281_167, 10**9, 10**9 + 7, 2**40 - 1])
def test_large_orders_are_one_to_one_and_random(n):
    """Sampled: runs at both ends and in the middle, and scattered positions."""
    run = np.arange(20000)
    scattered = np.random.default_rng(1).integers(0, n, 100_000)
    positions = np.unique(np.concatenate([run, n // 2 + run, n - 20000 + run, scattered]))

    rows = order.rows_at(7, 3, n, positions)

    assert rows.min() >= 0
    assert rows.max() < n
    assert len(np.unique(rows)) == len(positions)
    # One standard deviation is 0.0025.
    assert correlation(positions, rows) < 0.015
    # Of the neighbours in the order, 0.002 are expected to be neighbours in the data set.
    distances = np.abs(np.diff(rows[:20000]))
    assert (distances < n // 1000).mean() < 0.004
    cells = np.bincount(rows * 64 // n, minlength=64)
    assert deviation_from_uniform(cells) < MAX_DEVIATION


def test_order_never_changes():
    """A resumed run must see the same order, with any version of numpy and of this package."""
    assert permutation(7, 2, 10).tolist() == [6, 4, 5, 9, 0, 2, 8, 7, 3, 1]
    of_imagenet = order.rows_at(7, 2, 1_281_167, np.array([0, 1, 640_000, 1_281_166]))
    assert of_imagenet.tolist() == [43162, 1104102, 532010, 1225447]
    of_many = order.rows_at(0, 89, 10**9, np.array([0, 1, 999_999_999]))
    assert of_many.tolist() == [322786475, 770257251, 580768410]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "epochs"), [(2, 2000), (3, 3000), (4, 4000), (5, 6000)])
def test_every_permutation_is_as_likely(n, epochs):
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for epoch in range(epochs):
        rows = permutation(5, epoch, n)
        counts[tuple(rows.tolist())] += 1
    assert deviation_from_uniform(np.array(list(counts.values()))) < MAX_DEVIATION


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 9, 12, 16, 25])
def test_positions_pairs_parity_and_fixed_points_are_those_of_random_permutations(n):
    """n of every kind: a power of two, odd squares, and one that needs cycle walking."""
    epochs = 4000
    rows = np.array([permutation(11, epoch, n) for epoch in range(epochs)])

    # Each row is at each position equally often.
    counts = [np.bincount(rows[:, position], minlength=n) for position in range(n)]
    assert deviation_from_uniform(np.array(counts)) < MAX_DEVIATION

    # So is each pair of two different rows at each pair of positions.
    can_occur = ~np.eye(n, dtype=bool)
    for first, second in ((0, 1), (1, 2), (0, n // 2), (0, n - 1)):
        pairs = rows[:, first] * n + rows[:, second]
        pair_counts = np.bincount(pairs, minlength=n * n).reshape(n, n)
        assert deviation_from_uniform(pair_counts[can_occur]) < MAX_DEVIATION

    # One fixed point is expected, with variance 1.
    num_fixed_points = (rows == np.arange(n)).sum() / epochs
    assert abs(num_fixed_points - 1) < MAX_DEVIATION / math.sqrt(epochs)

    # Half of the permutations are odd, with standard deviation 1/2.
    is_inverted = rows[:, :, None] > rows[:, None, :]
    inversions = np.triu(is_inverted).sum(axis=(1, 2))
    is_odd = inversions % 2 == 1
    assert abs(is_odd.mean() - 0.5) < MAX_DEVIATION * 0.5 / math.sqrt(epochs)


def test_epochs_are_unrelated():
    """The same position, or the same row, tells nothing of the next epoch's."""
    n = 4096
    limit = MAX_DEVIATION / math.sqrt(n)
    orders = [permutation(1, epoch, n) for epoch in range(20)]
    for one, other in itertools.pairwise(orders):
        assert correlation(one, other) < limit
        position_in_one = np.argsort(one)
        assert correlation(position_in_one[other[:-1]], np.arange(n - 1)) < limit


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(world_size):
    n = 103
    batch = 24
    steps_per_epoch = 4
    tails = []
    for epoch in range(3):
        first_step = epoch * steps_per_epoch
        steps = range(first_step, first_step + steps_per_epoch)
        rows = np.concatenate([rows_of_step(step, n, batch, world_size) for step in steps])
        assert len(rows) == len(set(rows)) == 96
        tails.append(frozenset(range(n)) - frozenset(rows))
    assert len(set(tails)) == 3, "each epoch drops other samples"


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_repeated_samples_are_on_other_ranks_and_never_side_by_side(repeats):
    """Each image of a batch occurs `repeats` times, and does not come back in the epoch."""
    n = 120
    batch = 24
    num_steps = 5
    num_different = batch // repeats
    assert order.steps_per_epoch(n, batch, repeats) == num_steps

    shown = []
    for step in range(num_steps):
        rows, repetitions = samples_of_step(step, n, batch, world_size=4, repeats=repeats)
        assert np.array_equal(rows, np.tile(rows[:num_different], repeats))
        assert np.array_equal(repetitions, np.repeat(np.arange(repeats), num_different))
        for rows_of_rank in np.split(rows, 4):
            assert len(set(rows_of_rank)) == len(rows_of_rank)
        other_layout = samples_of_step(
            step, n, batch, world_size=2, grad_accum_steps=3, repeats=repeats
        )
        assert np.array_equal(other_layout, (rows, repetitions))
        shown += rows[:num_different].tolist()
    assert shown == permutation(3, 0, n)[: len(shown)].tolist()


def test_repeats_must_divide_the_batch():
    message = "augment.repeats is 3.*train.global_batch_size, which is 256.*255"
    with pytest.raises(ValueError, match=message):
        order.steps_per_epoch(1000, 256, 3)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="100 images.*train.global_batch_size = 256.*100 or less"):
        order.steps_per_epoch(100, 256)
    assert order.steps_per_epoch(256, 256) == 1
