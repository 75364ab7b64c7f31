"""The loss of each image, with targets that may be mixed with the neighbour's (see mix.py)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from resnet_dist.config import TrainConfig
from resnet_dist.mix import swap_neighbours

LossFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(logits [B, C], labels [B], shares) to losses [B]; `shares` [B] are the weights of each image's
own label, its neighbour's label has the rest; None: the images are not mixed
"""


LossFor = Callable[[torch.Tensor], LossFn]
"""From the images [B, 3, H, W] of a micro-batch, after mixing, to the loss of its logits. A teacher
looks at the images here, once for all heads
"""


def build_loss(config: TrainConfig) -> LossFn:
    """Build the training loss that `config.loss` names: "ce" or "bce".

    Args:
        config: The `train` section of the config.
    """
    smoothing = config.label_smoothing
    threshold = config.bce_target_threshold

    def cross_entropy_loss(
        logits: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor | None
    ) -> torch.Tensor:
        return mixed_cross_entropy(logits, labels, shares, smoothing)

    def binary_loss(
        logits: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor | None
    ) -> torch.Tensor:
        return mixed_binary_cross_entropy(logits, labels, shares, smoothing, threshold)

    if config.loss == "bce":
        return binary_loss
    return cross_entropy_loss


def mixed_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shares: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy with the mixed target.

    Cross-entropy is linear in the target, so the losses of both labels are computed, then mixed.

    Args:
        logits: [B, C].
        labels: int64 [B].
        shares: [B], weight of each image's own label, from 0 to 1; its neighbour's label has the
            rest. None: only the own label counts.
        label_smoothing: Share of the target that is spread evenly over all classes.

    Returns:
        The loss of each image, [B].
    """
    own = F.cross_entropy(
        logits,
        labels,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if shares is None:
        return own
    other = F.cross_entropy(
        logits,
        swap_neighbours(labels),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return torch.lerp(other, own, shares.to(own.dtype))


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL divergence of the predictions from those of a teacher, times the squared temperature.

    The logits of both are divided by the temperature before the softmax. The factor keeps the size
    of the gradient (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2).
    Beyer et al. 2021 write the loss as a KL divergence.

    Args:
        logits: [B, C].
        teacher_logits: [B, C], without gradient.
        temperature: T, above 0.

    Returns:
        The loss of each image, [B].
    """
    log_probabilities = F.log_softmax(logits / temperature, dim=1)
    teacher_log_probabilities = F.log_softmax(teacher_logits / temperature, dim=1)
    divergences = F.kl_div(
        log_probabilities,
        teacher_log_probabilities,
        reduction="none",
        log_target=True,
    )
    return divergences.sum(1) * temperature**2


def mixed_binary_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shares: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    threshold: float = 0.0,
) -> torch.Tensor:
    """Binary cross-entropy with the mixed target, averaged over the C classes.

    Wightman et al. 2021, "ResNet strikes back". With label smoothing s the target is 1 - s + s / C
    at the label and s / C elsewhere, before it is mixed.

    Args:
        logits: [B, C].
        labels: int64 [B].
        shares: [B], weight of each image's own target, from 0 to 1; its neighbour's target has the
            rest. None: only the own target counts.
        label_smoothing: Share s of the target that is spread evenly over all classes.
        threshold: If not 0, targets above it become 1 and the others 0 (timm's
            `--bce-target-thresh`, 0.2 in its recipes).

    Returns:
        The loss of each image, [B].
    """
    num_classes = logits.shape[1]
    low = label_smoothing / num_classes
    high = 1 - label_smoothing + low
    targets = torch.full_like(logits, low)
    targets.scatter_(1, labels[:, None], high)
    if shares is not None:
        neighbours = swap_neighbours(targets)
        weights = shares.to(targets.dtype)[:, None]
        targets = torch.lerp(neighbours, targets, weights)
    if threshold:
        is_above = targets > threshold
        targets = is_above.to(targets.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.mean(1)
