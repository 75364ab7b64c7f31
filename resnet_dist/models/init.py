"""How the weights of a new network are initialised.

Every choice is made by module type, never by the name of a module, so that a norm in a shortcut is
treated like any other. All functions work in place. On the meta device they do nothing.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


def init_weights(model: nn.Module) -> nn.Module:
    """Initialise every parameter of `model`, and reset the running statistics of its norms.

    Returns `model`.

    Convolutions: normal with mean 0 and variance 2 / fan_out, where fan_out = out_channels * kernel
    area (not divided by the groups, as in torchvision); biases 0. This keeps the variance of
    the *gradients* through ReLU layers: He et al. 2015, "Delving Deep into Rectifiers", section
    2.2, "Backward Propagation Case". Norms: weight 1, bias 0. Linear layers: PyTorch's default,
    U(-1/sqrt(in), 1/sqrt(in)), as torchvision's `fc`.
    """
    parameters = list(model.parameters())
    if all(parameter.is_meta for parameter in parameters):
        # There is nothing to fill. PyTorch would import its compiler to find that out.
        return model
    for module in model.modules():
        if isinstance(module, _ConvNd):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (_BatchNorm, nn.Linear)):
            module.reset_parameters()
    return model


def zero_residual_norms(last_norms: Iterable[nn.Module]) -> None:
    """Set the weights of these norms to zero: the last norm of each residual branch.

    Such a block passes on its shortcut alone in the first step, which makes the start of
    large-batch training easier: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1.
    """
    for norm in last_norms:
        assert isinstance(norm.weight, nn.Parameter)
        nn.init.zeros_(norm.weight)
