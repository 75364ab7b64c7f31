"""Layers of the ResNet family that torch does not have."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MethodPart(nn.Module):
    """A method of a network as a module of its own, so that `Module.compile` can compile it.

    It has no weights. The network must keep it out of its list of modules (a tuple does that), so
    that its state-dict keys and `modules()` stay as they are.

    Args:
        method: From one tensor to one tensor. It uses the layers of the network.
    """

    def __init__(self, method: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        """What the method returns."""
        return self.method(x)


class BlurConv2d(nn.Conv2d):
    """A convolution after a 3x3 binomial filter, so that its stride does not alias.

    Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"; blur first, then the strided
    convolution. Same arguments and state-dict keys as Conv2d.
    """

    kernel: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        row = torch.tensor([0.25, 0.5, 0.25])
        column = row[:, None]
        self.register_buffer("kernel", column * row, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, H / stride, W / stride]."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, 3, 3)
        blurred = F.conv2d(x, kernel, padding=1, groups=channels)
        return super().forward(blurred)


class SqueezeExcitation(nn.Module):
    """Multiply each channel of [B, C, H, W] by a weight in (0, 1), which two layers compute from
    the means of all channels.

    Hu et al. 2017, "Squeeze-and-Excitation Networks", equations 2 to 4. State-dict keys as timm's
    `se`.

    Args:
        channels: Number of channels C, at least 1 / ratio.
        ratio: Hidden channels as a fraction of C.
    """

    def __init__(self, channels: int, ratio: float = 1 / 16) -> None:
        super().__init__()
        hidden_channels = int(channels * ratio)
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        means = x.mean((2, 3), keepdim=True)
        hidden = torch.relu(self.fc1(means))
        weights = torch.sigmoid(self.fc2(hidden))
        return x * weights


class NoShortcut(nn.Module):
    """The path around the block of a plain network, which adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """A zero."""
        return x.new_zeros(())


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    blur: bool = False,
) -> nn.Conv2d:
    """A convolution that keeps height and width at stride 1.

    It has no bias: the norm that follows would cancel it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Side of the kernel in pixels, odd.
        stride: Stride of the convolution.
        groups: Number of groups of channels.
        blur: Whether a convolution with a stride above 1 blurs its input first, see `BlurConv2d`.
    """
    conv_type = nn.Conv2d
    if blur and stride > 1:
        conv_type = BlurConv2d
    return conv_type(
        in_channels,
        out_channels,
        kernel,
        stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
    )


def drop_samples(x: Tensor, rate: float) -> Tensor:
    """Set random samples of [B, C, H, W] to zero, at the given rate, and scale up the others."""
    num_samples = len(x)
    kept = x.new_empty(num_samples, 1, 1, 1)
    kept.bernoulli_(1 - rate)
    return x * kept / (1 - rate)
