"""The arithmetic and the memory traffic of a training step, counted on the meta device."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.config import Config
from resnet_dist.forward import all_logits
from resnet_dist.models.build import build_model
from resnet_dist.resources.operations import OperationWatch, Tensors


@dataclass(frozen=True)
class StepCost:
    """Forward and backward pass of a training step."""

    flops_per_image: int
    """of convolutions and matrix products; a multiplication and an addition count as two"""
    bytes_per_image: int
    """that the operations read and write in eager mode, each tensor once per operation. Fused
    operations move less"""
    bytes_per_step: int
    """the same, of tensors that do not depend on the number of images"""

    def bytes_moved(self, num_images: int) -> int:
        """Bytes that a step of `num_images` images reads and writes."""
        return self.bytes_per_step + num_images * self.bytes_per_image


def count_step(config: Config) -> StepCost:
    """Count what a training step costs, without computing anything.

    Args:
        config: The config of the run; `train.precision` must be resolved.
    """
    model_config = replace(config.model, sync_batch_norm=False)
    num_classes = config.model.num_classes or 1000
    with torch.device("meta"):
        model = build_model(model_config, num_classes)
    model.train()
    side = config.data.train_crop_size
    # Two are enough for batch norm.
    flops_of_two, bytes_of_two = _count(model, 2, side)
    _, bytes_of_four = _count(model, 4, side)
    bytes_per_image = (bytes_of_four - bytes_of_two) // 2
    bytes_per_step = bytes_of_two - 2 * bytes_per_image
    if config.train.precision != "fp32":
        # Under autocast nearly all activations have 16 bits.
        bytes_per_image //= 2
    return StepCost(flops_of_two // 2, bytes_per_image, bytes_per_step)


def _count(model: nn.Module, num_images: int, side: int) -> tuple[int, int]:
    """FLOPs and bytes moved of a forward and backward pass of a model on the meta device."""
    images = torch.empty(num_images, 3, side, side, device="meta")
    traffic = _Traffic()
    with FlopCounterMode(display=False) as counter, traffic:
        totals = []
        for logits in all_logits(model(images)):
            totals.append(logits.sum())
        torch.stack(totals).sum().backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops(), traffic.num_bytes


class _Traffic(OperationWatch):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the tensors that each operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def see(self, operation: Any, inputs: Tensors, results: Tensors) -> None:  # noqa: ANN401
        """Count the tensors of an operation."""
        if getattr(operation, "is_view", False):
            return
        for tensor in (*inputs, *results):
            self.num_bytes += tensor.numel() * tensor.element_size()
