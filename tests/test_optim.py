"""Parameter groups, the optimizers' formulas and state, and the average of the weights."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from engine_utils import state_of
from torch import nn

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
    config = OptimConfig(
        weight_decay=1e-4,
        norm_weight_decay=0.0,
        bias_weight_decay=1e-5,
    )

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
    _, norm_of_shortcut = model.layer2[0].downsample
    assert id(norm_of_shortcut.weight) in identities(norms["params"])

    grouped = weights["params"] + norms["params"] + biases["params"]
    assert identities(grouped) == identities(model.parameters())


def identities(parameters):
    """What tells parameters apart: `==` would compare their numbers."""
    return {id(parameter) for parameter in parameters}


def test_no_setting_means_the_same_decay_for_all():
    model = MODELS["resnet18"]()
    groups = parameter_groups(model, OptimConfig(weight_decay=5e-4))
    for group in groups:
        assert group["weight_decay"] == 5e-4


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_exists_from_the_start_changes_nothing(nesterov):
    torch.manual_seed(0)
    ours = nn.Linear(4, 3).double()
    plain = copy.deepcopy(ours)
    config = OptimConfig(nesterov=nesterov, weight_decay=0.01)
    our_optimizer = build_optimizer(config, ours)
    set_lr(our_optimizer, 0.1)
    plain_optimizer = torch.optim.SGD(
        plain.parameters(),
        lr=0.1,
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.01,
    )
    pairs = (
        (ours, our_optimizer),
        (plain, plain_optimizer),
    )

    for _ in range(3):
        inputs = torch.randn(5, 4, dtype=torch.float64)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            optimizer.step()

    torch.testing.assert_close(
        ours.state_dict(),
        plain.state_dict(),
        rtol=1e-12,
        atol=1e-14,
    )


class Loop:
    """The published formulas of one tensor, a number at a time, in plain Python."""

    def __init__(self, weights, adapt, decay):
        self.weights = weights.flatten().tolist()
        self.adapt = adapt
        self.decay = decay
        self.num_updates = 0
        num_weights = len(self.weights)
        self.momenta = [0.0] * num_weights
        self.first_moments = [0.0] * num_weights
        self.second_moments = [0.0] * num_weights
        self.mean_squares = [1.0] * num_weights

    def step(self, grad, lr):
        self.num_updates += 1
        grads = grad.flatten().tolist()
        self.update(grads, lr)

    def update(self, grads, lr):
        raise NotImplementedError

    def with_decay(self, number, i):
        """Add the decay of weight `i`."""
        return number + self.decay * self.weights[i]


def norm(numbers):
    squares = [number * number for number in numbers]
    return math.sqrt(sum(squares))


class LarsLoop(Loop):
    """MLPerf's ResNet-50 reference: compute_lr, and the momentum of lars_optimizer.py."""

    momentum = 0.8
    trust_coefficient = 0.002

    def update(self, grads, lr):
        local_lr = lr * self.trust_ratio(grads)
        for i, grad in enumerate(grads):
            change = local_lr * self.with_decay(grad, i)
            self.momenta[i] = self.momentum * self.momenta[i] + change
            self.weights[i] -= self.momenta[i]

    def trust_ratio(self, grads):
        weight_norm = norm(self.weights)
        grad_norm = norm(grads)
        if not self.adapt or weight_norm == 0 or grad_norm == 0:
            return 1.0
        denominator = grad_norm + self.decay * weight_norm
        return self.trust_coefficient * weight_norm / denominator


class LambLoop(Loop):
    """Algorithm 2 of You et al. 2019, as in NVIDIA's FusedLAMB."""

    beta1 = 0.7
    beta2 = 0.95
    eps = 1e-6

    def update(self, grads, lr):
        updates = []
        for i, grad in enumerate(grads):
            first = self.beta1 * self.first_moments[i] + (1 - self.beta1) * grad
            second = self.beta2 * self.second_moments[i] + (1 - self.beta2) * grad * grad
            self.first_moments[i] = first
            self.second_moments[i] = second
            unbiased_first = first / (1 - self.beta1**self.num_updates)
            unbiased_second = second / (1 - self.beta2**self.num_updates)
            direction = unbiased_first / (math.sqrt(unbiased_second) + self.eps)
            updates.append(self.with_decay(direction, i))

        ratio = self.trust_ratio(updates)
        for i, update in enumerate(updates):
            self.weights[i] -= lr * ratio * update

    def trust_ratio(self, updates):
        weight_norm = norm(self.weights)
        update_norm = norm(updates)
        if not self.adapt or weight_norm == 0 or update_norm == 0:
            return 1.0
        return weight_norm / update_norm


class RmspropLoop(Loop):
    """The update in the documentation of TensorFlow's ApplyRMSProp."""

    momentum = 0.8
    alpha = 0.85
    eps = 1e-3

    def update(self, grads, lr):
        for i, grad in enumerate(grads):
            total = self.with_decay(grad, i)
            difference = total * total - self.mean_squares[i]
            self.mean_squares[i] += (1 - self.alpha) * difference
            change = lr * total / math.sqrt(self.mean_squares[i] + self.eps)
            self.momenta[i] = self.momentum * self.momenta[i] + change
            self.weights[i] -= self.momenta[i]


LOOPS = {
    "lars": LarsLoop,
    "lamb": LambLoop,
    "rmsprop": RmspropLoop,
}

# The numbers of the classes above.
SETTINGS = {
    "lars": {
        "momentum": LarsLoop.momentum,
        "trust_coefficient": LarsLoop.trust_coefficient,
    },
    "lamb": {
        "betas": (LambLoop.beta1, LambLoop.beta2),
    },
    "rmsprop": {
        "momentum": RmspropLoop.momentum,
        "alpha": RmspropLoop.alpha,
        "eps": RmspropLoop.eps,
    },
    "adamw": {},
    "sgd": {},
}


def build_small_net(kind, dtype=torch.float64):
    """Kernels, a norm, a matrix that is zero (its ratio is 1), a frozen bias; and the optimizer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    net = net.to(dtype)
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
            numbers = generator.normal(size=parameter.shape)
            parameter.grad = torch.tensor(numbers, dtype=parameter.dtype)


@pytest.mark.parametrize("kind", LOOPS)
def test_updates_equal_a_loop_over_numbers(kind):
    """A fixed sequence of gradients, with a falling learning rate. One gradient is zero at first,
    and absent later, so that the weights of its group have different numbers of updates.
    """
    net, optimizer = build_small_net(kind)
    kernel = net[0].weight
    frozen = net[3].bias
    frozen_before = frozen.clone()
    loop_class = LOOPS[kind]
    loops = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            loops[parameter] = loop_class(
                parameter.detach(),
                group["adapt"],
                group["weight_decay"],
            )

    num_steps = 12
    for step in range(num_steps):
        draw_gradients(net, step)
        if step == 0:
            kernel.grad.zero_()
        if step == 2:
            kernel.grad = None
        lr = 0.1 * (1 - step / num_steps)
        set_lr(optimizer, lr)
        optimizer.step()
        for parameter, loop in loops.items():
            if parameter.grad is None:
                continue
            loop.step(parameter.grad, lr)
            found = parameter.detach().flatten()
            np.testing.assert_allclose(found, loop.weights, rtol=1e-12, atol=1e-14)
    assert torch.equal(frozen, frozen_before), "no gradient, no decay"


def test_defaults_of_eps():
    defaults = {
        "lars": 0.0,
        "lamb": 1e-6,
        "rmsprop": 1e-8,
        "adamw": 1e-8,
    }
    betas = (0.8, 0.99)
    model = nn.Linear(2, 2)
    for kind, eps in defaults.items():
        without_eps = OptimConfig(kind=kind, betas=betas)
        optimizer = build_optimizer(without_eps, model)
        for group in optimizer.param_groups:
            assert group["eps"] == eps
        assert optimizer.defaults["betas"] == betas
        assert optimizer.defaults["fused"]

        with_eps = OptimConfig(kind=kind, eps=0.1)
        optimizer = build_optimizer(with_eps, model)
        first_group = optimizer.param_groups[0]
        assert first_group["eps"] == 0.1


def test_adamw_is_that_of_torch():
    optimizer = build_optimizer(OptimConfig(kind="adamw"), nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.AdamW


def update(state, step):
    """One update with random gradients."""
    draw_gradients(state.model, step)
    set_lr(state.optimizer, 0.1 / (1 + step))
    state.optimizer.step()


def tensors_of(state):
    """The weights, and the state of the optimizer."""
    weights = state.model.state_dict()
    optimizer_state = state.optimizer.state_dict()["state"]
    return [weights, optimizer_state]


def assert_same_tensors(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def build_state_of_small_net(kind):
    net, optimizer = build_small_net(kind, torch.float32)
    return state_of(net, optimizer)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_optimizer_goes_on_bit_for_bit_from_its_file(kind):
    saved = build_state_of_small_net(kind)
    loaded = build_state_of_small_net(kind)
    for step in range(3):
        update(saved, step)

    load_from_file_of(saved, loaded)

    for step in range(3, 6):
        update(saved, step)
        update(loaded, step)
    assert_same_tensors(tensors_of(loaded), tensors_of(saved))


def load_from_file_of(saved, loaded):
    """Write the state `saved` to a file, and read it into the state `loaded`."""
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    loaded.load_state_dict(content)


@pytest.mark.parametrize("kind", SETTINGS)
def test_an_update_marked_as_not_finite_leaves_no_trace(kind):
    """Not in the count of steps either: the following updates are those of a run without it."""
    undisturbed = build_state_of_small_net(kind)
    disturbed = build_state_of_small_net(kind)
    update(undisturbed, step=0)
    update(disturbed, step=0)
    before = copy.deepcopy(tensors_of(disturbed))

    disturbed.optimizer.found_inf = torch.ones(())
    for parameter in disturbed.model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(math.nan)
    disturbed.optimizer.step()
    assert_same_tensors(tensors_of(disturbed), before)

    disturbed.optimizer.found_inf = torch.zeros(())
    update(undisturbed, step=1)
    update(disturbed, step=1)
    assert_same_tensors(tensors_of(disturbed), tensors_of(undisturbed))


def bits_of(tensor):
    """The bit patterns as integers, in which NaN equals NaN and 0 differs from -0."""
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}
    return tensor.view(integers[tensor.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [True, False])
def test_assign_if_sets_all_tensors_or_none_exactly(dtype, condition):
    """With values that arithmetic would not keep."""
    inf = math.inf
    special_values = [0.0, -0.0, math.nan, inf, -inf, 1e-45, 3e38, 1.0]
    special = torch.tensor(special_values, dtype=dtype)
    kernel = torch.ones(2, 3, 4, 4, dtype=dtype)
    kernel = kernel.to(memory_format=torch.channels_last)
    scalar = torch.tensor(2.0, dtype=dtype)
    old = [
        special,
        kernel,
        scalar,
    ]
    new = [
        special.flip(0),
        torch.full_like(kernel, -7.0),
        scalar + 1,
    ]
    chosen = old
    if condition:
        chosen = new
    # `assign_if` writes to the tensors of both lists.
    expected = copy.deepcopy(chosen)

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
    assert of_nonfinite.count <= 12

    most_of_optimizers = {
        "lars": 60,
        "lamb": 125,
        "rmsprop": 70,
    }
    for kind, most in most_of_optimizers.items():
        optimizer = build_optimizer(OptimConfig(kind), model)
        optimizer.found_inf = torch.zeros((), device="meta")
        with OperationCount() as of_optimizer:
            optimizer.step()
        assert of_optimizer.count <= most, kind


def test_ema_is_the_recursion_and_copies_counts():
    decay = 0.9
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 3),
        nn.BatchNorm1d(3),
    )
    ema = Ema(model, decay)
    expected = copy.deepcopy(dict(model.state_dict()))
    for _ in range(4):
        # Changes the running statistics.
        inputs = torch.randn(8, 3)
        model(inputs)
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
