"""How many ranks train, and in how many micro-steps, when a launcher changes their number."""

import pytest

from resnet_dist.config import TrainConfig
from resnet_dist.layout import Layout, describe_layout, fit_layout


def fit(world_size, may_spare=True, pairs=False, **settings):
    return fit_layout(TrainConfig(**settings), world_size, may_spare, pairs)


def test_64_images_on_4_3_4_ranks():
    assert [fit(n, global_batch_size=64) for n in (4, 3, 4)] == [
        Layout(4, 1),
        Layout(2, 1),
        Layout(4, 1),
    ]


@pytest.mark.parametrize(
    "world_size, expected, settings",
    [
        (4, Layout(4, 1), {"global_batch_size": 64, "max_local_batch": 16}),
        (2, Layout(2, 2), {"global_batch_size": 64, "max_local_batch": 16}),
        (1, Layout(1, 4), {"global_batch_size": 64, "max_local_batch": 16}),
        (3, Layout(2, 2), {"global_batch_size": 64, "max_local_batch": 16}),
        (1, Layout(1, 64), {"global_batch_size": 64, "max_local_batch": 1}),
        (2, Layout(2, 4), {"global_batch_size": 96, "max_local_batch": 15}),
        (3, Layout(2, 3), {"global_batch_size": 60, "grad_accum_steps": 3}),
        (7, Layout(5, 1), {"global_batch_size": 5}),
    ],
)
def test_the_largest_number_of_ranks_and_the_fewest_micro_steps(world_size, expected, settings):
    assert fit(world_size, **settings) == expected


def test_pairs_need_an_even_batch():
    assert fit(4, pairs=True, global_batch_size=12) == Layout(3, 1)
    assert fit(2, pairs=True, global_batch_size=12, max_local_batch=3) == Layout(2, 3)


def test_without_spares_the_config_stays_for_the_check_to_refuse():
    assert fit(3, may_spare=False, global_batch_size=64) == Layout(3, 1)
    assert fit(5, global_batch_size=4, grad_accum_steps=8) == Layout(5, 8)


def test_what_is_said():
    train = TrainConfig(global_batch_size=64, max_local_batch=16)
    assert describe_layout(train, 4, Layout(4, 1)) == []
    spares, steps = describe_layout(train, 3, Layout(2, 2))
    assert "64 does not divide by 3 ranks: 2 of them train, 1 wait as spares" in spares
    assert "from 1 to 2" in steps
    assert "batch norm" in steps
