"""The random part of the augmentation: operations, colour jitter, lighting and erasing as numbers.

Like crops, everything is a pure function of (seed, epoch, row), computed for a whole batch at once.
In place of the epoch there may be a number for each sample, where an epoch shows an image several
times (see rng.py). The laws are torchvision's. What an operation does is in operations.py.
"""

import numpy as np

from resnet_dist.config import AugmentConfig
from resnet_dist.data import operations
from resnet_dist.data.arrays import FloatArray, IntArray
from resnet_dist.data.types import OperationPlan
from resnet_dist.rng import uniform

_NUM_STRENGTHS = 31
"""Strengths of RandAugment and TrivialAugment: 0 to 30."""

# AutoAugment's policy for ImageNet (Cubuk et al. 2018, table 9) as torchvision has it: pairs of
# (operation, probability, strength 0 to 9).
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
_PAIR_OPS = operations.operation_ids(_PAIRS[..., 0].ravel()).reshape(-1, 2)
_PAIR_PROBABILITIES = _PAIRS[..., 1].astype(float)
_PAIR_LEVELS = _PAIRS[..., 2].astype(int) / 9

_CHOICES = {name: operations.drawn_by(name) for name in ("randaugment", "trivialaugment")}
_IDENTITY = operations.operation_ids(["identity"])[0]
_JITTERED = operations.operation_ids(["brightness", "contrast", "color", "hue"])
"""The operations of the colour jitter, in the order of `augment.color_jitter`."""

# Principal components of R, G, B in [0, 1] over ImageNet, as fb.resnet.torch publishes them; the
# vectors are columns.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def num_slots(config: AugmentConfig) -> int:
    """K, the number of operations on an image: those of the policy, then the colour jitter."""
    return _num_policy_slots(config) + int(np.count_nonzero(config.color_jitter))


def _num_policy_slots(config: AugmentConfig) -> int:
    slots = {
        "none": 0,
        "randaugment": config.num_ops,
        "trivialaugment": 1,
        "autoaugment": _PAIRS.shape[1],
    }
    return slots[config.policy]


def plan_operations(
    config: AugmentConfig, seed: int, epoch: int | IntArray, rows: IntArray, side: int
) -> OperationPlan | None:
    """Draw the operations on the samples `rows`, which are crops of `side` pixels.

    Returns:
        The plan, or None where policy and colour jitter are off.
    """
    if num_slots(config) == 0:
        return None
    num_policy = _num_policy_slots(config)
    policy_numbers = uniform(seed, "policy", epoch, rows, 3 * num_policy)
    jitter_numbers = uniform(seed, "jitter", epoch, rows, 8)
    policy_ops, policy_params = _draw_policy(
        config, policy_numbers.reshape(len(rows), num_policy, 3), side
    )
    jitter_ops, jitter_params = _draw_jitter(config, jitter_numbers)
    ops = np.concatenate([policy_ops, jitter_ops], axis=1)
    params = np.concatenate([policy_params, jitter_params], axis=1)
    return OperationPlan(
        ops.astype(np.int32),
        params.astype(np.float32),
        operations.matrices(ops, params, side),
    )


def _draw_policy(
    config: AugmentConfig, numbers: FloatArray, side: int
) -> tuple[IntArray, FloatArray]:
    """Operations and parameters [n, K] from three uniform numbers for each slot: [n, K, 3]."""
    pick = numbers[..., 0]
    strength = numbers[..., 1]
    signs = np.where(numbers[..., 2] < 0.5, -1, 1)
    if config.policy == "none":
        return np.empty(pick.shape, np.int64), np.empty(pick.shape)
    if config.policy == "autoaugment":
        ops, levels = _draw_autoaugment(pick, strength)
    else:
        choices = _CHOICES[config.policy]
        ops = choices[np.floor(pick * len(choices)).astype(np.int64)]
        levels = _draw_levels(config, strength)
    return ops, operations.parameters(config.policy, ops, levels, signs, side)


def _draw_autoaugment(pick: FloatArray, strength: FloatArray) -> tuple[IntArray, FloatArray]:
    """A pair of operations for each image; each is applied with its own probability."""
    pairs = np.floor(pick[:, 0] * len(_PAIRS)).astype(np.int64)
    is_applied = strength < _PAIR_PROBABILITIES[pairs]
    ops = np.where(is_applied, _PAIR_OPS[pairs], _IDENTITY)
    return ops, _PAIR_LEVELS[pairs]


def _draw_levels(config: AugmentConfig, strength: FloatArray) -> FloatArray:
    """The strength as a fraction of the largest: fixed in RandAugment, random in TrivialAugment."""
    if config.policy == "trivialaugment":
        levels: FloatArray = np.floor(strength * _NUM_STRENGTHS) / (_NUM_STRENGTHS - 1)
        return levels
    return np.full(strength.shape, config.magnitude / (_NUM_STRENGTHS - 1))


def _draw_jitter(config: AugmentConfig, numbers: FloatArray) -> tuple[IntArray, FloatArray]:
    """Torchvision's ColorJitter: the changes that are not 0, in random order, each uniform.

    `numbers` is uniform [n, 8]: four for the sizes of the changes, four for their order.
    """
    change = np.array(config.color_jitter)
    neutral = np.array([1, 1, 1, 0])
    low = np.maximum(neutral - change, neutral - 1)
    high = neutral + change
    params = low + (high - low) * numbers[:, :4]

    active = np.flatnonzero(config.color_jitter)
    order = active[np.argsort(numbers[:, 4:][:, active], axis=1)]
    return _JITTERED[order], np.take_along_axis(params, order, axis=1)


def lighting_shifts(
    config: AugmentConfig, seed: int, epoch: int | IntArray, rows: IntArray
) -> FloatArray:
    """What PCA lighting adds to R, G and B, for pixels in [0, 1]: float32 [n, 3].

    Krizhevsky et al. 2012, section 4.1.
    """
    numbers = uniform(seed, "lighting", epoch, rows, 6)
    # Normal numbers by the method of Box and Muller (1958).
    radius = np.sqrt(-2 * np.log(1 - numbers[:, :3]))
    normal = radius * np.cos(2 * np.pi * numbers[:, 3:])
    shifts: FloatArray = config.lighting_std * normal * _EIGENVALUES @ _EIGENVECTORS.T
    return shifts.astype(np.float32)


def erasing_boxes(
    config: AugmentConfig, seed: int, epoch: int | IntArray, rows: IntArray, side: int
) -> IntArray:
    """The rectangle (y, x, height, width) of each square that is set to zero: int64 [n, 4].

    It is all zeros for an image that is not erased. The law is torchvision's RandomErasing: the
    area is uniform in 2 to 33 % of the square's, and height over width log-uniform in 0.3 to 3.3.
    The first of ten tries whose sides are shorter than the square's is taken, and placed uniformly.
    """
    numbers = uniform(seed, "erasing", epoch, rows, 23)
    areas = side**2 * (0.02 + 0.31 * numbers[:, 3::2])
    ratios = 0.3 * 11 ** numbers[:, 4::2]
    tries = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios], axis=2)))

    fits = np.all(tries < side, axis=2)
    first_fit = fits.argmax(axis=1)
    sides = tries[np.arange(len(tries)), first_fit]
    corners = np.floor(numbers[:, 1:3] * (side - sides + 1))
    is_erased = (numbers[:, :1] < config.random_erasing) & np.any(fits, axis=1, keepdims=True)
    boxes: FloatArray = np.hstack([corners, sides]) * is_erased
    return boxes.astype(np.int64)
