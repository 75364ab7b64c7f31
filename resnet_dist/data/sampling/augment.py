"""Random draws of the augmentation: operations, colour jitter, PCA lighting and random erasing.

Like crops, all draws are pure functions of (seed, epoch, row), computed for a whole batch at once.
The epoch may also be an array with one number per sample. Repeated augmentation uses this to draw
differently for each repetition of an image (see rng.py). The distributions are torchvision's, and
those of `randaugment_increasing` are timm's.
`operations.py` describes what an operation does to the pixels.
"""

import numpy as np

from resnet_dist.config import AugmentConfig
from resnet_dist.data import operations
from resnet_dist.data.arrays import FloatArray, IntArray
from resnet_dist.data.types import OperationPlan
from resnet_dist.rng import integers_below, uniform

_NUM_STRENGTHS = 31
"""Number of strengths of RandAugment and TrivialAugment, which are 0 to 30."""

# AutoAugment's policy for ImageNet (Cubuk et al. 2018, table 9), as torchvision implements it. Each
# line is a pair of operations, each with its probability and its strength from 0 to 9.
_AUTOAUGMENT_POLICY = """
posterize .4 8    rotate .6 9
solarize .6 5     autocontrast .6 0
equalize .8 0     equalize .6 0
posterize .6 7    posterize .6 6
equalize .4 0     solarize .2 4
equalize .4 0     rotate .8 8
solarize .6 3     equalize .6 0
posterize .8 5    equalize 1 0
rotate .2 3       solarize .6 8
equalize .6 0     posterize .4 6
rotate .8 8       color .4 0
rotate .4 9       equalize .6 0
equalize 0 0      equalize .8 0
invert .6 0       equalize 1 0
color .6 4        contrast 1 8
rotate .8 8       color 1 2
color .8 8        solarize .8 7
sharpness .4 7    invert .6 0
shear_x .6 5      equalize 1 0
color .4 0        equalize .6 0
equalize .4 0     solarize .2 4
solarize .6 5     autocontrast .6 0
invert .6 0       equalize 1 0
color .6 4        contrast 1 8
equalize .8 0     equalize .6 0
"""
_PAIRS = np.array(_AUTOAUGMENT_POLICY.split()).reshape(-1, 2, 3)
"""text [25, 2, 3]: (operation, probability, strength) of both operations of each pair"""
_PAIR_OPS = operations.operation_ids(_PAIRS[..., 0].ravel()).reshape(-1, 2)
_PAIR_PROBABILITIES = _PAIRS[..., 1].astype(float)
_PAIR_LEVELS = _PAIRS[..., 2].astype(int) / 9

_TIMM_LARGEST_MAGNITUDE = 10
"""Magnitude of `randaugment_increasing` at which its operations are strongest."""
_TIMM_PROBABILITY = 0.5
"""Probability with which `randaugment_increasing` applies an operation that it has drawn."""

_CHOICES = {
    "randaugment": operations.drawn_by("randaugment"),
    "randaugment_increasing": operations.drawn_by("randaugment_increasing"),
    "trivialaugment": operations.drawn_by("trivialaugment"),
}
"""The ids of the operations that a policy draws from, all with the same probability."""

_NUMBERS_OF_TIMM = 6
"""Random numbers of `randaugment_increasing` for each slot; the others take 3."""

_IDENTITY = operations.operation_ids(["identity"])[0]
_JITTERED = operations.operation_ids(["brightness", "contrast", "color", "hue"])
"""The operations of the colour jitter, in the order of `augment.color_jitter`."""

# Principal components of the R, G, B values in [0, 1] over ImageNet, as published in
# fb.resnet.torch. Each column is an eigenvector.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)

# Random erasing, as in torchvision: number of tries, and the ranges of the erased area as a
# fraction of the image and of height over width.
_ERASING_TRIES = 10
_ERASING_SMALLEST_AREA = 0.02
_ERASING_LARGEST_AREA = 0.33
_ERASING_SMALLEST_RATIO = 0.3
_ERASING_LARGEST_RATIO = 3.3


def num_slots(config: AugmentConfig) -> int:
    """K, the number of operations on an image: those of the policy, then those of the jitter."""
    num_jitter = int(np.count_nonzero(config.color_jitter))
    return _num_policy_slots(config) + num_jitter


def _num_policy_slots(config: AugmentConfig) -> int:
    """The number of operations that the policy applies to an image."""
    slots = {
        "none": 0,
        "randaugment": config.num_ops,
        "randaugment_increasing": config.num_ops,
        "trivialaugment": 1,
        "autoaugment": _PAIRS.shape[1],
    }
    return slots[config.policy]


def plan_operations(
    config: AugmentConfig,
    seed: int,
    epoch: int | IntArray,
    rows: IntArray,
    side: int,
) -> OperationPlan | None:
    """Draw the operations of the policy and of the colour jitter for a batch.

    Args:
        config: the section `augment`.
        seed: the seed of the run.
        epoch: one number, or one for each sample (see rng.py).
        rows: int64 [n], the samples.
        side: side of their crops, in pixels.

    Returns:
        The plan, or None if the policy and the colour jitter are off.
    """
    if num_slots(config) == 0:
        return None
    policy_slots = _num_policy_slots(config)
    numbers_per_slot = _NUMBERS_OF_TIMM if config.policy == "randaugment_increasing" else 3
    policy_numbers = uniform(seed, "policy", epoch, rows, numbers_per_slot * policy_slots)
    policy_numbers = policy_numbers.reshape(len(rows), policy_slots, numbers_per_slot)
    jitter_numbers = uniform(seed, "jitter", epoch, rows, 8)

    policy_ops, policy_params = _draw_policy(config, policy_numbers, side)
    jitter_ops, jitter_params = _draw_jitter(config, jitter_numbers)
    ops = np.concatenate([policy_ops, jitter_ops], axis=1)
    params = np.concatenate([policy_params, jitter_params], axis=1)
    matrices = operations.matrices(ops, params, side)
    return OperationPlan(ops.astype(np.int32), params.astype(np.float32), matrices)


def _draw_policy(
    config: AugmentConfig,
    numbers: FloatArray,
    side: int,
) -> tuple[IntArray, FloatArray]:
    """Draw the operations of the policy.

    Args:
        config: the section `augment`.
        numbers: uniform [n, K, 3]: for each slot a number for the operation, for the strength and
            for the sign; [n, K, 6] for `randaugment_increasing` (see `_draw_timm`).
        side: side of the crops, in pixels.

    Returns:
        Operation ids and parameters, both [n, K].
    """
    pick = numbers[..., 0]
    strength = numbers[..., 1]
    is_negative = numbers[..., 2] < 0.5
    signs = np.where(is_negative, -1, 1)

    if config.policy == "none":
        return np.empty(pick.shape, np.int64), np.empty(pick.shape)
    if config.policy == "autoaugment":
        ops, levels = _draw_autoaugment(pick, strength)
    elif config.policy == "randaugment_increasing":
        ops, levels = _draw_timm(config, pick, numbers[..., 3:])
    else:
        choices = _CHOICES[config.policy]
        places = integers_below(pick, len(choices))
        ops = choices[places]
        levels = _draw_levels(config, strength)
    params = operations.parameters(config.policy, ops, levels, signs, side)
    return ops, params


def _draw_autoaugment(pick: FloatArray, strength: FloatArray) -> tuple[IntArray, FloatArray]:
    """Draw a pair of operations for each image. Each is applied with its own probability.

    Args:
        pick: uniform [n, 2]; the first column chooses the pair.
        strength: uniform [n, 2]; decides whether an operation is applied.

    Returns:
        Operation ids and levels, both [n, 2].
    """
    pairs = integers_below(pick[:, 0], len(_PAIRS))
    is_applied = strength < _PAIR_PROBABILITIES[pairs]
    ops = np.where(is_applied, _PAIR_OPS[pairs], _IDENTITY)
    levels = _PAIR_LEVELS[pairs]
    return ops, levels


def _draw_timm(
    config: AugmentConfig, pick: FloatArray, numbers: FloatArray
) -> tuple[IntArray, FloatArray]:
    """Draw the operations of timm's RandAugment. Each is applied with probability 0.5.

    Its magnitude has a normal distribution around `augment.magnitude`, and is clipped to 0 to 10.

    Args:
        config: the section `augment`.
        pick: uniform [n, K]; chooses the operation.
        numbers: uniform [n, K, 3]: a number that decides whether the operation is applied, and two
            for the magnitude.

    Returns:
        Operation ids and levels, both [n, K].
    """
    choices = _CHOICES["randaugment_increasing"]
    places = integers_below(pick, len(choices))
    is_applied = numbers[..., 0] < _TIMM_PROBABILITY
    ops = np.where(is_applied, choices[places], _IDENTITY)

    normal = _normal(numbers[..., 1], numbers[..., 2])
    deviations = config.magnitude_std * normal
    magnitudes = np.clip(config.magnitude + deviations, 0, _TIMM_LARGEST_MAGNITUDE)
    levels: FloatArray = magnitudes / _TIMM_LARGEST_MAGNITUDE
    return ops, levels


def _normal(first: FloatArray, second: FloatArray) -> FloatArray:
    """Normally distributed numbers from two uniform ones (Box and Muller 1958)."""
    radius = np.sqrt(-2 * np.log(1 - first))
    angle = 2 * np.pi * second
    normal: FloatArray = radius * np.cos(angle)
    return normal


def _draw_levels(config: AugmentConfig, strength: FloatArray) -> FloatArray:
    """The strength of each operation as a fraction of the largest, from 0 to 1.

    It is random in TrivialAugment, and fixed (`augment.magnitude`) in RandAugment.
    """
    largest = _NUM_STRENGTHS - 1
    if config.policy == "trivialaugment":
        strengths = integers_below(strength, _NUM_STRENGTHS)
        levels: FloatArray = strengths / largest
        return levels
    return np.full(strength.shape, config.magnitude / largest)


def _draw_jitter(config: AugmentConfig, numbers: FloatArray) -> tuple[IntArray, FloatArray]:
    """Draw the changes of torchvision's ColorJitter: all that are not 0, in random order.

    Args:
        config: the section `augment`.
        numbers: uniform [n, 8]: four numbers for the size of the changes, four for their order.

    Returns:
        Operation ids and parameters, both [n, number of changes].
    """
    size_numbers = numbers[:, :4]
    order_numbers = numbers[:, 4:]

    # A factor of brightness, contrast or color is at least 0. Hue is an offset, at least -1.
    change = np.array(config.color_jitter)
    neutral = np.array([1, 1, 1, 0])
    low = np.maximum(neutral - change, neutral - 1)
    high = neutral + change
    params = low + (high - low) * size_numbers

    active = np.flatnonzero(config.color_jitter)
    ranking = np.argsort(order_numbers[:, active], axis=1)
    order = active[ranking]
    ops = _JITTERED[order]
    return ops, np.take_along_axis(params, order, axis=1)


def lighting_shifts(
    config: AugmentConfig,
    seed: int,
    epoch: int | IntArray,
    rows: IntArray,
) -> FloatArray:
    """Draw the shifts of PCA lighting (Krizhevsky et al. 2012, section 4.1).

    Args:
        config: the section `augment`.
        seed: the seed of the run.
        epoch: one number, or one for each sample (see rng.py).
        rows: int64 [n], the samples.

    Returns:
        float32 [n, 3]: what is added to R, G and B of an image whose pixels are in [0, 1].
    """
    numbers = uniform(seed, "lighting", epoch, rows, 6)
    normal = _normal(numbers[:, :3], numbers[:, 3:])

    coefficients = config.lighting_std * normal * _EIGENVALUES
    shifts: FloatArray = coefficients @ _EIGENVECTORS.T
    return shifts.astype(np.float32)


def erasing_boxes(
    config: AugmentConfig,
    seed: int,
    epoch: int | IntArray,
    rows: IntArray,
    side: int,
) -> IntArray:
    """Draw the rectangles of torchvision's RandomErasing.

    The area is uniform in 2 to 33 % of the image, and height over width is log-uniform in 0.3 to
    3.3. The first of ten tries whose height and width are below `side` is placed uniformly. If
    there is none, the image is not erased.

    Args:
        config: the section `augment`.
        seed: the seed of the run.
        epoch: one number, or one for each sample (see rng.py).
        rows: int64 [n], the samples.
        side: side of the square images, in pixels.

    Returns:
        int64 [n, 4]: the rectangle (y, x, height, width) of each image that is set to zero. It is
        all zeros for an image that is not erased.
    """
    # A number for the decision to erase, two for the position, and two for each try.
    numbers = uniform(seed, "erasing", epoch, rows, 3 + 2 * _ERASING_TRIES)
    is_wanted = numbers[:, :1] < config.random_erasing
    position_numbers = numbers[:, 1:3]
    area_numbers = numbers[:, 3::2]
    ratio_numbers = numbers[:, 4::2]

    area_range = _ERASING_LARGEST_AREA - _ERASING_SMALLEST_AREA
    areas = side**2 * (_ERASING_SMALLEST_AREA + area_range * area_numbers)
    ratio_factor = _ERASING_LARGEST_RATIO / _ERASING_SMALLEST_RATIO
    ratios = _ERASING_SMALLEST_RATIO * ratio_factor**ratio_numbers
    heights = np.sqrt(areas * ratios)
    widths = np.sqrt(areas / ratios)
    # [n, tries, 2]
    tries = np.rint(np.stack([heights, widths], axis=2))

    fits = np.all(tries < side, axis=2)
    any_fits = np.any(fits, axis=1, keepdims=True)
    first_fit = fits.argmax(axis=1)
    sides = tries[np.arange(len(tries)), first_fit]
    room = side - sides
    corners = integers_below(position_numbers, room + 1)

    is_erased = is_wanted & any_fits
    rectangles = np.hstack([corners, sides])
    boxes: FloatArray = rectangles * is_erased
    return boxes.astype(np.int64)
