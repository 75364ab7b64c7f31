"""The ResNet family: one network, and a table of what has a name.

ImageNet: ResNet-18/34/50/101/152 (He et al. 2015, "Deep Residual Learning for Image Recognition",
table 1), ResNeXt (Xie et al. 2016, "Aggregated Residual Transformations") and Wide ResNet
bottlenecks (Zagoruyko and Komodakis 2016, "Wide Residual Networks"), with torchvision's names and
state-dict keys, so that weights go both ways. CIFAR: ResNet-20/32/44/56/110 (He et al. 2015,
section 4.2). Plain networks are the same without shortcuts, and pre-activation ones (`preresnet`)
move norm and ReLU before the convolutions (He et al. 2016, "Identity Mappings").

A network is a stem, stages `layer1..layerN` of residual blocks, a global average pool and a
classifier. The first block of every stage but the first halves height and width. Images are [B, 3,
H, W], logits are [B, num_classes].
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.models.init import init_weights, zero_residual_norms


@dataclass(frozen=True)
class Options:
    """What the members of the family differ in, apart from the kind of block and the depth."""

    stem: str = "imagenet"
    """imagenet: 7x7 convolution of stride 2, 3x3 max pool of stride 2; cifar: 3x3 convolution, no
    pool; deep: three 3x3 convolutions in place of the 7x7 (ResNet-C, He et al. 2018, "Bag of
    Tricks", figure 2)"""
    stem_channels: int = 64
    """channels of the stem; stage i has stem_channels * widen * 2**i"""
    widen: int = 1
    """factor on the channels of all stages (k of Zagoruyko and Komodakis 2016, table 1)"""
    shortcut: str = "B"
    """A, B, C or none, see `make_shortcut`"""
    avg_pool_shortcut: bool = False
    """a shortcut of stride 2 averages before it projects (ResNet-D, He et al. 2018, "Bag of
    Tricks", figure 2)"""
    groups: int = 1
    """groups of the 3x3 convolution of a bottleneck"""
    width_per_group: int = 64
    """its channels in each group at the first stage, see `Bottleneck`"""
    zero_init_residual: bool = False
    """start every block as its shortcut, see `init.zero_residual_norms`"""
    stride_in_1x1: bool = False
    """True for v1, False for v1.5, see `Bottleneck`"""
    preactivation: bool = False
    """norm and ReLU before each convolution, none after the addition (He et al. 2016, figure 4e)"""
    squeeze_excitation: bool = False
    """weigh the channels at the end of each residual branch, see `SqueezeExcitation`"""
    stochastic_depth: float = 0.0
    """rate at which the last residual branch is left out in training; it rises linearly from 0 for
    the first, as in timm (Huang et al. 2016 begin one step above)"""
    blur_pool: bool = False
    """blur before each convolution of stride 2 but the stem's, see `BlurConv2d`"""


class BlurConv2d(nn.Conv2d):
    """A convolution after the 3x3 binomial filter, so that its stride does not alias. Same
    state-dict keys as Conv2d.

    Zhang 2019, "Making Convolutional Networks Shift-Invariant Again"; blur first, then the strided
    convolution.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", row[:, None] * row, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return super().forward(
            F.conv2d(x, self.kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
        )


class SqueezeExcitation(nn.Module):
    """Each channel times a weight in (0, 1) that two layers find from all channels' means: [B, C,
    H, W], same shape.

    Hu et al. 2017, "Squeeze-and-Excitation Networks", equations 2 to 4, reduction 16. Keys as
    timm's `se`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class NoShortcut(nn.Module):
    """The path around the block of a plain network, which adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    blur: bool = False,
) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1. No bias: a norm follows, which would cancel
    it.
    """
    kind = BlurConv2d if blur and stride > 1 else nn.Conv2d
    return kind(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def make_shortcut(
    in_channels: int, out_channels: int, stride: int, options: Options
) -> nn.Module | None:
    """The path around a block, or None where the input can be added as it is.

    `options.shortcut` is "A" (every `stride`-th pixel, and channels of zeros behind those there
    are), "B" (1x1 convolution and norm), both of which leave the input alone where the shape does
    not change, "C" (as B, in every block) or "none". He et al. 2015, section 4.1, "Identity vs.
    Projection Shortcuts". Raises ValueError for another kind.
    """
    kind = options.shortcut
    if kind not in ("A", "B", "C", "none"):
        raise ValueError(
            f"model.shortcut: {kind!r} is not a kind of shortcut; choose 'A' (zero padding), 'B' "
            "(projection where the shape changes), 'C' (projection everywhere) or 'none' (plain network)"
        )
    if kind == "none":
        return NoShortcut()
    if kind != "C" and stride == 1 and in_channels == out_channels:
        return None
    if kind == "A":
        zeros = nn.ConstantPad3d(
            (0, 0, 0, 0, 0, out_channels - in_channels), 0.0
        )  # of C, H, W: behind C only
        return nn.Sequential(nn.AvgPool2d(1, stride), zeros)
    norm = [] if options.preactivation else [nn.BatchNorm2d(out_channels)]  # there it comes before
    if options.avg_pool_shortcut:
        pool = (
            nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            if stride > 1
            else nn.Identity()
        )
        return nn.Sequential(pool, conv(in_channels, out_channels, 1), *norm)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride, blur=options.blur_pool), *norm)


class Block(nn.Module):
    """What residual blocks share: [B, in_channels, H, W] -> [B, expansion * channels, H / stride, W
    / stride].

    `downsample` is the shortcut, None for identity. `is_first`: the block follows the stem, whose
    norm and ReLU serve as its pre-activation (He et al. 2016, appendix). `drop_rate`: share of
    samples in training whose residual branch is left out (Huang et al. 2016, "Deep Networks with
    Stochastic Depth"); the others are scaled up by as much.
    """

    expansion: int

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        options: Options,
        is_first: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        out_channels, before = channels * self.expansion, options.preactivation
        self._make_residual(in_channels, channels, stride, options)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(in_channels, out_channels, stride, options)
        self.se = SqueezeExcitation(out_channels) if options.squeeze_excitation else nn.Identity()
        self.preactivation = (
            nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
            if before and not is_first
            else nn.Identity()
        )
        self.activation = nn.Identity() if before else self.relu
        self.drop_rate = drop_rate

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        return getattr(self, "bn3", self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.preactivation(x)
        shortcut = x if self.downsample is None else self.downsample(activated)
        out = self.se(self.residual(activated))
        if self.drop_rate and self.training:
            kept = out.new_empty(len(out), 1, 1, 1).bernoulli_(1 - self.drop_rate)
            out = out * kept / (1 - self.drop_rate)
        out += shortcut
        return self.activation(out)


def end_norm(channels: int, options: Options) -> nn.Module:
    """The norm after a block's last convolution; with pre-activation the next block has it."""
    return nn.Identity() if options.preactivation else nn.BatchNorm2d(channels)


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left)."""

    expansion = 1

    def _make_residual(
        self, in_channels: int, channels: int, stride: int, options: Options
    ) -> None:
        self.conv1 = conv(in_channels, channels, 3, stride, blur=options.blur_pool)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = end_norm(channels, options)

    def residual(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2015, figure 5 right).

    The 3x3 convolution has groups * (channels * width_per_group // 64) channels: Xie et al. 2016,
    table 1, and Wide ResNet with one group. `stride_in_1x1` puts the stride in the first 1x1
    convolution as in the paper ("v1"); otherwise it sits in the 3x3 ("v1.5", as torchvision and
    fb.resnet.torch), which looks at every pixel: about half a point better and 5 % slower by
    NVIDIA's account.
    """

    expansion = 4

    def _make_residual(
        self, in_channels: int, channels: int, stride: int, options: Options
    ) -> None:
        width, blur = channels * options.width_per_group // 64 * options.groups, options.blur_pool
        stride1, stride2 = (stride, 1) if options.stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride1, blur=blur)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride2, options.groups, blur=blur)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, channels * self.expansion, 1)
        self.bn3 = end_norm(channels * self.expansion, options)

    def residual(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))


class ResNet(nn.Module):
    """A residual network with one stage for each entry of `depths`.

    Images [B, 3, H, W] -> logits [B, num_classes]. H and W are free; the classifier sees the mean
    over the last map.

    block: BasicBlock or Bottleneck, for all stages. depths: blocks per stage. num_classes: length
    of a row of logits. options: those of `Options`.

    Raises ValueError for a stem or shortcut that there is not, and for options that exclude each
    other. Warns where stride_in_1x1 has no effect.
    """

    def __init__(
        self, block: type[Block], depths: Sequence[int], num_classes: int = 1000, **options
    ) -> None:
        super().__init__()
        options = Options(**options)
        check_options(block, options)
        self._make_stem(options.stem, options.stem_channels)
        self.num_stages = len(depths)
        in_channels, number_of_all, last = options.stem_channels, 0, max(1, sum(depths) - 1)
        for i, depth in enumerate(depths):
            channels, stage = options.stem_channels * options.widen * 2**i, nn.Sequential()
            for number in range(depth):
                stride = 2 if i > 0 and number == 0 else 1
                stage.append(
                    block(
                        in_channels,
                        channels,
                        stride,
                        options,
                        is_first=number_of_all == 0,
                        drop_rate=options.stochastic_depth * number_of_all / last,
                    )
                )
                in_channels = channels * block.expansion
                number_of_all += 1
            self.add_module(f"layer{i + 1}", stage)
        self.activation = (
            nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True))
            if options.preactivation
            else nn.Identity()
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        init_weights(self)
        if options.zero_init_residual:
            zero_residual_norms(m for m in self.modules() if isinstance(m, Block))

    def _make_stem(self, stem: str, channels: int) -> None:
        """Set conv1, bn1, relu and maxpool: [B, 3, H, W] -> [B, channels, H / 4, W / 4], or full
        size for "cifar".
        """
        if stem == "imagenet":
            self.conv1 = conv(3, channels, 7, stride=2)
        elif stem == "deep":
            half = channels // 2
            self.conv1 = nn.Sequential(
                conv(3, half, 3, stride=2),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
                conv(half, half, 3),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
                conv(half, channels, 3),
            )
        elif stem == "cifar":
            self.conv1 = conv(3, channels, 3)
        else:
            raise ValueError(
                f"model.stem: {stem!r} is not a kind of stem; choose 'imagenet', 'cifar' or 'deep'"
            )
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for i in range(1, self.num_stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(torch.flatten(self.avgpool(self.activation(x)), 1))


def check_options(block: type[Block], options: Options) -> None:
    """Refuse options that exclude each other with a ValueError; warn about one without effect."""
    if block is BasicBlock and (options.groups != 1 or options.width_per_group != 64):
        raise ValueError(
            f"groups={options.groups}, width_per_group={options.width_per_group}: only bottlenecks have "
            "these"
        )
    if options.zero_init_residual and (options.preactivation or options.shortcut == "none"):
        raise ValueError(
            "model.zero_init_residual is true: it needs a norm at the end of the residual branch and a "
            "shortcut beside it, and this network is pre-activated or plain; set it to false"
        )
    if options.stochastic_depth and options.shortcut == "none":
        raise ValueError(
            f"model.stochastic_depth is {options.stochastic_depth}: a plain network has no way around a "
            "block that is left out; set it to 0"
        )
    if options.avg_pool_shortcut and options.shortcut in ("A", "none"):
        raise ValueError(
            "model.avg_pool_shortcut is true: only shortcuts B and C project; set it to false, or "
            "model.shortcut to B"
        )
    if block is BasicBlock and options.stride_in_1x1:
        warnings.warn(
            "stride_in_1x1 has no effect: this network has no bottleneck blocks", stacklevel=4
        )


_CIFAR = {
    "stem": "cifar",
    "stem_channels": 16,
    "shortcut": "A",
}  # He et al. 2015, section 4.2; 6 n + 2 layers
_PLAIN = {"shortcut": "none"}
_PRE = {"preactivation": True}

FAMILY: dict[str, tuple[type[Block], tuple[int, ...], dict]] = {
    # He et al. 2015, table 1: 11.7, 21.8, 25.6, 44.5 and 60.2 million parameters
    "resnet18": (BasicBlock, (2, 2, 2, 2), {}),
    "resnet34": (BasicBlock, (3, 4, 6, 3), {}),
    "resnet50": (Bottleneck, (3, 4, 6, 3), {}),
    "resnet101": (Bottleneck, (3, 4, 23, 3), {}),
    "resnet152": (Bottleneck, (3, 8, 36, 3), {}),
    # He et al. 2015, figure 3 middle: as deep, without shortcuts
    "plain18": (BasicBlock, (2, 2, 2, 2), _PLAIN),
    "plain34": (BasicBlock, (3, 4, 6, 3), _PLAIN),
    # Xie et al. 2016, table 1, and torchvision's larger ones: 25.0, 88.8 and 83.5 million
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}),
    "resnext101_64x4d": (Bottleneck, (3, 4, 23, 3), {"groups": 64, "width_per_group": 4}),
    # Zagoruyko and Komodakis 2016, 3x3 convolutions twice as wide: 68.9 and 126.9 million
    "wide_resnet50_2": (Bottleneck, (3, 4, 6, 3), {"width_per_group": 128}),
    "wide_resnet101_2": (Bottleneck, (3, 4, 23, 3), {"width_per_group": 128}),
    # He et al. 2018, "Bag of Tricks", table 5; Hu et al. 2017, table 2 (28.1 million); He et al.
    # 2016, table 5
    "resnet50c": (Bottleneck, (3, 4, 6, 3), {"stem": "deep"}),
    "resnet50d": (Bottleneck, (3, 4, 6, 3), {"stem": "deep", "avg_pool_shortcut": True}),
    "seresnet50": (Bottleneck, (3, 4, 6, 3), {"squeeze_excitation": True}),
    "preresnet200": (Bottleneck, (3, 24, 36, 3), _PRE),
    # He et al. 2015, table 6, for images of 32x32: 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4 million
    "resnet20": (BasicBlock, (3, 3, 3), _CIFAR),
    "resnet32": (BasicBlock, (5, 5, 5), _CIFAR),
    "resnet44": (BasicBlock, (7, 7, 7), _CIFAR),
    "resnet56": (BasicBlock, (9, 9, 9), _CIFAR),
    "resnet110": (BasicBlock, (18, 18, 18), _CIFAR),
    "resnet1202": (BasicBlock, (200, 200, 200), _CIFAR),
    "plain20": (BasicBlock, (3, 3, 3), _CIFAR | _PLAIN),
    "plain32": (BasicBlock, (5, 5, 5), _CIFAR | _PLAIN),
    "plain44": (BasicBlock, (7, 7, 7), _CIFAR | _PLAIN),
    "plain56": (BasicBlock, (9, 9, 9), _CIFAR | _PLAIN),
    # He et al. 2016, tables 2 to 4, and bottlenecks of 9 n + 2 layers; WRN-28-10: 36.5 million
    "resnet29": (Bottleneck, (3, 3, 3), _CIFAR),
    "resnet164": (Bottleneck, (18, 18, 18), _CIFAR),
    "preresnet110": (BasicBlock, (18, 18, 18), _CIFAR | _PRE),
    "preresnet164": (Bottleneck, (18, 18, 18), _CIFAR | _PRE),
    "preresnet1001": (Bottleneck, (111, 111, 111), _CIFAR | _PRE),
    "wide_resnet28_10": (BasicBlock, (4, 4, 4), _CIFAR | _PRE | {"widen": 10, "shortcut": "B"}),
}
"""Each name's block, blocks per stage, and further arguments of `ResNet`."""
