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

SEED = 3
"""Of the batches of the tests."""


def permutation(seed, epoch, n):
    """The rows of a whole epoch."""
    positions = np.arange(n)
    return order.rows_at(seed, epoch, n, positions)


def samples_of_step(
    step,
    n,
    global_batch_size,
    world_size,
    grad_accum_steps=1,
    repeats=1,
):
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
            rows_of_share, repetitions_of_share = order.samples_at(
                SEED,
                epoch,
                n,
                step_in_epoch,
                positions,
                global_batch_size,
                repeats,
            )
            rows.append(rows_of_share)
            repetitions.append(repetitions_of_share)
    return np.concatenate(rows), np.concatenate(repetitions)


def rows_of_step(step, n, global_batch_size, world_size, grad_accum_steps=1):
    rows, _ = samples_of_step(step, n, global_batch_size, world_size, grad_accum_steps)
    return rows


def correlation(first, second):
    """The absolute value of the coefficient of correlation."""
    coefficients = np.corrcoef(first, second)
    return abs(coefficients[0, 1])


def test_order_is_complete_and_differs_by_epoch_and_seed():
    small = range(1, 70)
    large = (1000, 1024, 4095, 4096, 4097, 5041)
    for n in (*small, *large):
        rows = permutation(0, 0, n)
        assert rows.dtype == np.int64
        assert sorted(rows) == list(range(n))
        again = permutation(0, 0, n)
        assert np.array_equal(rows, again)

    first = permutation(0, 0, 5041)
    next_epoch = permutation(0, 1, 5041)
    next_seed = permutation(1, 0, 5041)
    # Unrelated orders agree at one position on average.
    same_in_next_epoch = first == next_epoch
    same_with_next_seed = first == next_seed
    assert same_in_next_epoch.sum() < 8
    assert same_with_next_seed.sum() < 8


def test_rows_do_not_depend_on_what_else_is_asked():
    n = 1000
    whole = permutation(3, 1, n)
    rng = np.random.default_rng(0)
    positions = rng.integers(0, n, 37)

    rows = order.rows_at(3, 1, n, positions)
    assert np.array_equal(rows, whole[positions])

    no_positions = positions[:0]
    no_rows = order.rows_at(3, 1, n, no_positions)
    assert no_rows.tolist() == []


@pytest.mark.parametrize("n", [1_281_167, 10**9, 10**9 + 7, 2**40 - 1])
def test_large_orders_are_one_to_one_and_random(n):
    """Sampled: runs at both ends and in the middle, and scattered positions."""
    run_length = 20000
    at_start = np.arange(run_length)
    in_middle = n // 2 + at_start
    at_end = n - run_length + at_start
    rng = np.random.default_rng(1)
    scattered = rng.integers(0, n, 100_000)
    asked = np.concatenate([at_start, in_middle, at_end, scattered])
    positions = np.unique(asked)

    rows = order.rows_at(7, 3, n, positions)

    assert rows.min() >= 0
    assert rows.max() < n
    different_rows = np.unique(rows)
    assert len(different_rows) == len(positions)

    # One standard deviation is 0.0025.
    assert correlation(positions, rows) < 0.015

    # Of the neighbours in the order, 0.002 are expected to be neighbours in the data set.
    distances = np.abs(np.diff(rows[:run_length]))
    is_near = distances < n // 1000
    assert is_near.mean() < 0.004

    num_cells = 64
    cells = rows * num_cells // n
    counts = np.bincount(cells, minlength=num_cells)
    assert deviation_from_uniform(counts) < MAX_DEVIATION


def test_order_never_changes():
    """A resumed run must see the same order, with any version of numpy and of this package."""
    of_ten = permutation(7, 2, 10)
    assert of_ten.tolist() == [6, 4, 5, 9, 0, 2, 8, 7, 3, 1]

    positions = np.array([0, 1, 640_000, 1_281_166])
    of_imagenet = order.rows_at(7, 2, 1_281_167, positions)
    assert of_imagenet.tolist() == [43162, 1104102, 532010, 1225447]

    positions = np.array([0, 1, 999_999_999])
    of_many = order.rows_at(0, 89, 10**9, positions)
    assert of_many.tolist() == [322786475, 770257251, 580768410]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "epochs"),
    [
        (2, 2000),
        (3, 3000),
        (4, 4000),
        (5, 6000),
    ],
)
def test_every_permutation_is_as_likely(n, epochs):
    all_permutations = itertools.permutations(range(n))
    count_of = dict.fromkeys(all_permutations, 0)
    for epoch in range(epochs):
        rows = permutation(5, epoch, n).tolist()
        count_of[tuple(rows)] += 1
    counts = np.array(list(count_of.values()))
    assert deviation_from_uniform(counts) < MAX_DEVIATION


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 9, 12, 16, 25])
def test_positions_pairs_parity_and_fixed_points_are_those_of_random_permutations(n):
    """n of every kind: a power of two, odd squares, and one that needs cycle walking."""
    epochs = 4000
    permutations = [permutation(11, epoch, n) for epoch in range(epochs)]
    rows = np.stack(permutations)

    # Each row is at each position equally often.
    counts = []
    for position in range(n):
        rows_at_position = rows[:, position]
        counts.append(np.bincount(rows_at_position, minlength=n))
    assert deviation_from_uniform(np.array(counts)) < MAX_DEVIATION

    # So is each pair of two different rows at each pair of positions.
    can_occur = ~np.eye(n, dtype=bool)
    pairs_of_positions = (
        (0, 1),
        (1, 2),
        (0, n // 2),
        (0, n - 1),
    )
    for first, second in pairs_of_positions:
        pairs = rows[:, first] * n + rows[:, second]
        pair_counts = np.bincount(pairs, minlength=n * n)
        pair_counts = pair_counts.reshape(n, n)
        assert deviation_from_uniform(pair_counts[can_occur]) < MAX_DEVIATION

    # One fixed point is expected, with variance 1.
    max_error = MAX_DEVIATION / math.sqrt(epochs)
    is_fixed = rows == np.arange(n)
    num_fixed_points = is_fixed.sum() / epochs
    assert abs(num_fixed_points - 1) < max_error

    # Half of the permutations are odd, with standard deviation 1/2.
    is_inverted = rows[:, :, None] > rows[:, None, :]
    inversions = np.triu(is_inverted).sum(axis=(1, 2))
    is_odd = inversions % 2 == 1
    assert abs(is_odd.mean() - 0.5) < 0.5 * max_error


def test_epochs_are_unrelated():
    """The same position, or the same row, tells nothing of the next epoch's."""
    n = 4096
    limit = MAX_DEVIATION / math.sqrt(n)
    orders = [permutation(1, epoch, n) for epoch in range(20)]
    for one, other in itertools.pairwise(orders):
        assert correlation(one, other) < limit
        position_in_one = np.argsort(one)
        positions_in_other = np.arange(n - 1)
        rows_in_other = other[:-1]
        assert correlation(position_in_one[rows_in_other], positions_in_other) < limit


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(world_size):
    n = 103
    batch = 24
    steps_per_epoch = 4
    tails = []
    for epoch in range(3):
        rows = []
        for step_in_epoch in range(steps_per_epoch):
            step = epoch * steps_per_epoch + step_in_epoch
            rows_of_all_ranks = rows_of_step(step, n, batch, world_size)
            rows += rows_of_all_ranks.tolist()
        assert len(rows) == 96
        assert len(set(rows)) == 96
        tail = set(range(n)) - set(rows)
        tails.append(frozenset(tail))
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
        rows, repetitions = samples_of_step(
            step,
            n,
            batch,
            world_size=4,
            repeats=repeats,
        )

        different_rows = rows[:num_different]
        assert np.array_equal(rows, np.tile(different_rows, repeats))
        expected_repetitions = np.repeat(np.arange(repeats), num_different)
        assert np.array_equal(repetitions, expected_repetitions)
        for rows_of_rank in np.split(rows, 4):
            assert len(set(rows_of_rank)) == len(rows_of_rank)

        on_other_layout = samples_of_step(
            step,
            n,
            batch,
            world_size=2,
            grad_accum_steps=3,
            repeats=repeats,
        )
        assert np.array_equal(on_other_layout, (rows, repetitions))
        shown += different_rows.tolist()

    whole_epoch = permutation(SEED, 0, n).tolist()
    assert shown == whole_epoch[: len(shown)]


def test_repeats_must_divide_the_batch():
    message = "augment.repeats is 3.*train.global_batch_size, which is 256.*255"
    with pytest.raises(ValueError, match=message):
        order.steps_per_epoch(1000, 256, 3)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="100 images.*train.global_batch_size = 256.*100 or less"):
        order.steps_per_epoch(100, 256)
    assert order.steps_per_epoch(256, 256) == 1
