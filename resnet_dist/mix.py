"""Mixup and CutMix: each image of a batch is mixed with its neighbour, and so are their targets.

What is mixed is a pure function of (seed, step). The neighbour of position p in the global batch is
position p ^ 1. Samples are in random order, so this pairing is as good as any other, and both
images are on the same rank on any number of ranks. All pairs of a step share one mixing factor, as
in the code of both papers and in torchvision.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from resnet_dist.config import AugmentConfig
from resnet_dist.rng import uniform

_CANDIDATES = 64
"""pairs of numbers that the rejection in `_beta` draws at once"""


@dataclass(frozen=True)
class Mix:
    """How the images of one step are mixed."""

    share: float
    """weight of the image's own target; the neighbour's has the rest"""
    box: tuple[float, float, float, float] | None
    """CutMix: (top, left, bottom, right) of the neighbour's patch, as fractions of the sides; None
    for mixup"""


Mixing = Callable[[int], Mix | None]
"""from the step to how its images are mixed; None leaves them as they are"""


def build_mixing(config: AugmentConfig, seed: int) -> Mixing:
    """The mixing of a run.

    Args:
        config: The `augment` section of the config.
        seed: The seed of the run.
    """
    mixup_alpha = config.mixup_alpha
    cutmix_alpha = config.cutmix_alpha

    def mixing(step: int) -> Mix | None:
        return draw_mix(seed, step, mixup_alpha, cutmix_alpha)

    return mixing


def draw_mix(seed: int, step: int, mixup_alpha: float, cutmix_alpha: float) -> Mix | None:
    """Draw how the images of one step are mixed.

    Mixup: Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization". CutMix: Yun et al. 2019,
    "CutMix"; its box has 1 - share of the area around a uniform centre, and is clipped at the edges
    of the image. With both, each step takes one of the two at random.

    Args:
        seed: The seed of the run.
        step: Number of updates before this one.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 turns mixup off.
        cutmix_alpha: Parameter of CutMix's Beta distribution; 0 turns CutMix off.

    Returns:
        The mixing, or None if both alphas are 0.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    numbers = uniform(seed, "mix", 0, np.array([step]), 3)
    choice, centre_y, centre_x = numbers[0].tolist()
    use_cutmix = cutmix_alpha > 0
    if mixup_alpha and cutmix_alpha:
        use_cutmix = choice >= 0.5

    if not use_cutmix:
        share = _beta(seed, step, mixup_alpha)
        return Mix(share, box=None)

    share = _beta(seed, step, cutmix_alpha)
    area = 1 - share
    half_side = 0.5 * area**0.5
    top = max(0.0, centre_y - half_side)
    left = max(0.0, centre_x - half_side)
    bottom = min(1.0, centre_y + half_side)
    right = min(1.0, centre_x + half_side)
    return Mix(share, box=(top, left, bottom, right))


def _beta(seed: int, step: int, alpha: float) -> float:
    """Draw a number from Beta(alpha, alpha), by Joehnk's rejection method (1964).

    It is written out here because numpy may change the stream of its own generator.
    """
    steps = np.array([step])
    for block in range(10_000):
        numbers = uniform(seed, "mix/beta", block, steps, 2 * _CANDIDATES)
        pairs = numbers.reshape(_CANDIDATES, 2)
        powers = pairs ** (1 / alpha)
        sums = powers.sum(axis=1)
        is_accepted = (sums <= 1) & (sums > 0)
        accepted = np.flatnonzero(is_accepted)
        if len(accepted):
            first = accepted[0]
            ratio = powers[first, 0] / sums[first]
            return float(ratio)
    raise AssertionError(f"no number from Beta({alpha}, {alpha})")


def mix_images(images: torch.Tensor, mix: Mix | None) -> tuple[torch.Tensor, float]:
    """Mix each image of a batch with its neighbour.

    Args:
        images: [B, 3, H, W]; B must be even, unless `mix` is None.
        mix: How to mix; None leaves the images as they are.

    Returns:
        The mixed images [B, 3, H, W], and the weight of each image's own target. For CutMix that is
        the exact share of its own pixels.
    """
    if mix is None:
        return images, 1.0
    neighbours = swap_neighbours(images)
    if mix.box is None:
        mixed = torch.lerp(neighbours, images, mix.share)
        return mixed, mix.share

    height, width = images.shape[2:]
    top, left, bottom, right = mix.box
    first_row = int(top * height)
    end_row = int(bottom * height)
    first_column = int(left * width)
    end_column = int(right * width)
    rows = slice(first_row, end_row)
    columns = slice(first_column, end_column)

    mixed = images.clone()
    mixed[:, :, rows, columns] = neighbours[:, :, rows, columns]
    patch_area = (end_row - first_row) * (end_column - first_column)
    own_share = 1 - patch_area / (height * width)
    return mixed, own_share


def swap_neighbours(batch: torch.Tensor) -> torch.Tensor:
    """Exchange neighbouring rows of [B, ...], B even: the result has rows 1, 0, 3, 2, ..."""
    pairs: torch.Tensor = batch.unflatten(0, (-1, 2))  # type: ignore[no-untyped-call]
    swapped = pairs.flip(1)
    return swapped.flatten(0, 1)
