"""Networks that prefer the classes in a fixed order, whatever they see, and images for them.

A class is a hit if it is the first one of the order among those that compete.
"""

from pathlib import Path

import torch
from PIL import Image

from resnet_dist.config import ModelConfig
from resnet_dist.models.build import build_model
from resnet_dist.models.class_names import imagenet_ids

WNIDS = imagenet_ids()
ORDER = (3, 1, 8, 2, 9, 4)
"""The order of preference of the network with ImageNet's classes."""

SMALL = (
    *("--data.val_resize_size", "8", "--data.val_crop_size", "8"),
    *("--distributed.threads", "1", "--data.threads", "1"),
    *("--model.name", "resnet20"),
)
"""Options of a command that reads the weights. The last pair names the network."""


def write_weights(path, num_classes, order):
    """A ResNet-20 whose logits are `len(order)` for the first class of the order, and so on."""
    torch.manual_seed(0)
    content = build_model(ModelConfig(name="resnet20"), num_classes).state_dict()
    content["fc.weight"].zero_()
    content["fc.bias"].zero_()
    for place, number in enumerate(order):
        content["fc.bias"][number] = len(order) - place
    torch.save(content, path)
    return str(path)


def write_images(folder, names):
    """One small image for each name below `folder`."""
    for number, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (number % 256, 40, 90)).save(path)


def of_class(number, count, suffix="jpg"):
    """Names of `count` images of one of ImageNet's classes."""
    return [f"{WNIDS[number]}/{place}.{suffix}" for place in range(count)]
