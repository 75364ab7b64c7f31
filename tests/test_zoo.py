"""Every network beside the ResNet family: its size, and that it trains, resumes, averages and
evaluates.

All images are real scans, of the embedded digits, enlarged to a side at which the network still has
something to see.
"""

import copy
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from checkpoint_utils import load_content
from dist_utils import equal_trees, logged_lines, run_app, run_ranks, small_run
from engine_utils import CPU, FP32, ListLoader, NoSync, do_step, rule_of, state_of
from image_files import OneProcess
from module_utils import count_parameters, modules_of
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist import engine
from resnet_dist.checkpoints.checkpoint import copy_to_cpu
from resnet_dist.checkpoints.checkpoint_file import FORMAT, write_checkpoint
from resnet_dist.checkpoints.state import build_state, wrap_ddp
from resnet_dist.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from resnet_dist.data.sources.digits import load_digits
from resnet_dist.data.types import Batch
from resnet_dist.engine import train_step
from resnet_dist.evaluation.loop import evaluate
from resnet_dist.mix import mix_images
from resnet_dist.models.build import build_model
from resnet_dist.models.init import init_weights
from resnet_dist.models.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm
from resnet_dist.models.zoo import ZOO, check_image_size
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import DTYPES, Precision

# Parameters for 1000 classes that torchvision does not publish. LeNet-5: LeCun et al. 1998, section
# II.B, with three maps for one in C1 and a linear layer of 1000 at the end. Densenet-264: counted
# layer by layer below. The rest: timm.
LENET_LAYERS = {
    "C1": 456,
    "S2": 12,
    "C3": 1516,
    "S4": 32,
    "C5": 48120,
    "F6": 10164,
    "head": 85 * 1000,
}
COUNTS = {
    "lenet5": sum(LENET_LAYERS.values()),
    "inception_v4": 42679816,
    "inception_resnet_v2": 55843464,
}
WITH_RESUME = {"lenet5", "alexnet", "vgg11_bn", "googlenet", "densenet121", "efficientnet_b0"}
"""One of each family is saved to a file and resumed: a checkpoint knows tensors, not networks."""
FAMILY_TOO = ("plain20", "preresnet110", "resnet29", "resnet50d", "seresnet50")
"""Blocks and options of the ResNet family that no other test trains."""


@dataclass(frozen=True)
class Overfit:
    """Settings with which a network learns a few images by heart at once."""

    size: int
    """side of the images"""
    count: int
    """number of images"""
    lr: float
    clip: float = 0.0
    """largest norm of the gradient; 0 = no clipping"""
    updates: int = 1
    """number of updates before the last one"""


SETTINGS = {
    "lenet5": Overfit(32, 4, 2.0, updates=2),
    "alexnet": Overfit(63, 4, 2.0, clip=1.0, updates=2),
    "googlenet": Overfit(32, 4, 0.03),
    "inception_v3": Overfit(299, 2, 0.01),
    "inception_v4": Overfit(75, 4, 0.003, updates=3),
    "inception_resnet_v2": Overfit(75, 2, 0.01),
    "vgg": Overfit(32, 4, 2.0, clip=1.0, updates=2),
    "vgg_bn": Overfit(32, 4, 0.6, clip=1.0, updates=2),
    "densenet": Overfit(32, 4, 0.03),
    "efficientnet_b2": Overfit(64, 4, 0.003, updates=2),
    "efficientnet_b5": Overfit(48, 4, 0.003),
    "efficientnet_b6": Overfit(48, 4, 0.003),
    "efficientnet_b7": Overfit(48, 4, 0.0005),
    "efficientnet": Overfit(48, 4, 0.003, updates=2),
    "plain20": Overfit(32, 4, 0.05, updates=3),
    "preresnet110": Overfit(32, 4, 0.1, updates=3),
    "resnet29": Overfit(32, 4, 0.03, updates=2),
    "resnet50d": Overfit(64, 4, 0.005),
    "seresnet50": Overfit(64, 4, 0.01),
}
"""By name, or by the family that the name begins with. After these updates the loss is at most 0.75
times the first one, on one CPU in fp32."""


def settings(name):
    """The settings of a network."""
    if name in SETTINGS:
        return SETTINGS[name]
    if name.startswith("vgg"):
        if name.endswith("_bn"):
            return SETTINGS["vgg_bn"]
        return SETTINGS["vgg"]
    for family, own in SETTINGS.items():
        if name.startswith(family):
            return own
    raise AssertionError(f"no settings for {name}")


def batch_of(size, count):
    """The first digits, 0 to `count` - 1, as a batch of images [count, 3, size, size]."""
    all_pixels, all_labels = load_digits()
    pixels = all_pixels[:count].astype(np.float32)
    labels = torch.from_numpy(all_labels[:count])
    # From 0 to 16 in the data.
    gray = torch.from_numpy(pixels) / 8 - 1
    enlarged = F.interpolate(gray[:, None], (size, size), mode="bilinear")
    images = enlarged.expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, labels, np.arange(count))


@pytest.fixture
def narrow(monkeypatch):
    """The two hidden layers of 4096 in VGG and AlexNet with 64, nine tenths of all weights; and
    nobody waits for a disk.
    """

    class Linear(nn.Linear):
        def __init__(self, inputs, outputs, *args, **options):
            narrower = {4096: 64}
            inputs = narrower.get(inputs, inputs)
            outputs = narrower.get(outputs, outputs)
            super().__init__(inputs, outputs, *args, **options)

    monkeypatch.setattr(nn, "Linear", Linear)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZOO, *FAMILY_TOO])
def test_trains_averages_and_evaluates(name, narrow, tmp_path):
    """A few updates by the engine's step: the loss falls with a margin, and the network and its
    average evaluate. Of some networks the last update is also done from the saved state: weights,
    momentum, average and statistics are the same, bit for bit.
    """
    own = settings(name)
    config = Config(
        model=ModelConfig(name=name),
        optim=OptimConfig(weight_decay=0.0),
        train=TrainConfig(
            precision="fp32",
            ema_decay=0.9,
            clip_grad_norm=own.clip,
        ),
    )
    state = build_state(config, 10, CPU)
    rule = rule_of(config)
    batch = batch_of(own.size, own.count)
    for norm in modules_of(state.model, _BatchNorm):
        assert isinstance(norm, SyncBatchNorm)

    def step(state):
        # The same masks of dropout each time, so that they do not hide the fall.
        torch.manual_seed(1)
        nonfinite = NonFinite(state.model, 0)
        state.model.train()
        model = NoSync(state.model)
        counts, _ = train_step(model, state, [batch], own.lr, rule, nonfinite)
        return counts.result()["loss"]

    losses = [step(state) for _ in range(own.updates)]
    saved = None
    if name in WITH_RESUME:
        saved = saved_and_read(state, tmp_path / "a.pt")
    losses.append(step(state))
    first_loss = losses[0]
    last_loss = losses[-1]
    assert first_loss < 10, losses
    assert last_loss < 0.9 * first_loss, losses

    if saved is not None:
        resumed = build_state(config, 10, CPU)
        resumed.load_state_dict(saved)
        assert step(resumed) == last_loss
        assert equal_trees(state.state_dict(), resumed.state_dict())

    for model in (state.model, state.ema.model):
        loader = ListLoader([batch], own.count)
        counts = evaluate(model, loader, OneProcess(), FP32)
        result = counts.result()
        assert result["num"] == own.count
        assert np.isfinite(result["loss"])


def saved_and_read(state, path):
    """The state, through a file."""
    content = {"format": FORMAT, **state.state_dict()}
    write_checkpoint(path, copy_to_cpu(content))
    return load_content(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_parameters_figures_and_conversion(name):
    """On meta, with 1000 classes. Conversion to SyncBatchNorm leaves no other norm, and the same
    keys.
    """
    entry = ZOO[name]
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), 1000)
    count = count_parameters(model)
    if entry.source.startswith("torchvision"):
        check_published_figures(name, entry, model)
    elif name == "densenet264":
        assert count == densenet_parameters(32, (6, 12, 64, 48), 64)
    else:
        assert count == COUNTS[name]

    keys = list(model.state_dict())
    norms = modules_of(model, _BatchNorm)
    converted = convert_sync_batch_norm(model)
    assert list(converted.state_dict()) == keys
    synced_norms = modules_of(converted, SyncBatchNorm)
    assert len(synced_norms) == len(norms)


def check_published_figures(name, entry, model):
    """Against the metadata of torchvision's weights, which `entry.source` names."""
    _, names = entry.source.split()
    enum_name, weights_name = names.split(".")
    weights = torchvision.models.get_model_weights(name)[weights_name]
    assert type(weights).__name__ == enum_name
    count = count_parameters(model)
    if name == "googlenet":
        # torchvision leaves the auxiliary heads out of its count.
        count -= count_parameters(model.aux1, model.aux2)
    assert count == weights.meta["num_params"]
    published = weights.meta["_metrics"]["ImageNet-1K"]
    assert entry.top1 == published["acc@1"]
    assert entry.top5 == published["acc@5"]
    [crop_size] = weights.transforms().crop_size
    assert entry.size == crop_size


def densenet_parameters(growth, depths, channels):
    """Huang et al. 2017, table 1, counted: per layer two norms, a 1x1 to 4 * growth and a 3x3;
    halving transitions.
    """

    def norm(channels):
        return 2 * channels

    def conv(inputs, outputs, side):
        return inputs * outputs * side * side

    bottleneck = 4 * growth
    last = len(depths) - 1
    total = conv(3, channels, side=7) + norm(channels)
    for number, depth in enumerate(depths):
        for _ in range(depth):
            total += norm(channels) + conv(channels, bottleneck, side=1)
            total += norm(bottleneck) + conv(bottleneck, growth, side=3)
            channels += growth
        if number != last:
            half = channels // 2
            total += norm(channels) + conv(channels, half, side=1)
            channels = half
    head = (channels + 1) * 1000
    return total + norm(channels) + head


def test_densenets_count_as_the_others():
    densenet121 = densenet_parameters(
        growth=32,
        depths=(6, 12, 24, 16),
        channels=64,
    )
    assert densenet121 == 7978856


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lenet5", "alexnet", "googlenet", "inception_v4", "efficientnet_b0"]
)
def test_the_whole_step_runs_on_meta(name):
    """At the native size and full width: no tensor on the wrong device, no stray .item()."""
    config = Config(
        model=ModelConfig(name=name),
        train=TrainConfig(
            precision="fp32",
            ema_decay=0.9,
            loss="bce",
        ),
    )
    side = ZOO[name].size
    with torch.device("meta"):
        state = build_state(config, 1000, torch.device("meta"))
        images = torch.empty(2, 3, side, side)
        labels = torch.zeros(2, dtype=torch.int64)
    state.model.train()
    batch = Batch(images, labels, np.arange(2))

    counts, norm = do_step(state, [batch], 0.1, config)

    assert counts.num.device.type == "meta"
    assert norm.device.type == "meta"


class TwoHeads(nn.Module):
    """Logits and those of two auxiliary heads."""

    auxiliary_weight = 0.25

    def __init__(self):
        super().__init__()
        self.main = nn.Linear(12, 10)
        self.first = nn.Linear(12, 10)
        self.second = nn.Linear(12, 10)

    def forward(self, images):
        features = images.flatten(1)
        return self.main(features), self.first(features), self.second(features)


def test_auxiliary_losses_count_their_weight():
    """Against plain torch, with mixed targets and smoothing; the counts are those of the first head
    alone.
    """
    lr = 0.5
    config = Config(
        train=TrainConfig(
            precision="fp32",
            label_smoothing=0.1,
            global_batch_size=4,
        ),
        optim=OptimConfig(momentum=0.0, weight_decay=0.0),
        augment=AugmentConfig(mixup_alpha=1.0),
    )
    torch.manual_seed(0)
    model = TwoHeads()
    reference = copy.deepcopy(model)
    batch = batch_of(2, 4)
    rule = rule_of(config)
    optimizer = build_optimizer(config.optim, model)
    state = state_of(model, optimizer)

    counts, _ = train_step(NoSync(model), state, [batch], lr, rule, NonFinite(model, 0))

    mixing = rule.mixing(0, 0)
    images, shares = mix_images(batch.images, mixing)
    share = shares[0].item()
    assert 0.01 < share < 0.99
    own = F.one_hot(batch.labels, 10)
    of_neighbours = own[[1, 0, 3, 2]]
    targets = share * own + (1 - share) * of_neighbours
    losses = []
    for logits in reference(images):
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        losses.append(loss)
    main, first_auxiliary, second_auxiliary = losses
    total = main + 0.25 * (first_auxiliary + second_auxiliary)
    total.backward()

    assert counts.result()["loss"] == pytest.approx(main.item(), rel=1e-6)
    for updated, original in zip(model.parameters(), reference.parameters(), strict=True):
        expected = original - lr * original.grad
        torch.testing.assert_close(updated, expected)


def test_published_weights_of_auxiliary_losses_and_dropout():
    with torch.device("meta"):
        googlenet = ZOO["googlenet"].make(num_classes=10)
        inception = ZOO["inception_v3"].make(num_classes=10)
        vgg = ZOO["vgg11"].make(num_classes=10)
    assert googlenet.auxiliary_weight == 0.3
    assert inception.auxiliary_weight == 0.4
    assert vgg.auxiliary_weight == 0.0
    assert not googlenet.transform_input
    assert not inception.transform_input
    # Szegedy et al. 2014, table 1; TF-slim's dropout_keep_prob of 0.8.
    assert googlenet.dropout.p == 0.4
    assert inception.dropout.p == 0.2


@pytest.fixture
def double(monkeypatch):
    """Double precision in place of single, in forked ranks too."""
    monkeypatch.setitem(DTYPES, "fp32", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def one_update(rank, world_size):
    """One update of GoogLeNet in double precision, without dropout, on this rank's share of four
    digits; in DDP where there is more than one rank. Its buckets settle before, in two passes of
    which the second finds what the first may have left behind, and without a trace.
    """
    config = Config(
        model=ModelConfig(name="googlenet"),
        train=TrainConfig(precision="fp32", global_batch_size=4),
    )
    state = build_state(config, 10, CPU)
    network = state.model
    for dropout in modules_of(network, nn.Dropout):
        dropout.p = 0.0

    whole = batch_of(32, 4)
    own = slice(rank, None, world_size)
    batch = Batch(
        whole.images[own].double(),
        whole.labels[own],
        whole.indices[own],
    )
    model = NoSync(network)
    if world_size > 1:
        model = wrap_ddp(network, CPU)

    before = copy.deepcopy(network.state_dict())
    engine.warm_up_ddp(model, (2, 3, 32, 32), FP32)
    assert equal_trees(before, network.state_dict())
    assert network.training

    nonfinite = NonFinite(network, 0)
    train_step(model, state, [batch], 0.01, rule_of(config), nonfinite)
    return {name: tensor.numpy() for name, tensor in network.state_dict().items()}


@pytest.mark.slow
def test_auxiliary_heads_on_two_ranks_equal_one_process(double):
    """DDP, SyncBatchNorm and the buckets' settling, with heads that only training uses: as the
    whole batch at once.
    """
    first, second = run_ranks(one_update, 2)
    whole = one_update(0, 1)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_warm_up_needs_no_more_than_two_values_a_channel():
    """The least side, where the last map is a single pixel."""
    precision = Precision("fp32", torch.device("meta"))
    for name in ("googlenet", "efficientnet_b0", "vgg11_bn"):
        entry = ZOO[name]
        with torch.device("meta"):
            plain = entry.make(num_classes=10)
            model = convert_sync_batch_norm(plain)
        side = entry.min_size
        engine.warm_up_ddp(NoSync(model), (2, 3, side, side), precision)


def test_lenet_sees_what_table_1_says():
    """A gradient of each map of C3 reaches the maps of S2 in the table, and no other: 60
    kernels.
    """
    torch.manual_seed(0)
    model = ZOO["lenet5"].make(num_classes=10)
    maps = {}

    def record_s2(module, inputs, output):
        maps["s2"] = output

    def record_c3(module, inputs):
        maps["c3"] = inputs[0]

    model.s2.register_forward_hook(record_s2)
    model.s4.register_forward_pre_hook(record_c3)
    model(batch_of(32, 1).images)

    rows = []
    [maps_of_c3] = maps["c3"]
    for map_of_c3 in maps_of_c3:
        [gradients] = torch.autograd.grad(map_of_c3.sum(), maps["s2"], retain_graph=True)
        sums = gradients[0].abs().sum((1, 2))
        rows.append(sums > 0)
    is_connected = torch.stack(rows)
    inputs_of_c3 = is_connected.sum(1).tolist()
    assert inputs_of_c3 == [3] * 6 + [4] * 9 + [6]
    outputs_of_s2 = is_connected.sum(0).tolist()
    assert outputs_of_s2 == [10] * 6
    assert count_parameters(model.c3) == LENET_LAYERS["C3"]


def test_lenet_takes_no_other_side():
    with torch.device("meta"):
        model = ZOO["lenet5"].make(num_classes=10)
        images = torch.empty(1, 3, 48, 48)
    with pytest.raises(RuntimeError):
        model(images)


@pytest.mark.slow
def test_timm_networks_keep_their_function():
    """The activation that is moved out of timm's norm stays where it was, and survives the
    conversion.
    """
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("inception_v4", num_classes=10)
    # Weights that keep the signal.
    init_weights(theirs)
    theirs.eval()
    # The pitfall: this one has lost its activations.
    without_activations = convert_sync_batch_norm(copy.deepcopy(theirs))
    with torch.device("meta"):
        ours = ZOO["inception_v4"].make(num_classes=10)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    ours = convert_sync_batch_norm(ours)
    ours.eval()
    images = batch_of(75, 1).images

    with torch.inference_mode():
        expected = theirs(images)
        logits = ours(images)
        wrong_logits = without_activations(images)

    assert expected.std() > 0.01
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(wrong_logits, expected, rtol=1e-2)


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"model\.name is 'inception_v4'.*pip install 'resnet-dist\[timm\]'"
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(name="inception_v4"), 10)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "lenet5",
            {},
            r"data\.train_crop_size is 224: lenet5 takes 32 pixels only",
        ),
        (
            "alexnet",
            {"train_crop_size": 62},
            r"data\.train_crop_size is 62: alexnet takes 63 pixels or more.*224",
        ),
        (
            "vgg16",
            {"val_crop_size": 31},
            r"data\.val_crop_size is 31: vgg16 takes 32",
        ),
        (
            "densenet264",
            {"progressive_start_size": 28},
            r"data\.progressive_start_size is 28",
        ),
        (
            "inception_v4",
            {"val_scales": (299, 74)},
            r"data\.val_scales is 74: inception_v4 takes 75",
        ),
        (
            "inception_v3",
            {"train_crop_size": 298},
            r"data\.train_crop_size is 298: inception_v3 takes 299",
        ),
    ],
)
def test_sides_that_a_network_cannot_take_are_refused(name, data, message):
    config = DataConfig(**data)
    with pytest.raises(ValueError, match=message):
        check_image_size(name, config)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("resnet50", {"train_crop_size": 8}),
        ("googlenet", {"train_crop_size": 15}),
        ("inception_v3", {"train_crop_size": 299, "val_crop_size": 75}),
        ("lenet5", {"train_crop_size": 32, "val_crop_size": 32}),
    ],
)
def test_sides_that_it_can_take_are_not(name, data):
    check_image_size(name, DataConfig(**data))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "lenet5",
        "alexnet",
        "vgg11",
        "googlenet",
        "inception_v3",
        "inception_v4",
        "inception_resnet_v2",
        "densenet121",
    ],
)
def test_the_least_side_is_the_least(name):
    """One pixel less fails in a convolution or a pool, on meta."""
    entry = ZOO[name]
    with torch.device("meta"):
        model = entry.make(num_classes=10)

    def run_on(side):
        model(torch.empty(2, 3, side, side, device="meta"))

    model.train()
    if entry.min_train_size:
        run_on(entry.min_train_size)
    else:
        run_on(entry.min_size)

    model.eval()
    with pytest.raises((RuntimeError, ValueError)):
        run_on(entry.min_size - 1)
    if entry.min_train_size:
        run_on(entry.min_size)


@pytest.mark.slow
def test_the_command_line_trains_lenet_and_refuses_a_side(digits, tmp_path):
    """On two ranks, through JPEG files and DALI; a side that does not fit ends both before the
    first step.
    """

    log = tmp_path / "log"

    def train(side):
        settings = small_run(
            data__data_dir=digits,
            output_dir=tmp_path / str(side),
            model__name="lenet5",
            data__train_crop_size=side,
            data__val_resize_size=side,
            data__val_crop_size=side,
            train__epochs=2,
            train__global_batch_size=64,
            schedule__warmup_epochs=0,
            optim__base_lr=2,
        )
        return run_app(2, ["train", *settings], str(log))

    assert train(28) == [2, 2]
    assert "data.train_crop_size is 28: lenet5 takes 32 pixels only" in log.read_text()

    assert train(32) == [0, 0], log.read_text()
    *_, last_line = logged_lines(tmp_path / "32")
    assert last_line["val/top1"] > 30
