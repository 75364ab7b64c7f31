"""The order of the samples: complete, the same on every layout, stable for ever."""

import numpy as np
import pytest

from resnet_dist.data import order


def rows_of_step(step, n, global_batch_size, world_size, grad_accum_steps=1, seed=3):
    """Rows by (micro-step, rank) of one step, concatenated in that order."""
    epoch, inside = order.locate(step, order.steps_per_epoch(n, global_batch_size))
    epoch_order = order.permutation(seed, epoch, n)
    return np.concatenate([
        epoch_order[order.micro_step_positions(inside, micro, global_batch_size=global_batch_size, rank=rank,
                                               grad_accum_steps=grad_accum_steps, world_size=world_size)]
        for micro in range(grad_accum_steps) for rank in range(world_size)
    ])


def test_permutation_is_complete_and_differs_by_epoch_and_seed():
    first = order.permutation(0, 0, 1000)
    assert first.dtype == np.int64
    assert sorted(first) == list(range(1000))
    assert not np.array_equal(first, order.permutation(0, 1, 1000))
    assert not np.array_equal(first, order.permutation(1, 0, 1000))
    assert np.array_equal(first, order.permutation(0, 0, 1000))


def test_permutation_never_changes():
    """A resumed run must see the same order with any version of numpy; these numbers are from numpy 2."""
    assert order.permutation(7, 2, 10).tolist() == [8, 3, 0, 7, 9, 5, 4, 2, 6, 1]


def test_permutation_is_uniform():
    """Every sample is as likely at every position: chi-square of 8 x 8 cells over 4000 epochs."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), order.permutation(5, epoch, 8)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 85                            # 49 degrees of freedom, p = 0.001


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_once_per_epoch_except_the_tail(world_size):
    n, batch = 103, 24
    tails = []
    for epoch in range(3):
        rows = np.concatenate([rows_of_step(step, n, batch, world_size) for step in range(4 * epoch, 4 * epoch + 4)])
        assert len(rows) == len(set(rows)) == 96
        tails.append(frozenset(range(n)) - frozenset(rows))
    assert len(set(tails)) == 3


def test_a_step_has_the_same_rows_on_every_layout():
    expected = rows_of_step(9, 200, 24, 1)
    for world_size, accumulated in [(2, 1), (3, 1), (4, 1), (1, 4), (2, 3), (4, 2), (3, 4)]:
        assert np.array_equal(rows_of_step(9, 200, 24, world_size, accumulated), expected)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="100 images.*train.global_batch_size = 256.*100 or less"):
        order.steps_per_epoch(100, 256)
    assert order.steps_per_epoch(256, 256) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 10, 40, 41, 79])
def test_evaluation_covers_every_row_once_in_equal_rounds(world_size, n):
    shares = [order.val_batches(n, 10, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {order.val_rounds(n, 10, world_size)}
    batches = [batch for share in shares for batch in share if batch is not None]
    assert sorted(row for batch in batches for row in batch) == list(range(n))
    assert {(batch.start, batch.stop) for batch in batches} == {(s, min(s + 10, n)) for s in range(0, n, 10)}
