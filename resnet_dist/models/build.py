"""From the `model` section of the config to a network: one table and one function."""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from resnet_dist.config import ModelConfig
from resnet_dist.models.resnet import FAMILY, Options, ResNet
from resnet_dist.models.zoo import ZOO


def _models() -> dict[str, Callable[..., nn.Module]]:
    """The networks of the ResNet family, then those of the zoo."""
    models: dict[str, Callable[..., nn.Module]] = {}
    for name, (block, depths, options) in FAMILY.items():
        models[name] = partial(ResNet, block, depths, **options)
    for name, entry in ZOO.items():
        models[name] = entry.make
    return models


MODELS: dict[str, Callable[..., nn.Module]] = _models()
"""Every network by name, as a function of `num_classes`"""


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the network that `config` names, initialised, on the current default device.

    Args:
        config: The `model` section of the config. Options that are false, 0 or "default" leave the
            network as its name says.
        num_classes: Number of logits.

    Returns:
        A network from images [B, 3, H, W] to logits [B, num_classes].

    Raises:
        ValueError: For an unknown name, for options that the network does not have, and for fewer
            than 1 class.
    """
    name = config.name
    if name not in MODELS:
        hint = ""
        close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        if close:
            hint = f"did you mean {', '.join(close)}? "
        raise ValueError(
            f"model.name: there is no model {name!r}; {hint}`resnet-dist models` lists all names"
        )
    if num_classes < 1:
        raise ValueError(
            f"num_classes: {num_classes} is too small; a classifier needs at least 1 class"
        )
    options = chosen_options(config)
    if options and name not in FAMILY:
        first_option = next(iter(options))
        raise ValueError(
            f"model.{first_option} is set, but only the ResNet family has this option, and "
            f"model.name is {name!r}; leave it out, or choose a ResNet"
        )
    make = MODELS[name]
    return make(num_classes=num_classes, **options)


def build_on_meta(config: ModelConfig) -> nn.Module:
    """Build a network without contents, whose norms are those of one rank.

    Args:
        config: The `model` section of the config. Without `num_classes`, there are 1,000 classes.

    Raises:
        ValueError: As `build_model`.
    """
    of_one_rank = dataclasses.replace(config, sync_batch_norm=False)
    with torch.device("meta"):
        return build_model(of_one_rank, config.num_classes or 1000)


def chosen_options(config: ModelConfig) -> dict[str, Any]:
    """The options of the ResNet family that the user has set."""
    options = {}
    for field in dataclasses.fields(Options):
        value = getattr(config, field.name, None)
        if value not in (None, False, 0, "default"):
            options[field.name] = value
    return options


def pads_shortcuts(config: ModelConfig) -> bool:
    """Whether the shortcuts of a network pad channels with zeros: kinds A and A_symmetric.

    They have no weights, so that a file of weights does not tell the two apart.

    Args:
        config: The `model` section of the config.
    """
    kind: str = config.shortcut
    if kind == "default" and config.name in FAMILY:
        _, _, options = FAMILY[config.name]
        kind = options.get("shortcut", Options.shortcut)
    return kind in ("A", "A_symmetric")


TWO_PADDED_SHORTCUTS = (
    "shortcuts of kind A exist in two layouts, and the file does not tell which: if the accuracy "
    "is that of guessing, set model.shortcut A_symmetric (zeros on both sides, as in networks with "
    "a head called linear) or model.shortcut A (zeros behind)"
)
"""Said when a file of weights may belong to the other layout."""
