"""Parameter groups, the optimizers' formulas and state, and the average of the weights."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint import TrainState
from resnet_dist.config import OptimConfig
from resnet_dist.ema import Ema
from resnet_dist.models.build import MODELS
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.optim import assign_if, build_optimizer, parameter_groups


@pytest.mark.parametrize("sync", [False, True])
def test_groups_follow_the_type_of_the_module(sync):
    """torchvision names the norms of a shortcut downsample.1: a search for "bn" would miss them."""
    model = MODELS["resnet18"](num_classes=10)
    if sync:
        model = convert_sync_batch_norm(model)
    groups = parameter_groups(
        model, OptimConfig(weight_decay=1e-4, norm_weight_decay=0.0, bias_weight_decay=1e-5)
    )
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0, 1e-5]
    assert [len(group["params"]) for group in groups] == [21, 40, 1]
    assert [group["adapt"] for group in groups] == [True, False, False]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    assert any(p is model.layer2[0].downsample[1].weight for p in groups[1]["params"])
    assert groups[2]["params"][0] is model.fc.bias


def test_no_setting_means_the_same_decay_for_all():
    assert {
        g["weight_decay"]
        for g in parameter_groups(MODELS["resnet18"](), OptimConfig(weight_decay=5e-4))
    } == {5e-4}


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_exists_from_the_start_changes_nothing(nesterov):
    torch.manual_seed(0)
    ours, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    plain.load_state_dict(ours.state_dict())
    a = build_optimizer(OptimConfig(nesterov=nesterov, weight_decay=0.01), ours)
    b = torch.optim.SGD(
        plain.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01
    )
    for group in a.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        x = torch.randn(5, 4, dtype=torch.float64)
        for model, optimizer in ((ours, a), (plain, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-14)


class Loop:
    """The published formulas of one tensor, a number at a time, in plain Python.

    LARS: MLPerf's ResNet-50 reference (compute_lr and the momentum of lars_optimizer.py). LAMB:
    algorithm 2 of You et al. 2019, as in NVIDIA's FusedLAMB. RMSprop: the update in the
    documentation of TensorFlow's ApplyRMSProp.
    """

    def __init__(self, kind, w, adapt, decay):
        self.kind, self.w, self.adapt, self.decay, self.t = (
            kind,
            [float(x) for x in w.flatten()],
            adapt,
            decay,
            0,
        )
        self.a, self.b = [0.0] * len(self.w), [1.0 if kind == "rmsprop" else 0.0] * len(self.w)

    def step(self, grad, lr):
        norm = lambda values: math.sqrt(sum(x * x for x in values))  # noqa: E731
        w, g, self.t = self.w, [float(x) for x in grad.flatten()], self.t + 1
        if self.kind == "lars":
            ratio = 1.0
            if self.adapt and norm(w) > 0 and norm(g) > 0:
                ratio = 0.002 * norm(w) / (norm(g) + self.decay * norm(w))
            for i in range(len(w)):
                self.a[i] = 0.8 * self.a[i] + lr * ratio * (g[i] + self.decay * w[i])
            self.w = [w[i] - self.a[i] for i in range(len(w))]
        if self.kind == "lamb":
            update = []
            for i in range(len(w)):
                self.a[i] = 0.7 * self.a[i] + 0.3 * g[i]
                self.b[i] = 0.95 * self.b[i] + 0.05 * g[i] * g[i]
                m, v = self.a[i] / (1 - 0.7**self.t), self.b[i] / (1 - 0.95**self.t)
                update.append(m / (math.sqrt(v) + 1e-6) + self.decay * w[i])
            ratio = (
                norm(w) / norm(update) if self.adapt and norm(w) > 0 and norm(update) > 0 else 1.0
            )
            self.w = [w[i] - lr * ratio * update[i] for i in range(len(w))]
        if self.kind == "rmsprop":
            for i in range(len(w)):
                total = g[i] + self.decay * w[i]
                self.b[i] += (1 - 0.85) * (total * total - self.b[i])
                self.a[i] = 0.8 * self.a[i] + lr * total / math.sqrt(self.b[i] + 1e-3)
                self.w[i] = w[i] - self.a[i]


SETTINGS = {
    "lars": {"momentum": 0.8, "trust_coefficient": 0.002},
    "lamb": {"betas": (0.7, 0.95)},
    "rmsprop": {"momentum": 0.8, "alpha": 0.85, "eps": 1e-3},
    "adamw": {},
    "sgd": {},
}


def small_net(kind, dtype=torch.float64):
    """Kernels, a norm, a matrix that is zero (its ratio is 1), a frozen bias; and the optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)).to(
        dtype
    )
    net = net.to(memory_format=torch.channels_last)
    nn.init.zeros_(net[3].weight)
    net[3].bias.requires_grad_(False)
    config = OptimConfig(
        kind=kind,
        weight_decay=0.01,
        norm_weight_decay=0.0,
        bias_weight_decay=0.02,
        **SETTINGS[kind],
    )
    return net, build_optimizer(config, net)


def draw_gradients(net, seed):
    generator = np.random.default_rng(seed)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.tensor(
                generator.normal(size=parameter.shape), dtype=parameter.dtype
            )


def update(net, optimizer, step):
    draw_gradients(net, step)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 / (1 + step)
    optimizer.step()


@pytest.mark.parametrize("kind", ["lars", "lamb", "rmsprop"])
def test_updates_equal_a_loop_over_numbers(kind):
    """A fixed sequence of gradients, with a falling learning rate. One gradient is zero at first,
    and absent later, so that the weights of its group have different numbers of updates.
    """
    net, optimizer = small_net(kind)
    loops = {
        p: Loop(kind, p.detach(), group["adapt"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    before = net[3].bias.clone()
    for step in range(12):
        draw_gradients(net, step)
        if step == 0:
            net[0].weight.grad.zero_()
        if step == 2:
            net[0].weight.grad = None
        lr = 0.1 * (1 - step / 12)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for parameter, loop in loops.items():
            if parameter.grad is not None:
                loop.step(parameter.grad, lr)
                np.testing.assert_allclose(
                    parameter.detach().flatten(), loop.w, rtol=1e-12, atol=1e-14
                )
    assert torch.equal(net[3].bias, before)  # frozen: no gradient, no decay


def test_defaults_of_eps_and_adamw_is_that_of_torch():
    for kind, eps in (("lars", 0.0), ("lamb", 1e-6), ("rmsprop", 1e-8), ("adamw", 1e-8)):
        model = nn.Linear(2, 2)
        optimizer = build_optimizer(OptimConfig(kind=kind, betas=(0.8, 0.99)), model)
        assert {group["eps"] for group in optimizer.param_groups} == {eps}
        assert optimizer.defaults["betas"] == (0.8, 0.99) and optimizer.defaults["fused"]
        assert build_optimizer(OptimConfig(kind=kind, eps=0.1), model).param_groups[0]["eps"] == 0.1
    assert type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_optimizer_goes_on_bit_for_bit_from_its_file(kind):
    """And an update that is marked as not finite leaves no trace, not in the count of steps
    either.
    """
    nets = [small_net(kind, torch.float32) for _ in range(2)]
    states = [
        TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        for net, optimizer in nets
    ]
    for step in range(3):
        update(*nets[0], step)
    file = io.BytesIO()
    torch.save(states[0].state_dict(), file)
    states[1].load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    nets[1][1].found_inf = torch.ones(())
    net_before, state_before = (
        copy.deepcopy(nets[1][0].state_dict()),
        copy.deepcopy(nets[1][1].state_dict()["state"]),
    )
    draw_gradients(nets[1][0], 9)
    for parameter in nets[1][0].parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))
    nets[1][1].step()
    torch.testing.assert_close(
        [dict(nets[1][0].state_dict()), nets[1][1].state_dict()["state"]],
        [dict(net_before), state_before],
        rtol=0,
        atol=0,
    )
    nets[1][1].found_inf = torch.zeros(())
    for step in range(3, 6):
        for net, optimizer in nets:
            update(net, optimizer, step)
    assert all(
        torch.equal(a, b)
        for a, b in zip(nets[0][0].parameters(), nets[1][0].parameters(), strict=True)
    )
    torch.testing.assert_close(
        nets[1][1].state_dict()["state"], nets[0][1].state_dict()["state"], rtol=0, atol=0
    )


def test_assign_if_sets_all_tensors_or_none_exactly():
    """Bit by bit what torch.where gives, with values that arithmetic would not keep."""
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3e38, 1.0])
    for dtype in (torch.float32, torch.float64):
        for condition in (True, False):
            old = [
                special.to(dtype),
                torch.ones(2, 3, 4, 4, dtype=dtype),
                torch.tensor(2.0).to(dtype),
            ]
            old[1] = old[1].contiguous(memory_format=torch.channels_last)
            new = [special.flip(0).to(dtype), torch.full_like(old[1], -7.0), old[2] + 1]
            expected = [tensor.clone() for tensor in (new if condition else old)]
            assign_if(torch.tensor(condition), old, new)
            for ours, theirs in zip(old, expected, strict=True):
                integer = torch.int64 if dtype == torch.float64 else torch.int32
                assert torch.equal(ours.view(integer), theirs.view(integer))


def test_ema_is_the_recursion_and_copies_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = Ema(model, 0.9)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(4):
        model(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        for key, value in model.state_dict().items():
            expected[key] = (
                value if value.dtype == torch.int64 else 0.9 * expected[key] + 0.1 * value
            )
    torch.testing.assert_close(dict(ema.model.state_dict()), expected)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
