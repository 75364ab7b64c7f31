"""The ResNet family.

ImageNet: ResNet-18/34/50/101/152 (He et al. 2015, "Deep Residual Learning for Image Recognition", table 1),
ResNeXt (Xie et al. 2016, "Aggregated Residual Transformations") and Wide ResNet bottlenecks (Zagoruyko and Komodakis
2016, "Wide Residual Networks"), with torchvision's names and state-dict keys, so that weights go both ways.
CIFAR: ResNet-20/32/44/56/110 (He et al. 2015, section 4.2).

A network is a stem, stages `layer1..layerN` of residual blocks, a global average pool and a classifier. The first
block of every stage but the first halves height and width. Images are [B, 3, H, W], logits are [B, num_classes].
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.init import init_weights, zero_residual_norms


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1. No bias: a norm follows, which would cancel it."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


class PadShortcut(nn.Module):
    """Shortcut of option A: take every `stride`-th pixel, append zero channels. It has no parameters.

    [B, C, H, W] -> [B, C + extra_channels, ceil(H / stride), ceil(W / stride)]. He et al. 2015, sections 3.3 and 4.2.
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


def make_shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The path around a block, or None where the input can be added as it is.

    `kind` is "A" (subsample and pad with zeros) or "B" (1x1 convolution and norm); both leave the input alone where
    the shape does not change. He et al. 2015, section 4.1, "Identity vs. Projection Shortcuts".
    Raises ValueError for another kind.
    """
    if kind not in ("A", "B"):
        raise ValueError(f"shortcut: {kind!r} is not a kind of shortcut; choose 'A' (zero padding) or 'B' (projection)")
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "A":
        return PadShortcut(out_channels - in_channels, stride)
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left).

    [B, in_channels, H, W] -> [B, channels, H / stride, W / stride]. `downsample` is the shortcut, None for identity.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2015, figure 5 right).

    [B, in_channels, H, W] -> [B, 4 * channels, H / stride, W / stride]. The 3x3 convolution has
    groups * (channels * width_per_group // 64) channels: Xie et al. 2016, table 1, and Wide ResNet with one group.
    `stride_in_1x1` puts the stride in the first 1x1 convolution as in the paper ("v1"); otherwise it sits in the 3x3
    ("v1.5", as torchvision and fb.resnet.torch), which looks at every pixel: about half a point better and 5 % slower
    by NVIDIA's account.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: nn.Module | None,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width = channels * width_per_group // 64 * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(in_channels, width, stride1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride2, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network with one stage for each entry of `depths`.

    Images [B, 3, H, W] -> logits [B, num_classes]. H and W are free; the classifier sees the mean over the last map.

    block: BasicBlock or Bottleneck, for all stages.
    depths: blocks per stage.
    num_classes: length of a row of logits.
    stem: "imagenet" (7x7 convolution of stride 2, 3x3 max pool of stride 2) or "cifar" (3x3 convolution, no pool).
    stem_channels: channels of the stem and of the first stage; every further stage doubles them.
    shortcut: "A" or "B", see `make_shortcut`.
    groups, width_per_group: of the 3x3 convolution of a bottleneck, see there.
    zero_init_residual: start every block as its shortcut, see `init.zero_residual_norms`.
    stride_in_1x1: True for v1, False for v1.5, see `Bottleneck`. It warns on basic blocks, where it has no effect.

    Raises ValueError for a stem or shortcut that is not one of these, and for groups or a width with basic blocks.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        stem: str = "imagenet",
        stem_channels: int = 64,
        shortcut: str = "B",
        groups: int = 1,
        width_per_group: int = 64,
        zero_init_residual: bool = False,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        bottleneck_options = {"groups": groups, "width_per_group": width_per_group, "stride_in_1x1": stride_in_1x1}
        if block is BasicBlock:
            if groups != 1 or width_per_group != 64:
                raise ValueError(
                    f"groups={groups}, width_per_group={width_per_group}: basic blocks have no such options"
                )
            if stride_in_1x1:
                warnings.warn("stride_in_1x1 has no effect: this network has no bottleneck blocks", stacklevel=3)
            bottleneck_options = {}
        self._make_stem(stem, stem_channels)
        self.num_stages = len(depths)
        in_channels = stem_channels
        for i, depth in enumerate(depths):
            channels, stride = stem_channels * 2**i, 1 if i == 0 else 2
            stage = _make_stage(block, depth, in_channels, channels, stride, shortcut, bottleneck_options)
            self.add_module(f"layer{i + 1}", stage)
            in_channels = channels * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        init_weights(self)
        if zero_init_residual:
            zero_residual_norms(m for m in self.modules() if isinstance(m, (BasicBlock, Bottleneck)))

    def _make_stem(self, stem: str, channels: int) -> None:
        """Set conv1, bn1, relu and maxpool: [B, 3, H, W] -> [B, channels, H / 4, W / 4], or full size for "cifar"."""
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
            pool = nn.MaxPool2d(3, stride=2, padding=1)
        elif stem == "cifar":
            self.conv1 = conv3x3(3, channels)
            pool = nn.Identity()
        else:
            raise ValueError(f"stem: {stem!r} is not a kind of stem; choose 'imagenet' or 'cifar'")
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _make_stage(
    block: type[BasicBlock] | type[Bottleneck],
    depth: int,
    in_channels: int,
    channels: int,
    stride: int,
    shortcut: str,
    options: dict,
) -> nn.Sequential:
    """`depth` blocks in a row; the first one changes the number of channels and the size."""
    out_channels = channels * block.expansion
    downsample = make_shortcut(shortcut, in_channels, out_channels, stride)
    blocks = [block(in_channels, channels, stride, downsample, **options)]
    blocks += [block(out_channels, channels, 1, None, **options) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


_CIFAR = {"stem": "cifar", "stem_channels": 16, "shortcut": "A"}     # He et al. 2015, section 4.2; 6 n + 2 layers

FAMILY: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], dict]] = {
    # He et al. 2015, table 1: 11.7, 21.8, 25.6, 44.5 and 60.2 million parameters
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
    # Xie et al. 2016, table 1, and torchvision's larger one: 25.0 and 88.8 million
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}),
    # Zagoruyko and Komodakis 2016, 3x3 convolutions twice as wide: 68.9 and 126.9 million
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"width_per_group": 128}),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), {"width_per_group": 128}),
    # He et al. 2015, table 6, for images of 32x32: 0.27, 0.46, 0.66, 0.85 and 1.7 million
    "resnet20": (BasicBlock, (3, 3, 3), _CIFAR),
    "resnet32": (BasicBlock, (5, 5, 5), _CIFAR),
    "resnet44": (BasicBlock, (7, 7, 7), _CIFAR),
    "resnet56": (BasicBlock, (9, 9, 9), _CIFAR),
    "resnet110": (BasicBlock, (18, 18, 18), _CIFAR),
}
"""Each name's block, blocks per stage, and further arguments of `ResNet`."""
