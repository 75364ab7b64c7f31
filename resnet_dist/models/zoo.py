"""The networks beside the ResNet family: LeNet-5, which is ours, and those of torchvision and timm.

All take images [B, 3, H, W] and return logits [B, num_classes]. A network with auxiliary heads
returns a tuple in training mode, its logits first, and says in `auxiliary_weight` what the loss of
each further one counts. All start from fresh weights, drawn by the law of their library. Dropout
and stochastic depth draw from torch's generator, which the loop seeds for each (step, rank): a run
resumes exactly on as many ranks and micro-steps, on others with other masks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_C3 = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)
"""LeCun et al. 1998, table I: the maps of S2 that each map of C3 sees"""


def squash(x: Tensor) -> Tensor:
    """1.7159 tanh(2/3 x), of any shape (LeCun et al. 1998, section II.B and appendix A)."""
    return 1.7159 * torch.tanh(x * (2 / 3))


class Subsample(nn.Module):
    """[B, C, H, W] -> [B, C, H / 2, W / 2]: the sum of 2x2 pixels times a trained factor of the
    map, plus a bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(x, 2) * self.weight + self.bias[:, None, None]


class LeNet5(nn.Module):
    """LeNet-5 as LeCun et al. 1998, section II.B, has it, but for its two ends. Images [B, 3, 32,
    32], no other size.

    The paper's input is one grey map: here it is R, G and B, as the data path gives them. Its
    output is the distance of F6 from fixed bitmaps of the characters (RBF units): here a linear
    layer takes their place, as is usual, since other classes have no bitmaps. Weights start uniform
    in +-2.4 / fan-in (appendix A), biases at 0.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.c1, self.s2 = nn.Conv2d(3, 6, 5), Subsample(6)
        self.c3, self.s4 = nn.ModuleList(nn.Conv2d(len(maps), 1, 5) for maps in _C3), Subsample(16)
        self.c5, self.f6, self.output = (
            nn.Conv2d(16, 120, 5),
            nn.Linear(120, 84),
            nn.Linear(84, num_classes),
        )
        for module in self.modules():
            if hasattr(module, "weight"):
                fan_in = 4 if isinstance(module, Subsample) else module.weight[0].numel()
                nn.init.uniform_(module.weight, -2.4 / fan_in, 2.4 / fan_in)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = squash(self.s2(squash(self.c1(images)))).unbind(1)
        seen = [torch.stack([maps[i] for i in sources], 1) for sources in _C3]
        x = torch.cat([conv(x) for conv, x in zip(self.c3, seen, strict=True)], 1)
        x = squash(self.s4(squash(x)))
        return self.output(squash(self.f6(squash(self.c5(x)).flatten(1))))


_AUXILIARY = {"googlenet": 0.3, "inception_v3": 0.4}
"""Szegedy et al. 2014, section 5; for Inception v3 the paper gives none: that of TF-slim and
torchvision's training
"""


def _torchvision(name: str, num_classes: int) -> nn.Module:
    """`transform_input` is off, which would normalise once more."""
    from torchvision.models import get_model

    heads = (
        {"aux_logits": True, "transform_input": False, "init_weights": True}
        if name in _AUXILIARY
        else {}
    )
    model = get_model(name, weights=None, num_classes=num_classes, **heads)
    model.auxiliary_weight = _AUXILIARY.get(name, 0.0)
    return model


def _densenet264(num_classes: int) -> nn.Module:
    """Huang et al. 2017, table 1; torchvision has the class, not this size."""
    from torchvision.models import DenseNet

    return DenseNet(
        growth_rate=32, block_config=(6, 12, 64, 48), num_init_features=64, num_classes=num_classes
    )


def _timm(name: str, num_classes: int) -> nn.Module:
    """Timm's norms apply the activation too, which a conversion to SyncBatchNorm would lose: it
    gets its own place.
    """
    try:
        import timm
        from timm.layers import ConvNormAct
    except ImportError as problem:
        way = "pip install 'resnet-dist[timm]'"
        raise ValueError(
            f"model.name is {name!r}, which needs timm ({problem}): {way}"
        ) from problem
    model = timm.create_model(
        name, num_classes=num_classes, drop_rate=0.2
    )  # Szegedy et al. 2016, figure 9
    for module in [module for module in model.modules() if isinstance(module, ConvNormAct)]:
        module.bn.__class__, module.aa = nn.BatchNorm2d, module.bn.act
    return model


class Entry(NamedTuple):
    """A network: `make(num_classes=...)` gives it. Published top-1 and top-5 in percent on
    ImageNet, one central crop of `size` pixels (None where there are none; torchvision's may belong
    to a better recipe than the paper's), and where they stand. The least sides that it takes at all
    and in training; 0 = the same.
    """

    make: Callable[..., nn.Module]
    source: str
    size: int
    top1: float | None
    top5: float | None
    min_size: int = 1
    min_train_size: int = 0


_TORCHVISION = {  # weights: size, top-1, top-5, least sides; EfficientNet: Tan and Le 2019
    "AlexNet": (224, 56.522, 79.066, 63),
    "GoogLeNet": (224, 69.778, 89.530, 15),
    "VGG11": (224, 69.020, 88.628, 32),
    "VGG11_BN": (224, 70.370, 89.810, 32),
    "VGG13": (224, 69.928, 89.246, 32),
    "VGG13_BN": (224, 71.586, 90.374, 32),
    "VGG16": (224, 71.592, 90.382, 32),
    "VGG16_BN": (224, 73.360, 91.516, 32),
    "VGG19": (224, 72.376, 90.876, 32),
    "VGG19_BN": (224, 74.218, 91.842, 32),
    "Inception_V3": (299, 77.294, 93.450, 75, 299),
    "DenseNet121": (224, 74.434, 91.972, 29),
    "DenseNet161": (224, 77.138, 93.560, 29),
    "DenseNet169": (224, 75.600, 92.806, 29),
    "DenseNet201": (224, 76.896, 93.370, 29),
    "EfficientNet_B0": (224, 77.692, 93.532),
    "EfficientNet_B1": (240, 78.642, 94.186),
    "EfficientNet_B2": (288, 80.608, 95.310),
    "EfficientNet_B3": (300, 82.008, 96.054),
    "EfficientNet_B4": (380, 83.384, 96.594),
    "EfficientNet_B5": (456, 83.444, 96.628),
    "EfficientNet_B6": (528, 84.008, 96.916),
    "EfficientNet_B7": (600, 84.122, 96.908),
}
ZOO: dict[str, Entry] = {
    "lenet5": Entry(LeNet5, "", 32, None, None, 32),
    **{
        weights.lower(): Entry(
            partial(_torchvision, weights.lower()),
            f"torchvision {weights}_Weights.IMAGENET1K_V1",
            *figures,
        )
        for weights, figures in _TORCHVISION.items()
    },
    "densenet264": Entry(_densenet264, "Huang et al. 2017, table 3", 224, 77.85, 93.88, 29),
    **{
        name: Entry(partial(_timm, name), "Szegedy et al. 2016, table 2", 299, top1, top5, 75)
        for name, top1, top5 in (("inception_v4", 80.0, 95.0), ("inception_resnet_v2", 80.1, 95.1))
    },
}
"""Every network of this file, by the name that `model.name` gives it."""


def check_image_size(name: str, config) -> None:
    """Raise ValueError where the network `name` cannot take a side of the `data` section `config`."""
    entry, exact = ZOO.get(name, Entry(nn.Identity, "", 1, None, None)), name == "lenet5"
    train = entry.min_train_size or entry.min_size
    for key, side, least in (
        ("train_crop_size", config.train_crop_size, train),
        ("progressive_start_size", config.progressive_start_size or train, train),
        ("val_crop_size", config.val_crop_size, entry.min_size),
        *(("val_scales", side, entry.min_size) for side in config.val_scales),
    ):
        if side < least or exact and side != least:
            raise ValueError(
                f"data.{key} is {side}: {name} takes {least} pixels {'only' if exact else 'or more'}, and "
                f"was made for {entry.size}; set it so, or choose another model.name"
            )
