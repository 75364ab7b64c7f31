"""The networks beside the ResNet family: LeNet-5 (ours), and the rest from torchvision and timm, which are imported here.

All take images [B, 3, H, W] and return logits [B, num_classes]. A network with auxiliary heads returns a tuple in
training mode, its logits first, and says in `auxiliary_weight` what the loss of each further one counts; its
transformation of the input is off, since images come normalised. All start from fresh weights, drawn by the law of
their library. Dropout and stochastic depth draw from torch's generator, which the loop seeds for each (step, rank):
a run resumes exactly on the same number of ranks and micro-steps, and on another one with other masks.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_C3 = ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5), (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5),
       (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5), (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5))
"""LeCun et al. 1998, table I: the maps of S2 that each map of C3 sees"""


class Squash(nn.Module):
    """1.7159 tanh(2/3 x), of any shape (LeCun et al. 1998, section II.B and appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsample(nn.Module):
    """The sum of each 2x2 window times a trained coefficient plus a trained bias of its map: [B, C, H, W] -> halved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(x, 2) * self.weight + self.bias[:, None, None]


class PartialConv(nn.Module):
    """Layer C3, [B, 6, H, W] -> [B, 16, H - 4, W - 4]: 5x5 convolutions of the maps in table I; 1,516 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Conv2d(len(sources), 1, 5) for sources in _C3)

    def forward(self, x: Tensor) -> Tensor:
        planes = x.unbind(1)
        return torch.cat([conv(torch.stack([planes[i] for i in sources], 1))
                          for conv, sources in zip(self.maps, _C3, strict=True)], 1)


class LeNet5(nn.Module):
    """LeNet-5 as LeCun et al. 1998, section II.B, has it, but for its two ends. Images [B, 3, 32, 32], no other size.

    C1, S2, C3, S4, C5 and F6 are the paper's: partial connections in C3, trained subsampling, a squashing function
    behind each. The paper's input is one grey map: here it is R, G and B, as the data path gives them. Its output is 84
    Gaussian units with fixed 7x12 bitmaps of the characters as centres: here a linear layer takes their place, as is
    usual, since other classes have no such bitmaps, and the loss is the loop's. Weights start uniform in
    +-2.4 / fan-in (appendix A), biases at 0.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), Squash(), Subsample(6), Squash(),                        # C1, S2
            PartialConv(), Squash(), Subsample(16), Squash(),                            # C3, S4
            nn.Conv2d(16, 120, 5), Squash(), nn.Flatten(), nn.Linear(120, 84), Squash())     # C5, F6
        self.classifier = nn.Linear(84, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, Subsample)):
                fan_in = 4 if isinstance(module, Subsample) else module.weight[0].numel()
                nn.init.uniform_(module.weight, -2.4 / fan_in, 2.4 / fan_in)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def _torchvision(name: str, num_classes: int, auxiliary_weight: float = 0.0, **options) -> nn.Module:
    from torchvision.models import get_model

    model = get_model(name, weights=None, num_classes=num_classes, **options)
    if auxiliary_weight:
        model.auxiliary_weight = auxiliary_weight
    return model


def _densenet264(num_classes: int) -> nn.Module:
    """Huang et al. 2017, table 1; torchvision has the class, not this size."""
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=32, block_config=(6, 12, 64, 48), num_init_features=64, num_classes=num_classes)


def _timm(name: str, num_classes: int) -> nn.Module:
    """timm's norms apply the activation too, which a conversion to SyncBatchNorm would lose: it gets its own place."""
    try:
        import timm
        from timm.layers import ConvNormAct
    except ImportError as problem:
        raise ValueError(f"model.name is {name!r}, which needs timm: pip install 'resnet-dist[timm]' ({problem})"
                         ) from problem
    model = timm.create_model(name, num_classes=num_classes, drop_rate=0.2)     # Szegedy et al. 2016, figure 9
    for module in list(model.modules()):
        if isinstance(module, ConvNormAct):
            module.bn.__class__, module.aa = nn.BatchNorm2d, module.bn.act
    return model


class Entry(NamedTuple):
    """What there is to know of a network by its name."""

    make: Callable[..., nn.Module]
    """make(num_classes=...) gives the network with fresh weights"""
    size: int
    """side of the image, in pixels, that the figures are of"""
    top1: float | None
    """published accuracy in percent on ImageNet's validation set, one central crop; None where there is none"""
    top5: float | None
    source: str
    """of the two figures; those of torchvision's weights may belong to a better recipe than the paper's"""
    min_size: int = 1
    """least side that it takes, in pixels"""
    min_train_size: int = 0
    """least side in training, where an auxiliary head needs more; 0 = `min_size`"""
    train_size: int = 0
    """side of the training crop that belongs to `size`, where it is another; 0 = `size`"""
    only_min_size: bool = False
    """whether it takes no other side than `min_size`"""


def _entry(name: str, weights: str, top1: float, top5: float, size: int, min_size: int, min_train_size: int = 0,
           train_size: int = 0, **options) -> Entry:
    source = f"torchvision {weights}_Weights.IMAGENET1K_V1"
    return Entry(partial(_torchvision, name, **options), size, top1, top5, source, min_size, min_train_size, train_size)


_HEADS = {"aux_logits": True, "transform_input": False, "init_weights": True}

ZOO: dict[str, Entry] = {
    "lenet5": Entry(LeNet5, 32, None, None, "", 32, only_min_size=True),
    "alexnet": _entry("alexnet", "AlexNet", 56.522, 79.066, 224, 63),
    "vgg11": _entry("vgg11", "VGG11", 69.020, 88.628, 224, 32),
    "vgg13": _entry("vgg13", "VGG13", 69.928, 89.246, 224, 32),
    "vgg16": _entry("vgg16", "VGG16", 71.592, 90.382, 224, 32),
    "vgg19": _entry("vgg19", "VGG19", 72.376, 90.876, 224, 32),
    "vgg11_bn": _entry("vgg11_bn", "VGG11_BN", 70.370, 89.810, 224, 32),
    "vgg13_bn": _entry("vgg13_bn", "VGG13_BN", 71.586, 90.374, 224, 32),
    "vgg16_bn": _entry("vgg16_bn", "VGG16_BN", 73.360, 91.516, 224, 32),
    "vgg19_bn": _entry("vgg19_bn", "VGG19_BN", 74.218, 91.842, 224, 32),
    # Szegedy et al. 2014, section 5: auxiliary losses count 0.3. Szegedy et al. 2015 give no number; 0.4 is that of
    # TF-slim's and torchvision's training code.
    "googlenet": _entry("googlenet", "GoogLeNet", 69.778, 89.530, 224, 15, auxiliary_weight=0.3, **_HEADS),
    "inception_v3": _entry("inception_v3", "Inception_V3", 77.294, 93.450, 299, 75, 299, auxiliary_weight=0.4, **_HEADS),
    "inception_v4": Entry(partial(_timm, "inception_v4"), 299, 80.0, 95.0, "Szegedy et al. 2016, table 2", 75),
    "inception_resnet_v2": Entry(partial(_timm, "inception_resnet_v2"), 299, 80.1, 95.1,
                                 "Szegedy et al. 2016, table 2", 75),
    "densenet121": _entry("densenet121", "DenseNet121", 74.434, 91.972, 224, 29),
    "densenet161": _entry("densenet161", "DenseNet161", 77.138, 93.560, 224, 29),
    "densenet169": _entry("densenet169", "DenseNet169", 75.600, 92.806, 224, 29),
    "densenet201": _entry("densenet201", "DenseNet201", 76.896, 93.370, 224, 29),
    "densenet264": Entry(_densenet264, 224, 77.85, 93.88, "Huang et al. 2017, table 3", 29),
    # Tan and Le 2019; B2 was made for 260 pixels, torchvision's weights of it are evaluated at 288
    "efficientnet_b0": _entry("efficientnet_b0", "EfficientNet_B0", 77.692, 93.532, 224, 1),
    "efficientnet_b1": _entry("efficientnet_b1", "EfficientNet_B1", 78.642, 94.186, 240, 1),
    "efficientnet_b2": _entry("efficientnet_b2", "EfficientNet_B2", 80.608, 95.310, 288, 1, train_size=260),
    "efficientnet_b3": _entry("efficientnet_b3", "EfficientNet_B3", 82.008, 96.054, 300, 1),
    "efficientnet_b4": _entry("efficientnet_b4", "EfficientNet_B4", 83.384, 96.594, 380, 1),
    "efficientnet_b5": _entry("efficientnet_b5", "EfficientNet_B5", 83.444, 96.628, 456, 1),
    "efficientnet_b6": _entry("efficientnet_b6", "EfficientNet_B6", 84.008, 96.916, 528, 1),
    "efficientnet_b7": _entry("efficientnet_b7", "EfficientNet_B7", 84.122, 96.908, 600, 1),
}
"""Every network of this file, by the name that `model.name` gives it."""


def check_image_size(name: str, config) -> None:
    """Raise ValueError where the network `name` cannot take a side of the `data` section `config`; others take any."""
    if name not in ZOO:
        return
    entry = ZOO[name]
    val = entry.min_size
    train = entry.min_train_size or val
    for key, side, least in (("train_crop_size", config.train_crop_size, train),
                             ("progressive_start_size", config.progressive_start_size or train, train),
                             ("val_crop_size", config.val_crop_size, val),
                             *(("val_scales", side, val) for side in config.val_scales)):
        if side < least or entry.only_min_size and side != least:
            rule = "takes" if entry.only_min_size else "needs at least"
            raise ValueError(f"data.{key} is {side}: {name} {rule} {least} pixels there, and was made for "
                             f"{entry.size}; set it so, or choose another model.name")
