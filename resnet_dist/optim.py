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
_DEFAULT_EPS = {
    "sgd": 0.0,
    "lars": 0.0,
    "lamb": 1e-6,
    "rmsprop": 1e-8,
    "adamw": 1e-8,
}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Divide the trained parameters into up to three groups, each with its own weight decay.

    The groups are:

    1. weights of convolutions and linear layers, with `adapt=True`: LARS and LAMB adapt the
       learning rate of this group only;
    2. weights and biases of norm layers;
    3. biases of all other layers.

    The type of the module and the number of dimensions decide, not the name of the parameter:
    `"bn" in name` would miss a norm called `downsample.1`. Frozen parameters (see `weights.freeze`)
    are in no group. With `backbone_lr_scale`, backbone and head are separate groups.

    Args:
        model: The network; its parameters are not changed.
        config: The `optim` section of the config.

    Returns:
        The groups that have at least one parameter, in the order above.
    """
    weights: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, _NORMS):
                norms.append(parameter)
            elif parameter.ndim <= 1:
                biases.append(parameter)
            else:
                weights.append(parameter)

    groups: list[Group] = []
    if weights:
        groups.append(_group(weights, config.weight_decay, config, adapt=True))
    if norms:
        groups.append(_group(norms, config.norm_weight_decay, config))
    if biases:
        groups.append(_group(biases, config.bias_weight_decay, config))
    if config.backbone_lr_scale != 1.0:
        groups = split_head(groups, model, config.backbone_lr_scale)
    return groups


def _group(
    parameters: list[nn.Parameter],
    decay: float | None,
    config: OptimConfig,
    adapt: bool = False,
) -> Group:
    """Build one group; a `decay` of None means the general `config.weight_decay`."""
    if decay is None:
        decay = config.weight_decay
    return {
        "params": parameters,
        "adapt": adapt,
        "weight_decay": decay,
    }


def split_head(groups: list[Group], model: nn.Module, backbone_lr_scale: float) -> list[Group]:
    """Split each group into a backbone part and a head part.

    Args:
        groups: Parameter groups of `model`.
        model: The network; `head_modules` says which of its modules are the head.
        backbone_lr_scale: Factor on the learning rate of the backbone.

    Returns:
        Groups with the additional key `lr_scale`, the factor on the learning rate of each step: 1
        for the head, `backbone_lr_scale` for the backbone. Empty parts are left out.
    """
    head: set[nn.Parameter] = set()
    for module in head_modules(model).values():
        head.update(module.parameters())

    split = []
    for group in groups:
        of_backbone = []
        of_head = []
        for parameter in group["params"]:
            if parameter in head:
                of_head.append(parameter)
            else:
                of_backbone.append(parameter)
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
    """Apply an update law, and skip updates whose gradient is not finite.

    It follows the protocol of torch's fused optimizers: an update whose `found_inf` (a scalar on
    the device, set by the training loop or by GradScaler) is not zero changes neither weights nor
    state, and the host does not wait for that decision. The state exists from the start. A
    parameter without a gradient is left out of the update.

    Args:
        groups: Parameter groups, see `parameter_groups`.
        law: The update law and its initial state.
        **settings: Settings that the law reads from each group, such as `momentum` and `eps`.
    """

    def __init__(self, groups: list[Group], law: Law, **settings: Any) -> None:
        # To torch, "fused" means that found_inf is honoured here, and that `step` is on the device.
        defaults = {"lr": 0.0, "fused": True, **settings}
        super().__init__(groups, defaults)
        # GradScaler then passes found_inf to this optimizer, and does not wait for it.
        self._step_supports_amp_scaling = True
        self.law = law
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._initial_state(parameter)

    def _initial_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Create the state tensors of one parameter, on its device."""
        state = {}
        for name, value in self.law.initial_state.items():
            if name == "step":
                state[name] = torch.full((), value, device=parameter.device)
            else:
                state[name] = torch.full_like(parameter, value, requires_grad=False)
        return state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Do one update. The gradients must be unscaled already."""
        assert getattr(self, "grad_scale", None) is None, "call GradScaler.unscale_ before step"
        for group in self.param_groups:
            weights = []
            for weight in group["params"]:
                if weight.grad is not None:
                    weights.append(weight)
            if weights:
                self._update_group(group, tuple(weights))

    def _update_group(self, group: Group, weights: Tensors) -> None:
        """Update the weights that have a gradient, and their state, unless `found_inf` is set."""
        gradients = tuple(weight.grad for weight in weights)
        state = []
        for name in self.law.initial_state:
            tensors = tuple(self.state[weight][name] for weight in weights)
            state.append(tensors)

        old_values = [weights, *state]
        new_values = self.law.update(group, weights, gradients, *state)

        no_inf = torch.zeros((), device=weights[0].device)
        found_inf = getattr(self, "found_inf", no_inf)
        is_applied = found_inf == 0
        for old_tensors, new_tensors in zip(old_values, new_values, strict=True):
            assign_if(is_applied, old_tensors, new_tensors)


def assign_if(condition: torch.Tensor, old: Tensors, new: Tensors) -> None:
    """Set each tensor of `old` to that of `new` if `condition` is true, without waiting for it.

    `torch.where` has no form for lists, and one kernel for each of 161 tensors takes longer to
    launch than to run. The difference of the bits as integers times 0 or 1 does the same in three
    operations on lists, and is exact: a product of floating point would make NaN * 0 into NaN.

    Args:
        condition: A bool scalar on the device.
        old: The tensors that are changed.
        new: Their new values, of the same shapes and type. They are overwritten.
    """
    integer = torch.int64 if old[0].element_size() == 8 else torch.int32
    old_bits = [tensor.detach().view(integer) for tensor in old]
    difference = [tensor.view(integer) for tensor in new]
    torch._foreach_sub_(difference, old_bits)
    torch._foreach_mul_(difference, condition.to(integer))
    torch._foreach_add_(old_bits, difference)


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

    Args:
        group: Parameter group with `lr`, `weight_decay`, `momentum`, `trust_coefficient`, `eps`
            and `adapt`.
        weights: The weights w, of any shapes.
        grads: The gradients g, one per weight.
        momentum_buffer: The buffers v, one per weight.

    Returns:
        New weights, new momentum buffers.
    """
    lr = group["lr"]
    weight_decay = group["weight_decay"]
    updates = torch._foreach_add(grads, weights, alpha=weight_decay)
    if group["adapt"]:
        weight_norms = _norms(weights)
        grad_norms = _norms(grads)
        denominators = grad_norms + weight_decay * weight_norms + group["eps"]
        local = group["trust_coefficient"] * weight_norms / denominators
        is_defined = (weight_norms > 0) & (grad_norms > 0)
        factors = torch.where(is_defined, local, 1.0)
        updates = _scale_each(updates, factors)

    buffers = torch._foreach_mul(momentum_buffer, group["momentum"])
    torch._foreach_add_(buffers, updates, alpha=lr)
    new_weights = torch._foreach_sub(weights, buffers)
    return new_weights, buffers


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
    exempt parameters without weight decay, which is the same in their recipes). It is not clamped,
    since the paper's phi is the identity there too. FusedLAMB and timm also clip the norm of the
    gradient at 1: here `train.clip_grad_norm 1` does that.

    Args:
        group: Parameter group with `lr`, `weight_decay`, `betas`, `eps` and `adapt`.
        weights: The weights w, of any shapes.
        grads: The gradients, one per weight.
        exp_avg: Running averages m of the gradient, one per weight.
        exp_avg_sq: Running averages v of the squared gradient, one per weight.
        step: Number of updates so far, one scalar per weight.

    Returns:
        New weights, averages, averages of squares and steps.
    """
    beta1, beta2 = group["betas"]
    steps = torch._foreach_add(step, 1)
    # A weight that had no gradient in some updates has a smaller count than the others. In double
    # precision, since 1 - beta2^t cancels in single precision.
    counts = torch.stack(list(steps)).double()
    dtype = weights[0].dtype
    corrections1 = (1 - beta1**counts).to(dtype).unbind()
    corrections2 = (1 - beta2**counts).to(dtype).unbind()

    averages = torch._foreach_lerp(exp_avg, grads, 1 - beta1)
    squares = torch._foreach_mul(exp_avg_sq, beta2)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

    corrected_averages = torch._foreach_div(averages, corrections1)
    corrected_squares = torch._foreach_div(squares, corrections2)
    roots = torch._foreach_sqrt(corrected_squares)
    denominators = torch._foreach_add(roots, group["eps"])
    updates = torch._foreach_div(corrected_averages, denominators)
    torch._foreach_add_(updates, weights, alpha=group["weight_decay"])

    if group["adapt"]:
        weight_norms = _norms(weights)
        update_norms = _norms(updates)
        is_defined = (weight_norms > 0) & (update_norms > 0)
        ratios = torch.where(is_defined, weight_norms / update_norms, 1.0)
        updates = _scale_each(updates, ratios)
    new_weights = torch._foreach_add(weights, updates, alpha=-group["lr"])
    return new_weights, averages, squares, steps


def rmsprop(
    group: Group,
    weights: Tensors,
    grads: Tensors,
    square_avg: Tensors,
    momentum_buffer: Tensors,
) -> NewValues:
    """RMSprop (Tieleman and Hinton 2012) in TensorFlow's form, with which Inception v3 and
    EfficientNet were trained.

        g <- g + weight_decay * w
        s <- alpha * s + (1 - alpha) * g^2, from s = 1
        b <- momentum * b + lr * g / sqrt(s + eps)
        w <- w - b

    torch's form differs: s starts at 0 (a first step of lr / sqrt(1 - alpha) for every weight), eps
    is outside the root (the recipes' 1e-3 and 1.0 would mean something else), and lr is outside b.

    Args:
        group: Parameter group with `lr`, `weight_decay`, `alpha`, `momentum` and `eps`.
        weights: The weights w, of any shapes.
        grads: The gradients g, one per weight.
        square_avg: Running averages s of the squared gradient, one per weight.
        momentum_buffer: The buffers b, one per weight.

    Returns:
        New weights, averages of squares and momentum buffers.
    """
    alpha = group["alpha"]
    grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])

    squares = torch._foreach_mul(square_avg, alpha)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - alpha)
    shifted_squares = torch._foreach_add(squares, group["eps"])
    roots = torch._foreach_sqrt(shifted_squares)

    buffers = torch._foreach_mul(momentum_buffer, group["momentum"])
    torch._foreach_addcdiv_(buffers, grads, roots, value=group["lr"])
    new_weights = torch._foreach_sub(weights, buffers)
    return new_weights, squares, buffers


_LAWS = {
    "lars": Law(
        update=lars,
        initial_state={"momentum_buffer": 0.0},
    ),
    "lamb": Law(
        update=lamb,
        initial_state={"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0},
    ),
    "rmsprop": Law(
        update=rmsprop,
        initial_state={"square_avg": 1.0, "momentum_buffer": 0.0},
    ),
}


def _norms(tensors: Tensors) -> torch.Tensor:
    """The L2 norm of each of n tensors, as one tensor [n]."""
    norms = torch._foreach_norm(tensors)
    return torch.stack(list(norms))


def _scale_each(tensors: Tensors, factors: torch.Tensor) -> Tensors:
    """Multiply the i-th of n tensors by `factors[i]`; `factors` is [n]."""
    return torch._foreach_mul(tensors, factors.unbind())


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that `config.kind` names, fused where torch has a fused kernel.

    The learning rate starts at 0: the training loop sets it at each step.

    Args:
        config: The `optim` section of the config.
        model: The network, on its final device.
    """
    groups = parameter_groups(model, config)
    device = next(model.parameters()).device
    is_fused = device.type in ("cuda", "cpu")
    eps = config.eps
    if eps is None:
        eps = _DEFAULT_EPS[config.kind]

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
        return torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=config.betas,
            eps=eps,
            fused=is_fused,
        )
    sgd = torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=is_fused,
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
