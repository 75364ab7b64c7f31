"""The order of the samples: complete, as random as a permutation, the same on every layout, stable
for ever.
"""

import itertools
import math

import numpy as np
import pytest

from resnet_dist.data.sampling import order


def permutation(seed, epoch, n):
    return order.rows_at(seed, epoch, n, np.arange(n))


def samples_of_step(step, n, global_batch_size, world_size, grad_accum_steps=1, seed=3, repeats=1):
    """Rows and repetitions by (micro-step, rank) of one step, concatenated in that order."""
    epoch, inside = order.locate(step, order.steps_per_epoch(n, global_batch_size, repeats))
    layouts = [
        order.BatchLayout(global_batch_size, grad_accum_steps, rank, world_size)
        for rank in range(world_size)
    ]
    shares = [
        order.samples_at(
            seed,
            epoch,
            n,
            inside,
            layout.positions(micro),
            global_batch_size,
            repeats,
        )
        for micro in range(grad_accum_steps)
        for layout in layouts
    ]
    return tuple(np.concatenate(part) for part in zip(*shares, strict=True))


def rows_of_step(*args, **options):
    return samples_of_step(*args, **options)[0]


def test_order_is_complete_and_differs_by_epoch_and_seed():
    for n in [*range(1, 70), 1000, 1024, 4095, 4096, 4097, 5041]:
        rows = permutation(0, 0, n)
        assert rows.dtype == np.int64
        assert sorted(rows) == list(range(n))
        assert np.array_equal(rows, permutation(0, 0, n))
    first = permutation(0, 0, 5041)
    for other in (permutation(0, 1, 5041), permutation(1, 0, 5041)):
        assert (first == other).sum() < 8  # 1 is expected, as of unrelated ones


def test_rows_do_not_depend_on_what_else_is_asked():
    whole, some = permutation(3, 1, 1000), np.random.default_rng(0).integers(0, 1000, 37)
    assert np.array_equal(order.rows_at(3, 1, 1000, some), whole[some])
    assert order.rows_at(3, 1, 1000, some[:0]).tolist() == []


@pytest.mark.parametrize("n", [1_281_167, 10**9, 10**9 + 7, 2**40 - 1])
def test_large_orders_are_one_to_one(n):
    """Sampled: runs at both ends and in the middle, and scattered positions."""
    places = np.unique(
        np.concatenate(
            [start + np.arange(20000) for start in (0, n // 2, n - 20000)]
            + [np.random.default_rng(1).integers(0, n, 100_000)]
        )
    )
    rows = order.rows_at(7, 3, n, places)
    assert rows.min() >= 0 and rows.max() < n
    assert len(np.unique(rows)) == len(places)
    assert abs(np.corrcoef(places, rows)[0, 1]) < 0.015  # 0.0025 is one standard deviation
    steps = np.diff(rows[:20000])
    assert (np.abs(steps) < n // 1000).mean() < 0.004  # neighbours: 0.002 are expected
    assert deviation(np.bincount(rows * 64 // n, minlength=64)) < 4


def test_order_never_changes():
    """A resumed run must see the same order, with any version of numpy and of this package."""
    assert permutation(7, 2, 10).tolist() == [6, 4, 5, 9, 0, 2, 8, 7, 3, 1]
    assert order.rows_at(7, 2, 1_281_167, np.array([0, 1, 640_000, 1_281_166])).tolist() == [
        43162,
        1104102,
        532010,
        1225447,
    ]
    assert order.rows_at(0, 89, 10**9, np.array([0, 1, 999_999_999])).tolist() == [
        322786475,
        770257251,
        580768410,
    ]


def deviation(counts):
    """How far chi-square is from what equally likely cells give, in its standard deviations."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(("n", "epochs"), [(2, 2000), (3, 3000), (4, 6000), (5, 12000)])
def test_every_permutation_is_as_likely(n, epochs):
    found = np.array([permutation(5, epoch, n) for epoch in range(epochs)]) @ n ** np.arange(n)
    cells = [np.array(one) @ n ** np.arange(n) for one in itertools.permutations(range(n))]
    assert deviation(np.array([(found == cell).sum() for cell in cells])) < 4


@pytest.mark.parametrize("n", [8, 9, 12, 16, 25])
def test_positions_pairs_parity_and_fixed_points_are_those_of_random_permutations(n):
    """n of every kind: a power of two, odd squares, and one that needs cycle walking."""
    epochs = 6000
    rows = np.array([permutation(11, epoch, n) for epoch in range(epochs)])
    assert deviation(np.array([np.bincount(column, minlength=n) for column in rows.T])) < 4
    for first, second in ((0, 1), (1, 2), (0, n // 2), (0, n - 1)):
        pairs = np.bincount(rows[:, first] * n + rows[:, second], minlength=n * n).reshape(n, n)
        assert deviation(pairs[~np.eye(n, dtype=bool)]) < 4
    assert abs((rows == np.arange(n)).sum() / epochs - 1) < 4 / math.sqrt(epochs)
    inversions = np.triu(rows[:, :, None] > rows[:, None, :]).sum((1, 2))
    assert abs((inversions % 2).mean() - 0.5) < 2 / math.sqrt(epochs)


def test_epochs_are_unrelated():
    """The same position, or the same row, tells nothing of the next epoch's."""
    n = 4096
    orders = [permutation(1, epoch, n) for epoch in range(20)]
    for one, other in itertools.pairwise(orders):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(n)
        assert abs(
            np.corrcoef(np.argsort(one)[other[:-1]], np.arange(n - 1))[0, 1]
        ) < 4 / math.sqrt(n)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(world_size):
    n, batch = 103, 24
    tails = []
    for epoch in range(3):
        rows = np.concatenate(
            [rows_of_step(step, n, batch, world_size) for step in range(4 * epoch, 4 * epoch + 4)]
        )
        assert len(rows) == len(set(rows)) == 96
        tails.append(frozenset(range(n)) - frozenset(rows))
    assert len(set(tails)) == 3


def test_a_step_has_the_same_rows_on_every_layout():
    expected = rows_of_step(9, 200, 24, 1)
    for world_size, accumulated in [(2, 1), (3, 1), (4, 1), (1, 4), (2, 3), (4, 2), (3, 4)]:
        assert np.array_equal(rows_of_step(9, 200, 24, world_size, accumulated), expected)


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_repeated_samples(repeats):
    """Each image of a batch `repeats` times, on other ranks and never side by side; none comes back
    in the epoch.
    """
    n, batch = 120, 24
    shown = []
    for step in range(5):
        rows, repetitions = samples_of_step(step, n, batch, 4, repeats=repeats)
        distinct = batch // repeats
        assert np.array_equal(rows, np.tile(rows[:distinct], repeats))
        assert np.array_equal(repetitions, np.repeat(np.arange(repeats), distinct))
        for rank in np.split(rows, 4):
            assert len(set(rank)) == len(rank)
        assert np.array_equal(
            samples_of_step(step, n, batch, 2, 3, repeats=repeats), (rows, repetitions)
        )
        shown += rows[:distinct].tolist()
    assert shown == permutation(3, 0, n)[: len(shown)].tolist()
    assert order.steps_per_epoch(n, batch, repeats) == 5


def test_repeats_must_divide_the_batch():
    with pytest.raises(
        ValueError, match="augment.repeats is 3.*train.global_batch_size, which is 256.*255"
    ):
        order.steps_per_epoch(1000, 256, 3)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="100 images.*train.global_batch_size = 256.*100 or less"):
        order.steps_per_epoch(100, 256)
    assert order.steps_per_epoch(256, 256) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 10, 40, 41, 79])
def test_evaluation_covers_every_row_once_in_equal_rounds(world_size, n):
    shares = [order.val_batches(n, 10, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {math.ceil(n / (10 * world_size))}
    batches = [batch for share in shares for batch in share if batch is not None]
    assert sorted(row for batch in batches for row in batch) == list(range(n))
    assert {(batch.start, batch.stop) for batch in batches} == {
        (s, min(s + 10, n)) for s in range(0, n, 10)
    }
