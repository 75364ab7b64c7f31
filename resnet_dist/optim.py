"""The optimizer: parameter groups by the type of the module, and SGD."""

import torch
from torch import nn

from resnet_dist.config import OptimConfig

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Three groups with their weight decay: matrices and kernels, norm layers, biases of the other layers.

    What a parameter is follows from the type of its module and its dimension, never from its name (`"bn" in name`
    misses a norm called `downsample.1`).
    """
    weights, norms, biases = [], [], []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            group = norms if isinstance(module, _NORMS) else biases if parameter.ndim <= 1 else weights
            group.append(parameter)
    decays = (config.weight_decay, config.norm_weight_decay, config.bias_weight_decay)
    return [{"params": group, "weight_decay": config.weight_decay if decay is None else decay}
            for group, decay in zip((weights, norms, biases), decays, strict=True) if group]


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD over the groups, fused into one kernel where the device has one. The step sets its learning rate.

    The momentum buffers are there from the start, as zeros, which gives the same updates as torch's later creation.
    Torch's fused kernel would create them uninitialised, and a first step that is skipped (a gradient that is not
    finite) would leave that memory in place.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(parameter_groups(model, config), lr=0.0, momentum=config.momentum,
                                nesterov=config.nesterov, fused=device.type in ("cuda", "cpu"))
    if config.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
