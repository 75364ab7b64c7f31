"""How many ranks train, and in how many micro-steps, when a launcher changes their number."""

import pytest

from resnet_dist.config import TrainConfig
from resnet_dist.layout import Layout, describe_layout, fit_layout


def fit(world_size, may_spare=True, pairs=False, **settings):
    return fit_layout(TrainConfig(**settings), world_size, may_spare, pairs)


def test_64_images_on_4_and_on_3_ranks():
    assert fit(4, global_batch_size=64) == Layout(4, 1)
    assert fit(3, global_batch_size=64) == Layout(2, 1)


BATCH_OF_64 = {
    "global_batch_size": 64,
    "max_local_batch": 16,
}
BATCH_OF_64_ONE_BY_ONE = {
    "global_batch_size": 64,
    "max_local_batch": 1,
}
BATCH_OF_96 = {
    "global_batch_size": 96,
    "max_local_batch": 15,
}
BATCH_OF_60 = {
    "global_batch_size": 60,
    "grad_accum_steps": 3,
}
BATCH_OF_5 = {
    "global_batch_size": 5,
}


@pytest.mark.parametrize(
    ("world_size", "expected", "settings"),
    [
        (4, Layout(4, 1), BATCH_OF_64),
        (2, Layout(2, 2), BATCH_OF_64),
        (1, Layout(1, 4), BATCH_OF_64),
        (3, Layout(2, 2), BATCH_OF_64),
        (1, Layout(1, 64), BATCH_OF_64_ONE_BY_ONE),
        (2, Layout(2, 4), BATCH_OF_96),
        (3, Layout(2, 3), BATCH_OF_60),
        (7, Layout(5, 1), BATCH_OF_5),
    ],
)
def test_the_largest_number_of_ranks_and_the_fewest_micro_steps(world_size, expected, settings):
    assert fit(world_size, **settings) == expected


def test_pairs_need_an_even_batch():
    layout = fit(4, pairs=True, global_batch_size=12)
    assert layout == Layout(3, 1)

    layout = fit(2, pairs=True, global_batch_size=12, max_local_batch=3)
    assert layout == Layout(2, 3)


def test_without_spares_the_config_stays_for_the_check_to_refuse():
    layout = fit(3, may_spare=False, global_batch_size=64)
    assert layout == Layout(3, 1)

    layout = fit(5, global_batch_size=4, grad_accum_steps=8)
    assert layout == Layout(5, 8)


def test_what_is_said():
    train = TrainConfig(**BATCH_OF_64)

    nothing_changed = describe_layout(train, 4, Layout(4, 1))
    assert nothing_changed == []

    spares, steps = describe_layout(train, 3, Layout(2, 2))
    assert "64 does not divide by 3 ranks: 2 of them train, 1 wait as spares" in spares
    assert "from 1 to 2" in steps
    assert "batch norm" in steps
