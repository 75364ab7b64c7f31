"""SyncBatchNorm on several ranks against BatchNorm2d in one process on the whole batch."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist_utils import run_ranks
from module_utils import modules_of
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.models import resnet, sync_batch_norm
from resnet_dist.models.build import MODELS
from resnet_dist.models.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

CHANNELS = 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
OPTIONS = (
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"eps": 0.3, "momentum": 0.7},
)


def make_batch(images, dtype, channels_last=True, shift=2.0):
    """Inputs and output gradients [images, 6, 5, 7]; each image has a mean of its own, so ranks
    differ.
    """
    generator = torch.Generator().manual_seed(images)

    layout = torch.contiguous_format
    if channels_last:
        layout = torch.channels_last

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise = draw(images, CHANNELS, 5, 7)
    means = draw(images, CHANNELS, 1, 1)
    x = noise + shift + means
    dy = draw(images, CHANNELS, 5, 7) + 0.5
    x = x.to(dtype, memory_format=layout)
    dy = dy.to(dtype, memory_format=layout)
    return x, dy


def set_weights(norm):
    """Weights and biases that differ by channel, one of them zero as in a zero-initialised
    block.
    """
    weights = torch.linspace(-1, 2, CHANNELS)
    weights[2] = 0
    biases = torch.linspace(1, -1, CHANNELS)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(weights)
            norm.bias.copy_(biases)


def make_norm(kind, **options):
    norm = kind(CHANNELS, **options)
    set_weights(norm)
    return norm


def as_arrays(tensors):
    """A dictionary of tensors as one of float64 arrays."""
    arrays = {}
    for key, tensor in tensors.items():
        arrays[key] = tensor.double().numpy()
    return arrays


def step(norm, x, dy, repeats=2):
    """Forward and backward `repeats` times; everything that can be compared, as arrays."""
    for _ in range(repeats):
        x = x.detach().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        assert y.dtype == x.dtype
        assert y.stride() == x.stride()
        y.backward(dy)
        assert x.grad.stride() == x.stride()
    result = {"y": y.detach(), "dx": x.grad, **norm.state_dict()}
    for name, parameter in norm.named_parameters():
        result[f"d{name}"] = parameter.grad
    return as_arrays(result)


def share(rank, world_size, tensors):
    """This rank's equal share of each batch."""
    shares = []
    for tensor in tensors:
        shares_of_ranks = tensor.chunk(world_size)
        shares.append(shares_of_ranks[rank])
    return shares


def cases():
    """(type of the numbers, options of the norm, options of the batch)."""
    for dtype in TOLERANCE:
        for channels_last in (True, False):
            yield dtype, {}, {"channels_last": channels_last}
    for options in OPTIONS[1:]:
        yield torch.float64, options, {}
    yield torch.float32, {}, {"shift": 1e4}


def rank_steps(rank, world_size, images):
    results = []
    for dtype, options, batch_options in cases():
        batch = make_batch(images, dtype, **batch_options)
        x, dy = share(rank, world_size, batch)
        norm = make_norm(SyncBatchNorm, dtype=dtype, **options)
        results.append(step(norm, x, dy))
    return results


def assert_ranks_equal_whole(ranks, whole, tolerance):
    """The result of `step` of each rank against that of one process on the whole batch."""
    values_per_channel = whole["y"].size / CHANNELS
    for key, expected in whole.items():
        of_ranks = [result[key] for result in ranks]
        largest = np.abs(expected).max()
        scale = max(1, largest)
        if key in ("y", "dx"):
            actual = np.concatenate(of_ranks)
        elif key in ("dweight", "dbias"):
            actual = sum(of_ranks)
            # Sums over the batch carry the rounding of all their terms; compared as means they need
            # no other tolerance.
            scale = values_per_channel
        else:
            actual = of_ranks[0]
            for other in of_ranks[1:]:
                assert np.array_equal(actual, other), f"{key} differs between ranks"
        np.testing.assert_allclose(
            actual / scale,
            expected / scale,
            rtol=0,
            atol=tolerance,
            err_msg=key,
        )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    """Every dtype, layout and option. A mean of 1e4 beside a variance of 1 survives: the reference
    is double precision there, since a float32 input near 1e4 carries an error of 5e-4 itself.
    """
    images = 2 * world_size
    results_of_ranks = run_ranks(rank_steps, world_size, images)
    # One list for each case, with the result of each rank.
    results_of_cases = zip(*results_of_ranks, strict=True)
    for case, results in zip(cases(), results_of_cases, strict=True):
        dtype, options, batch_options = case
        x, dy = make_batch(images, dtype, **batch_options)
        tolerance = TOLERANCE[dtype]
        if "shift" in batch_options:
            dtype = torch.float64
            tolerance = 1e-3
        norm = make_norm(nn.BatchNorm2d, dtype=dtype, **options)
        whole = step(norm, x.to(dtype), dy.to(dtype))
        assert_ranks_equal_whole(results, whole, tolerance)


def rank_autocast(rank, world_size, shift):
    norm = make_norm(SyncBatchNorm)
    batch = make_batch(32, torch.bfloat16, shift=shift)
    x, dy = share(rank, world_size, batch)
    with torch.autocast("cpu", torch.bfloat16):
        result = step(norm, x, dy, repeats=1)
    tensors = (
        norm.running_mean,
        norm.running_var,
        norm.weight.grad,
        norm.bias.grad,
    )
    for tensor in tensors:
        assert tensor.dtype == torch.float32
    return result


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_bf16_autocast_is_as_exact_as_batch_norm(shift):
    x, dy = make_batch(32, torch.bfloat16, shift=shift)
    norm_in_double = make_norm(nn.BatchNorm2d, dtype=torch.float64)
    exact = step(norm_in_double, x.double(), dy.double(), repeats=1)
    norm_in_single = make_norm(nn.BatchNorm2d)
    plain = step(norm_in_single, x, dy, repeats=1)

    first, second = run_ranks(rank_autocast, 2, shift)

    for key in ("y", "dx"):
        ours = np.concatenate([first[key], second[key]])
        errors = np.abs(ours - exact[key])
        plain_errors = np.abs(plain[key] - exact[key])
        assert errors.mean() < 1.5 * plain_errors.mean(), key
    for key in ("running_mean", "running_var"):
        np.testing.assert_allclose(first[key], exact[key], rtol=1e-6)
    for key in ("dweight", "dbias"):
        total = first[key] + second[key]
        np.testing.assert_allclose(total, exact[key], rtol=1e-4, atol=1e-3)


def rank_counts_collectives(rank, world_size):
    x, dy = make_batch(4, torch.float32)
    x.requires_grad_()
    norm = make_norm(SyncBatchNorm)
    with CommDebugMode() as forward:
        y = norm(x)
    kinds = [str(kind) for kind in forward.get_comm_counts()]
    assert kinds == ["c10d_functional.all_reduce"]
    assert forward.get_total_counts() == 1

    with CommDebugMode() as backward:
        y.backward(dy)
    assert backward.get_total_counts() == 1

    plain = make_norm(nn.BatchNorm2d)
    plain.load_state_dict(norm.state_dict())
    norm.eval()
    plain.eval()
    with CommDebugMode() as evaluation:
        y = norm(x)
        y.sum().backward()
    assert evaluation.get_total_counts() == 0
    expected = plain(x)
    assert torch.equal(y, expected)


def test_one_collective_each_way_and_none_in_eval():
    run_ranks(rank_counts_collectives, 2)


def group_of_one(rank, world_size):
    """Plain batch norm in a group of one, and with the switch the same numbers by a collective."""
    num_steps = 2
    num_collectives = {
        False: 0,
        # One forward and one backward.
        True: 2 * num_steps,
    }
    results = []
    for is_synced in (False, True):
        sync_batch_norm.SYNC_IN_GROUP_OF_ONE = is_synced
        norm = make_norm(SyncBatchNorm, dtype=torch.float64)
        x, dy = make_batch(4, torch.float64)
        with CommDebugMode() as mode:
            result = step(norm, x, dy, num_steps)
        results.append(result)
        assert mode.get_total_counts() == num_collectives[is_synced]
    return results


def test_the_switch_runs_the_collectives_of_a_single_rank():
    [[plain, synced]] = run_ranks(group_of_one, 1)
    torch.testing.assert_close(synced, plain, rtol=1e-12, atol=1e-12)


def rank_subgroup(rank, world_size):
    """Ranks 0 and 1 share a group, and rank 2 has one of its own with half of the batch."""
    pair = dist.new_group([0, 1])
    single = dist.new_group([2])
    groups = (pair, pair, single)
    images_of_ranks = (
        slice(0, 2),
        slice(2, 4),
        slice(4, 8),
    )
    norm = make_norm(
        SyncBatchNorm,
        dtype=torch.float64,
        process_group=groups[rank],
    )
    x, dy = make_batch(8, torch.float64)
    own = images_of_ranks[rank]
    return step(norm, x[own], dy[own])


def test_process_group_limits_the_batch():
    x, dy = make_batch(8, torch.float64)
    first, second, third = run_ranks(rank_subgroup, 3)
    groups = (
        (slice(0, 4), [first, second]),
        (slice(4, 8), [third]),
    )
    for images, members in groups:
        norm = make_norm(nn.BatchNorm2d, dtype=torch.float64)
        whole = step(norm, x[images], dy[images])
        assert_ranks_equal_whole(members, whole, 1e-12)


def rank_too_few(rank, world_size):
    sync_batch_norm.SYNC_IN_GROUP_OF_ONE = True
    norm = SyncBatchNorm(6)
    norm(torch.zeros(1, 6, 1, 1))


def test_one_value_per_channel_is_refused():
    with pytest.raises(RuntimeError, match="more than 1 value per channel"):
        run_ranks(rank_too_few, 1)


def test_without_process_group_it_is_batch_norm():
    x, dy = make_batch(8, torch.float32)
    for training in (True, False):
        plain = make_norm(nn.BatchNorm2d)
        plain.train(training)
        ours = make_norm(SyncBatchNorm)
        ours.train(training)
        expected = step(plain, x, dy)
        actual = step(ours, x, dy)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def make_network():
    torch.manual_seed(9)
    network = resnet.ResNet(
        resnet.BasicBlock,
        depths=(1, 1),
        num_classes=5,
        stem="cifar",
        stem_channels=8,
        shortcut="A",
    )
    network = network.double()
    return network.to(memory_format=torch.channels_last)


def make_images():
    """Two micro-batches of eight images."""
    generator = torch.Generator().manual_seed(10)
    return torch.randn(2, 8, 3, 12, 12, generator=generator, dtype=torch.float64)


def accumulate_gradients(network, images):
    loss = network(images).square().mean()
    loss.backward()


def network_result(network):
    """State and gradients, as arrays."""
    tensors = dict(network.state_dict())
    for name, parameter in network.named_parameters():
        tensors[f"grad {name}"] = parameter.grad
    return as_arrays(tensors)


def rank_network(rank, world_size):
    """Two micro-batches, each split 4 + 4, gradients accumulated with no_sync as in the training
    loop.
    """
    synced = convert_sync_batch_norm(make_network())
    network = DistributedDataParallel(synced)
    first, second = share(rank, world_size, make_images())
    with network.no_sync():
        accumulate_gradients(network, first)
    accumulate_gradients(network, second)
    return network_result(network.module)


def test_network_with_ddp_and_accumulation_equals_one_process():
    network = make_network()
    for micro_batch in make_images():
        accumulate_gradients(network, micro_batch)
    expected = network_result(network)

    for actual in run_ranks(rank_network, 2):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_convert_keeps_tensors_flags_and_options():
    network = make_network()
    stem = network.bn1
    stem.eps = 0.25
    stem.momentum = None
    stem.weight.requires_grad_(False)
    block = network.layer1[0]
    block.bn2.eval()
    before = copy.copy(network.state_dict(keep_vars=True))

    converted = convert_sync_batch_norm(network)

    assert converted is network
    after = network.state_dict(keep_vars=True)
    assert list(before) == list(after)
    for key, tensor in before.items():
        assert after[key] is tensor, key
    norms = modules_of(network, nn.modules.batchnorm._BatchNorm)
    assert len(norms) == 5
    for norm in norms:
        assert isinstance(norm, SyncBatchNorm)

    stem = network.bn1
    assert stem.eps == 0.25
    assert stem.momentum is None
    assert not stem.weight.requires_grad
    assert stem.bias.requires_grad

    block = network.layer1[0]
    assert block.bn1.training
    assert not block.bn2.training
    assert block.last_norm is block.bn2


def test_convert_takes_a_bare_norm_and_norms_without_tensors():
    plain = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    norm = convert_sync_batch_norm(plain)
    assert isinstance(norm, SyncBatchNorm)
    assert not norm.state_dict()
    assert not list(norm.parameters())

    images = torch.randn(4, 6, 2, 2)
    assert norm(images).shape == images.shape


def compiled_step(rank, world_size, backend):
    """Norm, ReLU and addition as one graph; eager and compiled."""
    results = []
    for is_compiled in (False, True):
        norm = make_norm(SyncBatchNorm)

        def block(x, norm=norm):
            return torch.relu(norm(x)) + x

        run = block
        if is_compiled:
            run = torch.compile(block, fullgraph=True, backend=backend)
        batch = make_batch(8, torch.float32)
        x, dy = share(rank, world_size, batch)
        x = x.detach().requires_grad_()
        y = run(x)
        y.backward(dy)
        result = {
            "y": y.detach(),
            "dx": x.grad,
            "dweight": norm.weight.grad,
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        }
        results.append(as_arrays(result))
    return results


def assert_compiled_equals_eager(backend):
    for eager, compiled in run_ranks(compiled_step, 2, backend):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_its_graph_has_no_break():
    """Forward and backward are traced as a whole, on two ranks; as eager, but for rounding."""
    assert_compiled_equals_eager("aot_eager")


@pytest.mark.long
def test_it_compiles_with_inductor(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert_compiled_equals_eager("inductor")


def kernels_of_inductor(rank, world_size):
    """The names of the kernels of norm, addition and ReLU: forward, backward."""
    from torch._inductor.utils import run_and_get_code

    sync_batch_norm.SYNC_IN_GROUP_OF_ONE = True
    norm = SyncBatchNorm(CHANNELS)

    def block(x, shortcut):
        return torch.relu(norm(x) + shortcut)

    x, shortcut = torch.randn(2, 4, CHANNELS, 5, 5).unbind()
    x.requires_grad_()
    shortcut.requires_grad_()

    def forward_and_backward():
        compiled = torch.compile(block, fullgraph=True, backend="inductor")
        loss = compiled(x, shortcut).sum()
        loss.backward()

    _, codes = run_and_get_code(forward_and_backward)
    definition = re.compile(r"^(\w+) = async_compile", re.MULTILINE)
    return [definition.findall(code) for code in codes]


@pytest.mark.long
def test_inductor_fuses_it_with_the_addition_and_relu(monkeypatch):
    """One kernel before each collective and one after it. The second one of the forward pass
    normalises, adds the shortcut and applies ReLU.
    """
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    [(forward, backward)] = run_ranks(kernels_of_inductor, 1)
    assert len(forward) == 2, forward
    assert len(backward) == 2, backward
    _, last_kernel = forward
    assert "batch_norm" in last_kernel
    assert "relu" in last_kernel


def test_a_converted_network_runs_on_meta():
    with torch.device("meta"):
        network = MODELS["resnet50"](10)
        network = convert_sync_batch_norm(network)
        images = torch.empty(2, 3, 64, 64)
    assert isinstance(network.bn1, SyncBatchNorm)

    loss = network(images).sum()
    loss.backward()

    network.eval()
    logits = network(images)
    assert logits.shape == (2, 10)
