"""The optimizer: parameter groups by the type of the module; SGD and AdamW of torch, LARS, LAMB and
RMSprop of our own.

Ours work on lists of tensors (`torch._foreach_*`), on any device, and never wait for it.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from resnet_dist.config import OptimConfig
from resnet_dist.models.weights import head_modules

Tensors = list[torch.Tensor]
New = tuple[Tensors, ...]
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_EPS = {"sgd": 0.0, "lars": 0.0, "lamb": 1e-6, "rmsprop": 1e-8, "adamw": 1e-8}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Three groups with their weight decay: matrices and kernels, norm layers, biases of the other
    layers.

    What a parameter is follows from the type of its module and its dimension, never from its name
    (`"bn" in name` misses a norm called `downsample.1`). `adapt` marks the first group, the one
    that LARS and LAMB adapt. Frozen parameters are in none.
    """
    weights, norms, biases = [], [], []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            group = (
                norms if isinstance(module, _NORMS) else biases if parameter.ndim <= 1 else weights
            )
            if parameter.requires_grad:  # see weights.freeze
                group.append(parameter)
    decays = (config.weight_decay, config.norm_weight_decay, config.bias_weight_decay)
    groups = [
        {
            "params": group,
            "adapt": group is weights,
            "weight_decay": config.weight_decay if decay is None else decay,
        }
        for group, decay in zip((weights, norms, biases), decays, strict=True)
        if group
    ]
    return (
        groups
        if config.backbone_lr_scale == 1.0
        else split_head(groups, model, config.backbone_lr_scale)
    )


def split_head(groups: list[dict], model: nn.Module, backbone_lr_scale: float) -> list[dict]:
    """Each group in two, backbone and head, with the factor on the step's learning rate as
    `lr_scale`.
    """
    head = {
        parameter for module in head_modules(model).values() for parameter in module.parameters()
    }
    return [
        {**group, "params": part, "lr_scale": scale}
        for group in groups
        for part, scale in (
            ([p for p in group["params"] if p not in head], backbone_lr_scale),
            ([p for p in group["params"] if p in head], 1.0),
        )
        if part
    ]


class GuardedOptimizer(torch.optim.Optimizer):
    """An update law over lists of tensors, with state from the start and the guard of torch's fused
    optimizers.

    An update for which `found_inf` (a scalar on the device, of train_step or GradScaler) is not
    zero changes neither weights nor state. A parameter without a gradient is left out. `law(group,
    weights, gradients, *state)` returns the new weights and state; `initial` names the state
    tensors of a weight, in that order, with their first values.
    """

    def __init__(
        self, groups: list[dict], law: Callable[..., New], initial: dict[str, float], **settings
    ) -> None:
        # As torch reads it, "fused" says that found_inf is honoured here, and that `step` lives on
        # the device.
        super().__init__(groups, {"lr": 0.0, "fused": True, **settings})
        self._step_supports_amp_scaling = (
            True  # GradScaler hands found_inf over, and does not wait for it
        )
        self.law, self.names = law, tuple(initial)
        for parameter in (
            parameter for group in self.param_groups for parameter in group["params"]
        ):
            self.state[parameter] = {
                name: torch.full((), value, device=parameter.device)
                if name == "step"
                else torch.full_like(parameter, value, requires_grad=False)
                for name, value in initial.items()
            }

    @torch.no_grad()
    def step(self) -> None:
        """One update; the gradients are unscaled already."""
        assert getattr(self, "grad_scale", None) is None, "GradScaler.unscale_ comes before"
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if weights:
                old = (
                    weights,
                    *([self.state[weight][name] for weight in weights] for name in self.names),
                )
                new = self.law(group, weights, [weight.grad for weight in weights], *old[1:])
                skipped = getattr(self, "found_inf", torch.zeros((), device=weights[0].device)) != 0
                for before, after in zip(chain(*old), chain(*new), strict=True):
                    torch.where(skipped, before, after, out=before)


def lars(group: dict, weights: Tensors, grads: Tensors, momentum_buffer: Tensors) -> New:
    """LARS with momentum: You et al. 2017, "Large Batch Training of Convolutional Networks",
    equation 6, algorithm 1.

    local = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps), 1 where |w| or |g| is 0, and
    1 for norm layers and biases; v <- momentum * v + lr * local * (g + weight_decay * w); w <- w -
    v. This is MLPerf's reference for ResNet-50 (lars_optimizer.py; its eps is 0, which its
    TensorFlow 2 version replaces by 1e-7), with the learning rate inside v. timm and NVIDIA's LARC
    multiply by it outside, which is another update while the learning rate changes.
    """
    updates = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    if group["adapt"]:
        weight, gradient = _norms(weights), _norms(grads)
        below = gradient + group["weight_decay"] * weight + group["eps"]
        torch._foreach_mul_(updates, _ratios(group["trust_coefficient"] * weight, below, gradient))
    buffers = torch._foreach_mul(momentum_buffer, group["momentum"])
    torch._foreach_add_(buffers, updates, alpha=group["lr"])
    return torch._foreach_sub(weights, buffers), buffers


def lamb(
    group: dict,
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: Tensors,
) -> New:
    """LAMB: You et al. 2019, "Large Batch Optimization for Deep Learning", algorithm 2, with bias
    correction.

    m and v are Adam's; u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w;
    w <- w - lr * |w| / |u| * u. The ratio is 1 where a norm is 0 and for norm layers and biases
    (NVIDIA's FusedLAMB and timm leave out what has no weight decay, which is the same in their
    recipes). It is not clamped: the paper's phi is the identity there too. Those two also clip the
    gradient's norm at 1: `train.clip_grad_norm 1` does that here.
    """
    beta1, beta2 = group["betas"]
    steps = torch._foreach_add(step, 1)
    count = torch.stack(steps).double()  # 1 - beta2 cancels in single precision
    corrections = [(1 - beta**count).to(weights[0].dtype).unbind() for beta in (beta1, beta2)]
    averages = torch._foreach_lerp(exp_avg, grads, 1 - beta1)
    squares = torch._foreach_mul(exp_avg_sq, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
    roots = torch._foreach_sqrt(torch._foreach_div(squares, corrections[1]))
    updates = torch._foreach_div(
        torch._foreach_div(averages, corrections[0]), torch._foreach_add(roots, group["eps"])
    )
    torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    if group["adapt"]:
        torch._foreach_mul_(updates, _ratios(_norms(weights), _norms(updates)))
    return torch._foreach_add(weights, updates, alpha=-group["lr"]), averages, squares, steps


def rmsprop(
    group: dict, weights: Tensors, grads: Tensors, square_avg: Tensors, momentum_buffer: Tensors
) -> New:
    """RMSprop (Tieleman and Hinton 2012) as TensorFlow has it, with which Inception v3 and
    EfficientNet were trained.

    g <- g + weight_decay * w; s <- alpha * s + (1 - alpha) * g^2, from s = 1; b <- momentum * b +
    lr * g / sqrt(s + eps); w <- w - b. torch's differs: s starts at 0 (a first step of lr / sqrt(1
    - alpha) for every weight), eps is outside the root (their 1e-3 and 1.0 would mean something
    else) and lr is outside b.
    """
    grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    squares = torch._foreach_mul(square_avg, group["alpha"])
    torch._foreach_addcmul_(squares, grads, grads, value=1 - group["alpha"])
    roots = torch._foreach_sqrt(torch._foreach_add(squares, group["eps"]))
    buffers = torch._foreach_mul(momentum_buffer, group["momentum"])
    torch._foreach_addcdiv_(buffers, grads, roots, value=group["lr"])
    return torch._foreach_sub(weights, buffers), squares, buffers


_OURS = {
    "lars": (lars, {"momentum_buffer": 0.0}),
    "lamb": (lamb, {"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0}),
    "rmsprop": (rmsprop, {"square_avg": 1.0, "momentum_buffer": 0.0}),
}


def _norms(tensors: Tensors) -> torch.Tensor:
    return torch.stack(torch._foreach_norm(tensors))


def _ratios(
    above: torch.Tensor, below: torch.Tensor, also: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Above / below for each tensor, 1 where one of the norms is 0: a layer that starts at zero
    must learn.
    """
    return torch.where(
        (above > 0) & ((below if also is None else also) > 0), above / below, 1.0
    ).unbind()


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """What `config.kind` says, over the groups, fused where torch has that. The step sets the
    learning rate.

    SGD's momentum buffers are there from the start, as zeros, which gives the same updates as
    torch's later creation. Torch's fused kernel would create them uninitialised, and a first step
    that is skipped (a gradient that is not finite) would leave that memory in place. AdamW creates
    its own as zeros.
    """
    groups, kind = parameter_groups(model, config), config.kind
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    eps = _EPS[kind] if config.eps is None else config.eps
    if kind in _OURS:
        return GuardedOptimizer(
            groups,
            *_OURS[kind],
            momentum=config.momentum,
            alpha=config.alpha,
            betas=config.betas,
            trust_coefficient=config.trust_coefficient,
            eps=eps,
        )
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=eps, fused=fused)
    optimizer = torch.optim.SGD(
        groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=fused
    )
    if config.momentum:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
