"""SyncBatchNorm on several ranks against BatchNorm2d in one process on the whole batch."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist_utils import run_ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.models import resnet, sync_batch_norm
from resnet_dist.models.build import MODELS
from resnet_dist.models.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

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
    x = torch.randn(images, 6, 5, 7, generator=generator, dtype=torch.float64)
    x = x + shift + torch.randn(images, 6, 1, 1, generator=generator, dtype=torch.float64)
    dy = torch.randn(images, 6, 5, 7, generator=generator, dtype=torch.float64) + 0.5
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype, memory_format=layout), dy.to(dtype, memory_format=layout)


def set_weights(norm):
    """Weights and biases that differ by channel, one of them zero as in a zero-initialised
    block.
    """
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, 6))
            norm.weight[2] = 0
            norm.bias.copy_(torch.linspace(1, -1, 6))
    return norm


def step(norm, x, dy, repeats=2):
    """Forward and backward `repeats` times; everything that can be compared, as arrays."""
    for _ in range(repeats):
        x = x.detach().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        assert y.dtype == x.dtype and y.stride() == x.stride()
        y.backward(dy)
        assert x.grad.stride() == x.stride()
    result = {"y": y.detach(), "dx": x.grad, **norm.state_dict()}
    result.update({f"d{name}": p.grad for name, p in norm.named_parameters()})
    return {key: value.double().numpy() for key, value in result.items()}


def share(rank, world_size, tensors):
    """This rank's equal share of each batch."""
    return [tensor.chunk(world_size)[rank] for tensor in tensors]


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
        x, dy = share(rank, world_size, make_batch(images, dtype, **batch_options))
        results.append(step(set_weights(SyncBatchNorm(6, dtype=dtype, **options)), x, dy))
    return results


def assert_ranks_equal_whole(ranks, whole, tolerance):
    values_per_channel = whole["y"].size / 6
    for key, expected in whole.items():
        if key in ("y", "dx"):
            actual = np.concatenate([r[key] for r in ranks])
        elif key in ("dweight", "dbias"):
            actual = sum(r[key] for r in ranks)
        else:
            actual = ranks[0][key]
            assert all(np.array_equal(r[key], actual) for r in ranks), (
                f"{key} differs between ranks"
            )
        # Sums over the batch carry the rounding of all their terms; compared as means they need no
        # other tolerance.
        scale = (
            values_per_channel if key in ("dweight", "dbias") else max(1, np.abs(expected).max())
        )
        np.testing.assert_allclose(
            actual / scale, expected / scale, rtol=0, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    """Every dtype, layout and option. A mean of 1e4 beside a variance of 1 survives: the reference
    is double precision there, since a float32 input near 1e4 carries an error of 5e-4 itself.
    """
    images = 2 * world_size
    ranks = run_ranks(rank_steps, world_size, images)
    for number, (dtype, options, batch_options) in enumerate(cases()):
        of_case = [results[number] for results in ranks]
        if "shift" in batch_options:
            x, dy = make_batch(images, torch.float32, **batch_options)
            norm = nn.BatchNorm2d(6, dtype=torch.float64, **options)
            whole = step(set_weights(norm), x.double(), dy.double())
            assert_ranks_equal_whole(of_case, whole, 1e-3)
        else:
            x, dy = make_batch(images, dtype, **batch_options)
            whole = step(set_weights(nn.BatchNorm2d(6, dtype=dtype, **options)), x, dy)
            assert_ranks_equal_whole(of_case, whole, TOLERANCE[dtype])


def rank_autocast(rank, world_size, shift):
    norm = set_weights(SyncBatchNorm(6))
    x, dy = share(rank, world_size, make_batch(32, torch.bfloat16, shift=shift))
    with torch.autocast("cpu", torch.bfloat16):
        result = step(norm, x, dy, repeats=1)
    dtypes = {
        str(t.dtype)
        for t in (norm.running_mean, norm.running_var, norm.weight.grad, norm.bias.grad)
    }
    return result, dtypes


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_bf16_autocast_is_as_exact_as_batch_norm(shift):
    x, dy = make_batch(32, torch.bfloat16, shift=shift)
    exact = step(
        set_weights(nn.BatchNorm2d(6, dtype=torch.float64)), x.double(), dy.double(), repeats=1
    )
    plain = step(set_weights(nn.BatchNorm2d(6)), x, dy, repeats=1)
    ranks = run_ranks(rank_autocast, 2, shift)
    assert all(dtypes == {"torch.float32"} for _, dtypes in ranks)
    for key in ("y", "dx"):
        ours = np.concatenate([r[key] for r, _ in ranks])
        error, plain_error = (np.abs(a - exact[key]).mean() for a in (ours, plain[key]))
        assert error < 1.5 * plain_error, key
    for key in ("running_mean", "running_var"):
        np.testing.assert_allclose(ranks[0][0][key], exact[key], rtol=1e-6)
    for key in ("dweight", "dbias"):
        np.testing.assert_allclose(sum(r[key] for r, _ in ranks), exact[key], rtol=1e-4, atol=1e-3)


def rank_counts_collectives(rank, world_size):
    """Collectives after forward, after backward, and after all else that needs none."""
    x, dy = make_batch(4, torch.float32)
    x.requires_grad_()
    norm, plain = set_weights(SyncBatchNorm(6)), set_weights(nn.BatchNorm2d(6))
    with CommDebugMode() as forward:
        y = norm(x)
    with CommDebugMode() as backward:
        y.backward(dy)
    plain(x)
    # Every rank holds the same batch, so only the unbiased factor of the variance may differ.
    plain.load_state_dict(norm.state_dict())
    norm.eval()
    plain.eval()
    with CommDebugMode() as evaluation:
        is_same = torch.equal(norm(x), plain(x))
        norm(x).sum().backward()
    totals = [mode.get_total_counts() for mode in (forward, backward, evaluation)]
    return totals, [str(kind) for kind in forward.get_comm_counts()], is_same


def test_one_collective_each_way_and_none_in_eval():
    for totals, kinds, is_same in run_ranks(rank_counts_collectives, 2):
        assert totals == [1, 1, 0] and is_same
        assert kinds == ["c10d_functional.all_reduce"]


def group_of_one(rank, world_size):
    """Plain batch norm in a group of one, and with the switch the same numbers by a collective."""
    results, counts = [], []
    for switch in (False, True):
        sync_batch_norm.SYNC_IN_GROUP_OF_ONE = switch
        norm = set_weights(SyncBatchNorm(6, dtype=torch.float64))
        with CommDebugMode() as mode:
            results.append(step(norm, *make_batch(4, torch.float64)))
        counts.append(mode.get_total_counts())
    return results, counts


def test_the_switch_runs_the_collectives_of_a_single_rank():
    [(results, counts)] = run_ranks(group_of_one, 1)
    assert counts == [0, 4]  # two steps, forward and backward
    for key, expected in results[0].items():
        np.testing.assert_allclose(results[1][key], expected, rtol=1e-12, atol=1e-12, err_msg=key)


def rank_subgroup(rank, world_size):
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    norm = set_weights(SyncBatchNorm(6, dtype=torch.float64, process_group=groups[rank // 2]))
    x, dy = (t.split((2, 2, 4))[rank] for t in make_batch(8, torch.float64))
    return step(norm, x, dy)


def test_process_group_limits_the_batch():
    x, dy = make_batch(8, torch.float64)
    ranks = run_ranks(rank_subgroup, 3)
    for part, members in ((slice(0, 4), ranks[:2]), (slice(4, 8), ranks[2:])):
        whole = step(set_weights(nn.BatchNorm2d(6, dtype=torch.float64)), x[part], dy[part])
        assert_ranks_equal_whole(members, whole, 1e-12)


def rank_too_few(rank, world_size):
    sync_batch_norm.SYNC_IN_GROUP_OF_ONE = True
    SyncBatchNorm(6)(torch.zeros(1, 6, 1, 1))


def test_one_value_per_channel_is_refused():
    with pytest.raises(RuntimeError, match="more than 1 value per channel"):
        run_ranks(rank_too_few, 1)


def test_without_process_group_it_is_batch_norm():
    for training in (True, False):
        plain = set_weights(nn.BatchNorm2d(6)).train(training)
        ours = set_weights(SyncBatchNorm(6)).train(training)
        expected, actual = (step(norm, *make_batch(8, torch.float32)) for norm in (plain, ours))
        assert expected.keys() == actual.keys()
        assert all(np.array_equal(expected[key], actual[key]) for key in expected)


def make_network():
    torch.manual_seed(9)
    network = resnet.ResNet(
        resnet.BasicBlock, (1, 1), 5, stem="cifar", stem_channels=8, shortcut="A"
    ).double()
    return network.to(memory_format=torch.channels_last)


def make_images():
    generator = torch.Generator().manual_seed(10)
    return torch.randn(2, 8, 3, 12, 12, generator=generator, dtype=torch.float64)


def network_result(network):
    tensors = {
        **network.state_dict(),
        **{f"grad {name}": p.grad for name, p in network.named_parameters()},
    }
    return {key: value.double().numpy() for key, value in tensors.items()}


def rank_network(rank, world_size):
    """Two micro-batches, each split 4 + 4, gradients accumulated with no_sync as in the training
    loop.
    """
    network = DistributedDataParallel(convert_sync_batch_norm(make_network()))
    first, second = (micro_batch.split(4)[rank] for micro_batch in make_images())
    with network.no_sync():
        network(first).square().mean().backward()
    network(second).square().mean().backward()
    return network_result(network.module)


def test_network_with_ddp_and_accumulation_equals_one_process():
    network = make_network()
    for micro_batch in make_images():
        network(micro_batch).square().mean().backward()
    expected = network_result(network)
    for actual in run_ranks(rank_network, 2):
        assert actual.keys() == expected.keys()
        for key in expected:
            np.testing.assert_allclose(
                actual[key], expected[key], rtol=1e-9, atol=1e-12, err_msg=key
            )


def test_convert_keeps_tensors_flags_and_options():
    network = make_network()
    network.bn1.eps, network.bn1.momentum = 0.25, None
    network.bn1.weight.requires_grad_(False)
    network.layer1[0].bn2.eval()
    before = copy.copy(network.state_dict(keep_vars=True))
    converted = convert_sync_batch_norm(network)
    assert converted is network
    after = network.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(before[key] is after[key] for key in before)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 5 and all(isinstance(m, SyncBatchNorm) for m in norms)
    assert (network.bn1.eps, network.bn1.momentum) == (0.25, None)
    assert not network.bn1.weight.requires_grad and network.bn1.bias.requires_grad
    assert not network.layer1[0].bn2.training and network.layer1[0].bn1.training
    assert network.layer1[0].last_norm is network.layer1[0].bn2


def test_convert_takes_a_bare_norm_and_norms_without_tensors():
    norm = convert_sync_batch_norm(nn.BatchNorm2d(6, affine=False, track_running_stats=False))
    assert isinstance(norm, SyncBatchNorm)
    assert not norm.state_dict() and not list(norm.parameters())
    assert norm(torch.randn(4, 6, 2, 2)).shape == (4, 6, 2, 2)


def compiled_step(rank, world_size, backend):
    """Norm, ReLU and addition as one graph; eager and compiled."""
    results = []
    for is_compiled in (False, True):
        norm = set_weights(SyncBatchNorm(6))

        def block(x, norm=norm):
            return torch.relu(norm(x)) + x

        x, dy = share(rank, world_size, make_batch(8, torch.float32))
        x = x.detach().requires_grad_()
        run = torch.compile(block, fullgraph=True, backend=backend) if is_compiled else block
        y = run(x)
        y.backward(dy)
        tensors = [y.detach(), x.grad, norm.weight.grad, norm.running_mean, norm.running_var]
        results.append([tensor.numpy() for tensor in tensors])
    return results


def assert_compiled_equals_eager(backend):
    for eager, compiled in run_ranks(compiled_step, 2, backend):
        for expected, actual in zip(eager, compiled, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)


def test_its_graph_has_no_break():
    """Forward and backward are traced as a whole, on two ranks; as eager, but for rounding."""
    assert_compiled_equals_eager("aot_eager")


@pytest.mark.long
def test_it_compiles_with_inductor(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    assert_compiled_equals_eager("inductor")


def test_meta():
    with torch.device("meta"):
        network = convert_sync_batch_norm(MODELS["resnet50"](10))
        images = torch.empty(2, 3, 64, 64)
    assert isinstance(network.bn1, SyncBatchNorm)
    network(images).sum().backward()
    assert network.eval()(images).shape == (2, 10)
