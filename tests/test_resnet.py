"""The ResNet family against torchvision, and the tables of the papers."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from resnet_dist.models import resnet
from resnet_dist.models.build import MODELS, build_model
from resnet_dist.models.layers import BlurConv2d

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
CIFAR_SIZES = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
}


def section(name, **options):
    return SimpleNamespace(name=name, **options)


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
        nn.init.normal_(
            parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 0.1
        )
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
    torch.testing.assert_close(
        logits / expected.std(), expected / expected.std(), rtol=0, atol=1e-5
    )


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
    assert (
        count(build_on_meta("resnet50", 1000)) - count(build_on_meta("resnet50", 10)) == 990 * 2049
    )


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
        assert (block.conv1.stride, block.conv2.stride) == (
            ((2, 2), (1, 1)) if v1 else ((1, 1), (2, 2))
        )
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
                lambda module, inputs, out: layouts.append(
                    out.is_contiguous(memory_format=torch.channels_last)
                )
            )
        logits = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert layouts == [True, True]


def test_plain_networks_have_no_way_around():
    torch.manual_seed(5)
    block = build_model(section("plain20"), 10).eval().layer1[0]
    x = torch.rand(2, 16, 4, 4)
    assert torch.equal(
        block(x), torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    )
    plain, residual = build_on_meta("plain34"), build_on_meta("resnet34", shortcut="none")
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in residual.state_dict().items()
    }
    assert not any("downsample" in key for key in plain.state_dict())


@pytest.mark.parametrize(
    "name", ["preresnet110", "preresnet164", "preresnet200", "wide_resnet28_10"]
)
def test_preactivation_blocks_add_to_the_raw_input(name):
    """He et al. 2016, equation 6: x + F(f(x)), with nothing after the addition; the first block
    follows the stem.
    """
    torch.manual_seed(6)
    with torch.device("meta"):
        model = build_model(section(name), 10)
    block = model.layer2[1].to_empty(device="cpu")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    randomise_norms(block)
    block.eval()
    x = torch.randn(2, block.preactivation[0].num_features, 4, 4)
    out = block.conv1(torch.relu(block.preactivation[0](x)))
    out = block.conv2(torch.relu(block.bn1(out)))
    if hasattr(block, "conv3"):
        out = block.conv3(torch.relu(block.bn2(out)))
    torch.testing.assert_close(block(x), x + out)
    assert isinstance(model.layer1[0].preactivation, nn.Identity)
    assert isinstance(model.activation[0], nn.BatchNorm2d)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    convs = sum(
        isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) or "downsample" not in n
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    )
    assert norms == convs  # one after each convolution but those of shortcuts


def test_shortcut_c_projects_everywhere():
    """He et al. 2015, table 3: C has "slightly" more parameters than B, and B than A."""
    model = build_on_meta("resnet34", shortcut="C")
    blocks = [m for m in model.modules() if isinstance(m, resnet.Block)]
    assert all(isinstance(b.downsample[0], nn.Conv2d) for b in blocks)
    a, b, c = (count(build_on_meta("resnet34", shortcut=kind)) for kind in "ABC")
    assert a < b < c and b == 21_797_672


@pytest.mark.parametrize("name", ["resnet50c", "resnet50d", "seresnet50", "resnetrs50"])
def test_logits_equal_timm(name):
    import timm  # takes seconds

    torch.manual_seed(7)
    theirs = timm.create_model(name)
    randomise_norms(theirs)
    ours = build_on_meta(name)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_dropout_is_before_the_classifier_and_in_training_only():
    torch.manual_seed(11)
    model = build_model(section("resnet20", dropout=0.25), 10)
    model.fc = nn.Identity()
    x = torch.rand(4000, 64, 1, 1)
    assert torch.equal(model.eval().head(x), x.flatten(1))
    features = model.train().head(x)
    kept = features != 0
    assert 0.74 < kept.float().mean() < 0.76
    torch.testing.assert_close(features[kept], x.flatten(1)[kept] / 0.75)


def test_stochastic_depth_leaves_branches_out_in_training_only():
    torch.manual_seed(8)
    model = build_model(section("resnet20", stochastic_depth=0.5), 10)
    rates = [m.drop_rate for m in model.modules() if isinstance(m, resnet.Block)]
    assert rates == pytest.approx([0.5 * i / 8 for i in range(9)])
    block, x = model.layer1[1].eval(), torch.rand(4000, 16, 2, 2)
    block.drop_rate, branch = 0.25, block.residual(x)
    assert torch.equal(block(x), torch.relu(branch + x))
    block.residual = lambda x: branch  # of eval mode, so that only the choice is random
    out = block.train()(x)
    left_out = (out == x).flatten(1).all(1)
    assert 0.2 < left_out.float().mean() < 0.3
    torch.testing.assert_close(out[~left_out], torch.relu(branch / 0.75 + x)[~left_out])


def test_blur_pool_filters_before_each_stride_but_the_stems():
    torch.manual_seed(9)
    model = build_model(section("resnet18", blur_pool=True), 10)
    plain = build_on_meta("resnet18", 10)
    assert model.state_dict().keys() == plain.state_dict().keys()
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert [type(m) for m in strided] == [nn.Conv2d] + [BlurConv2d] * 6
    conv, x = model.layer2[0].conv1, torch.randn(1, 64, 9, 9)
    row = torch.tensor([1.0, 2, 1])
    kernel = (row[:, None] * row / 16)[None, None]
    blurred = torch.cat(
        [nn.functional.conv2d(plane[:, None], kernel, padding=1) for plane in x.unbind(1)], 1
    )
    torch.testing.assert_close(
        conv(x), nn.functional.conv2d(blurred, conv.weight, stride=2, padding=1)
    )


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("plain20", {"zero_init_residual": True}, "zero_init_residual"),
        ("preresnet110", {"zero_init_residual": True}, "zero_init_residual"),
        ("plain20", {"stochastic_depth": 0.1}, "stochastic_depth"),
        ("resnet20", {"avg_pool_shortcut": True}, "avg_pool_shortcut"),
    ],
)
def test_options_that_exclude_each_other_are_refused(name, options, text):
    with pytest.raises(ValueError, match=f"model.{text} is"):
        build_on_meta(name, 10, **options)


@pytest.mark.parametrize("name", ["plain20", "preresnet110", "resnet29", "resnet50d", "seresnet50"])
def test_training_step_gives_every_weight_a_gradient(name):
    torch.manual_seed(10)
    model = build_model(
        section(name, **({"stochastic_depth": 0.1, "blur_pool": True} if name[-1] != "0" else {})),
        10,
    )
    model(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


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
