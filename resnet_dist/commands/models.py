"""`resnet-dist models`: all networks with parameters, GFLOPs and published accuracy.

GFLOPs are multiply-adds for one image of the size beside them, as papers count. Top-1 accuracy in
percent is what others published, on ImageNet unless it says CIFAR-10; docs/results.md has what this
project measured.
"""

import argparse
import json
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.models.build import MODELS
from resnet_dist.models.resnet import FAMILY
from resnet_dist.models.zoo import ZOO
from resnet_dist.text import did_you_mean

_CIFAR = "CIFAR-10, He et al. 2015, table 6"
_V1 = "torchvision {}_Weights.IMAGENET1K_V1"
_IDENTITY = "CIFAR-10, He et al. 2016"
PUBLISHED: dict[str, tuple[float, str]] = {
    "resnet18": (69.758, _V1.format("ResNet18")),
    "resnet34": (73.314, _V1.format("ResNet34")),
    "resnet50": (76.130, _V1.format("ResNet50")),
    "resnet101": (77.374, _V1.format("ResNet101")),
    "resnet152": (78.312, _V1.format("ResNet152")),
    "resnext50_32x4d": (77.618, _V1.format("ResNeXt50_32X4D")),
    "resnext101_32x8d": (79.312, _V1.format("ResNeXt101_32X8D")),
    "resnext101_64x4d": (83.246, _V1.format("ResNeXt101_64X4D")),
    "wide_resnet50_2": (78.468, _V1.format("Wide_ResNet50_2")),
    "wide_resnet101_2": (78.848, _V1.format("Wide_ResNet101_2")),
    "plain18": (72.06, "He et al. 2015, table 2, ten crops"),
    "plain34": (71.46, "He et al. 2015, table 2, ten crops"),
    "resnet50c": (76.87, "He et al. 2018, Bag of Tricks, table 5"),
    "resnet50d": (77.16, "He et al. 2018, Bag of Tricks, table 5"),
    "seresnet50": (76.71, "Hu et al. 2017, table 2"),
    "preresnet200": (79.3, "He et al. 2016, table 5, scale augmentation, crop of 320"),
    "resnet20": (91.25, _CIFAR),
    "resnet32": (92.49, _CIFAR),
    "resnet44": (92.83, _CIFAR),
    "resnet56": (93.03, _CIFAR),
    "resnet110": (93.57, f"{_CIFAR}, best of five"),
    "resnet1202": (92.07, _CIFAR),
    "resnet164": (94.07, f"{_IDENTITY}, table 2"),
    "preresnet110": (93.63, f"{_IDENTITY}, table 2"),
    "preresnet164": (94.54, f"{_IDENTITY}, table 2"),
    "preresnet1001": (95.08, f"{_IDENTITY}, table 4"),
    "wide_resnet28_10": (96.00, "CIFAR-10, Zagoruyko and Komodakis 2016, table 5"),
}
"""Published top-1 accuracy in percent of members of the ResNet family, and where it stands."""


def measure_network(name: str) -> dict[str, Any]:
    """Parameters and multiply-adds of a network at its native image size, and published accuracy.

    The network is built on the meta device. Raises ValueError if an optional library is missing.
    """
    size, stages = 224, ""
    top1, source = PUBLISHED.get(name, (None, ""))
    if name in FAMILY:
        block, depths, options = FAMILY[name]
        stages = f"{block.__name__} {'-'.join(map(str, depths))}"
        if options.get("stem") == "cifar":
            size = 32
    if name in ZOO:
        entry = ZOO[name]
        size, top1, source = entry.size, entry.top1, entry.source
    classes = 10 if size == 32 else 1000
    with torch.device("meta"):
        model: nn.Module = MODELS[name](num_classes=classes).eval()
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "size": size,
        "classes": classes,
        "multiply_adds": counter.get_total_flops() // 2,
        "stages": stages,
        "top1": top1,
        "source": source,
    }


def run(options: argparse.Namespace) -> int:
    """Print the table of the networks whose name contains `options.filter`."""
    names = [name for name in MODELS if options.filter in name]
    if not names:
        similar = did_you_mean(options.filter, MODELS)
        print(f"error: no network has {options.filter!r} in its name{similar}", file=sys.stderr)
        return 2
    if not options.json:
        print(_HEADER)
    for name in names:
        try:
            row = measure_network(name)
        except ValueError as problem:
            # An optional library is not installed.
            row = {"name": name, "error": str(problem)}
        print(json.dumps(row) if options.json else _format_row(row), flush=True)
    return 0


_HEADER = (
    f"{'name':20} {'params/M':>8}  {'size':>4}  {'GFLOPs':>7}  {'stages':24}  {'top-1':>5}  "
    "published in"
)


def _format_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']:20} {row['error']}"
    top1 = f"{row['top1']:.2f}" if row["top1"] else "-"
    line = (
        f"{row['name']:20} {row['parameters'] / 1e6:8.2f}  {row['size']:4}  "
        f"{row['multiply_adds'] / 1e9:7.2f}  {row['stages']:24}  {top1:>5}  {row['source']}"
    )
    return line.rstrip()
