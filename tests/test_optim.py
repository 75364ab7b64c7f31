"""Parameter groups, and the average of the weights."""

import pytest
import torch
from torch import nn

from resnet_dist.config import OptimConfig
from resnet_dist.ema import Ema
from resnet_dist.models.build import MODELS
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.optim import build_optimizer, parameter_groups


@pytest.mark.parametrize("sync", [False, True])
def test_groups_follow_the_type_of_the_module(sync):
    """torchvision names the norms of a shortcut downsample.1: a search for "bn" would miss them."""
    model = MODELS["resnet18"](num_classes=10)
    if sync:
        model = convert_sync_batch_norm(model, device_type="cpu")
    groups = parameter_groups(model, OptimConfig(weight_decay=1e-4, norm_weight_decay=0.0, bias_weight_decay=1e-5))
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0, 1e-5]
    assert [len(group["params"]) for group in groups] == [21, 40, 1]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())
    assert any(p is model.layer2[0].downsample[1].weight for p in groups[1]["params"])
    assert groups[2]["params"][0] is model.fc.bias


def test_no_setting_means_the_same_decay_for_all():
    assert {g["weight_decay"] for g in parameter_groups(MODELS["resnet18"](), OptimConfig(weight_decay=5e-4))} == {5e-4}


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_exists_from_the_start_changes_nothing(nesterov):
    torch.manual_seed(0)
    ours, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    plain.load_state_dict(ours.state_dict())
    a = build_optimizer(OptimConfig(nesterov=nesterov, weight_decay=0.01), ours)
    b = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    for group in a.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        x = torch.randn(5, 4, dtype=torch.float64)
        for model, optimizer in ((ours, a), (plain, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-14)


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
            expected[key] = value if value.dtype == torch.int64 else 0.9 * expected[key] + 0.1 * value
    torch.testing.assert_close(dict(ema.model.state_dict()), expected)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
