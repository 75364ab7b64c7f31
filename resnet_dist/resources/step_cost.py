"""The arithmetic and the memory traffic of a training step, counted on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.config import Config, ModelConfig
from resnet_dist.forward import all_logits
from resnet_dist.models.build import build_on_meta
from resnet_dist.resources.operations import OperationWatch, Tensors


@dataclass(frozen=True)
class StepCost:
    """Forward and backward pass of a training step, and the forward pass of its teacher."""

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


def count_step(config: Config, teacher: ModelConfig | None = None) -> StepCost:
    """Count what a training step costs, without computing anything.

    Args:
        config: The config of the run; `train.precision` must be resolved.
        teacher: The teacher of a distillation; None for none.
    """
    networks = [build_on_meta(config.model).train()]
    if teacher is not None:
        networks.append(build_on_meta(teacher).eval().requires_grad_(False))
    side = config.data.train_crop_size
    # Two are enough for batch norm.
    flops_of_two, bytes_of_two = _count(networks, 2, side)
    _, bytes_of_four = _count(networks, 4, side)
    bytes_per_image = (bytes_of_four - bytes_of_two) // 2
    bytes_per_step = bytes_of_two - 2 * bytes_per_image
    if config.train.precision != "fp32":
        # Under autocast nearly all activations have 16 bits.
        bytes_per_image //= 2
    return StepCost(flops_of_two // 2, bytes_per_image, bytes_per_step)


def _count(networks: list[nn.Module], num_images: int, side: int) -> tuple[int, int]:
    """FLOPs and bytes moved by networks on the meta device: the forward pass of each, and the
    backward pass of those that are trained.
    """
    images = torch.empty(num_images, 3, side, side, device="meta")
    traffic = _Traffic()
    with FlopCounterMode(display=False) as counter, traffic:
        for network in networks:
            totals = []
            for logits in all_logits(network(images)):
                totals.append(logits.sum())
            total = torch.stack(totals).sum()
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
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
