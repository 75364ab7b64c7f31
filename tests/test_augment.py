"""Policies, jitter, lighting, erasing: torchvision's distributions, and functions of the sample and
nothing else.
"""

import random
import typing

import numpy as np
import pytest
import torch
from statistics_utils import same_distribution, same_frequencies
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

ROWS = np.arange(30000)
SIDE = 224
# Probability that a Kolmogorov-Smirnov test of equal distributions fails.
P_VALUE = 0.0002
POLICIES = {
    "randaugment": RandAugment(3, 9),
    "trivialaugment": TrivialAugmentWide(),
    "autoaugment": AutoAugment(),
}
ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# Our names of torchvision's operations, which has "ShearX" for "shear_x".
OUR_NAMES = {name.replace("_", ""): name for name in operations.NAMES}


def drawn_by_each(transform, done, count):
    """What a transform adds to the list `done`, for each of `count` images."""
    images = []
    for _ in range(count):
        transform(None)
        images.append(list(done))
        done.clear()
    return images


def drawn_by_torchvision(transform, monkeypatch, count):
    """For each of `count` images a list of (our name of the operation, magnitude)."""
    done = []

    def record(image, name, magnitude, **_):
        if name.startswith("Translate"):
            magnitude = whole_pixels(magnitude)
        done.append((OUR_NAMES[name.lower()], magnitude))

    monkeypatch.setattr(autoaugment, "_apply_op", record)
    monkeypatch.setattr(autoaugment.F, "get_dimensions", lambda _: [3, SIDE, SIDE])
    torch.manual_seed(0)
    return drawn_by_each(transform, done, count)


def whole_pixels(pixels):
    """torchvision truncates translations; its table in float32 has 15.999999 where it means 16."""
    return np.trunc(pixels + np.sign(pixels) * 1e-5)


def torchvisions_magnitude(name, param):
    """torchvision has the change of a factor, where we have the factor."""
    if name in ENHANCEMENTS:
        return param - 1
    return param


def drawn_by_us(config):
    """For each of ROWS a list of (name of the operation, torchvision's magnitude).

    AutoAugment of torchvision skips an operation where ours is the identity, which is left out.
    """
    plan = augment.plan_operations(config, 0, 0, ROWS, SIDE)
    images = []
    for ops, params in zip(plan.ops.tolist(), plan.params.tolist(), strict=True):
        done = []
        for op, param in zip(ops, params, strict=True):
            name = operations.NAMES[op]
            if name == "identity" and config.policy == "autoaugment":
                continue
            done.append((name, torchvisions_magnitude(name, param)))
        images.append(done)
    return images


def first_two(images):
    """The names of the first two operations of each image."""
    return [tuple(name for name, _ in done[:2]) for done in images]


def magnitudes_by_name(images):
    found = {}
    for done in images:
        for name, magnitude in done:
            found.setdefault(name, []).append(magnitude)
    return {name: np.array(magnitudes) for name, magnitudes in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_draws_as_torchvisions(policy, monkeypatch):
    """Frequencies of (place, operation), and the magnitudes with their signs, of each operation."""
    theirs = drawn_by_torchvision(POLICIES[policy], monkeypatch, 4000)
    ours = drawn_by_us(AugmentConfig(policy=policy, num_ops=3, magnitude=9))

    assert same_frequencies(first_two(ours), first_two(theirs))
    assert {len(done) for done in ours} == {len(done) for done in theirs}
    our_magnitudes = magnitudes_by_name(ours)
    their_magnitudes = magnitudes_by_name(theirs)
    assert our_magnitudes.keys() == their_magnitudes.keys()
    for name in our_magnitudes:
        assert_same_magnitudes(our_magnitudes[name], their_magnitudes[name], name)


def assert_same_magnitudes(ours, theirs, name):
    our_values = np.unique(ours)
    their_values = np.unique(theirs)
    # Each of theirs is one of ours.
    distances = np.abs(our_values[:, None] - their_values)
    assert distances.min(axis=0).max() < 1e-4, name
    assert len(their_values) <= len(our_values) <= 2 * 31, name
    if len(our_values) == 2:
        middle = our_values.mean()
        assert same_frequencies(ours > middle, theirs > middle), name
    assert same_distribution(np.round(ours, 4), np.round(theirs, 4), P_VALUE), name


NUM_BINS = 31


def torchvisions_table(policy, side):
    """For each operation (magnitude of each bin, whether it is signed)."""
    if policy == "randaugment":
        return POLICIES[policy]._augmentation_space(NUM_BINS, (side, side))
    return POLICIES[policy]._augmentation_space(NUM_BINS)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_every_magnitude_is_torchvisions(policy):
    """The whole table of each operation that has one. (AutoAugment's are all drawn above.)"""
    side = 96
    middle_of_bins = (np.arange(NUM_BINS)[:, None] + 0.5) / NUM_BINS
    positive = np.full((NUM_BINS, 1), 0.9)
    for their_name, (magnitudes, signed) in torchvisions_table(policy, side).items():
        name = OUR_NAMES[their_name.lower()]
        op = operations.NAMES.index(name)
        pick = np.full((NUM_BINS, 1), (op + 0.5) / 14)
        numbers = np.stack([pick, middle_of_bins, positive], axis=2)
        ours = []
        for i in range(NUM_BINS):
            config = AugmentConfig(policy=policy, magnitude=i)
            ops, params = augment._draw_policy(config, numbers, side)
            assert (ops == op).all()
            ours.append(torchvisions_magnitude(name, params[i, 0]))
        theirs = magnitudes.double().numpy()
        if name.startswith("translate"):
            theirs = whole_pixels(theirs)
        assert np.allclose(ours, theirs, atol=1e-4), name
        assert signed == (name in GEOMETRIC + ENHANCEMENTS), name


def test_autoaugments_table_is_torchvisions():
    theirs = []
    for pair in POLICIES["autoaugment"].policies:
        for name, probability, strength in pair:
            theirs.append((OUR_NAMES[name.lower()], float(probability), strength or 0))
    ours = []
    for name, probability, strength in augment._PAIRS.reshape(-1, 3).tolist():
        ours.append((name, float(probability), int(strength)))
    assert ours == theirs


@pytest.mark.slow
def test_color_jitter_draws_as_torchvisions():
    ranges = (0.4, 1.5, 0.3, 0.1)
    plan = augment.plan_operations(AugmentConfig(color_jitter=ranges), 0, 0, ROWS, SIDE)
    jitter = ColorJitter(*ranges)
    torch.manual_seed(0)
    names = ("brightness", "contrast", "color", "hue")
    their_orders = []
    their_factors = []
    for _ in range(4000):
        order, *factors = ColorJitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        their_orders.append(tuple(names[i] for i in order.tolist()))
        their_factors.append(factors)

    our_orders = [tuple(operations.NAMES[op] for op in ops) for ops in plan.ops]
    assert same_frequencies(our_orders, their_orders)
    for name, theirs in zip(names, np.array(their_factors).T, strict=True):
        ours = plan.params[plan.ops == operations.NAMES.index(name)]
        assert same_distribution(ours, theirs, P_VALUE), name


def test_color_jitter_leaves_out_what_has_no_range():
    config = AugmentConfig(color_jitter=(0.4, 0, 0.3, 0))
    plan = augment.plan_operations(config, 0, 0, ROWS[:500], SIDE)
    brightness, color = operations.operation_ids(["brightness", "color"]).tolist()
    found = {tuple(ops) for ops in plan.ops.tolist()}
    assert found == {(brightness, color), (color, brightness)}


@pytest.mark.slow
def test_erasing_draws_as_torchvisions():
    boxes = augment.erasing_boxes(AugmentConfig(random_erasing=0.25), 0, 0, ROWS, SIDE)
    erased = boxes[boxes.any(axis=1)]
    assert abs(len(erased) / len(ROWS) - 0.25) < 0.01
    torch.manual_seed(0)
    blank = torch.zeros(3, SIDE, SIDE)
    theirs = []
    for _ in range(4000):
        *box, _ = RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])
        theirs.append(box)

    y, x, heights, widths = erased.T
    their_y, their_x, their_heights, their_widths = np.array(theirs).T
    assert same_distribution(heights * widths, their_heights * their_widths, P_VALUE)
    assert same_distribution(heights / widths, their_heights / their_widths, P_VALUE)
    assert same_distribution(y, their_y, P_VALUE)
    assert same_distribution(x, their_x, P_VALUE)
    assert (y + heights <= SIDE).all()
    assert (x + widths <= SIDE).all()
    assert erased.min() >= 0


def test_lighting_has_the_published_covariance():
    std = 0.1
    shifts = augment.lighting_shifts(AugmentConfig(lighting_std=std), 0, 0, ROWS)
    assert shifts.dtype == np.float32
    assert not augment.lighting_shifts(AugmentConfig(), 0, 0, ROWS).any()

    scaled = augment._EIGENVECTORS * augment._EIGENVALUES * std
    assert np.allclose(np.cov(shifts.T), scaled @ scaled.T, rtol=0.05, atol=2e-6)
    # The normal numbers that were drawn.
    normal = shifts @ augment._EIGENVECTORS / (std * augment._EIGENVALUES)
    expected = np.random.default_rng(0).normal(size=len(ROWS))
    assert same_distribution(normal[:, 0], expected, P_VALUE)
    fourth_moments = (normal**4).mean(axis=0)
    assert np.allclose(fourth_moments, 3, atol=0.3)
    assert np.allclose(np.corrcoef(normal.T), np.eye(3), atol=0.03)


ALL = AugmentConfig(
    policy="autoaugment", color_jitter=(0.4, 0.4, 0.4, 0.1), lighting_std=0.1, random_erasing=0.5
)


def test_a_sample_does_not_depend_on_its_batch():
    rows = np.arange(100, 200)
    chosen = np.array([7, 80, 3])
    configs = (
        ALL,
        AugmentConfig(policy="randaugment", num_ops=3),
        AugmentConfig(policy="trivialaugment"),
    )
    for config in configs:
        all_plans = augment.plan_operations(config, 3, 5, rows, 96)
        few_plans = augment.plan_operations(config, 3, 5, rows[chosen], 96)
        assert np.array_equal(all_plans.ops[chosen], few_plans.ops)
        assert np.array_equal(all_plans.params[chosen], few_plans.params)
        assert np.array_equal(all_plans.matrices[chosen], few_plans.matrices)
        assert all_plans.ops.shape == (100, augment.num_slots(config))

        next_epoch = augment.plan_operations(config, 3, 6, rows, 96)
        assert not np.array_equal(next_epoch.ops, all_plans.ops)

        two_copies = rows[[7, 7]]
        epochs = epoch_of_repetition(5, np.arange(2))
        first, second = augment.plan_operations(config, 3, epochs, two_copies, 96).params
        assert np.array_equal(first, all_plans.params[7])
        assert not np.array_equal(first, second)

    shifts = augment.lighting_shifts(ALL, 3, 5, rows)
    assert np.array_equal(shifts[chosen], augment.lighting_shifts(ALL, 3, 5, rows[chosen]))
    boxes = augment.erasing_boxes(ALL, 3, 5, rows, 96)
    assert np.array_equal(boxes[chosen], augment.erasing_boxes(ALL, 3, 5, rows[chosen], 96))


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
    assert augment.plan_operations(AugmentConfig(), 0, 0, ROWS, SIDE) is None
    assert augment.num_slots(AugmentConfig()) == 0


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
    boxes = augment.erasing_boxes(ALL, 0, 1, np.arange(3), 224)
    assert boxes.tolist() == GOLDEN["erasing"]
    shifts = augment.lighting_shifts(ALL, 0, 1, np.array([5]))
    assert np.allclose(shifts, GOLDEN["lighting"], rtol=1e-5)


def drawn_by_timm(count, monkeypatch):
    """With rand-m7-mstd0.5-inc1: for each image a list of (operation, argument)."""
    from timm.data import auto_augment

    done = []

    def recorder(name):
        def record(image, *arguments, **_):
            argument = 0
            if arguments:
                [argument] = arguments
            done.append((name, argument))

        return record

    for name in auto_augment.NAME_TO_OP:
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, recorder(name))
    transform = auto_augment.rand_augment_transform("rand-m7-mstd0.5-inc1", {})
    random.seed(0)
    np.random.seed(0)
    return drawn_by_each(transform, done, count)


# Our names of timm's operations, for those that are not theirs in lower case.
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


def params_by_name(plan):
    names = np.array(operations.NAMES)[plan.ops]
    return {str(name): plan.params[names == name] for name in np.unique(names)}


@pytest.mark.slow
def test_the_increasing_policy_draws_as_timms(monkeypatch):
    """Frequencies of the operations, and the distribution of the argument of each."""
    config = AugmentConfig(policy="randaugment_increasing", magnitude=7, magnitude_std=0.5)
    plan = augment.plan_operations(config, 0, 0, ROWS, SIDE)
    ours = params_by_name(plan)
    skipped = ours.pop("identity")
    assert abs(len(skipped) / plan.ops.size - 0.5) < 0.01

    theirs = {}
    for done in drawn_by_timm(6000, monkeypatch):
        for their_name, argument in done:
            name = TIMM_NAMES.get(their_name, their_name.removesuffix("Increasing").lower())
            if "translate" in name:
                argument = SIDE * argument
            theirs.setdefault(name, []).append(argument)
    assert ours.keys() == theirs.keys()
    assert same_frequencies(repeated_names(ours), repeated_names(theirs))
    for name, params in ours.items():
        assert same_distribution(params, np.array(theirs[name]), P_VALUE), name


def repeated_names(params):
    """Each name as often as it was drawn."""
    names = []
    for name, values in params.items():
        names += [name] * len(values)
    return names


def test_the_largest_magnitude_of_the_increasing_policy():
    config = AugmentConfig(policy="randaugment_increasing", magnitude=10)
    params = params_by_name(augment.plan_operations(config, 0, 0, ROWS[:4000], SIDE))
    assert np.unique(params["timm_posterize"]).tolist() == [0]
    assert np.allclose(np.unique(params["color"]), [0.1, 1.9])
