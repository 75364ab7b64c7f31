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
from torch import Tensor, nn

from resnet_dist.models.init import init_weights, zero_residual_norms


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1. No bias: a norm follows, which would cancel it."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def make_shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The path around a block, or None where the input can be added as it is.

    `kind` is "A" (every `stride`-th pixel, and channels of zeros behind those there are) or "B" (1x1 convolution and
    norm); both leave the input alone where the shape does not change. He et al. 2015, section 4.1, "Identity vs.
    Projection Shortcuts".
    Raises ValueError for another kind.
    """
    if kind not in ("A", "B"):
        raise ValueError(f"shortcut: {kind!r} is not a kind of shortcut; choose 'A' (zero padding) or 'B' (projection)")
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "A":
        zeros = nn.ConstantPad3d((0, 0, 0, 0, 0, out_channels - in_channels), 0.0)       # of C, H, W: behind C only
        return nn.Sequential(nn.AvgPool2d(1, stride), zeros)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """What residual blocks share: [B, in_channels, H, W] -> [B, expansion * channels, H / stride, W / stride].

    `downsample` is the shortcut, None for identity.
    """

    expansion: int

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        return getattr(self, "bn3", self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.residual(x)
        out += shortcut
        return self.relu(out)


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = downsample

    def residual(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2015, figure 5 right).

    The 3x3 convolution has groups * (channels * width_per_group // 64) channels: Xie et al. 2016, table 1, and Wide
    ResNet with one group. `stride_in_1x1` puts the stride in the first 1x1 convolution as in the paper ("v1");
    otherwise it sits in the 3x3 ("v1.5", as torchvision and fb.resnet.torch), which looks at every pixel: about half a
    point better and 5 % slower by NVIDIA's account.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None, *, groups: int,
                 width_per_group: int, stride_in_1x1: bool) -> None:
        super().__init__()
        width = channels * width_per_group // 64 * groups
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride2, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, channels * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def residual(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))


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

    def __init__(self, block: type[Block], depths: Sequence[int], num_classes: int = 1000, *, stem: str = "imagenet",
                 stem_channels: int = 64, shortcut: str = "B", groups: int = 1, width_per_group: int = 64,
                 zero_init_residual: bool = False, stride_in_1x1: bool = False) -> None:
        super().__init__()
        options = {"groups": groups, "width_per_group": width_per_group, "stride_in_1x1": stride_in_1x1}
        if block is BasicBlock:
            if groups != 1 or width_per_group != 64:
                raise ValueError(f"groups={groups}, width_per_group={width_per_group}: only bottlenecks have these")
            if stride_in_1x1:
                warnings.warn("stride_in_1x1 has no effect: this network has no bottleneck blocks", stacklevel=3)
            options = {}
        self._make_stem(stem, stem_channels)
        self.num_stages = len(depths)
        in_channels = stem_channels
        for i, depth in enumerate(depths):
            channels, stage = stem_channels * 2**i, nn.Sequential()
            for number in range(depth):
                stride = 2 if i > 0 and number == 0 else 1
                downsample = make_shortcut(shortcut, in_channels, channels * block.expansion, stride)
                stage.append(block(in_channels, channels, stride, downsample, **options))
                in_channels = channels * block.expansion
            self.add_module(f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        init_weights(self)
        if zero_init_residual:
            zero_residual_norms(m for m in self.modules() if isinstance(m, Block))

    def _make_stem(self, stem: str, channels: int) -> None:
        """Set conv1, bn1, relu and maxpool: [B, 3, H, W] -> [B, channels, H / 4, W / 4], or full size for "cifar"."""
        if stem == "imagenet":
            self.conv1 = conv(3, channels, 7, stride=2)
            pool = nn.MaxPool2d(3, stride=2, padding=1)
        elif stem == "cifar":
            self.conv1 = conv(3, channels, 3)
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


_CIFAR = {"stem": "cifar", "stem_channels": 16, "shortcut": "A"}     # He et al. 2015, section 4.2; 6 n + 2 layers

FAMILY: dict[str, tuple[type[Block], tuple[int, ...], dict]] = {
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
