"""SyncBatchNorm on several ranks against BatchNorm2d in one process on the whole batch."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dist_utils import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.models import resnet
from resnet_dist.models.build import MODELS
from resnet_dist.models.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm

SPLITS = [(4, 4), (5, 3), (1, 31), (8, 0), (3, 4, 1)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


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
    """Weights and biases that differ by channel, one of them zero as in a zero-initialised block."""
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


def rank_step(rank, world_size, splits, dtype, options, batch_options):
    x, dy = (t.split(splits)[rank] for t in make_batch(sum(splits), dtype, **batch_options))
    return step(set_weights(SyncBatchNorm(6, dtype=dtype, **options)), x, dy)


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("splits", SPLITS)
def test_ranks_equal_one_process(splits, dtype):
    for channels_last in (True, False):
        batch_options = {"channels_last": channels_last}
        whole = step(
            set_weights(nn.BatchNorm2d(6, dtype=dtype)),
            *make_batch(sum(splits), dtype, **batch_options),
        )
        ranks = run_ranks(rank_step, len(splits), splits, dtype, {}, batch_options)
        assert_ranks_equal_whole(ranks, whole, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.3, "momentum": 0.7},
    ],
)
def test_options_of_batch_norm(options):
    whole = step(
        set_weights(nn.BatchNorm2d(6, dtype=torch.float64, **options)),
        *make_batch(8, torch.float64),
    )
    ranks = run_ranks(rank_step, 2, (5, 3), torch.float64, options, {})
    assert_ranks_equal_whole(ranks, whole, 1e-12)


def test_a_mean_far_from_zero_does_not_cancel():
    batch_options = {"shift": 1000.0}
    whole = step(
        set_weights(nn.BatchNorm2d(6, dtype=torch.float64)),
        *make_batch(8, torch.float64, **batch_options),
    )
    ranks = run_ranks(rank_step, 2, (5, 3), torch.float32, {}, batch_options)
    # An input near 1000 carries an error of 3e-5 in float32.
    assert_ranks_equal_whole(ranks, whole, 3e-4)


def rank_autocast(rank, world_size, shift):
    norm = set_weights(SyncBatchNorm(6))
    x, dy = (t.split((20, 12))[rank] for t in make_batch(32, torch.bfloat16, shift=shift))
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
    calls = []
    real = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: (calls.append("all_gather"), real(*args, **kwargs))
    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "all_gather_object"):
        setattr(dist, name, lambda *args, name=name, **kwargs: calls.append(name))
    norm = set_weights(SyncBatchNorm(6))
    plain = set_weights(nn.BatchNorm2d(6))
    x, dy = make_batch(4, torch.float32)
    x.requires_grad_()
    y = norm(x)
    forward = len(calls)
    y.backward(dy)
    both = len(calls)
    plain(x)
    # Every rank holds the same batch, so only the unbiased factor of the variance may differ.
    plain.load_state_dict(norm.state_dict())
    norm.eval()
    plain.eval()
    same = torch.equal(norm(x), plain(x))
    norm(x).sum().backward()
    return forward, both, len(calls), same


def test_one_collective_each_way_and_none_in_eval():
    assert run_ranks(rank_counts_collectives, 2) == [(1, 2, 2, True)] * 2


def rank_subgroup(rank, world_size):
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    norm = set_weights(SyncBatchNorm(6, dtype=torch.float64, process_group=groups[rank // 2]))
    x, dy = (t.split((3, 1, 4))[rank] for t in make_batch(8, torch.float64))
    return step(norm, x, dy)


def test_process_group_limits_the_batch():
    x, dy = make_batch(8, torch.float64)
    ranks = run_ranks(rank_subgroup, 3)
    for part, members in ((slice(0, 4), ranks[:2]), (slice(4, 8), ranks[2:])):
        whole = step(set_weights(nn.BatchNorm2d(6, dtype=torch.float64)), x[part], dy[part])
        assert_ranks_equal_whole(members, whole, 1e-12)


def rank_too_few(rank, world_size):
    SyncBatchNorm(6)(torch.zeros(1 - rank, 6, 1, 1))


def test_one_value_per_channel_is_refused():
    with pytest.raises(RuntimeError, match="more than 1 value per channel"):
        run_ranks(rank_too_few, 2)


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
    converted = convert_sync_batch_norm(network, None, "cpu")
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


def test_convert_on_cuda_is_torchs_own():
    network = convert_sync_batch_norm(make_network(), None, "cuda")
    assert isinstance(network.bn1, nn.SyncBatchNorm)
    assert not any(isinstance(m, SyncBatchNorm) for m in network.modules())


def test_meta():
    with torch.device("meta"):
        network = convert_sync_batch_norm(MODELS["resnet50"](10), None, "meta")
        images = torch.empty(2, 3, 64, 64)
    assert isinstance(network.bn1, SyncBatchNorm)
    network(images).sum().backward()
    assert network.eval()(images).shape == (2, 10)
