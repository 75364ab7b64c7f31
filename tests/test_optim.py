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
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import assign_if, build_optimizer, parameter_groups
from resnet_dist.resources.operations import OperationWatch


@pytest.mark.parametrize("sync", [False, True])
def test_groups_follow_the_type_of_the_module(sync):
    """torchvision names the norms of a shortcut downsample.1: a search for "bn" would miss them."""
    model = MODELS["resnet18"](num_classes=10)
    if sync:
        model = convert_sync_batch_norm(model)
    config = OptimConfig(weight_decay=1e-4, norm_weight_decay=0.0, bias_weight_decay=1e-5)

    weights, norms, biases = parameter_groups(model, config)

    assert weights["weight_decay"] == 1e-4
    assert norms["weight_decay"] == 0.0
    assert biases["weight_decay"] == 1e-5
    assert weights["adapt"]
    assert not norms["adapt"]
    assert not biases["adapt"]
    assert len(weights["params"]) == 21
    assert len(norms["params"]) == 40
    [bias] = biases["params"]
    assert bias is model.fc.bias
    norm_of_shortcut = model.layer2[0].downsample[1].weight
    assert any(parameter is norm_of_shortcut for parameter in norms["params"])

    grouped = weights["params"] + norms["params"] + biases["params"]
    assert {id(parameter) for parameter in grouped} == {id(p) for p in model.parameters()}


def test_no_setting_means_the_same_decay_for_all():
    groups = parameter_groups(MODELS["resnet18"](), OptimConfig(weight_decay=5e-4))
    assert {group["weight_decay"] for group in groups} == {5e-4}


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_exists_from_the_start_changes_nothing(nesterov):
    torch.manual_seed(0)
    ours = nn.Linear(4, 3).double()
    plain = copy.deepcopy(ours)
    our_optimizer = build_optimizer(OptimConfig(nesterov=nesterov, weight_decay=0.01), ours)
    set_lr(our_optimizer, 0.1)
    plain_optimizer = torch.optim.SGD(
        plain.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01
    )
    for _ in range(3):
        x = torch.randn(5, 4, dtype=torch.float64)
        for model, optimizer in ((ours, our_optimizer), (plain, plain_optimizer)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-14)


class Loop:
    """The published formulas of one tensor, a number at a time, in plain Python.

    Attributes:
        w: The weights.
        a: The momentum; of LAMB the first moment.
        b: The mean square of RMSprop; of LAMB the second moment.
        t: Number of updates.
    """

    first_mean_square = 0.0

    def __init__(self, weights, adapt, decay):
        self.w = [float(x) for x in weights.flatten()]
        self.adapt = adapt
        self.decay = decay
        self.t = 0
        self.a = [0.0] * len(self.w)
        self.b = [self.first_mean_square] * len(self.w)

    def step(self, grad, lr):
        self.t += 1
        self.update([float(x) for x in grad.flatten()], lr)

    def update(self, g, lr):
        raise NotImplementedError


def norm(numbers):
    return math.sqrt(sum(x * x for x in numbers))


class LarsLoop(Loop):
    """MLPerf's ResNet-50 reference: compute_lr, and the momentum of lars_optimizer.py."""

    def update(self, g, lr):
        ratio = 1.0
        if self.adapt and norm(self.w) > 0 and norm(g) > 0:
            ratio = 0.002 * norm(self.w) / (norm(g) + self.decay * norm(self.w))
        for i in range(len(self.w)):
            total = g[i] + self.decay * self.w[i]
            self.a[i] = 0.8 * self.a[i] + lr * ratio * total
        for i in range(len(self.w)):
            self.w[i] -= self.a[i]


class LambLoop(Loop):
    """Algorithm 2 of You et al. 2019, as in NVIDIA's FusedLAMB."""

    def update(self, g, lr):
        update = []
        for i in range(len(self.w)):
            self.a[i] = 0.7 * self.a[i] + 0.3 * g[i]
            self.b[i] = 0.95 * self.b[i] + 0.05 * g[i] * g[i]
            m = self.a[i] / (1 - 0.7**self.t)
            v = self.b[i] / (1 - 0.95**self.t)
            update.append(m / (math.sqrt(v) + 1e-6) + self.decay * self.w[i])
        ratio = 1.0
        if self.adapt and norm(self.w) > 0 and norm(update) > 0:
            ratio = norm(self.w) / norm(update)
        for i in range(len(self.w)):
            self.w[i] -= lr * ratio * update[i]


class RmspropLoop(Loop):
    """The update in the documentation of TensorFlow's ApplyRMSProp."""

    first_mean_square = 1.0

    def update(self, g, lr):
        for i in range(len(self.w)):
            total = g[i] + self.decay * self.w[i]
            self.b[i] += (1 - 0.85) * (total * total - self.b[i])
            self.a[i] = 0.8 * self.a[i] + lr * total / math.sqrt(self.b[i] + 1e-3)
            self.w[i] -= self.a[i]


LOOPS = {"lars": LarsLoop, "lamb": LambLoop, "rmsprop": RmspropLoop}

# The numbers in the formulas above.
SETTINGS = {
    "lars": {"momentum": 0.8, "trust_coefficient": 0.002},
    "lamb": {"betas": (0.7, 0.95)},
    "rmsprop": {"momentum": 0.8, "alpha": 0.85, "eps": 1e-3},
    "adamw": {},
    "sgd": {},
}


def build_small_net(kind, dtype=torch.float64):
    """Kernels, a norm, a matrix that is zero (its ratio is 1), a frozen bias; and the optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    net = net.to(dtype).to(memory_format=torch.channels_last)
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
            numbers = generator.normal(size=parameter.shape)
            parameter.grad = torch.tensor(numbers, dtype=parameter.dtype)


@pytest.mark.parametrize("kind", LOOPS)
def test_updates_equal_a_loop_over_numbers(kind):
    """A fixed sequence of gradients, with a falling learning rate. One gradient is zero at first,
    and absent later, so that the weights of its group have different numbers of updates.
    """
    net, optimizer = build_small_net(kind)
    frozen = net[3].bias
    frozen_before = frozen.clone()
    loops = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            loops[parameter] = LOOPS[kind](
                parameter.detach(), group["adapt"], group["weight_decay"]
            )

    num_steps = 12
    for step in range(num_steps):
        draw_gradients(net, step)
        if step == 0:
            net[0].weight.grad.zero_()
        if step == 2:
            net[0].weight.grad = None
        lr = 0.1 * (1 - step / num_steps)
        set_lr(optimizer, lr)
        optimizer.step()
        for parameter, loop in loops.items():
            if parameter.grad is None:
                continue
            loop.step(parameter.grad, lr)
            found = parameter.detach().flatten()
            np.testing.assert_allclose(found, loop.w, rtol=1e-12, atol=1e-14)
    assert torch.equal(frozen, frozen_before), "no gradient, no decay"


def test_defaults_of_eps():
    defaults = {"lars": 0.0, "lamb": 1e-6, "rmsprop": 1e-8, "adamw": 1e-8}
    model = nn.Linear(2, 2)
    for kind, eps in defaults.items():
        optimizer = build_optimizer(OptimConfig(kind=kind, betas=(0.8, 0.99)), model)
        assert {group["eps"] for group in optimizer.param_groups} == {eps}
        assert optimizer.defaults["betas"] == (0.8, 0.99)
        assert optimizer.defaults["fused"]
        with_eps = build_optimizer(OptimConfig(kind=kind, eps=0.1), model)
        assert with_eps.param_groups[0]["eps"] == 0.1


def test_adamw_is_that_of_torch():
    optimizer = build_optimizer(OptimConfig(kind="adamw"), nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.AdamW


def update(net, optimizer, step):
    draw_gradients(net, step)
    set_lr(optimizer, 0.1 / (1 + step))
    optimizer.step()


def state_of(net, optimizer):
    """The weights, and the state of the optimizer."""
    return [dict(net.state_dict()), optimizer.state_dict()["state"]]


def assert_same_state(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def build_state_of_small_net(kind):
    net, optimizer = build_small_net(kind, torch.float32)
    return TrainState(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_optimizer_goes_on_bit_for_bit_from_its_file(kind):
    saved = build_state_of_small_net(kind)
    loaded = build_state_of_small_net(kind)
    for step in range(3):
        update(saved.model, saved.optimizer, step)

    load_from_file_of(saved, loaded)

    for step in range(3, 6):
        update(saved.model, saved.optimizer, step)
        update(loaded.model, loaded.optimizer, step)
    assert_same_state(
        state_of(loaded.model, loaded.optimizer), state_of(saved.model, saved.optimizer)
    )


def load_from_file_of(saved, loaded):
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_update_marked_as_not_finite_leaves_no_trace(kind):
    """Not in the count of steps either: the following updates are those of a run without it."""
    undisturbed = build_state_of_small_net(kind)
    disturbed = build_state_of_small_net(kind)
    for state in (undisturbed, disturbed):
        update(state.model, state.optimizer, 0)
    before = copy.deepcopy(state_of(disturbed.model, disturbed.optimizer))

    disturbed.optimizer.found_inf = torch.ones(())
    for parameter in disturbed.model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)
    disturbed.optimizer.step()

    assert_same_state(state_of(disturbed.model, disturbed.optimizer), before)
    disturbed.optimizer.found_inf = torch.zeros(())
    for state in (undisturbed, disturbed):
        update(state.model, state.optimizer, 1)
    assert_same_state(
        state_of(disturbed.model, disturbed.optimizer),
        state_of(undisturbed.model, undisturbed.optimizer),
    )


def bits_of(tensor):
    """The bit patterns as integers, in which NaN equals NaN and 0 differs from -0."""
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}
    return tensor.view(integers[tensor.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [True, False])
def test_assign_if_sets_all_tensors_or_none_exactly(dtype, condition):
    """With values that arithmetic would not keep."""
    inf = math.inf
    special = torch.tensor([0.0, -0.0, math.nan, inf, -inf, 1e-45, 3e38, 1.0], dtype=dtype)
    kernel = torch.ones(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    scalar = torch.tensor(2.0, dtype=dtype)
    old = [special, kernel, scalar]
    new = [special.flip(0), torch.full_like(kernel, -7.0), scalar + 1]
    expected = [tensor.clone() for tensor in (new if condition else old)]

    assign_if(torch.tensor(condition), old, new)

    for found, tensor in zip(old, expected, strict=True):
        assert torch.equal(bits_of(found), bits_of(tensor))


class OperationCount(OperationWatch):
    """Counts operations that are no views: each takes at least one kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def see(self, operation, inputs, results):
        if not getattr(operation, "is_view", False):
            self.count += 1


@pytest.mark.slow
def test_an_update_of_resnet50_takes_few_operations():
    """One operation for the list of all tensors, not one for each: launching thousands of small
    kernels would take longer than running them. SGD and AdamW have torch's fused kernels.
    """
    with torch.device("meta"):
        model = MODELS["resnet50"](1000)
        nonfinite = NonFinite(model, 0)
        skipped = torch.zeros((), dtype=torch.bool)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with OperationCount() as of_nonfinite:
        nonfinite.snapshot_statistics()
        nonfinite.restore_if_skipped(skipped)
    counts = {"NonFinite": of_nonfinite.count}
    for kind in ("lars", "lamb", "rmsprop"):
        optimizer = build_optimizer(OptimConfig(kind), model)
        optimizer.found_inf = torch.zeros((), device="meta")
        with OperationCount() as of_optimizer:
            optimizer.step()
        counts[kind] = of_optimizer.count
    most = {"NonFinite": 12, "lars": 60, "lamb": 125, "rmsprop": 70}
    assert all(counts[name] <= most[name] for name in most), counts


def test_ema_is_the_recursion_and_copies_counts():
    decay = 0.9
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = Ema(model, decay)
    expected = copy.deepcopy(dict(model.state_dict()))
    for _ in range(4):
        # Changes the running statistics.
        model(torch.randn(8, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))

        ema.update()

        for key, value in model.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
            else:
                expected[key] = value
    torch.testing.assert_close(dict(ema.model.state_dict()), expected)
    assert not ema.model.training
    for parameter in ema.model.parameters():
        assert not parameter.requires_grad
