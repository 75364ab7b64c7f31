"""The law of fresh weights."""

import math

import pytest
import torch
import torchvision
from torch import nn

from resnet_dist.models import resnet
from resnet_dist.models.build import MODELS
from resnet_dist.models.init import init_weights, zero_residual_norms


def fan_out(conv):
    return conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]


def convs(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_convolutions_have_the_law_of_torchvision(name):
    torch.manual_seed(5)
    ours, theirs = MODELS[name](), getattr(torchvision.models, name)()
    for (key, conv), (their_key, their_conv) in zip(convs(ours), convs(theirs), strict=True):
        assert key == their_key
        weight, std = conv.weight.detach(), math.sqrt(2 / fan_out(conv))
        # Five standard errors of an estimated standard deviation and mean, for a normal law.
        error = 5 / math.sqrt(weight.numel())
        assert weight.std().item() == pytest.approx(std, rel=error / math.sqrt(2))
        assert their_conv.weight.std().item() == pytest.approx(std, rel=error / math.sqrt(2))
        assert abs(weight.mean().item()) < error * std


def test_convolutions_are_normal_not_uniform():
    torch.manual_seed(6)
    conv = init_weights(nn.Conv2d(64, 64, 3))
    z = conv.weight.detach().flatten() / conv.weight.std()
    assert z.pow(4).mean().item() == pytest.approx(3, abs=0.15)
    assert not conv.bias.any()


def test_norms_and_head():
    torch.manual_seed(7)
    model = MODELS["resnet18"]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()
            assert not module.running_mean.any()
            assert torch.equal(module.running_var, torch.ones_like(module.running_var))
    bound = 1 / math.sqrt(512)
    for parameter in (model.fc.weight, model.fc.bias):
        assert parameter.abs().max().item() <= bound
    assert model.fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_every_tensor_is_drawn_anew_and_by_seed():
    model = MODELS["resnet20"](10)
    states = []
    for _ in range(2):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(77)
        torch.manual_seed(8)
        init_weights(model)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    for key, value in states[0].items():
        assert not (value == 77).any(), key
        assert torch.equal(value, states[1][key]), key


def test_zero_residual_norms_touches_the_last_norm_only():
    model = MODELS["resnet50"](num_classes=2)
    zero_residual_norms(m.last_norm for m in model.modules() if isinstance(m, resnet.Bottleneck))
    zeroed = [
        n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()
    ]
    assert len(zeroed) == 16
    assert all(name.endswith(".bn3") for name in zeroed)


def test_works_on_meta():
    with torch.device("meta"):
        model = MODELS["resnet50"](zero_init_residual=True)
    assert all(t.device.type == "meta" for t in model.state_dict().values())
