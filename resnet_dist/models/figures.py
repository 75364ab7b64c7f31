"""Size, cost and published accuracy of every network, as `resnet-dist models` prints them.

To measure them, each network is built on the meta device, which takes minutes for all of them.
`figures.json` beside this module therefore holds the results. Write it again after a change with:

    python -m resnet_dist.models.figures

`tests/test_models.py` compares the file with `measure_network` for every network.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_dist.files import write_file
from resnet_dist.models.build import MODELS
from resnet_dist.models.resnet import FAMILY
from resnet_dist.models.zoo import ZOO

FIGURES_PATH = Path(__file__).with_name("figures.json")
"""The measured figures of all networks: {name: `measure_network(name)`}."""

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
    "resnetrs50": (78.8, "Bello et al. 2021, by the README of tensorflow/tpu, image size 160"),
    "resnetrs101": (81.2, "Bello et al. 2021, by the README of tensorflow/tpu, image size 192"),
    "resnetrs152": (83.0, "Bello et al. 2021, by the README of tensorflow/tpu, image size 256"),
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
    """Measure one network at its native image size, and look up its published accuracy.

    Args:
        name: A key of `MODELS`.

    Returns:
        A dictionary with the keys

        - "parameters": number of trainable parameters,
        - "size": side of the square image, in pixels,
        - "classes": number of classes: 10 for images of 32x32, else 1000,
        - "multiply_adds": multiply-adds of the forward pass of one image,
        - "stages": block type and number of blocks of each stage, empty outside the ResNet family,
        - "top1": published top-1 accuracy in percent, or None,
        - "source": where it was published,
        - "library": optional library that the network needs, or an empty string.

    Raises:
        ValueError: The optional library is not installed.
    """
    size = 224
    stages = ""
    library = ""
    top1, source = PUBLISHED.get(name, (None, ""))
    if name in FAMILY:
        block, depths, options = FAMILY[name]
        blocks_per_stage = "-".join(str(depth) for depth in depths)
        stages = f"{block.__name__} {blocks_per_stage}"
        if options.get("stem") == "cifar":
            size = 32
    if name in ZOO:
        entry = ZOO[name]
        size = entry.size
        top1 = entry.top1
        source = entry.source
        library = entry.library
    num_classes = 10 if size == 32 else 1000
    with torch.device("meta"):
        model: nn.Module = MODELS[name](num_classes=num_classes).eval()
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": num_parameters,
        "size": size,
        "classes": num_classes,
        # The counter counts a multiply-add as two operations.
        "multiply_adds": counter.get_total_flops() // 2,
        "stages": stages,
        "top1": top1,
        "source": source,
        "library": library,
    }


def write_figures(path: Path = FIGURES_PATH) -> None:
    """Measure all networks, and write the figures to `path` with one network per line."""
    lines = []
    for name in MODELS:
        figures = json.dumps(measure_network(name))
        lines.append(f'"{name}": {figures}')
    rows = ",\n".join(lines)
    write_file(path, f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    write_figures()
