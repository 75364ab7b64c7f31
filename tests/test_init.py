"""The distribution of fresh weights."""

import math

import pytest
import torch
import torchvision
from module_utils import modules_of
from torch import nn

from resnet_dist.models import resnet
from resnet_dist.models.build import MODELS
from resnet_dist.models.init import init_weights, zero_residual_norms


def named_convs(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


def he_std(conv):
    """Standard deviation of Kaiming's initialization in the mode "fan_out"."""
    fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
    return math.sqrt(2 / fan_out)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_convolutions_have_torchvisions_mean_and_deviation(name):
    torch.manual_seed(5)
    our_convs = named_convs(MODELS[name]())
    their_convs = named_convs(getattr(torchvision.models, name)())

    for (key, conv), (their_key, their_conv) in zip(our_convs, their_convs, strict=True):
        assert key == their_key
        std = he_std(conv)
        # Five standard errors of the estimates, for a normal distribution.
        mean_error = 5 * std / math.sqrt(conv.weight.numel())
        std_error = mean_error / math.sqrt(2)
        assert conv.weight.std().item() == pytest.approx(std, abs=std_error)
        assert their_conv.weight.std().item() == pytest.approx(std, abs=std_error)
        assert abs(conv.weight.mean().item()) < mean_error


def test_convolutions_are_normal_not_uniform():
    torch.manual_seed(6)
    conv = init_weights(nn.Conv2d(64, 64, 3))
    standardized = conv.weight.detach() / conv.weight.std()
    # The fourth moment is 3 for a normal and 1.8 for a uniform distribution.
    assert standardized.pow(4).mean().item() == pytest.approx(3, abs=0.15)
    assert not conv.bias.any()


def test_norms_are_the_identity_and_the_head_is_uniform():
    torch.manual_seed(7)
    model = MODELS["resnet18"]()
    for norm in modules_of(model, nn.BatchNorm2d):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
        assert not norm.bias.any()
        assert not norm.running_mean.any()

    bound = 1 / math.sqrt(model.fc.in_features)
    assert model.fc.weight.abs().max().item() <= bound
    assert model.fc.bias.abs().max().item() <= bound
    assert model.fc.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_every_tensor_is_drawn_anew_and_by_seed():
    model = MODELS["resnet20"](10)
    old_value = 77

    def draw_again():
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(old_value)
        torch.manual_seed(8)
        init_weights(model)
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}

    first = draw_again()
    second = draw_again()
    for key, tensor in first.items():
        assert not (tensor == old_value).any(), key
        assert torch.equal(tensor, second[key]), key


def test_zero_residual_norms_touches_the_last_norm_only():
    model = MODELS["resnet50"](num_classes=2)
    blocks = modules_of(model, resnet.Bottleneck)
    zero_residual_norms(block.last_norm for block in blocks)

    assert len(blocks) == 16
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            is_zero = not module.weight.any()
            assert is_zero == name.endswith(".bn3"), name


def test_networks_are_built_on_the_meta_device():
    with torch.device("meta"):
        model = MODELS["resnet50"](zero_init_residual=True)
    for tensor in model.state_dict().values():
        assert tensor.device.type == "meta"
