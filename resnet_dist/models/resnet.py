"""The ResNet family: one network, and a table of its members by name.

ImageNet: ResNet-18/34/50/101/152 (He et al. 2015, "Deep Residual Learning for Image Recognition",
table 1), ResNeXt (Xie et al. 2016, "Aggregated Residual Transformations") and Wide ResNet
bottlenecks (Zagoruyko and Komodakis 2016, "Wide Residual Networks"). Names and state-dict keys are
torchvision's, so that weights can be exchanged. CIFAR: ResNet-20/32/44/56/110 (He et al. 2015,
section 4.2). Plain networks are the same without shortcuts. Pre-activation networks (`preresnet`)
have norm and ReLU before the convolutions (He et al. 2016, "Identity Mappings").
ResNet-RS: Bello et al. 2021, "Revisiting ResNets"; state-dict keys are timm's.

A network is a stem, stages `layer1..layerN` of residual blocks, a global average pool and a
classifier. The first block of every stage but the first halves height and width. Images are [B, 3,
H, W], logits are [B, num_classes].
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.models.init import init_weights, zero_residual_norms
from resnet_dist.models.layers import MethodPart, NoShortcut, SqueezeExcitation, conv, drop_samples


@dataclass(frozen=True)
class Options:
    """How the members of the family differ, apart from the kind of block and the depth."""

    stem: str = "imagenet"
    """imagenet: 7x7 convolution of stride 2, 3x3 max pool of stride 2; cifar: 3x3 convolution, no
    pool; deep: three 3x3 convolutions in place of the 7x7 (ResNet-C, He et al. 2018, "Bag of
    Tricks", figure 2); deep_strided: as deep, with a fourth 3x3 convolution, of stride 2, in place
    of the pool (Bello et al. 2021)"""
    stem_channels: int = 64
    """channels of the stem; stage i, from 0, has stem_channels * widen * 2**i"""
    widen: int = 1
    """factor on the channels of all stages (k of Zagoruyko and Komodakis 2016, table 1)"""
    shortcut: str = "B"
    """A, A_symmetric, B, C or none, see `make_shortcut`"""
    avg_pool_shortcut: bool = False
    """a shortcut of stride 2 averages before it projects (ResNet-D, He et al. 2018, "Bag of
    Tricks", figure 2)"""
    groups: int = 1
    """groups of the 3x3 convolution of a bottleneck"""
    width_per_group: int = 64
    """channels of that convolution in each group at the first stage, see `Bottleneck`"""
    zero_init_residual: bool = False
    """start every block as its shortcut, see `init.zero_residual_norms`"""
    stride_in_1x1: bool = False
    """True for v1, False for v1.5, see `Bottleneck`"""
    preactivation: bool = False
    """norm and ReLU before each convolution, none after the addition (He et al. 2016, figure 4e)"""
    squeeze_excitation: bool = False
    """weigh the channels at the end of each residual branch, see `SqueezeExcitation`"""
    se_ratio: float = 1 / 16
    """hidden channels of squeeze-and-excitation, as a fraction of the channels"""
    dropout: float = 0.0
    """share of the features before the classifier that are set to zero in training"""
    stochastic_depth: float = 0.0
    """rate at which the last residual branch is dropped in training. It rises linearly from 0 for
    the first block, as in timm (Huang et al. 2016 begin one step above 0)"""
    blur_pool: bool = False
    """blur before each convolution of stride 2 but the stem's, see `BlurConv2d`"""


def make_shortcut(
    in_channels: int, out_channels: int, stride: int, options: Options
) -> nn.Module | None:
    """The path around a block, or None if the input can be added as it is.

    `options.shortcut` is one of (He et al. 2015, section 4.1, "Identity vs. Projection Shortcuts"):

    - "A": every `stride`-th pixel, and channels of zeros behind the existing ones;
    - "A_symmetric": as A, but half of the zeros stand before them, as in a well-known PyTorch
      version of the CIFAR networks. The weights fit both, with other results;
    - "B": a 1x1 convolution and a norm; A and B are None where the shape does not change;
    - "C": as B, in every block;
    - "none": nothing is added.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output of the block.
        stride: Stride of the block.
        options: Options of the network.

    Raises:
        ValueError: For another kind.
    """
    kind = options.shortcut
    if kind not in ("A", "A_symmetric", "B", "C", "none"):
        raise ValueError(
            f"model.shortcut: {kind!r} is not a kind of shortcut; choose 'A' or 'A_symmetric' "
            "(zero padding), 'B' (projection where the shape changes), 'C' (projection everywhere) "
            "or 'none' (plain network)"
        )
    if kind == "none":
        return NoShortcut()
    keeps_shape = stride == 1 and in_channels == out_channels
    if keeps_shape and kind != "C":
        return None
    if kind in ("A", "A_symmetric"):
        pool = nn.AvgPool2d(1, stride)
        num_zeros = out_channels - in_channels
        num_before = num_zeros // 2 if kind == "A_symmetric" else 0
        # The pairs of widths belong to W, H and C: zeros are added to C only.
        zeros = nn.ConstantPad3d((0, 0, 0, 0, num_before, num_zeros - num_before), 0.0)
        return nn.Sequential(pool, zeros)
    return _projection(in_channels, out_channels, stride, options)


class Block(nn.Module):
    """What residual blocks share.

    [B, in_channels, H, W] -> [B, expansion * channels, H / stride, W / stride]. `downsample` is the
    shortcut, None for identity.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the block, before `expansion`.
        stride: Stride of the block.
        options: Options of the network.
        is_first: Whether the block follows the stem, whose norm and ReLU then serve as its
            pre-activation (He et al. 2016, appendix).
        drop_rate: Share of the samples whose residual branch is dropped in training (Huang et al.
            2016, "Deep Networks with Stochastic Depth"); the others are scaled up by as much.
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
        out_channels = channels * self.expansion
        self._make_residual(in_channels, channels, stride, options)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(in_channels, out_channels, stride, options)
        self.se: nn.Module = nn.Identity()
        if options.squeeze_excitation:
            self.se = SqueezeExcitation(out_channels, options.se_ratio)
        self.preactivation: nn.Module = nn.Identity()
        if options.preactivation and not is_first:
            self.preactivation = norm_and_relu(in_channels)
        self.activation = nn.Identity() if options.preactivation else self.relu
        self.drop_rate = drop_rate

    def _make_residual(
        self, in_channels: int, channels: int, stride: int, options: Options
    ) -> None:
        """Set the layers of `residual`."""
        raise NotImplementedError

    def residual(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        name = "bn3" if hasattr(self, "bn3") else "bn2"
        return self.get_submodule(name)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, expansion * channels, H / stride, W / stride]."""
        activated = self.preactivation(x)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(activated)
        out = self.residual(activated)
        out = self.se(out)
        if self.drop_rate and self.training:
            out = drop_samples(out, self.drop_rate)
        out += shortcut
        activated_sum: Tensor = self.activation(out)
        return activated_sum


def _projection(in_channels: int, out_channels: int, stride: int, options: Options) -> nn.Module:
    """The shortcut of kinds B and C: a 1x1 convolution, and a norm without pre-activation."""
    layers = nn.Sequential()
    if not options.avg_pool_shortcut:
        layers.append(conv(in_channels, out_channels, 1, stride, blur=options.blur_pool))
    else:
        pool: nn.Module = nn.Identity()
        if stride > 1:
            pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        layers.append(pool)
        layers.append(conv(in_channels, out_channels, 1))

    # With pre-activation the norm is before the block.
    if not options.preactivation:
        layers.append(nn.BatchNorm2d(out_channels))
    return layers


def norm_and_relu(channels: int) -> nn.Sequential:
    """A pre-activation."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def end_norm(channels: int, options: Options) -> nn.Module:
    """The norm after a block's last convolution; with pre-activation the next block has it."""
    if options.preactivation:
        return nn.Identity()
    return nn.BatchNorm2d(channels)


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
        out: Tensor = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        return out


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2015, figure 5 right).

    The 3x3 convolution has groups * (channels * width_per_group // 64) channels (Xie et al. 2016,
    table 1; Wide ResNet with one group). `stride_in_1x1` puts the stride into the first 1x1
    convolution, as in the paper ("v1"). Otherwise the 3x3 has it ("v1.5", as in torchvision and
    fb.resnet.torch), so that every pixel counts: about half a point better and 5 % slower according
    to NVIDIA.
    """

    expansion = 4

    def _make_residual(
        self, in_channels: int, channels: int, stride: int, options: Options
    ) -> None:
        width = channels * options.width_per_group // 64 * options.groups
        out_channels = channels * self.expansion
        blur = options.blur_pool
        stride_of_1x1 = 1
        stride_of_3x3 = stride
        if options.stride_in_1x1:
            stride_of_1x1 = stride
            stride_of_3x3 = 1
        self.conv1 = conv(in_channels, width, 1, stride_of_1x1, blur=blur)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride_of_3x3, options.groups, blur=blur)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = end_norm(out_channels, options)

    def residual(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        out: Tensor = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)
        return out


class ResNet(nn.Module):
    """A residual network with one stage for each entry of `depths`.

    Images [B, 3, H, W] -> logits [B, num_classes]. H and W are free, since the classifier sees the
    mean over the last map.

    Args:
        block: BasicBlock or Bottleneck, for all stages.
        depths: Blocks of each stage.
        num_classes: Length of a row of logits.
        **options: Fields of `Options`.

    Raises:
        ValueError: For an unknown stem or shortcut, and for options that exclude each other.
    """

    def __init__(
        self, block: type[Block], depths: Sequence[int], num_classes: int = 1000, **options: Any
    ) -> None:
        super().__init__()
        own = Options(**options)
        check_options(block, own)
        self._make_stem(own.stem, own.stem_channels)
        self.num_stages = len(depths)
        channels = self._make_stages(block, depths, own)
        self.activation: nn.Module = nn.Identity()
        if own.preactivation:
            self.activation = norm_and_relu(channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(own.dropout)
        self.fc = nn.Linear(channels, num_classes)
        # In a tuple they are not registered as modules.
        self._ends = (MethodPart(self.stem), MethodPart(self.head))
        init_weights(self)
        if own.zero_init_residual:
            last_norms = []
            for module in self.modules():
                if isinstance(module, Block):
                    last_norms.append(module.last_norm)
            zero_residual_norms(last_norms)

    def _make_stem(self, stem: str, channels: int) -> None:
        """Set conv1, bn1, relu and maxpool.

        [B, 3, H, W] -> [B, channels, H / 4, W / 4], or full size for "cifar".
        """
        self.conv1: nn.Module
        if stem == "imagenet":
            self.conv1 = conv(3, channels, 7, stride=2)
        elif stem in ("deep", "deep_strided"):
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
                f"model.stem: {stem!r} is not a kind of stem; choose 'imagenet', 'cifar', 'deep' "
                "or 'deep_strided'"
            )
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        if stem == "cifar":
            self.maxpool = nn.Identity()
        elif stem == "deep_strided":
            self.maxpool = nn.Sequential(
                conv(channels, channels, 3, stride=2),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            )

    def _make_stages(self, block: type[Block], depths: Sequence[int], options: Options) -> int:
        """Set layer1 to layerN.

        Args:
            block: Class of all blocks.
            depths: Blocks of each stage.
            options: Options of the network.

        Returns:
            The channels of the last map.
        """
        in_channels = options.stem_channels
        block_index = 0
        last_index = max(1, sum(depths) - 1)
        for stage_index, depth in enumerate(depths):
            channels = options.stem_channels * options.widen * 2**stage_index
            stage = nn.Sequential()
            for index_in_stage in range(depth):
                stride = 1
                if stage_index > 0 and index_in_stage == 0:
                    stride = 2
                drop_rate = options.stochastic_depth * block_index / last_index
                new_block = block(
                    in_channels,
                    channels,
                    stride,
                    options,
                    is_first=block_index == 0,
                    drop_rate=drop_rate,
                )
                stage.append(new_block)
                in_channels = channels * block.expansion
                block_index += 1
            self.add_module(f"layer{stage_index + 1}", stage)
        return in_channels

    def parts(self) -> dict[str, nn.Module]:
        """What `forward` calls one after the other: stem, layer1 to layerN, head.

        Each part can be compiled in place (see compilation.py).
        """
        stem, head = self._ends
        parts: dict[str, nn.Module] = {"stem": stem}
        for number in range(1, self.num_stages + 1):
            name = f"layer{number}"
            parts[name] = self.get_submodule(name)
        parts["head"] = head
        return parts

    def stem(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the first map, see `_make_stem`."""
        x = self.conv1(images)
        x = self.bn1(x)
        x = self.relu(x)
        first_map: Tensor = self.maxpool(x)
        return first_map

    def head(self, x: Tensor) -> Tensor:
        """The last map [B, C, H, W] -> logits [B, num_classes]."""
        x = self.activation(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.dropout(x)
        logits: Tensor = self.fc(x)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, num_classes]."""
        x = images
        for part in self.parts().values():
            x = part(x)
        return x


def check_options(block: type[Block], options: Options) -> None:
    """Check options that depend on each other; warn about an option without effect.

    Args:
        block: Class of the blocks of the network.
        options: Options of the network.

    Raises:
        ValueError: For options that exclude each other.
    """
    is_basic = block is BasicBlock
    is_plain = options.shortcut == "none"
    has_default_groups = options.groups == 1 and options.width_per_group == 64
    if is_basic and not has_default_groups:
        raise ValueError(
            f"groups={options.groups}, width_per_group={options.width_per_group}: only bottleneck "
            "blocks have these options"
        )
    if options.zero_init_residual and (options.preactivation or is_plain):
        raise ValueError(
            "model.zero_init_residual is true: it needs a norm at the end of the residual branch "
            "and a shortcut beside it, and this network is pre-activated or plain; set it to false"
        )
    if options.stochastic_depth and is_plain:
        raise ValueError(
            f"model.stochastic_depth is {options.stochastic_depth}: a plain network has no "
            "shortcut around a dropped block; set it to 0"
        )
    if options.avg_pool_shortcut and options.shortcut in ("A", "A_symmetric", "none"):
        raise ValueError(
            "model.avg_pool_shortcut is true: only shortcuts B and C project; set it to false, or "
            "model.shortcut to B"
        )
    if is_basic and options.stride_in_1x1:
        warnings.warn(
            "stride_in_1x1 has no effect: this network has no bottleneck blocks", stacklevel=4
        )


# He et al. 2015, section 4.2; 6 n + 2 layers.
_CIFAR = {"stem": "cifar", "stem_channels": 16, "shortcut": "A"}
_PLAIN = {"shortcut": "none"}
_PRE = {"preactivation": True}
_DEEP_STEM = {"stem": "deep"}
_RESNET_D = {"stem": "deep", "avg_pool_shortcut": True}
_SE = {"squeeze_excitation": True}
_RESNET_RS = _SE | {"stem": "deep_strided", "avg_pool_shortcut": True, "se_ratio": 0.25}
_GROUPS_32X4 = {"groups": 32, "width_per_group": 4}
_GROUPS_32X8 = {"groups": 32, "width_per_group": 8}
_GROUPS_64X4 = {"groups": 64, "width_per_group": 4}
_TWICE_AS_WIDE = {"width_per_group": 128}
_WRN_28_10 = _CIFAR | _PRE | {"widen": 10, "shortcut": "B"}

# Blocks of each stage.
_DEPTHS_18 = (2, 2, 2, 2)
_DEPTHS_50 = (3, 4, 6, 3)
_DEPTHS_101 = (3, 4, 23, 3)
_DEPTHS_152 = (3, 8, 36, 3)

FAMILY: dict[str, tuple[type[Block], tuple[int, ...], dict[str, Any]]] = {
    # He et al. 2015, table 1: 11.7, 21.8, 25.6, 44.5 and 60.2 million parameters
    "resnet18": (BasicBlock, _DEPTHS_18, {}),
    "resnet34": (BasicBlock, _DEPTHS_50, {}),
    "resnet50": (Bottleneck, _DEPTHS_50, {}),
    "resnet101": (Bottleneck, _DEPTHS_101, {}),
    "resnet152": (Bottleneck, _DEPTHS_152, {}),
    # He et al. 2015, figure 3 middle: as deep, without shortcuts
    "plain18": (BasicBlock, _DEPTHS_18, _PLAIN),
    "plain34": (BasicBlock, _DEPTHS_50, _PLAIN),
    # Xie et al. 2016, table 1, and torchvision's larger ones: 25.0, 88.8 and 83.5 million
    "resnext50_32x4d": (Bottleneck, _DEPTHS_50, _GROUPS_32X4),
    "resnext101_32x8d": (Bottleneck, _DEPTHS_101, _GROUPS_32X8),
    "resnext101_64x4d": (Bottleneck, _DEPTHS_101, _GROUPS_64X4),
    # Zagoruyko and Komodakis 2016, 3x3 convolutions twice as wide: 68.9 and 126.9 million
    "wide_resnet50_2": (Bottleneck, _DEPTHS_50, _TWICE_AS_WIDE),
    "wide_resnet101_2": (Bottleneck, _DEPTHS_101, _TWICE_AS_WIDE),
    # He et al. 2018, "Bag of Tricks", table 5; Hu et al. 2017, table 2 (28.1 million); He et al.
    # 2016, table 5
    "resnet50c": (Bottleneck, _DEPTHS_50, _DEEP_STEM),
    "resnet50d": (Bottleneck, _DEPTHS_50, _RESNET_D),
    "seresnet50": (Bottleneck, _DEPTHS_50, _SE),
    "preresnet200": (Bottleneck, (3, 24, 36, 3), _PRE),
    # Bello et al. 2021: 35.7, 63.6 and 86.6 million parameters
    "resnetrs50": (Bottleneck, _DEPTHS_50, _RESNET_RS),
    "resnetrs101": (Bottleneck, _DEPTHS_101, _RESNET_RS),
    "resnetrs152": (Bottleneck, _DEPTHS_152, _RESNET_RS),
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
    "wide_resnet28_10": (BasicBlock, (4, 4, 4), _WRN_28_10),
}
"""For each name: block, blocks of each stage, and the options of `ResNet`."""
