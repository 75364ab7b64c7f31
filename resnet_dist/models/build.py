"""From the `model` section of the configuration to a network: one table and one function."""

import difflib
from collections.abc import Callable

from torch import nn

from resnet_dist.models import resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnext50_32x4d": resnet.resnext50_32x4d,
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "wide_resnet50_2": resnet.wide_resnet50_2,
    "wide_resnet101_2": resnet.wide_resnet101_2,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet44": resnet.resnet44,
    "resnet56": resnet.resnet56,
    "resnet110": resnet.resnet110,
}


def build_model(config, num_classes: int) -> nn.Module:
    """The network that `config` names, freshly initialised, on the current default device.

    `config` has the attributes `name` (a key of `MODELS`), `zero_init_residual` and `stride_in_1x1`. The network takes
    images [B, 3, H, W] and returns logits [B, num_classes].
    Raises ValueError for an unknown name, and for a number of classes below 1.
    """
    if config.name not in MODELS:
        close = difflib.get_close_matches(config.name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise ValueError(
            f"model.name: there is no model {config.name!r}; {hint}All names: "
            'python -c "from resnet_dist.models.build import MODELS; print(*MODELS)"'
        )
    if num_classes < 1:
        raise ValueError(f"num_classes: {num_classes} is too small; a classifier needs at least 1 class")
    return MODELS[config.name](
        num_classes=num_classes, zero_init_residual=config.zero_init_residual, stride_in_1x1=config.stride_in_1x1
    )
