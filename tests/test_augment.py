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
TORCHVISIONS_POLICIES = {
    "randaugment": RandAugment(3, 9),
    "trivialaugment": TrivialAugmentWide(),
    "autoaugment": AutoAugment(),
}
ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# Our names by those of torchvision in lower case, which has "ShearX" for "shear_x".
OUR_NAMES = {name.replace("_", ""): name for name in operations.NAMES}


def plan_epoch(config, rows=ROWS, side=SIDE):
    """The operations on these samples in the first epoch of a run with the seed 0."""
    return augment.plan_operations(
        config,
        seed=0,
        epoch=0,
        rows=rows,
        side=side,
    )


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
    rounding_error = np.sign(pixels) * 1e-5
    return np.trunc(pixels + rounding_error)


def torchvisions_magnitude(name, param):
    """torchvision has the change of a factor, where we have the factor."""
    if name in ENHANCEMENTS:
        return param - 1
    return param


def drawn_by_us(config):
    """For each of ROWS a list of (name of the operation, torchvision's magnitude).

    AutoAugment of torchvision skips an operation where ours is the identity, which is left out.
    """
    plan = plan_epoch(config)
    leaves_out_identity = config.policy == "autoaugment"
    images = []
    for ops, params in zip(plan.ops.tolist(), plan.params.tolist(), strict=True):
        done = []
        for op, param in zip(ops, params, strict=True):
            name = operations.NAMES[op]
            if name == "identity" and leaves_out_identity:
                continue
            magnitude = torchvisions_magnitude(name, param)
            done.append((name, magnitude))
        images.append(done)
    return images


def first_two(images):
    """The names of the first two operations of each image."""
    pairs = []
    for done in images:
        names = [name for name, _ in done]
        pairs.append(tuple(names[:2]))
    return pairs


def numbers_of_operations(images):
    """The different numbers of operations on an image."""
    return {len(done) for done in images}


def magnitudes_by_name(images):
    found = {}
    for done in images:
        for name, magnitude in done:
            found.setdefault(name, []).append(magnitude)
    return {name: np.array(magnitudes) for name, magnitudes in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("policy", TORCHVISIONS_POLICIES)
def test_a_policy_draws_as_torchvisions(policy, monkeypatch):
    """Frequencies of (place, operation), and the magnitudes with their signs, of each operation."""
    transform = TORCHVISIONS_POLICIES[policy]
    config = AugmentConfig(policy=policy, num_ops=3, magnitude=9)
    theirs = drawn_by_torchvision(transform, monkeypatch, 4000)
    ours = drawn_by_us(config)

    assert same_frequencies(first_two(ours), first_two(theirs))
    assert numbers_of_operations(ours) == numbers_of_operations(theirs)

    our_magnitudes = magnitudes_by_name(ours)
    their_magnitudes = magnitudes_by_name(theirs)
    assert our_magnitudes.keys() == their_magnitudes.keys()
    for name in our_magnitudes:
        assert_same_magnitudes(our_magnitudes[name], their_magnitudes[name], name)


NUM_BINS = 31


def assert_same_magnitudes(ours, theirs, name):
    our_values = np.unique(ours)
    their_values = np.unique(theirs)
    # Each of theirs is one of ours.
    distances = np.abs(our_values[:, None] - their_values)
    distances_of_theirs = distances.min(axis=0)
    assert distances_of_theirs.max() < 1e-4, name

    assert len(their_values) <= len(our_values), name
    # One of each sign.
    assert len(our_values) <= 2 * NUM_BINS, name

    if len(our_values) == 2:
        middle = our_values.mean()
        assert same_frequencies(ours > middle, theirs > middle), name
    our_rounded = np.round(ours, 4)
    their_rounded = np.round(theirs, 4)
    assert same_distribution(our_rounded, their_rounded, P_VALUE), name


def torchvisions_table(policy, side):
    """For each operation (magnitude of each bin, whether it is signed)."""
    transform = TORCHVISIONS_POLICIES[policy]
    if policy == "randaugment":
        return transform._augmentation_space(NUM_BINS, (side, side))
    return transform._augmentation_space(NUM_BINS)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_every_magnitude_is_torchvisions(policy):
    """The whole table of each operation that has one. (AutoAugment's are all drawn above.)"""
    side = 96
    num_operations = 14
    bins = np.arange(NUM_BINS)[:, None]
    middle_of_bins = (bins + 0.5) / NUM_BINS
    positive = np.full((NUM_BINS, 1), 0.9)
    table = torchvisions_table(policy, side)
    for their_name, (magnitudes, is_signed) in table.items():
        name = OUR_NAMES[their_name.lower()]

        # The random numbers that choose this operation.
        op = operations.NAMES.index(name)
        middle_of_op = (op + 0.5) / num_operations
        choice = np.full((NUM_BINS, 1), middle_of_op)
        numbers = np.stack([choice, middle_of_bins, positive], axis=2)

        ours = []
        for i in range(NUM_BINS):
            config = AugmentConfig(policy=policy, magnitude=i)
            ops, params = augment._draw_policy(config, numbers, side)
            assert (ops == op).all()
            magnitude = torchvisions_magnitude(name, params[i, 0])
            ours.append(magnitude)

        theirs = magnitudes.double().numpy()
        if name.startswith("translate"):
            theirs = whole_pixels(theirs)
        assert np.allclose(ours, theirs, atol=1e-4), name
        expected_signed = name in GEOMETRIC or name in ENHANCEMENTS
        assert is_signed == expected_signed, name


def test_autoaugments_table_is_torchvisions():
    theirs = []
    for pair in TORCHVISIONS_POLICIES["autoaugment"].policies:
        for their_name, probability, strength in pair:
            name = OUR_NAMES[their_name.lower()]
            if strength is None:
                strength = 0
            theirs.append((name, float(probability), strength))

    ours = []
    entries = augment._PAIRS.reshape(-1, 3).tolist()
    for name, probability, strength in entries:
        ours.append((name, float(probability), int(strength)))
    assert ours == theirs


@pytest.mark.slow
def test_color_jitter_draws_as_torchvisions():
    ranges = (0.4, 1.5, 0.3, 0.1)
    names = ("brightness", "contrast", "color", "hue")
    ids = operations.operation_ids(names)

    plan = plan_epoch(AugmentConfig(color_jitter=ranges))

    jitter = ColorJitter(*ranges)
    torch.manual_seed(0)
    their_orders = []
    their_factors = []
    for _ in range(4000):
        order, *factors = ColorJitter.get_params(
            jitter.brightness,
            jitter.contrast,
            jitter.saturation,
            jitter.hue,
        )
        order_as_ids = ids[order.numpy()]
        their_orders.append(tuple(order_as_ids.tolist()))
        their_factors.append(factors)

    our_orders = [tuple(ops) for ops in plan.ops.tolist()]
    assert same_frequencies(our_orders, their_orders)

    their_factors = np.array(their_factors)
    for i, name in enumerate(names):
        is_this_operation = plan.ops == ids[i]
        ours = plan.params[is_this_operation]
        assert same_distribution(ours, their_factors[:, i], P_VALUE), name


def test_color_jitter_leaves_out_what_has_no_range():
    config = AugmentConfig(color_jitter=(0.4, 0, 0.3, 0))
    plan = plan_epoch(config, ROWS[:500])

    found = {tuple(ops) for ops in plan.ops.tolist()}
    ids = operations.operation_ids(["brightness", "color"])
    brightness, color = ids.tolist()
    both_orders = {
        (brightness, color),
        (color, brightness),
    }
    assert found == both_orders


@pytest.mark.slow
def test_erasing_draws_as_torchvisions():
    probability = 0.25
    config = AugmentConfig(random_erasing=probability)
    boxes = augment.erasing_boxes(config, 0, 0, ROWS, SIDE)
    is_erased = boxes.any(axis=1)
    erased = boxes[is_erased]
    assert abs(is_erased.mean() - probability) < 0.01

    torch.manual_seed(0)
    image = torch.zeros(3, SIDE, SIDE)
    theirs = []
    for _ in range(4000):
        *box, _ = RandomErasing.get_params(
            image,
            scale=(0.02, 0.33),
            ratio=(0.3, 3.3),
            value=[0.0],
        )
        theirs.append(box)

    y, x, heights, widths = erased.T
    their_y, their_x, their_heights, their_widths = np.array(theirs).T
    areas = heights * widths
    their_areas = their_heights * their_widths
    assert same_distribution(areas, their_areas, P_VALUE)
    ratios = heights / widths
    their_ratios = their_heights / their_widths
    assert same_distribution(ratios, their_ratios, P_VALUE)
    assert same_distribution(y, their_y, P_VALUE)
    assert same_distribution(x, their_x, P_VALUE)
    assert (y + heights <= SIDE).all()
    assert (x + widths <= SIDE).all()
    assert erased.min() >= 0


def test_lighting_has_the_published_covariance():
    std = 0.1
    eigenvectors = augment._EIGENVECTORS
    stds = augment._EIGENVALUES * std

    no_shifts = augment.lighting_shifts(AugmentConfig(), 0, 0, ROWS)
    assert not no_shifts.any()
    shifts = augment.lighting_shifts(AugmentConfig(lighting_std=std), 0, 0, ROWS)
    assert shifts.dtype == np.float32

    scaled = eigenvectors * stds
    expected_covariance = scaled @ scaled.T
    covariance = np.cov(shifts.T)
    assert np.allclose(covariance, expected_covariance, rtol=0.05, atol=2e-6)

    # The normal numbers that were drawn.
    normal = shifts @ eigenvectors / stds
    rng = np.random.default_rng(0)
    expected = rng.normal(size=len(ROWS))
    assert same_distribution(normal[:, 0], expected, P_VALUE)
    fourth_moments = (normal**4).mean(axis=0)
    assert np.allclose(fourth_moments, 3, atol=0.3)
    correlations = np.corrcoef(normal.T)
    assert np.allclose(correlations, np.eye(3), atol=0.03)


ALL = AugmentConfig(
    policy="autoaugment",
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    lighting_std=0.1,
    random_erasing=0.5,
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
        whole = augment.plan_operations(config, 3, 5, rows, 96)
        assert whole.ops.shape == (100, augment.num_slots(config))

        alone = augment.plan_operations(config, 3, 5, rows[chosen], 96)
        assert np.array_equal(whole.ops[chosen], alone.ops)
        assert np.array_equal(whole.params[chosen], alone.params)
        assert np.array_equal(whole.matrices[chosen], alone.matrices)

        next_epoch = augment.plan_operations(config, 3, 6, rows, 96)
        assert not np.array_equal(next_epoch.ops, whole.ops)

        two_copies = rows[[7, 7]]
        epochs = epoch_of_repetition(5, np.arange(2))
        repeated = augment.plan_operations(config, 3, epochs, two_copies, 96)
        first, second = repeated.params
        assert np.array_equal(first, whole.params[7])
        assert not np.array_equal(first, second)

    shifts = augment.lighting_shifts(ALL, 3, 5, rows)
    shifts_alone = augment.lighting_shifts(ALL, 3, 5, rows[chosen])
    assert np.array_equal(shifts[chosen], shifts_alone)

    boxes = augment.erasing_boxes(ALL, 3, 5, rows, 96)
    boxes_alone = augment.erasing_boxes(ALL, 3, 5, rows[chosen], 96)
    assert np.array_equal(boxes[chosen], boxes_alone)


def test_the_table_of_operations_is_complete():
    """Every policy of the config draws from the table, whose entries are found by their names."""
    policies = typing.get_args(AugmentConfig.__annotations__["policy"])
    [identity] = operations.operation_ids(["identity"])
    for policy in policies:
        config = AugmentConfig(policy=policy)
        plan = plan_epoch(config, ROWS[:500], side=96)
        if policy == "none":
            assert plan is None
            continue
        drawn = set(np.unique(plan.ops).tolist())
        choices = set(operations.drawn_by(policy))
        assert drawn <= choices | {identity}

    ids = operations.operation_ids(operations.NAMES)
    assert list(ids) == list(range(len(operations.NAMES)))
    with pytest.raises(KeyError, match="solarise"):
        operations.operation_ids(["solarise"])


def test_nothing_is_planned_where_all_is_off():
    config = AugmentConfig()
    assert plan_epoch(config) is None
    assert augment.num_slots(config) == 0


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
    rows = np.array([5, 2**40])
    plan = augment.plan_operations(ALL, 0, 1, rows, 224)
    assert plan.ops.tolist() == GOLDEN["ops"]
    assert np.allclose(plan.params, GOLDEN["params"], rtol=1e-6)

    rows = np.arange(3)
    boxes = augment.erasing_boxes(ALL, 0, 1, rows, 224)
    assert boxes.tolist() == GOLDEN["erasing"]

    rows = np.array([5])
    shifts = augment.lighting_shifts(ALL, 0, 1, rows)
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


def our_name_of_timms(their_name):
    default = their_name.removesuffix("Increasing").lower()
    return TIMM_NAMES.get(their_name, default)


def params_by_name(plan):
    """The drawn parameters of each operation that was drawn."""
    params = {}
    for op in np.unique(plan.ops):
        name = operations.NAMES[op]
        is_this_operation = plan.ops == op
        params[name] = plan.params[is_this_operation]
    return params


@pytest.mark.slow
def test_the_increasing_policy_draws_as_timms(monkeypatch):
    """Frequencies of the operations, and the distribution of the argument of each."""
    config = AugmentConfig(
        policy="randaugment_increasing",
        magnitude=7,
        magnitude_std=0.5,
    )
    plan = plan_epoch(config)
    ours = params_by_name(plan)
    skipped = ours.pop("identity")
    skipped_share = len(skipped) / plan.ops.size
    assert abs(skipped_share - 0.5) < 0.01

    theirs = {}
    for done in drawn_by_timm(6000, monkeypatch):
        for their_name, argument in done:
            name = our_name_of_timms(their_name)
            if "translate" in name:
                argument = SIDE * argument
            theirs.setdefault(name, []).append(argument)

    assert ours.keys() == theirs.keys()
    assert same_frequencies(repeated_names(ours), repeated_names(theirs))
    for name, our_params in ours.items():
        their_params = np.array(theirs[name])
        assert same_distribution(our_params, their_params, P_VALUE), name


def repeated_names(params):
    """Each name as often as it was drawn."""
    names = []
    for name, values in params.items():
        names += [name] * len(values)
    return names


def test_the_largest_magnitude_of_the_increasing_policy():
    config = AugmentConfig(policy="randaugment_increasing", magnitude=10)
    plan = plan_epoch(config, ROWS[:4000])
    params = params_by_name(plan)
    bits_kept = np.unique(params["timm_posterize"])
    color_factors = np.unique(params["color"])
    assert bits_kept.tolist() == [0]
    assert np.allclose(color_factors, [0.1, 1.9])
