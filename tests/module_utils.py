"""What tests ask about the modules of a network."""

from torch import nn


def modules_of(model: nn.Module, *types: type) -> list[nn.Module]:
    """The modules of these types, in order."""
    found = []
    for module in model.modules():
        if isinstance(module, types):
            found.append(module)
    return found


def count_parameters(*modules: nn.Module) -> int:
    """The number of weights of all these modules together."""
    count = 0
    for module in modules:
        for parameter in module.parameters():
            count += parameter.numel()
    return count
