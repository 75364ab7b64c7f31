"""From the `model` section of the config to a network: one table and one function."""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from resnet_dist.config import ModelConfig
from resnet_dist.models.resnet import FAMILY, Options, ResNet
from resnet_dist.models.zoo import ZOO

MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(ResNet, block, depths, **options)
    for name, (block, depths, options) in FAMILY.items()
} | {name: entry.make for name, entry in ZOO.items()}
"""Every network by name, as a function of `num_classes`"""


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The network that `config` names, initialised, on the current default device.

    The network takes images [B, 3, H, W] and returns logits [B, num_classes]. Options of `config`
    that are false, 0 or "default" leave what belongs to the name. Raises ValueError for an unknown
    name, for options that the network does not have, and for fewer than 1 class.
    """
    if config.name not in MODELS:
        close = difflib.get_close_matches(config.name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"model.name: there is no model {config.name!r}; {hint}`resnet-dist models` lists all "
            "names"
        )
    if num_classes < 1:
        raise ValueError(
            f"num_classes: {num_classes} is too small; a classifier needs at least 1 class"
        )
    options = chosen_options(config)
    if options and config.name not in FAMILY:
        raise ValueError(
            f"model.{next(iter(options))} is set, but only the ResNet family has this option, and "
            f"model.name is {config.name!r}; leave it out, or choose a ResNet"
        )
    return MODELS[config.name](num_classes=num_classes, **options)


def chosen_options(config: ModelConfig) -> dict[str, Any]:
    """The options of the ResNet family that the user has set."""
    options = {}
    for field in dataclasses.fields(Options):
        value = getattr(config, field.name, None)
        if value not in (None, False, 0, "default"):
            options[field.name] = value
    return options
