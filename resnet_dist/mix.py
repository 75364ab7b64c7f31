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
    """The mixing of a run with this `augment` section."""

    def mixing(step: int) -> Mix | None:
        return draw_mix(seed, step, config.mixup_alpha, config.cutmix_alpha)

    return mixing


def draw_mix(seed: int, step: int, mixup_alpha: float, cutmix_alpha: float) -> Mix | None:
    """How the images of update `step` are mixed; None if both alphas are 0.

    With both, each step takes one of the two at random. Mixup: Zhang et al. 2017, "mixup: Beyond
    Empirical Risk Minimization". CutMix: Yun et al. 2019, "CutMix"; its box has 1 - share of the
    area around a uniform centre, and is clipped at the edges of the image.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    choice, y, x = uniform(seed, "mix", 0, np.array([step]), 3)[0].tolist()
    use_cutmix = bool(cutmix_alpha) and (not mixup_alpha or choice >= 0.5)
    if not use_cutmix:
        return Mix(_beta(seed, step, mixup_alpha), None)
    share = _beta(seed, step, cutmix_alpha)
    half = 0.5 * (1 - share) ** 0.5
    box = (max(0.0, y - half), max(0.0, x - half), min(1.0, y + half), min(1.0, x + half))
    return Mix(share, box)


def _beta(seed: int, step: int, alpha: float) -> float:
    """A number from Beta(alpha, alpha), by Joehnk's rejection (1964).

    Written out, since numpy may change the stream of its own generator.
    """
    for block in range(10_000):
        numbers = uniform(seed, "mix/beta", block, np.array([step]), 2 * _CANDIDATES)
        powers = numbers.reshape(_CANDIDATES, 2) ** (1 / alpha)
        sums = powers.sum(axis=1)
        accepted = np.flatnonzero((sums <= 1) & (sums > 0))
        if len(accepted):
            first = accepted[0]
            return float(powers[first, 0] / sums[first])
    raise AssertionError(f"no number from Beta({alpha}, {alpha})")


def mix_images(images: torch.Tensor, mix: Mix | None) -> tuple[torch.Tensor, float]:
    """The mixed images [B, 3, H, W], and the weight of their own targets.

    B must be even, unless `mix` is None.
    """
    if mix is None:
        return images, 1.0
    neighbours = swap_neighbours(images)
    if mix.box is None:
        return torch.lerp(neighbours, images, mix.share), mix.share
    height, width = images.shape[2:]
    top, left, bottom, right = mix.box
    rows = slice(int(top * height), int(bottom * height))
    columns = slice(int(left * width), int(right * width))
    mixed = images.clone()
    mixed[:, :, rows, columns] = neighbours[:, :, rows, columns]
    patch_area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - patch_area / (height * width)


def swap_neighbours(batch: torch.Tensor) -> torch.Tensor:
    """Each row of [B, ...] in the place of its neighbour: rows 1, 0, 3, 2, ..."""
    pairs: torch.Tensor = batch.unflatten(0, (-1, 2))  # type: ignore[no-untyped-call]
    return pairs.flip(1).flatten(0, 1)
