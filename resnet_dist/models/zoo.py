"""The networks beside the ResNet family: LeNet-5, written here, and those of torchvision and timm.

All take images [B, 3, H, W] and return logits [B, num_classes]. In training mode, a network with
auxiliary heads returns a tuple: its logits first, then those of each head. Its `auxiliary_weight`
is the factor on the loss of each head. All start from new weights, initialised as their library
does. Dropout and stochastic depth draw from torch's generator, which the training loop seeds for
each (step, rank): a run resumes exactly on the same number of ranks and micro-steps, on others with
other masks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_dist.config import DataConfig

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
"""LeCun et al. 1998, table I: the maps of S2 that each map of C3 takes as input"""


def squash(x: Tensor) -> Tensor:
    """1.7159 tanh(2/3 x), of any shape (LeCun et al. 1998, section II.B and appendix A)."""
    return 1.7159 * torch.tanh(x * (2 / 3))


class Subsample(nn.Module):
    """The sum of 2x2 pixels, times a trained factor of the channel, plus a trained bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, 1))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        sums = 4 * F.avg_pool2d(x, 2)
        bias = self.bias[:, None, None]
        return sums * self.weight + bias


class LeNet5(nn.Module):
    """LeNet-5 of LeCun et al. 1998, section II.B, except for its input and its output layer.

    Images [B, 3, 32, 32], no other size. The paper's input is one grey channel; here it is R, G and
    B, as the data path gives them. The paper's output is the distance of F6 from fixed bitmaps of
    the characters (RBF units). Other classes have no bitmaps, so that here a linear layer takes
    their place, as is usual. Weights start uniform in +-2.4 / fan-in (appendix A), biases at 0.

    Args:
        num_classes: Length of a row of logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 5)
        self.s2 = Subsample(6)
        self.c3 = nn.ModuleList()
        for sources in _C3:
            self.c3.append(nn.Conv2d(len(sources), 1, 5))
        self.s4 = Subsample(16)
        self.c5 = nn.Conv2d(16, 120, 5)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, num_classes)
        for module in self.modules():
            if isinstance(module, Subsample):
                self._init(module.weight, module.bias, fan_in=4)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                assert module.bias is not None
                fan_in = module.weight[0].numel()
                self._init(module.weight, module.bias, fan_in)

    @staticmethod
    def _init(weight: Tensor, bias: Tensor, fan_in: int) -> None:
        """Initialise a layer whose outputs each depend on `fan_in` inputs."""
        bound = 2.4 / fan_in
        nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] -> logits [B, num_classes]."""
        x = squash(self.c1(images))
        x = squash(self.s2(x))

        # C3: each map is the convolution of its own choice of the maps of S2.
        maps = x.unbind(1)
        outputs = []
        for conv, sources in zip(self.c3, _C3, strict=True):
            chosen = [maps[source] for source in sources]
            inputs = torch.stack(chosen, 1)
            outputs.append(conv(inputs))
        x = squash(torch.cat(outputs, 1))

        x = squash(self.s4(x))
        x = squash(self.c5(x))
        x = x.flatten(1)
        x = squash(self.f6(x))
        logits: Tensor = self.output(x)
        return logits


_AUXILIARY = {"googlenet": 0.3, "inception_v3": 0.4}
"""Weight of the loss of an auxiliary head: Szegedy et al. 2014, section 5. The paper of Inception
v3 gives none: 0.4 is that of TF-slim and of torchvision's training script."""

_DROPOUT = {"googlenet": 0.4, "inception_v3": 0.2}
"""Share of the features before the classifier that are dropped in training, where torchvision's
default, 0.2 and 0.5, is another: Szegedy et al. 2014, table 1, and TF-slim's Inception v3"""


def _torchvision(name: str, num_classes: int) -> nn.Module:
    """Build a network of torchvision.

    Without `transform_input`, which would normalise the images a second time.
    """
    from torchvision.models import get_model

    options: dict[str, bool | float] = {}
    if name in _AUXILIARY:
        options = {
            "aux_logits": True,
            "transform_input": False,
            "init_weights": True,
            "dropout": _DROPOUT[name],
        }
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **options)
    model.auxiliary_weight = _AUXILIARY.get(name, 0.0)  # type: ignore[assignment]
    return model


def _densenet264(num_classes: int) -> nn.Module:
    """Huang et al. 2017, table 1; torchvision has the class, but not this size."""
    from torchvision.models import DenseNet

    model: nn.Module = DenseNet(
        growth_rate=32,
        block_config=(6, 12, 64, 48),
        num_init_features=64,
        num_classes=num_classes,
    )
    return model


def _timm(name: str, num_classes: int) -> nn.Module:
    """A network of timm.

    Timm's norms apply the activation too, which a conversion to SyncBatchNorm would lose: the
    activation moves to a module of its own.
    """
    try:
        import timm
        from timm.layers.conv_bn_act import ConvNormAct
    except ImportError as problem:
        raise ValueError(
            f"model.name is {name!r}, which needs timm ({problem}): pip install 'resnet-dist[timm]'"
        ) from problem
    # The rate of dropout: Szegedy et al. 2016, figure 9.
    model: nn.Module = timm.create_model(name, num_classes=num_classes, drop_rate=0.2)
    for module in list(model.modules()):
        if isinstance(module, ConvNormAct):
            module.bn.__class__ = nn.BatchNorm2d
            module.aa = module.bn.act
    return model


@dataclass(frozen=True)
class Entry:
    """A network, its published accuracy, and the image sizes it can take."""

    make: Callable[..., nn.Module]
    """`make(num_classes=...)` builds it"""
    source: str
    """where the published accuracy stands"""
    size: int
    """side of the central crop of the published accuracy, in pixels"""
    top1: float | None
    """published top-1 on ImageNet in percent, one central crop; None if there is none.
    Torchvision's may belong to a better recipe than the paper's"""
    top5: float | None
    min_size: int = 1
    """smallest side of an image"""
    min_train_size: int = 0
    """smallest side in training; 0 = min_size"""
    library: str = ""
    """optional library that builds it; empty = none"""


@dataclass(frozen=True)
class _Published:
    """Facts of weights of torchvision, see `Entry`."""

    size: int
    top1: float
    top5: float
    min_size: int = 1
    min_train_size: int = 0


# EfficientNet: Tan and Le 2019.
_TORCHVISION = {
    "AlexNet": _Published(224, 56.522, 79.066, 63),
    "GoogLeNet": _Published(224, 69.778, 89.530, 15),
    "VGG11": _Published(224, 69.020, 88.628, 32),
    "VGG11_BN": _Published(224, 70.370, 89.810, 32),
    "VGG13": _Published(224, 69.928, 89.246, 32),
    "VGG13_BN": _Published(224, 71.586, 90.374, 32),
    "VGG16": _Published(224, 71.592, 90.382, 32),
    "VGG16_BN": _Published(224, 73.360, 91.516, 32),
    "VGG19": _Published(224, 72.376, 90.876, 32),
    "VGG19_BN": _Published(224, 74.218, 91.842, 32),
    "Inception_V3": _Published(299, 77.294, 93.450, 75, 299),
    "DenseNet121": _Published(224, 74.434, 91.972, 29),
    "DenseNet161": _Published(224, 77.138, 93.560, 29),
    "DenseNet169": _Published(224, 75.600, 92.806, 29),
    "DenseNet201": _Published(224, 76.896, 93.370, 29),
    "EfficientNet_B0": _Published(224, 77.692, 93.532),
    "EfficientNet_B1": _Published(240, 78.642, 94.186),
    "EfficientNet_B2": _Published(288, 80.608, 95.310),
    "EfficientNet_B3": _Published(300, 82.008, 96.054),
    "EfficientNet_B4": _Published(380, 83.384, 96.594),
    "EfficientNet_B5": _Published(456, 83.444, 96.628),
    "EfficientNet_B6": _Published(528, 84.008, 96.916),
    "EfficientNet_B7": _Published(600, 84.122, 96.908),
}


def _torchvision_entry(weights: str, published: _Published) -> Entry:
    """The entry of a network of torchvision; `weights` is the name before `_Weights`."""
    name = weights.lower()
    return Entry(
        make=partial(_torchvision, name),
        source=f"torchvision {weights}_Weights.IMAGENET1K_V1",
        size=published.size,
        top1=published.top1,
        top5=published.top5,
        min_size=published.min_size,
        min_train_size=published.min_train_size,
    )


def _timm_entry(name: str, top1: float, top5: float) -> Entry:
    """The entry of a network of timm, with its published accuracy in percent."""
    return Entry(
        make=partial(_timm, name),
        source="Szegedy et al. 2016, table 2",
        size=299,
        top1=top1,
        top5=top5,
        min_size=75,
        library="timm",
    )


def _zoo() -> dict[str, Entry]:
    """Every network of this module, in the order in which `resnet-dist models` lists them."""
    entries = {}
    entries["lenet5"] = Entry(
        make=LeNet5,
        source="",
        size=32,
        top1=None,
        top5=None,
        min_size=32,
    )
    for weights, published in _TORCHVISION.items():
        entries[weights.lower()] = _torchvision_entry(weights, published)
    entries["densenet264"] = Entry(
        make=_densenet264,
        source="Huang et al. 2017, table 3",
        size=224,
        top1=77.85,
        top5=93.88,
        min_size=29,
    )
    entries["inception_v4"] = _timm_entry("inception_v4", 80.0, 95.0)
    entries["inception_resnet_v2"] = _timm_entry("inception_resnet_v2", 80.1, 95.1)
    return entries


ZOO: dict[str, Entry] = _zoo()
"""Every network of this module, by the name that `model.name` gives it."""


def check_image_size(name: str, config: DataConfig) -> None:
    """Check that a network can take every image size of the config.

    Args:
        name: Name of the network, as in `model.name`.
        config: The `data` section of the config.

    Raises:
        ValueError: If the network cannot take one of the sizes.
    """
    # The ResNet family takes any size.
    if name not in ZOO:
        return
    entry = ZOO[name]
    min_train_size = entry.min_train_size or entry.min_size
    _check_side(name, "train_crop_size", config.train_crop_size, min_train_size)
    _check_side(name, "val_crop_size", config.val_crop_size, entry.min_size)
    if config.progressive_start_size:
        start_size = config.progressive_start_size
        _check_side(name, "progressive_start_size", start_size, min_train_size)
    for side in config.val_scales:
        _check_side(name, "val_scales", side, entry.min_size)


def _check_side(name: str, key: str, side: int, least: int) -> None:
    """Raise ValueError if `data.key` is a side that is too small (or not the one of LeNet-5)."""
    is_fixed = name == "lenet5"
    if is_fixed and side == least:
        return
    if not is_fixed and side >= least:
        return
    rule = "only" if is_fixed else "or more"
    raise ValueError(
        f"data.{key} is {side}: {name} takes {least} pixels {rule}, and was made for "
        f"{ZOO[name].size}; set it so, or choose another model.name"
    )
