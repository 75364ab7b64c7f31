"""Policies, jitter, lighting, erasing: torchvision's laws, and functions of the sample and nothing
else.
"""

import math
import random
import typing

import numpy as np
import pytest
import torch
from torchvision.transforms import (
    AutoAugment,
    ColorJitter,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
    autoaugment,
)

from resnet_dist.config import AugmentConfig
from resnet_dist.data import operations
from resnet_dist.data.sampling import augment
from resnet_dist.rng import epoch_of_repetition

ROWS, SIDE = np.arange(30000), 224
POLICIES = {
    "randaugment": RandAugment(3, 9),
    "trivialaugment": TrivialAugmentWide(),
    "autoaugment": AutoAugment(),
}


def recorded(transform, monkeypatch, count):
    """What torchvision draws: for each of `count` images a list of (operation, magnitude)."""
    done = []
    monkeypatch.setattr(
        autoaugment, "_apply_op", lambda image, name, magnitude, **_: done.append((name, magnitude))
    )
    monkeypatch.setattr(autoaugment.F, "get_dimensions", lambda _: [3, SIDE, SIDE])
    torch.manual_seed(0)
    return applied_to_each(transform, done, count)


def applied_to_each(transform, done, count):
    """What a transform adds to the list `done`, for each of `count` images."""
    images = []
    for _ in range(count):
        transform(None)
        images.append(list(done))
        done.clear()
    return images


def whole(pixels):
    """torchvision truncates translations; its table in float32 has 15.999999 where it means 16."""
    return np.trunc(pixels + np.sign(pixels) * 1e-5)


def ours(config, rows=ROWS):
    """The same of our plan: parameters as torchvision's magnitudes, the identity of what is left
    out dropped.
    """
    plan = augment.plan_operations(config, 0, 0, rows, SIDE)
    images = []
    for ops, params in zip(plan.ops.tolist(), plan.params.tolist(), strict=True):
        named = [
            (operations.NAMES[op].replace("_", ""), param - (6 <= op <= 9))
            for op, param in zip(ops, params, strict=True)
        ]
        images.append(
            [
                (name, value)
                for name, value in named
                if name != "identity" or config.policy != "autoaugment"
            ]
        )
    return images


def distance(a, b):
    """Kolmogorov-Smirnov, relative to the threshold at p = 0.0002."""
    a, b = np.sort(a), np.sort(b)
    grid = np.concatenate([a, b])
    gap = np.abs(
        np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)
    ).max()
    return gap / (2.15 * math.sqrt(1 / len(a) + 1 / len(b)))


def same_frequencies(a, b):
    """Two-sample chi-square over categories; threshold at four standard deviations."""
    names = sorted(set(a) | set(b))
    counts = np.array([[list(values).count(name) for name in names] for values in (a, b)], float)
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), max(len(names) - 1, 1)
    return chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_draws_as_torchvisions(policy, monkeypatch):
    """Frequencies of (place, operation), and the magnitudes with their signs, of each operation."""
    count = 4000
    theirs = [
        [(name.lower(), whole(value) if "Translate" in name else value) for name, value in image]
        for image in recorded(POLICIES[policy], monkeypatch, count)
    ]
    mine = ours(AugmentConfig(policy=policy, num_ops=3, magnitude=9))
    assert same_frequencies(
        ["/".join(name for name, _ in image[:2]) for image in mine],
        ["/".join(name for name, _ in image[:2]) for image in theirs],
    )
    assert {len(image) for image in mine} == {len(image) for image in theirs}
    by_name = [{}, {}]
    for found, images in zip(by_name, (mine, theirs), strict=True):
        for name, value in (pair for image in images for pair in image):
            found.setdefault(name, []).append(value)
    assert by_name[0].keys() == by_name[1].keys()
    for name in by_name[0]:
        grid, drawn = np.unique(by_name[0][name]), np.unique(by_name[1][name])
        assert np.abs(grid[:, None] - drawn).min(axis=0).max() < 1e-4, (
            name
        )  # each of theirs is one of ours
        assert len(grid) <= 2 * 31 and len(drawn) <= len(grid)
        if len(grid) == 2:
            assert same_frequencies(
                np.array(by_name[0][name]) > grid.mean(), np.array(by_name[1][name]) > grid.mean()
            )
        assert distance(np.round(by_name[0][name], 4), np.round(by_name[1][name], 4)) < 1, name


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_every_magnitude_is_torchvisions(policy):
    """The whole table of each operation that has one. (AutoAugment's are all drawn above.)"""
    names = [name.replace("_", "") for name in operations.NAMES]
    space = POLICIES[policy]._augmentation_space(*[31, (96, 96)][: 1 + (policy == "randaugment")])
    bins, positive = (np.arange(31)[:, None] + 0.5) / 31, np.full((31, 1), 0.9)
    for name, (magnitudes, signed) in space.items():
        op = names.index(name.lower())
        pick = np.full((31, 1), (op + 0.5) / 14)
        numbers = np.stack([pick, bins, positive], axis=2)
        params = []
        for i in range(31):
            config = AugmentConfig(policy=policy, magnitude=i)
            ops, drawn = augment._draw_policy(config, numbers, 96)
            assert (ops == op).all()
            params.append(drawn[i, 0])
        theirs = whole(magnitudes.double().numpy()) if "Translate" in name else magnitudes.numpy()
        assert np.allclose(np.array(params) - (6 <= op <= 9), theirs, atol=1e-4), name
        assert signed == (1 <= op <= 9)


def test_autoaugments_table_is_torchvisions():
    names = {name.replace("_", ""): name for name in operations.NAMES}
    theirs = [
        [
            [names[name.lower()], float(probability), strength or 0]
            for name, probability, strength in pair
        ]
        for pair in POLICIES["autoaugment"].policies
    ]
    mine = [
        [[name, float(probability), int(strength)] for name, probability, strength in pair]
        for pair in augment._PAIRS.tolist()
    ]
    assert mine == theirs


def test_color_jitter_draws_as_torchvisions():
    jitter = ColorJitter(0.4, 1.5, 0.3, 0.1)
    plan = augment.plan_operations(
        AugmentConfig(color_jitter=(0.4, 1.5, 0.3, 0.1)), 0, 0, ROWS, SIDE
    )
    torch.manual_seed(0)
    theirs = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(4000)
    ]
    names = ["brightness", "contrast", "color", "hue"]
    assert same_frequencies(
        ["/".join(operations.NAMES[op] for op in ops) for ops in plan.ops],
        ["/".join(names[i] for i in order.tolist()) for order, *_ in theirs],
    )
    for i, name in enumerate(names):
        mine = plan.params[plan.ops == operations.NAMES.index(name)]
        assert distance(mine, np.array([factors[i] for _, *factors in theirs])) < 1, name
    some = augment.plan_operations(
        AugmentConfig(color_jitter=(0.4, 0, 0.3, 0)), 0, 0, ROWS[:500], SIDE
    )
    assert {tuple(ops) for ops in some.ops.tolist()} == {(6, 7), (7, 6)}


def test_erasing_draws_as_torchvisions():
    mine = augment.erasing_boxes(AugmentConfig(random_erasing=0.25), 0, 0, ROWS, SIDE)
    erased = mine[mine.any(axis=1)]
    assert abs(len(erased) / len(ROWS) - 0.25) < 0.01
    torch.manual_seed(0)
    blank = torch.zeros(3, SIDE, SIDE)
    theirs = np.array(
        [RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(4000)]
    )
    for statistic in (
        lambda r: r[:, 2] * r[:, 3],
        lambda r: r[:, 2] / r[:, 3],
        lambda r: r[:, 0],
        lambda r: r[:, 1],
    ):
        assert distance(statistic(erased), statistic(theirs)) < 1
    assert (erased[:, :2] + erased[:, 2:] <= SIDE).all() and erased.min() >= 0


def test_lighting_has_the_published_covariance():
    shifts = augment.lighting_shifts(AugmentConfig(lighting_std=0.1), 0, 0, ROWS)
    assert (
        shifts.dtype == np.float32
        and not augment.lighting_shifts(AugmentConfig(), 0, 0, ROWS).any()
    )
    scaled = augment._EIGENVECTORS * augment._EIGENVALUES * 0.1
    assert np.allclose(np.cov(shifts.T), scaled @ scaled.T, rtol=0.05, atol=2e-6)
    along = (
        shifts @ augment._EIGENVECTORS / (0.1 * augment._EIGENVALUES)
    )  # the normal numbers again
    assert distance(along[:, 0], np.random.default_rng(0).normal(size=len(ROWS))) < 1
    assert (
        np.allclose((along**4).mean(axis=0), 3, atol=0.3)
        and abs(np.corrcoef(along.T) - np.eye(3)).max() < 0.03
    )


ALL = AugmentConfig(
    policy="autoaugment", color_jitter=(0.4, 0.4, 0.4, 0.1), lighting_std=0.1, random_erasing=0.5
)


def test_a_sample_does_not_depend_on_its_batch():
    rows, chosen = np.arange(100, 200), np.array([7, 80, 3])
    for config in (
        ALL,
        AugmentConfig(policy="randaugment", num_ops=3),
        AugmentConfig(policy="trivialaugment"),
    ):
        whole, part = (
            augment.plan_operations(config, 3, 5, some, 96) for some in (rows, rows[chosen])
        )
        for name in ("ops", "params", "matrices"):
            assert np.array_equal(getattr(whole, name)[chosen], getattr(part, name))
        assert whole.ops.shape == (100, augment.num_slots(config))
        assert not np.array_equal(augment.plan_operations(config, 3, 6, rows, 96).ops, whole.ops)
        twice = augment.plan_operations(
            config, 3, epoch_of_repetition(5, np.arange(2)), rows[[7, 7]], 96
        )  # two copies of one sample
        assert np.array_equal(twice.params[0], whole.params[7]) and not np.array_equal(
            *twice.params
        )
    for function in (
        lambda rows: augment.lighting_shifts(ALL, 3, 5, rows),
        lambda rows: augment.erasing_boxes(ALL, 3, 5, rows, 96),
    ):
        assert np.array_equal(function(rows)[chosen], function(rows[chosen]))


def test_the_table_of_operations_is_complete():
    """Every policy of the config draws from the table, whose entries are found by their names."""
    for policy in typing.get_args(AugmentConfig.__annotations__["policy"]):
        config = AugmentConfig(policy=policy)
        plan = augment.plan_operations(config, 0, 0, ROWS[:500], 96)
        assert (plan is None) == (policy == "none")
        if plan is not None:
            drawn = {operations.NAMES[op] for op in np.unique(plan.ops)}
            choices = {operations.NAMES[op] for op in operations.drawn_by(policy)}
            assert drawn <= choices | {"identity"}
    assert list(operations.operation_ids(operations.NAMES)) == list(range(len(operations.NAMES)))
    with pytest.raises(KeyError, match="solarise"):
        operations.operation_ids(["solarise"])


def test_nothing_is_planned_where_all_is_off():
    assert (
        augment.plan_operations(AugmentConfig(), 0, 0, ROWS, SIDE) is None
        and augment.num_slots(AugmentConfig()) == 0
    )


GOLDEN = {
    "ops": [[0, 0, 15, 7, 8, 6], [5, 7, 7, 15, 8, 6]],
    "params": [
        [0, 0, 0.040844597, 1.22693014, 1.31724405, 0.98610592],
        [26.6666667, 0.8, 0.82949227, -0.06377167, 0.89500004, 0.73295569],
    ],
    "erasing": [[54, 44, 165, 66], [6, 139, 183, 74], [0, 0, 0, 0]],
    "lighting": [[0.00476526, 0.00452941, 0.00342723]],
}


def test_golden_values():
    """A run that is resumed by a later version must go on with the same numbers."""
    plan = augment.plan_operations(ALL, 0, 1, np.array([5, 2**40]), 224)
    assert plan.ops.tolist() == GOLDEN["ops"]
    assert np.allclose(plan.params, GOLDEN["params"], rtol=1e-6)
    assert augment.erasing_boxes(ALL, 0, 1, np.arange(3), 224).tolist() == GOLDEN["erasing"]
    assert np.allclose(
        augment.lighting_shifts(ALL, 0, 1, np.array([5])), GOLDEN["lighting"], rtol=1e-5
    )


def timm_draws(count, monkeypatch):
    """What timm draws with rand-m7-mstd0.5-inc1: for each image a list of (operation, argument)."""
    from timm.data import auto_augment

    done = []

    def record(name):
        return lambda image, *arguments, **_: done.append((name, *arguments))

    for name in auto_augment.NAME_TO_OP:
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, record(name))
    transform = auto_augment.rand_augment_transform("rand-m7-mstd0.5-inc1", {})
    random.seed(0)
    np.random.seed(0)
    return applied_to_each(transform, done, count)


TIMM_NAMES = {
    "TranslateXRel": "timm_translate_x",
    "TranslateYRel": "timm_translate_y",
    "ShearX": "timm_shear_x",
    "ShearY": "timm_shear_y",
    "Rotate": "timm_rotate",
    "PosterizeIncreasing": "timm_posterize",
    "SolarizeIncreasing": "timm_solarize",
    "SolarizeAdd": "solarize_add",
    "AutoContrast": "autocontrast",
}


def test_the_increasing_policy_draws_as_timms(monkeypatch):
    """Frequencies of the operations, and the distribution of the argument of each."""
    theirs = {}
    for image in timm_draws(6000, monkeypatch):
        for name, *arguments in image:
            ours_name = TIMM_NAMES.get(name, name.removesuffix("Increasing").lower())
            scale = SIDE if "Translate" in name else 1
            theirs.setdefault(ours_name, []).append(scale * (arguments or [0])[0])
    config = AugmentConfig(policy="randaugment_increasing", magnitude=7, magnitude_std=0.5)
    plan = augment.plan_operations(config, 0, 0, ROWS, SIDE)
    names = np.array(operations.NAMES)[plan.ops]
    mine = {name: plan.params[names == name] for name in np.unique(names)}
    skipped = mine.pop("identity")
    assert abs(len(skipped) / names.size - 0.5) < 0.01
    assert mine.keys() == theirs.keys()
    assert same_frequencies(
        [name for name in mine for _ in mine[name]], [name for name in theirs for _ in theirs[name]]
    )
    for name, values in mine.items():
        assert distance(values, np.array(theirs[name])) < 1, name
    fixed = AugmentConfig(policy="randaugment_increasing", magnitude=10)
    plan = augment.plan_operations(fixed, 0, 0, ROWS[:4000], SIDE)
    names = np.array(operations.NAMES)[plan.ops]
    assert set(plan.params[names == "timm_posterize"].tolist()) == {0}
    assert np.allclose(np.unique(plan.params[names == "color"]), [0.1, 1.9])
