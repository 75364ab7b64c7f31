"""The ResNet family against torchvision, and the tables of the papers."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from module_utils import count_parameters, modules_of
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


def build(name, num_classes=10, **options):
    return build_model(section(name, **options), num_classes)


def build_on_meta(name, num_classes=1000, **options):
    with torch.device("meta"):
        return build(name, num_classes, **options)


def torchvisions(name, **options):
    """torchvision's network of this name, with weights of its own."""
    build_theirs = getattr(torchvision.models, name)
    return build_theirs(**options)


def shapes_of(model):
    """Keys and shapes of the state dict, in order."""
    state = model.state_dict()
    return [(key, tensor.shape) for key, tensor in state.items()]


def gradients_of(model):
    return [parameter.grad for parameter in model.parameters()]


def randomise_norms(model):
    """Give the norms weights and statistics of their own, which a fresh network does not have."""
    for norm in modules_of(model, nn.BatchNorm2d):
        nn.init.uniform_(norm.weight, 0.5, 1.0)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)


def test_the_table_holds_the_whole_family():
    published = {*TORCHVISION_NAMES, *CIFAR_SIZES}
    assert published < set(MODELS)


def draw_weights(model):
    """As fast as possible: drawing 127 million weights the usual way takes longer than a test."""
    for parameter in model.parameters():
        std = 0.1
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            std = math.sqrt(2 / fan_in)
        nn.init.normal_(parameter, std=std)
    randomise_norms(model)
    for norm in modules_of(model, nn.BatchNorm2d):
        norm.num_batches_tracked.zero_()


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_logits_equal_torchvision(name):
    torch.manual_seed(1)
    with torch.device("meta"):
        theirs = torchvisions(name)
    theirs.to_empty(device="cpu")
    theirs.eval()
    draw_weights(theirs)
    ours = build_on_meta(name)
    ours.eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images = torch.randn(2, 3, 64, 64)

    with torch.inference_mode():
        expected = theirs(images)
        logits = ours(images)

    assert logits.shape == (2, 1000)
    scale = expected.std()
    assert scale > 1e-3
    torch.testing.assert_close(logits / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_step_equals_torchvision(name):
    torch.manual_seed(2)
    theirs = torchvisions(name, num_classes=7)
    ours = build(name, 7)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 64, 64)

    for model in (theirs, ours):
        loss = model(images).square().mean()
        loss.backward()

    torch.testing.assert_close(gradients_of(ours), gradients_of(theirs))
    torch.testing.assert_close(list(ours.buffers()), list(theirs.buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_keys_shapes_and_order_equal_torchvision(name):
    with torch.device("meta"):
        theirs = torchvisions(name, num_classes=10)
    ours = build_on_meta(name, 10)
    assert count_parameters(ours) == count_parameters(theirs)
    assert shapes_of(ours) == shapes_of(theirs)


def test_fewer_classes_change_only_the_head():
    imagenet = count_parameters(build_on_meta("resnet50", 1000))
    ten_classes = count_parameters(build_on_meta("resnet50", 10))
    parameters_per_class = 2048 + 1
    assert imagenet - ten_classes == 990 * parameters_per_class


@pytest.mark.parametrize(("name", "millions"), CIFAR_SIZES.items())
def test_cifar_sizes_equal_the_paper(name, millions):
    model = build_on_meta(name, 10)

    # The paper has one digit after the point above a million, and two below.
    half_a_digit = 0.005
    if millions > 1:
        half_a_digit = 0.05
    found = count_parameters(model) / 1e6
    assert found == pytest.approx(millions, abs=half_a_digit)

    depth = int(name.removeprefix("resnet"))
    layers = modules_of(model, nn.Conv2d, nn.Linear)
    assert len(layers) == depth


def test_cifar_maps_are_32_16_8():
    model = build_on_meta("resnet20", 10)
    shapes = []

    def record_shape(module, inputs, output):
        _, *shape = output.shape
        shapes.append(tuple(shape))

    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(record_shape)
    images = torch.empty(5, 3, 32, 32, device="meta")
    logits = model(images)
    assert shapes == [
        (16, 32, 32),
        (32, 16, 16),
        (64, 8, 8),
    ]
    assert logits.shape == (5, 10)


def test_shortcut_a_subsamples_and_pads():
    x = torch.randn(2, 3, 5, 6)
    shortcut = resnet.make_shortcut(
        in_channels=3,
        out_channels=7,
        stride=2,
        options=resnet.Options(shortcut="A"),
    )

    out = shortcut(x)

    assert out.shape == (2, 7, 3, 3)
    old_channels = out[:, :3]
    new_channels = out[:, 3:]
    every_second_pixel = x[:, :, ::2, ::2]
    assert torch.equal(old_channels, every_second_pixel)
    assert not new_channels.any()


@pytest.mark.slow
def test_stride_in_1x1_moves_the_stride():
    model_v1 = build_on_meta("resnet50", stride_in_1x1=True)
    block_v1 = model_v1.layer2[0]
    assert block_v1.conv1.stride == (2, 2)
    assert block_v1.conv2.stride == (1, 1)
    assert block_v1.downsample[0].stride == (2, 2)

    model_v15 = build_on_meta("resnet50", stride_in_1x1=False)
    block_v15 = model_v15.layer2[0]
    assert block_v15.conv1.stride == (1, 1)
    assert block_v15.conv2.stride == (2, 2)
    assert block_v15.downsample[0].stride == (2, 2)


@pytest.mark.slow
def test_stride_in_1x1_keeps_shapes_and_changes_logits():
    torch.manual_seed(3)
    v15 = build("resnet50").eval()
    v1 = build("resnet50", stride_in_1x1=True).eval()
    v1.load_state_dict(v15.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        logits_v15 = v15(images)
        logits_v1 = v1(images)
    assert logits_v1.shape == logits_v15.shape
    assert not torch.allclose(logits_v1, logits_v15)


@pytest.mark.parametrize("name", ["resnet18", "resnet20"])
def test_stride_in_1x1_warns_without_bottlenecks(name):
    with pytest.warns(UserWarning, match="stride_in_1x1"):
        build_on_meta(name, stride_in_1x1=True)


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [
        ("resnet20", 9),
        ("resnet50", 16),
    ],
)
def test_zero_init_residual_makes_blocks_the_identity(name, num_blocks):
    model = build(name, zero_init_residual=True)
    blocks = modules_of(model, resnet.BasicBlock, resnet.Bottleneck)
    assert len(blocks) == num_blocks
    for block in blocks:
        assert not block.last_norm.weight.any()
        if block.downsample is None:
            # What enters a block comes from a ReLU.
            channels = block.conv1.in_channels
            x = torch.rand(2, channels, 4, 4)
            assert torch.equal(block(x), x)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet20"])
def test_channels_last_gives_the_same_logits_and_layout(name):
    torch.manual_seed(4)
    model = build(name)
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
    outputs = []

    def record_output(module, inputs, output):
        outputs.append(output)

    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    for stage in (model.layer1, model.layer3):
        stage.register_forward_hook(record_output)
    with torch.inference_mode():
        logits = model(images)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(outputs) == 2
    for output in outputs:
        assert output.is_contiguous(memory_format=torch.channels_last)


def test_plain_networks_have_no_way_around():
    torch.manual_seed(5)
    model = build("plain20")
    model.eval()
    block = model.layer1[0]
    x = torch.rand(2, 16, 4, 4)
    hidden = torch.relu(block.bn1(block.conv1(x)))
    expected = torch.relu(block.bn2(block.conv2(hidden)))
    assert torch.equal(block(x), expected)

    plain = build_on_meta("plain34")
    without_shortcuts = build_on_meta("resnet34", shortcut="none")
    assert shapes_of(plain) == shapes_of(without_shortcuts)
    for key in plain.state_dict():
        assert "downsample" not in key


PREACTIVATION_NAMES = [
    "preresnet110",
    "preresnet164",
    "preresnet200",
    "wide_resnet28_10",
]


@pytest.mark.parametrize("name", PREACTIVATION_NAMES)
def test_preactivation_blocks_add_to_the_raw_input(name):
    """He et al. 2016, equation 6: x + F(f(x)), with nothing after the addition."""
    torch.manual_seed(6)
    model = build_on_meta(name, 10)
    block = model.layer2[1]
    block.to_empty(device="cpu")
    block.eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    randomise_norms(block)
    first_norm = block.preactivation[0]
    x = torch.randn(2, first_norm.num_features, 4, 4)

    residual = block.conv1(torch.relu(first_norm(x)))
    residual = block.conv2(torch.relu(block.bn1(residual)))
    if hasattr(block, "conv3"):
        residual = block.conv3(torch.relu(block.bn2(residual)))
    torch.testing.assert_close(block(x), x + residual)


@pytest.mark.slow
@pytest.mark.parametrize("name", PREACTIVATION_NAMES)
def test_preactivation_norms_follow_each_convolution_but_those_of_shortcuts(name):
    """The norm of the stem is the first one, and the last one stands before the head."""
    model = build_on_meta(name, 10)
    first_block = model.layer1[0]
    assert isinstance(first_block.preactivation, nn.Identity)
    assert isinstance(model.activation[0], nn.BatchNorm2d)

    num_convs = 0
    for module_name, module in model.named_modules():
        is_in_shortcut = "downsample" in module_name
        if isinstance(module, nn.Conv2d) and not is_in_shortcut:
            num_convs += 1
    norms = modules_of(model, nn.BatchNorm2d)
    assert len(norms) == num_convs


def test_shortcut_c_projects_everywhere():
    """He et al. 2015, table 3: C has "slightly" more parameters than B, and B than A."""
    with_a = build_on_meta("resnet34", shortcut="A")
    with_b = build_on_meta("resnet34", shortcut="B")
    with_c = build_on_meta("resnet34", shortcut="C")

    for block in modules_of(with_c, resnet.Block):
        first_layer = block.downsample[0]
        assert isinstance(first_layer, nn.Conv2d)

    assert count_parameters(with_a) < count_parameters(with_b)
    assert count_parameters(with_b) < count_parameters(with_c)
    assert count_parameters(with_b) == 21_797_672


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50c", "resnet50d", "seresnet50", "resnetrs50"])
def test_logits_equal_timm(name):
    # Takes seconds.
    import timm

    torch.manual_seed(7)
    theirs = timm.create_model(name)
    theirs.eval()
    randomise_norms(theirs)
    ours = build_on_meta(name)
    ours.eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    images = torch.randn(1, 3, 96, 96)

    with torch.inference_mode():
        logits = ours(images)
        expected = theirs(images)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_before_the_classifier_and_in_training_only():
    torch.manual_seed(11)
    model = build("resnet20", dropout=0.25)
    model.fc = nn.Identity()
    x = torch.rand(4000, 64, 1, 1)
    features = x.flatten(1)

    model.eval()
    assert torch.equal(model.head(x), features)

    model.train()
    dropped = model.head(x)
    is_kept = dropped != 0
    share_kept = is_kept.float().mean()
    assert 0.74 < share_kept < 0.76
    scaled = features / 0.75
    torch.testing.assert_close(dropped[is_kept], scaled[is_kept])


def test_stochastic_depth_leaves_branches_out_in_training_only():
    torch.manual_seed(8)
    model = build("resnet20", stochastic_depth=0.5)
    blocks = modules_of(model, resnet.Block)
    rates = [block.drop_rate for block in blocks]
    expected_rates = torch.linspace(0, 0.5, 9).tolist()
    assert rates == pytest.approx(expected_rates)

    block = model.layer1[1]
    block.eval()
    block.drop_rate = 0.25
    x = torch.rand(4000, 16, 2, 2)
    branch = block.residual(x)
    assert torch.equal(block(x), torch.relu(branch + x))

    def same_branch(x):
        return branch

    # The branch is that of evaluation, so that only the choice is random.
    block.residual = same_branch
    block.train()
    out = block(x)
    is_equal = out == x
    is_left_out = is_equal.flatten(1).all(1)
    share_left_out = is_left_out.float().mean()
    assert 0.2 < share_left_out < 0.3
    expected = torch.relu(branch / 0.75 + x)
    torch.testing.assert_close(out[~is_left_out], expected[~is_left_out])


def test_blur_pool_filters_before_each_stride_but_the_stems():
    torch.manual_seed(9)
    model = build("resnet18", blur_pool=True)
    without_blur = build_on_meta("resnet18", 10)
    assert shapes_of(model) == shapes_of(without_blur)

    types_of_strided = []
    for conv in modules_of(model, nn.Conv2d):
        if conv.stride != (1, 1):
            types_of_strided.append(type(conv))
    assert types_of_strided == [nn.Conv2d] + [BlurConv2d] * 6

    conv = model.layer2[0].conv1
    channels = 64
    x = torch.randn(1, channels, 9, 9)
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(row, row)
    kernel = kernel.expand(channels, 1, 3, 3)
    blurred = F.conv2d(x, kernel, padding=1, groups=channels)
    expected = F.conv2d(blurred, conv.weight, stride=2, padding=1)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain20", {"zero_init_residual": True}),
        ("preresnet110", {"zero_init_residual": True}),
        ("plain20", {"stochastic_depth": 0.1}),
        ("resnet20", {"avg_pool_shortcut": True}),
    ],
)
def test_options_that_exclude_each_other_are_refused(name, options):
    [option] = options
    with pytest.raises(ValueError, match=f"model.{option} is"):
        build_on_meta(name, 10, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain20", {}),
        ("preresnet110", {}),
        ("resnet29", {"stochastic_depth": 0.1, "blur_pool": True}),
        ("resnet50d", {"stochastic_depth": 0.1, "blur_pool": True}),
        ("seresnet50", {}),
    ],
)
def test_training_step_gives_every_weight_a_gradient(name, options):
    torch.manual_seed(10)
    model = build(name, **options)
    images = torch.randn(4, 3, 32, 32)
    logits = model(images)
    loss = logits.logsumexp(1).sum()
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, parameter_name
        assert gradient.isfinite().all(), parameter_name


def test_training_step_on_meta():
    model = build_on_meta("resnet50", 10, zero_init_residual=True)
    images = torch.empty(2, 3, 224, 224, device="meta")
    loss = model(images).sum()
    loss.backward()
    for gradient in gradients_of(model):
        assert gradient.device.type == "meta"


def test_unknown_name_is_refused_with_the_closest():
    with pytest.raises(ValueError, match=r"model\.name.*'resnet51'.*resnet50.*resnet-dist models"):
        build("resnet51")
    with pytest.raises(ValueError, match=r"model\.name.*'xyz'"):
        build("xyz")


def test_senseless_options_are_refused():
    with pytest.raises(ValueError, match="num_classes: 0"):
        build_on_meta("resnet18", 0)

    def build_directly(**options):
        return resnet.ResNet(resnet.BasicBlock, (1,), **options)

    with pytest.raises(ValueError, match="shortcut: 'Z'"):
        build_directly(shortcut="Z")
    with pytest.raises(ValueError, match="stem: 'Z'"):
        build_directly(stem="Z")
    with pytest.raises(ValueError, match="groups=2"):
        build_directly(groups=2)
