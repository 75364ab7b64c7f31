"""Mixup and CutMix: each image of a batch is mixed with its neighbour, on the device, and so are the targets.

What is mixed with what, and how, is a pure function of (seed, step). The neighbour of position p in the global batch is
position p ^ 1: the order of the samples is random, so that it is as good as any other, and it lies on the same rank on
any number of ranks. One number per step, as for one batch in the papers' and torchvision's code.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from resnet_dist.rng import uniform

_TRIES = 64                      # of the rejection below, drawn at once


@dataclass(frozen=True)
class Draw:
    """How the images of one step are mixed."""

    share: float
    """of the image's own target; the rest is its neighbour's"""
    box: tuple[float, float, float, float] | None
    """CutMix: (top, left, bottom, right) of what the neighbour shows, as fractions; None for mixup"""


def draw(seed: int, step: int, mixup_alpha: float, cutmix_alpha: float) -> Draw | None:
    """The mixing of update `step`; None where both are off. With both, each step takes one of them at random.

    Mixup: Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization". CutMix: Yun et al. 2019; the box has
    1 - lambda of the area around a uniform centre, and is cut off at the edge.
    """
    alphas = [alpha for alpha in (mixup_alpha, cutmix_alpha) if alpha]
    if not alphas:
        return None
    which, y, x = uniform(seed, "mix", 0, np.array([step]), 3)[0].tolist()
    cut_it = bool(cutmix_alpha) and (not mixup_alpha or which >= 0.5)
    share = _beta(seed, step, cutmix_alpha if cut_it else mixup_alpha)
    if not cut_it:
        return Draw(share, None)
    half = 0.5 * (1 - share) ** 0.5
    return Draw(share, (max(0.0, y - half), max(0.0, x - half), min(1.0, y + half), min(1.0, x + half)))


def _beta(seed: int, step: int, alpha: float) -> float:
    """A number from Beta(alpha, alpha), by Joehnk's rejection (1964): no generator whose stream could change."""
    for block in range(10_000):
        powers = uniform(seed, "mix/beta", block, np.array([step]), 2 * _TRIES).reshape(_TRIES, 2) ** (1 / alpha)
        sums = powers.sum(axis=1)
        found = np.flatnonzero((sums <= 1) & (sums > 0))
        if len(found):
            return float(powers[found[0], 0] / sums[found[0]])
    raise AssertionError(f"no number from Beta({alpha}, {alpha})")


def mix_images(images: torch.Tensor, drawn: Draw | None) -> tuple[torch.Tensor, float]:
    """The images [B, 3, H, W] of a step, mixed, and the share of their own targets. B is even if `drawn`."""
    if drawn is None:
        return images, 1.0
    neighbours = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    if drawn.box is None:
        return torch.lerp(neighbours, images, drawn.share), drawn.share
    height, width = images.shape[2:]
    top, left, bottom, right = (int(place * side) for place, side in zip(drawn.box, (height, width) * 2, strict=True))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = neighbours[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)     # what is left, in whole pixels


def losses(logits: torch.Tensor, labels: torch.Tensor, share: float, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of each image [B], of logits [B, C] and labels [B]; `share` of the own label, the rest of the
    neighbour's (which is the cross-entropy with the mixed target, since that is linear in it)."""
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if share == 1.0:
        return own
    others = labels.unflatten(0, (-1, 2)).flip(1).flatten()
    other = F.cross_entropy(logits, others, reduction="none", label_smoothing=label_smoothing)
    return torch.lerp(other, own, share)
