"""From the `model` section of the configuration to a network: one table and one function."""

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from resnet_dist.models.resnet import FAMILY, ResNet

MODELS: dict[str, Callable[..., nn.Module]] = {
    name: partial(ResNet, block, depths, **options) for name, (block, depths, options) in FAMILY.items()
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
