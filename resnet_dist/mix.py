"""Mixup and CutMix: each image of a batch is mixed with its neighbour, on the device, and so are
the targets.

What is mixed with what, and how, is a pure function of (seed, step). The neighbour of position p in
the global batch is position p ^ 1: the order of the samples is random, so that it is as good as any
other, and it lies on the same rank on any number of ranks. One number per step, as for one batch in
the papers' and torchvision's code.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from resnet_dist.rng import uniform

_TRIES = 64  # of the rejection below, drawn at once


@dataclass(frozen=True)
class Draw:
    """How the images of one step are mixed."""

    share: float
    """of the image's own target; the rest is its neighbour's"""
    box: tuple[float, float, float, float] | None
    """CutMix: (top, left, bottom, right) of what the neighbour shows, as fractions; None for mixup
    """


def draw(seed: int, step: int, mixup_alpha: float, cutmix_alpha: float) -> Draw | None:
    """The mixing of update `step`; None where both are off. With both, each step takes one of them
    at random.

    Mixup: Zhang et al. 2017, "mixup: Beyond Empirical Risk Minimization". CutMix: Yun et al. 2019;
    the box has 1 - lambda of the area around a uniform centre, and is cut off at the edge.
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
    return Draw(
        share, (max(0.0, y - half), max(0.0, x - half), min(1.0, y + half), min(1.0, x + half))
    )


def _beta(seed: int, step: int, alpha: float) -> float:
    """A number from Beta(alpha, alpha), by Joehnk's rejection (1964): no generator whose stream
    could change.
    """
    for block in range(10_000):
        powers = uniform(seed, "mix/beta", block, np.array([step]), 2 * _TRIES).reshape(
            _TRIES, 2
        ) ** (1 / alpha)
        sums = powers.sum(axis=1)
        found = np.flatnonzero((sums <= 1) & (sums > 0))
        if len(found):
            return float(powers[found[0], 0] / sums[found[0]])
    raise AssertionError(f"no number from Beta({alpha}, {alpha})")


def mix_images(images: torch.Tensor, drawn: Draw | None) -> tuple[torch.Tensor, float]:
    """The images [B, 3, H, W] of a step, mixed, and the share of their own targets. B is even if
    `drawn`.
    """
    if drawn is None:
        return images, 1.0
    neighbours = _neighbours(images)
    if drawn.box is None:
        return torch.lerp(neighbours, images, drawn.share), drawn.share
    height, width = images.shape[2:]
    top, left, bottom, right = (
        int(place * side) for place, side in zip(drawn.box, (height, width) * 2, strict=True)
    )
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = neighbours[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (
        height * width
    )  # what is left, in whole pixels


def _neighbours(batch: torch.Tensor) -> torch.Tensor:
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    share: float,
    label_smoothing: float,
    loss: str = "ce",
    threshold: float = 0.0,
) -> torch.Tensor:
    """The loss of each image [B], of logits [B, C] and labels [B]; `share` of the own label, the
    rest the neighbour's.

    ce: cross-entropy with the mixed target; as it is linear in that, each label's own is computed,
    and mixed. bce: the mean over the classes of softplus(x) - t * x ("ResNet strikes back",
    Wightman et al. 2021), with the mixed target t, before mixing 1 - s + s / C at the label and s /
    C elsewhere with label smoothing s; with a `threshold`, t becomes 1 where it is above, else 0
    (timm's `--bce-target-thresh`: 0.2 in its recipes).
    """
    if loss == "bce":
        others = label_smoothing / logits.shape[1]
        targets = torch.full_like(logits, others).scatter_(
            1, labels[:, None], 1 - label_smoothing + others
        )
        if share != 1.0:
            targets = torch.lerp(_neighbours(targets), targets, share)
        targets = (targets > threshold).to(targets.dtype) if threshold else targets
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if share == 1.0:
        return own
    other = F.cross_entropy(
        logits, _neighbours(labels), reduction="none", label_smoothing=label_smoothing
    )
    return torch.lerp(other, own, share)
