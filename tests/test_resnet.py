"""The ResNet family against torchvision, and the tables of the papers."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from resnet_dist.models import resnet
from resnet_dist.models.build import MODELS, build_model

TORCHVISION_NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
# He et al. 2015, table 6, in millions of parameters.
CIFAR_SIZES = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}


def section(name, zero_init_residual=False, stride_in_1x1=False):
    return SimpleNamespace(name=name, zero_init_residual=zero_init_residual, stride_in_1x1=stride_in_1x1)


def build_on_meta(name, num_classes=1000, **options):
    with torch.device("meta"):
        return build_model(section(name, **options), num_classes)


def count(model):
    return sum(p.numel() for p in model.parameters())


def randomise_norms(model):
    """Give the norms weights and statistics of their own, which a fresh network does not have."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def test_the_table_holds_the_whole_family():
    assert {*TORCHVISION_NAMES, *CIFAR_SIZES} < set(MODELS)


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_logits_equal_torchvision(name):
    torch.manual_seed(1)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
    ours = build_on_meta(name)
    theirs.to_empty(device="cpu").eval()
    # Drawing 127 million weights the usual way takes longer than the comparison.
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 0.1)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    randomise_norms(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, logits = theirs(images), ours.eval()(images)
    assert logits.shape == (2, 1000)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits / expected.std(), expected / expected.std(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_step_equals_torchvision(name):
    torch.manual_seed(2)
    theirs = getattr(torchvision.models, name)(num_classes=7)
    ours = build_model(section(name), 7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 64, 64)
    for model in (theirs, ours):
        model(images).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_keys_shapes_and_order_equal_torchvision(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(num_classes=10)
    ours = build_on_meta(name, 10)
    assert count(ours) == count(theirs)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]


def test_fewer_classes_change_only_the_head():
    assert count(build_on_meta("resnet50", 1000)) - count(build_on_meta("resnet50", 10)) == 990 * 2049


@pytest.mark.parametrize("name, millions", CIFAR_SIZES.items())
def test_cifar_sizes_equal_the_paper(name, millions):
    model = build_on_meta(name, 10)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1 else 0.005)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == int(name.removeprefix("resnet"))


def test_cifar_maps_are_32_16_8():
    model = build_on_meta("resnet20", 10)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape[1:])))
    logits = model(torch.empty(5, 3, 32, 32, device="meta"))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert logits.shape == (5, 10)


def test_shortcut_a_subsamples_and_pads():
    x = torch.randn(2, 3, 5, 6)
    out = resnet.make_shortcut(3, 7, 2, resnet.Options(shortcut="A"))(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert out.shape == (2, 7, 3, 3)
    assert not out[:, 3:].any()


def test_stride_in_1x1_moves_the_stride():
    for v1 in (False, True):
        block = build_on_meta("resnet50", stride_in_1x1=v1).layer2[0]
        assert (block.conv1.stride, block.conv2.stride) == (((2, 2), (1, 1)) if v1 else ((1, 1), (2, 2)))
        assert block.downsample[0].stride == (2, 2)


def test_stride_in_1x1_keeps_shapes_and_changes_logits():
    torch.manual_seed(3)
    v15 = build_model(section("resnet50"), 10).eval()
    v1 = build_model(section("resnet50", stride_in_1x1=True), 10).eval()
    v1.load_state_dict(v15.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert v1(images).shape == v15(images).shape
        assert not torch.allclose(v1(images), v15(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_stride_in_1x1_warns_without_bottlenecks(name):
    with pytest.warns(UserWarning, match="stride_in_1x1"):
        build_on_meta(name, stride_in_1x1=True)


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_zero_init_residual_makes_blocks_the_identity(name):
    model = build_model(section(name, zero_init_residual=True), 10)
    blocks = [m for m in model.modules() if isinstance(m, (resnet.BasicBlock, resnet.Bottleneck))]
    for block in (b for b in blocks if b.downsample is None):
        # What enters a block comes from a ReLU.
        x = torch.rand(2, block.conv1.in_channels, 4, 4)
        assert torch.equal(block(x), x)
    assert len(blocks) == {"resnet20": 9, "resnet50": 16}[name]
    assert all(not b.last_norm.weight.any() for b in blocks)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet20"])
def test_channels_last_gives_the_same_logits_and_layout(name):
    torch.manual_seed(4)
    model = build_model(section(name), 10).eval()
    images = torch.randn(2, 3, 64, 64)
    layouts = []
    with torch.inference_mode():
        expected = model(images)
        model.to(memory_format=torch.channels_last)
        for stage in (model.layer1, model.layer3):
            stage.register_forward_hook(
                lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
        logits = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert layouts == [True, True]


def test_training_step_on_meta():
    model = build_on_meta("resnet50", 10, zero_init_residual=True)
    model(torch.empty(2, 3, 224, 224, device="meta")).sum().backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters())


def test_unknown_name_is_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"model\.name.*'resnet51'.*resnet50.*resnet-dist models"):
        build_model(section("resnet51"), 10)
    with pytest.raises(ValueError, match=r"model\.name.*'xyz'"):
        build_model(section("xyz"), 10)


def test_senseless_options_are_refused():
    with pytest.raises(ValueError, match="num_classes: 0"):
        build_on_meta("resnet18", 0)
    with pytest.raises(ValueError, match="shortcut: 'Z'"):
        resnet.ResNet(resnet.BasicBlock, (1,), shortcut="Z")
    with pytest.raises(ValueError, match="stem: 'Z'"):
        resnet.ResNet(resnet.BasicBlock, (1,), stem="Z")
    with pytest.raises(ValueError, match="groups=2"):
        resnet.ResNet(resnet.BasicBlock, (1,), groups=2)
