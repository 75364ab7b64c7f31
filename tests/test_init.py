"""The distribution of fresh weights."""

import copy
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
    """Pairs of the name and the module of each convolution."""
    convs = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            convs.append((name, module))
    return convs


def he_std(conv):
    """Standard deviation of Kaiming's initialization in the mode "fan_out"."""
    height, width = conv.kernel_size
    fan_out = conv.out_channels * height * width
    return math.sqrt(2 / fan_out)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_convolutions_have_torchvisions_mean_and_deviation(name):
    build_theirs = getattr(torchvision.models, name)
    torch.manual_seed(5)
    our_convs = named_convs(MODELS[name]())
    their_convs = named_convs(build_theirs())

    for ours, theirs in zip(our_convs, their_convs, strict=True):
        our_name, our_conv = ours
        their_name, their_conv = theirs
        assert our_name == their_name

        expected_std = he_std(our_conv)
        # Five standard errors of the estimates, for a normal distribution.
        mean_error = 5 * expected_std / math.sqrt(our_conv.weight.numel())
        std_error = mean_error / math.sqrt(2)
        our_mean = our_conv.weight.mean().item()
        our_std = our_conv.weight.std().item()
        their_std = their_conv.weight.std().item()
        assert our_std == pytest.approx(expected_std, abs=std_error)
        assert their_std == pytest.approx(expected_std, abs=std_error)
        assert abs(our_mean) < mean_error


def test_convolutions_are_normal_not_uniform():
    torch.manual_seed(6)
    conv = init_weights(nn.Conv2d(64, 64, 3))
    weight = conv.weight.detach()
    standardized = weight / weight.std()
    # The fourth moment is 3 for a normal and 1.8 for a uniform distribution.
    fourth_moment = standardized.pow(4).mean().item()
    assert fourth_moment == pytest.approx(3, abs=0.15)
    assert not conv.bias.any()


def test_norms_are_the_identity_and_the_head_is_uniform():
    torch.manual_seed(7)
    model = MODELS["resnet18"]()
    for norm in modules_of(model, nn.BatchNorm2d):
        assert (norm.weight == 1).all()
        assert (norm.running_var == 1).all()
        assert not norm.bias.any()
        assert not norm.running_mean.any()

    head = model.fc
    bound = 1 / math.sqrt(head.in_features)
    largest_weight = head.weight.abs().max().item()
    largest_bias = head.bias.abs().max().item()
    assert largest_weight <= bound
    assert largest_bias <= bound
    std = head.weight.std().item()
    std_of_uniform = bound / math.sqrt(3)
    assert std == pytest.approx(std_of_uniform, rel=0.01)


def test_every_tensor_is_drawn_anew_and_by_seed():
    model = MODELS["resnet20"](10)
    old_value = 77

    def draw_again():
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(old_value)
        torch.manual_seed(8)
        init_weights(model)
        return copy.deepcopy(model.state_dict())

    first = draw_again()
    second = draw_again()
    for key, tensor in first.items():
        is_old = tensor == old_value
        assert not is_old.any(), key
        assert torch.equal(tensor, second[key]), key


def test_zero_residual_norms_touches_the_last_norm_only():
    model = MODELS["resnet50"](num_classes=2)
    blocks = modules_of(model, resnet.Bottleneck)
    zero_residual_norms(block.last_norm for block in blocks)

    assert len(blocks) == 16
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            is_zero = not module.weight.any()
            is_last_of_block = name.endswith(".bn3")
            assert is_zero == is_last_of_block, name


def test_networks_are_built_on_the_meta_device():
    with torch.device("meta"):
        model = MODELS["resnet50"](zero_init_residual=True)
    for tensor in model.state_dict().values():
        assert tensor.device.type == "meta"
