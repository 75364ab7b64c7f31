"""Evaluation: every image of the validation set is counted once, on any number of ranks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.compilation import run_eagerly
from resnet_dist.data.types import IGNORED_LABEL, Batch, ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.forward import at_least_fp32, train_mode
from resnet_dist.metrics import Counts
from resnet_dist.precision import Precision

Collector = Callable[[Batch, torch.Tensor], None]
"""Called on each rank with each of its evaluated batches and the logits [B, C], float32 or wider.

Images that cannot be decoded have the label `IGNORED_LABEL`. `Batch.indices` are rows of the index.
"""


def no_stop() -> bool:
    """The `poll` of an evaluation that nothing interrupts."""
    return False


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: ValLoader,
    runtime: Runtime,
    precision: Precision,
    poll: Callable[[], bool] = no_stop,
    collect: Collector | None = None,
) -> Counts | None:
    """Count over the whole validation set, each image once, on any number of ranks.

    The loss is the plain cross-entropy, without label smoothing and whatever `train.loss` is. Every
    rank does the same number of rounds, with or without a batch, so that `poll` may be a
    collective. A compiled network runs eagerly here: the counts are those of
    `resnet-dist evaluate`, and no batch size is compiled.

    Args:
        model: The network. It is in its previous mode afterwards.
        loader: This rank's share of the images.
        runtime: This rank.
        precision: The precision of the forward pass.
        poll: Asked before each round whether to stop.
        collect: Gets each batch and its logits, for figures beside the counts. A failure of it
            is an error of this rank.

    Returns:
        The counts over all ranks; None if `poll` asked to stop.
    """
    was_training = model.training
    model.eval()
    # Without SyncBatchNorm every rank has running statistics of its own: take those of rank 0.
    runtime.broadcast_buffers(model)
    counts = Counts.zero(runtime.device)
    try:
        with run_eagerly(model):
            for batch in loader:
                if poll():
                    return None
                if batch is not None:
                    logits = predict_logits(model, batch, loader.mirrored, precision)
                    counts = counts + count_logits(logits, batch.labels)
                    if collect is not None:
                        collect(batch, logits)
    finally:
        if was_training:
            train_mode(model)
    counts = counts.reduce(runtime)
    num_evaluated = int(counts.num)
    assert num_evaluated == loader.num_samples, (
        f"evaluated {num_evaluated} of {loader.num_samples} images"
    )
    return counts


def count_logits(logits: torch.Tensor, labels: torch.Tensor) -> Counts:
    """The counts of one evaluation batch, with its plain cross-entropy as the loss.

    Args:
        logits: [B, C].
        labels: int64 [B], class ids or IGNORED_LABEL.
    """
    losses = F.cross_entropy(
        logits,
        labels,
        reduction="none",
        ignore_index=IGNORED_LABEL,
    )
    return Counts.of(logits, labels, losses)


@torch.inference_mode()
def predict_logits(
    model: nn.Module, batch: Batch, mirrored: bool, precision: Precision
) -> torch.Tensor:
    """Logits of an evaluation batch, by a model in eval mode.

    The probabilities of several views of an image are averaged (Krizhevsky et al. 2012, section
    4.1). The result is then the logarithm of the averages.

    Args:
        model: The network.
        batch: Its images and other views are [B, 3, H, W].
        mirrored: Whether each view counts together with its mirror image, see `ValLoader`.
        precision: The precision of the forward pass.

    Returns:
        Logits [B, C], at least float32.
    """
    views = []
    for view in (batch.images, *batch.other_views):
        views.append(view)
        if mirrored:
            views.append(view.flip(3))

    logits = []
    with precision.autocast():
        for images in views:
            outputs = model(images)
            logits.append(at_least_fp32(outputs))
    if len(logits) == 1:
        return logits[0]
    log_probabilities = torch.stack(logits).log_softmax(2)
    log_sum = torch.logsumexp(log_probabilities, 0)
    return log_sum - math.log(len(logits))
