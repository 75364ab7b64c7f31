"""The optimizer: parameter groups by type of module, and the update laws.

SGD and AdamW are torch's. LARS, LAMB and RMSprop are written here. They work on lists of tensors
(`torch._foreach_*`), on any device, and never wait for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_dist.config import OptimConfig
from resnet_dist.models.weights import head_modules

Tensors = tuple[torch.Tensor, ...]
Group = dict[str, Any]
"""a parameter group, as torch's optimizers have them"""
NewValues = tuple[Tensors, ...]
"""new weights, then new state, each with one tensor for each weight"""

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_DEFAULT_EPS = {"sgd": 0.0, "lars": 0.0, "lamb": 1e-6, "rmsprop": 1e-8, "adamw": 1e-8}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """The trained parameters in up to three groups, each with its weight decay.

    The groups are weights of convolutions and linear layers, norm layers, and biases of the other
    layers. The type of the module and the dimension decide, never the name (`"bn" in name` misses a
    norm called `downsample.1`). `adapt` marks the first group, the one that LARS and LAMB adapt.
    Frozen parameters are in none. With `backbone_lr_scale`, backbone and head are separate groups.
    """
    weights: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:  # see weights.freeze
                continue
            if isinstance(module, _NORMS):
                norms.append(parameter)
            elif parameter.ndim <= 1:
                biases.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        _group(weights, config.weight_decay, config, adapt=True),
        _group(norms, config.norm_weight_decay, config),
        _group(biases, config.bias_weight_decay, config),
    ]
    groups = [group for group in groups if group["params"]]
    if config.backbone_lr_scale != 1.0:
        groups = split_head(groups, model, config.backbone_lr_scale)
    return groups


def _group(
    parameters: list[nn.Parameter], decay: float | None, config: OptimConfig, adapt: bool = False
) -> Group:
    weight_decay = config.weight_decay if decay is None else decay
    return {"params": parameters, "adapt": adapt, "weight_decay": weight_decay}


def split_head(groups: list[Group], model: nn.Module, backbone_lr_scale: float) -> list[Group]:
    """Split each group into backbone and head.

    `lr_scale` of a group is the factor on the learning rate of each step.
    """
    head = {
        parameter for module in head_modules(model).values() for parameter in module.parameters()
    }
    split = []
    for group in groups:
        of_backbone = [parameter for parameter in group["params"] if parameter not in head]
        of_head = [parameter for parameter in group["params"] if parameter in head]
        if of_backbone:
            split.append({**group, "params": of_backbone, "lr_scale": backbone_lr_scale})
        if of_head:
            split.append({**group, "params": of_head, "lr_scale": 1.0})
    return split


@dataclass(frozen=True)
class Law:
    """An update law over lists of tensors."""

    update: Callable[..., NewValues]
    """`update(group, weights, gradients, *state)` returns the new weights and state"""
    initial_state: dict[str, float]
    """the state tensors of each weight, in that order, with their first values; `step` is a scalar,
    the others have the shape of the weight"""


class GuardedOptimizer(torch.optim.Optimizer):
    """An update law, with its state from the start and the guard of torch's fused optimizers.

    An update whose `found_inf` (a scalar on the device, set by the training loop or by GradScaler)
    is not zero changes neither weights nor state. A parameter without a gradient is left out.
    """

    def __init__(self, groups: list[Group], law: Law, **settings: Any) -> None:
        # To torch, "fused" means that found_inf is honoured here, and that `step` is on the device.
        super().__init__(groups, {"lr": 0.0, "fused": True, **settings})
        # GradScaler then hands found_inf over, and does not wait for it.
        self._step_supports_amp_scaling = True
        self.law = law
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._initial_state(parameter)

    def _initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {}
        for name, value in self.law.initial_state.items():
            if name == "step":
                state[name] = torch.full((), value, device=parameter.device)
            else:
                state[name] = torch.full_like(parameter, value, requires_grad=False)
        return state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Do one update; the gradients are unscaled already."""
        assert getattr(self, "grad_scale", None) is None, "GradScaler.unscale_ comes before"
        for group in self.param_groups:
            weights = tuple(weight for weight in group["params"] if weight.grad is not None)
            if weights:
                self._update_group(group, weights)

    def _update_group(self, group: Group, weights: Tensors) -> None:
        gradients = tuple(weight.grad for weight in weights)
        state = [
            tuple(self.state[weight][name] for weight in weights) for name in self.law.initial_state
        ]
        new_values = self.law.update(group, weights, gradients, *state)
        found_inf = getattr(self, "found_inf", torch.zeros((), device=weights[0].device))
        is_skipped = found_inf != 0
        for old_tensors, new_tensors in zip([weights, *state], new_values, strict=True):
            for old, new in zip(old_tensors, new_tensors, strict=True):
                torch.where(is_skipped, old, new, out=old)


def lars(group: Group, weights: Tensors, grads: Tensors, momentum_buffer: Tensors) -> NewValues:
    """LARS with momentum: You et al. 2017, "Large Batch Training of Convolutional Networks",
    equation 6, algorithm 1.

        local = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)
        v <- momentum * v + lr * local * (g + weight_decay * w)
        w <- w - v

    `local` is 1 where |w| or |g| is 0, and for norm layers and biases. This is MLPerf's reference
    for ResNet-50 (lars_optimizer.py; its eps is 0, which its TensorFlow 2 version replaces by
    1e-7), with the learning rate inside v. timm and NVIDIA's LARC multiply by it outside, which is
    a different update while the learning rate changes.
    """
    updates = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    if group["adapt"]:
        weight_norms, grad_norms = _norms(weights), _norms(grads)
        denominators = grad_norms + group["weight_decay"] * weight_norms + group["eps"]
        local = group["trust_coefficient"] * weight_norms / denominators
        is_defined = (weight_norms > 0) & (grad_norms > 0)
        updates = _scale_each(updates, torch.where(is_defined, local, 1.0))
    buffers = torch._foreach_mul(momentum_buffer, group["momentum"])
    torch._foreach_add_(buffers, updates, alpha=group["lr"])
    return torch._foreach_sub(weights, buffers), buffers


def lamb(
    group: Group,
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: Tensors,
) -> NewValues:
    """LAMB: You et al. 2019, "Large Batch Optimization for Deep Learning", algorithm 2, with bias
    correction. m and v are Adam's averages.

        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
        w <- w - lr * |w| / |u| * u

    The ratio is 1 where a norm is 0, and for norm layers and biases (NVIDIA's FusedLAMB and timm
    exempt what has no weight decay, which is the same in their recipes). It is not clamped, as the
    paper's phi is the identity there too. Those two also clip the norm of the gradient at 1: here
    `train.clip_grad_norm 1` does that.
    """
    beta1, beta2 = group["betas"]
    steps = torch._foreach_add(step, 1)
    count = torch.stack(list(steps)).double()  # 1 - beta2^t cancels in single precision
    dtype = weights[0].dtype
    correction1 = (1 - beta1**count).to(dtype).unbind()
    correction2 = (1 - beta2**count).to(dtype).unbind()

    averages = torch._foreach_lerp(exp_avg, grads, 1 - beta1)
    squares = torch._foreach_mul(exp_avg_sq, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

    roots = torch._foreach_sqrt(torch._foreach_div(squares, correction2))
    denominators = torch._foreach_add(roots, group["eps"])
    updates = torch._foreach_div(torch._foreach_div(averages, correction1), denominators)
    torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    if group["adapt"]:
        weight_norms, update_norms = _norms(weights), _norms(updates)
        is_defined = (weight_norms > 0) & (update_norms > 0)
        ratios = torch.where(is_defined, weight_norms / update_norms, 1.0)
        updates = _scale_each(updates, ratios)
    return torch._foreach_add(weights, updates, alpha=-group["lr"]), averages, squares, steps


def rmsprop(
    group: Group, weights: Tensors, grads: Tensors, square_avg: Tensors, momentum_buffer: Tensors
) -> NewValues:
    """RMSprop (Tieleman and Hinton 2012) as TensorFlow has it, with which Inception v3 and
    EfficientNet were trained.

        g <- g + weight_decay * w
        s <- alpha * s + (1 - alpha) * g^2, from s = 1
        b <- momentum * b + lr * g / sqrt(s + eps)
        w <- w - b

    torch's differs: s starts at 0 (a first step of lr / sqrt(1 - alpha) for every weight), eps is
    outside the root (the recipes' 1e-3 and 1.0 would mean something else), and lr is outside b.
    """
    grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    squares = torch._foreach_mul(square_avg, group["alpha"])
    torch._foreach_addcmul_(squares, grads, grads, value=1 - group["alpha"])
    roots = torch._foreach_sqrt(torch._foreach_add(squares, group["eps"]))
    buffers = torch._foreach_mul(momentum_buffer, group["momentum"])
    torch._foreach_addcdiv_(buffers, grads, roots, value=group["lr"])
    return torch._foreach_sub(weights, buffers), squares, buffers


_LAWS = {
    "lars": Law(lars, {"momentum_buffer": 0.0}),
    "lamb": Law(lamb, {"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0}),
    "rmsprop": Law(rmsprop, {"square_avg": 1.0, "momentum_buffer": 0.0}),
}


def _norms(tensors: Tensors) -> torch.Tensor:
    """The L2 norm of each tensor."""
    return torch.stack(list(torch._foreach_norm(tensors)))


def _scale_each(tensors: Tensors, factors: torch.Tensor) -> Tensors:
    """Each tensor times its factor."""
    return torch._foreach_mul(tensors, factors.unbind())


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config.kind` names, fused where torch has that.

    The training loop sets the learning rate at each step.
    """
    groups = parameter_groups(model, config)
    is_fused = next(model.parameters()).device.type in ("cuda", "cpu")
    eps = _DEFAULT_EPS[config.kind] if config.eps is None else config.eps
    if config.kind in _LAWS:
        return GuardedOptimizer(
            groups,
            _LAWS[config.kind],
            momentum=config.momentum,
            alpha=config.alpha,
            betas=config.betas,
            trust_coefficient=config.trust_coefficient,
            eps=eps,
        )
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=eps, fused=is_fused)
    sgd = torch.optim.SGD(
        groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=is_fused
    )
    if config.momentum:
        create_momentum_buffers(sgd)
    return sgd


def create_momentum_buffers(sgd: torch.optim.SGD) -> None:
    """Create the momentum buffers as zeros, which gives the same updates as torch's later creation.

    Torch's fused kernel would create them uninitialised, and a first update that is skipped (its
    gradient is not finite) would leave that memory in place. AdamW creates its own as zeros.
    """
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
