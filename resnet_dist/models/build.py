"""From the `model` section of the configuration to a network: one table and one function."""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from resnet_dist.models.resnet import FAMILY, Options, ResNet
from resnet_dist.models.zoo import ZOO

MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(ResNet, block, depths, **options)
    for name, (block, depths, options) in FAMILY.items()
} | {name: entry.make for name, entry in ZOO.items()}


def build_model(config, num_classes: int) -> nn.Module:
    """The network that `config` names, freshly initialised, on the current default device.

    `config` has the attributes `name` (a key of `MODELS`) and, for the ResNet family, fields of
    `resnet.Options`; those that are false, 0 or "default" leave what belongs to the name. The
    network takes images [B, 3, H, W] and returns logits [B, num_classes]. Raises ValueError for an
    unknown name, options that it does not have, and for a number of classes below 1.
    """
    if config.name not in MODELS:
        close = difflib.get_close_matches(config.name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"model.name: there is no model {config.name!r}; {hint}`resnet-dist models` lists all names"
        )
    if num_classes < 1:
        raise ValueError(
            f"num_classes: {num_classes} is too small; a classifier needs at least 1 class"
        )
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Options)
        if getattr(config, field.name, None) not in (None, False, 0, "default")
    }
    if options and config.name not in FAMILY:
        raise ValueError(
            f"model.{next(iter(options))} is set: only the ResNet family has it, and model.name is "
            f"{config.name!r}; leave it out, or choose a ResNet"
        )
    return MODELS[config.name](num_classes=num_classes, **options)
