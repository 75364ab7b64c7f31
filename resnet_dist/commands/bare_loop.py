"""The loop that everybody could write: torchvision's network, one batch, plain PyTorch.

The comparisons of docs/gpu.md measure against it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from resnet_dist.commands.benchmark_parts import Step
from resnet_dist.precision import Precision

_NUM_CLASSES = 1000


@dataclass(frozen=True)
class BareSettings:
    """What a bare loop trains."""

    network: str
    """a function of torchvision.models"""
    batch_size: int
    image_size: int
    """side of the images, in pixels"""
    precision: Precision
    compiled: bool = False
    """whether the network runs under torch.compile, with its default settings"""


def build_bare_step(settings: BareSettings) -> Step:
    """An update of torchvision's network in `channels_last`, with autocast and fused SGD.

    The loss is the cross-entropy of one fixed batch of random pixels. There is no gradient scaler,
    no DDP and no check of the gradient.

    Args:
        settings: The network and its batch.
    """
    from torchvision import models

    device = settings.precision.device
    torch.manual_seed(0)
    network = getattr(models, settings.network)(num_classes=_NUM_CLASSES)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True
    )
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, device=device, dtype=settings.precision.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(_NUM_CLASSES, (settings.batch_size,), device=device)
    forward = torch.compile(network) if settings.compiled else network

    def step() -> None:
        with settings.precision.autocast():
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
