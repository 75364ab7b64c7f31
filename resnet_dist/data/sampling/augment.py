"""What is done to the pixels of a training image behind crop and flip: operations and strengths, as
numbers.

A policy turns uniform numbers into one operation and its parameter for each of K slots of an image;
one list of operations serves all policies, and dali.py carries them out. As with crops, all is a
pure function of (seed, epoch, row), or of rng.draw in place of the epoch, computed for a whole
batch at once. The laws are torchvision's.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import AugmentConfig
from resnet_dist.rng import uniform

OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "invert",
    "hue",
)
"""Name of each operation id."""
_CHOICES, _BINS = 14, 31  # RandAugment and TrivialAugment: the first 14 operations, and strengths

# For ImageNet (Cubuk et al. 2018, table 9) as torchvision has it: 25 pairs of (operation,
# probability, strength of 10).
_AUTOAUGMENT = """
posterize .4 8 rotate .6 9  solarize .6 5 autocontrast .6 0  equalize .8 0 equalize .6 0  posterize .6 7 posterize .6 6
equalize .4 0 solarize .2 4  equalize .4 0 rotate .8 8  solarize .6 3 equalize .6 0  posterize .8 5 equalize 1 0
rotate .2 3 solarize .6 8  equalize .6 0 posterize .4 6  rotate .8 8 color .4 0  rotate .4 9 equalize .6 0
equalize 0 0 equalize .8 0  invert .6 0 equalize 1 0  color .6 4 contrast 1 8  rotate .8 8 color 1 2
color .8 8 solarize .8 7  sharpness .4 7 invert .6 0  shear_x .6 5 equalize 1 0  color .4 0 equalize .6 0
equalize .4 0 solarize .2 4  solarize .6 5 autocontrast .6 0  invert .6 0 equalize 1 0  color .6 4 contrast 1 8
equalize .8 0 equalize .6 0"""
_PAIRS = np.array(_AUTOAUGMENT.split()).reshape(25, 2, 3)

# The matrix of an operation is _FIXED + parameter * _SLOPE; rotate alone is not linear.
_FIXED, _SLOPE = np.zeros((2, len(OPERATIONS), 3, 3))
_FIXED[1:6] = np.eye(3)
_FIXED[9] = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # what Pillow blends for sharpness
_SLOPE[6:, 0, 0] = 1
_SLOPE[9] = np.pad([[1.0]], 1) - _FIXED[9]
_SLOPE[[1, 2, 3, 4], [0, 1, 0, 1], [1, 0, 2, 2]] = [1, 1, -1, -1]

# Of R, G, B in [0, 1] over ImageNet, as fb.resnet.torch publishes them; the vectors are columns.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


@dataclass(frozen=True)
class Plan:
    """The operations on each image of a batch, in their order."""

    ops: np.ndarray
    """int32 [n, K], places in OPERATIONS"""
    params: np.ndarray
    """float32 [n, K]: tangent of a shear; pixels of a translation; degrees, counter-clockwise;
    factor of brightness, color, contrast, sharpness; bits that posterize leaves; threshold of
    solarize; turns of hue; 0 for the others"""
    matrices: np.ndarray
    """float32 [n, K, 3, 3]: geometric: (x, y, 1) in the result, in pixels from its corner, to the
    place in the image; sharpness: the filter; else the parameter at [0, 0]"""


def num_slots(config: AugmentConfig) -> int:
    """K, the operations on an image: the policy's, then those of the colour jitter."""
    of_policy = {"none": 0, "randaugment": config.num_ops, "trivialaugment": 1, "autoaugment": 2}[
        config.policy
    ]
    return of_policy + np.count_nonzero(config.color_jitter)


def plan(
    config: AugmentConfig, seed: int, epoch: int | np.ndarray, rows: np.ndarray, side: int
) -> Plan | None:
    """The operations on the samples `rows`, cut to squares of `side` pixels; None where all is
    switched off.
    """
    of_jitter = np.count_nonzero(config.color_jitter)
    of_policy = num_slots(config) - of_jitter
    if of_policy + of_jitter == 0:
        return None
    numbers = uniform(seed, "policy", epoch, rows, 3 * of_policy).reshape(len(rows), of_policy, 3)
    parts = (
        _policy(config, *np.moveaxis(numbers, 2, 0), side),
        _jitter(config, uniform(seed, "jitter", epoch, rows, 8)),
    )
    ops, params = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return Plan(ops.astype(np.int32), params.astype(np.float32), matrices(ops, params, side))


def _policy(
    config: AugmentConfig, pick: np.ndarray, strength: np.ndarray, sign: np.ndarray, side: int
):
    """Operations and parameters [n, K] from three uniform numbers each, in torchvision's ranges."""
    ops, bins, last = np.floor(pick * _CHOICES).astype(np.int64), config.magnitude, _BINS - 1
    factor, shear, degrees, pixels, bits = 0.9, 0.3, 30, 150 / 331 * side, 4
    if config.policy == "trivialaugment":
        bins, (factor, shear, degrees, pixels, bits) = (
            np.floor(strength * _BINS),
            (0.99, 0.99, 135, 32, 6),
        )
    if config.policy == "autoaugment":
        pairs = _PAIRS[np.floor(pick[:, 0] * len(_PAIRS)).astype(np.int64)]
        ops = np.vectorize(OPERATIONS.index)(pairs[..., 0]) * (
            strength < pairs[..., 1].astype(float)
        )
        bins, last = pairs[..., 2].astype(int), 9
    part, largest = (
        bins / last,
        np.array([0, shear, shear, pixels, pixels, degrees, *[factor] * 4, *[0] * 6]),
    )
    params = largest[ops] * part * np.where(sign < 0.5, -1, 1)
    params = np.where((ops == 3) | (ops == 4), np.trunc(params), params) + ((ops >= 6) & (ops <= 9))
    params = np.where(ops == 10, 8 - np.rint(part * bits), params)
    return ops, np.where(ops == 11, 255 * (1 - part), params)


def _jitter(config: AugmentConfig, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Torchvision's ColorJitter: the changes that are not 0, in random order, each uniform in its
    range.
    """
    reach, middle, on = (
        np.array(config.color_jitter),
        np.array([1, 1, 1, 0]),
        np.flatnonzero(config.color_jitter),
    )
    low = np.maximum(middle - reach, middle - 1)
    order = on[np.argsort(numbers[:, 4:][:, on], axis=1)]
    params = np.take_along_axis(low + (middle + reach - low) * numbers[:, :4], order, axis=1)
    return np.array(
        [OPERATIONS.index(name) for name in ("brightness", "contrast", "color", "hue")]
    )[order], params


def matrices(ops: np.ndarray, params: np.ndarray, side: int) -> np.ndarray:
    """The matrices of a Plan: shears keep the corner of the image, rotations its centre, as
    torchvision's do.
    """
    out = _FIXED[ops] + params[..., None, None] * _SLOPE[ops]
    angle, half = np.deg2rad(params[ops == 5]), side / 2
    cos, sin = np.cos(angle), np.sin(angle)
    out[ops == 5, 0] = np.stack([cos, -sin, half * (1 - cos + sin)], axis=1)
    out[ops == 5, 1] = np.stack([sin, cos, half * (1 - cos - sin)], axis=1)
    return out.astype(np.float32)


def lighting(
    config: AugmentConfig, seed: int, epoch: int | np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """float32 [n, 3]: what PCA lighting adds to R, G, B, for pixels in [0, 1] (Krizhevsky et al.
    2012, section 4.1).
    """
    numbers = uniform(seed, "lighting", epoch, rows, 6)
    normal = np.sqrt(-2 * np.log(1 - numbers[:, :3])) * np.cos(
        2 * np.pi * numbers[:, 3:]
    )  # Box and Muller 1958
    return (config.lighting_std * normal * _EIGENVALUES @ _EIGENVECTORS.T).astype(np.float32)


def erasing(
    config: AugmentConfig, seed: int, epoch: int | np.ndarray, rows: np.ndarray, side: int
) -> np.ndarray:
    """int64 [n, 4]: the rectangle (y, x, height, width) of each square that is set to zero; all 0
    for none.

    torchvision's RandomErasing: area uniform in 2 to 33 % of the square's, height over width
    log-uniform in 0.3 to 3.3, the first of ten tries whose sides are shorter than the square's,
    placed uniformly.
    """
    numbers = uniform(seed, "erasing", epoch, rows, 23)
    areas, ratios = side**2 * (0.02 + 0.31 * numbers[:, 3::2]), 0.3 * 11 ** numbers[:, 4::2]
    tries = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios], axis=2)))
    fits = (tries < side).all(axis=2)
    sides = tries[np.arange(len(tries)), fits.argmax(axis=1)]
    done = (numbers[:, :1] < config.random_erasing) & fits.any(axis=1, keepdims=True)
    return (np.hstack([np.floor(numbers[:, 1:3] * (side - sides + 1)), sides]) * done).astype(
        np.int64
    )
