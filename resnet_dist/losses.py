"""The loss of each image, with targets that may be mixed with the neighbour's (see mix.py)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from resnet_dist.config import TrainConfig
from resnet_dist.mix import swap_neighbours

LossFn = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(logits [B, C], labels [B], share) to losses [B]; `share` is the weight of the image's own label,
its neighbour's label has the rest"""


def build_loss(config: TrainConfig) -> LossFn:
    """The training loss that the `train` section names."""
    smoothing = config.label_smoothing
    threshold = config.bce_target_threshold

    def cross_entropy_loss(
        logits: torch.Tensor, labels: torch.Tensor, share: float
    ) -> torch.Tensor:
        return mixed_cross_entropy(logits, labels, share, smoothing)

    def binary_loss(logits: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
        return mixed_binary_cross_entropy(logits, labels, share, smoothing, threshold)

    return binary_loss if config.loss == "bce" else cross_entropy_loss


def mixed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, share: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy with the mixed target, [B].

    It is linear in the target: the losses of both labels are computed, then mixed.
    """
    own = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if share == 1.0:
        return own
    other_labels = swap_neighbours(labels)
    other = F.cross_entropy(logits, other_labels, reduction="none", label_smoothing=label_smoothing)
    return torch.lerp(other, own, share)


def mixed_binary_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    share: float,
    label_smoothing: float = 0.0,
    threshold: float = 0.0,
) -> torch.Tensor:
    """Binary cross-entropy with the mixed target, averaged over the C classes, [B].

    Wightman et al. 2021, "ResNet strikes back". With label smoothing s the target is 1 - s + s / C
    at the label and s / C elsewhere, before it is mixed. With a `threshold`, targets above it
    become 1 and the others 0 (timm's `--bce-target-thresh`, 0.2 in its recipes).
    """
    low = label_smoothing / logits.shape[1]
    high = 1 - label_smoothing + low
    targets = torch.full_like(logits, low).scatter_(1, labels[:, None], high)
    if share != 1.0:
        targets = torch.lerp(swap_neighbours(targets), targets, share)
    if threshold:
        targets = (targets > threshold).to(targets.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
