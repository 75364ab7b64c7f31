"""One training step and one evaluation, against plain torch and on devices that are not there."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from engine_utils import (
    CONFIG,
    CPU,
    FP32,
    ListLoader,
    NoSync,
    do_step,
    make_bad_batch,
    make_batch,
    state_of,
)
from image_files import OneProcess
from torch import nn

from resnet_dist import engine
from resnet_dist.checkpoints.state import build_state
from resnet_dist.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.data.types import IGNORED_LABEL, Batch
from resnet_dist.evaluation.loop import evaluate
from resnet_dist.models.build import MODELS
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.plan import is_due
from resnet_dist.precision import Precision


def copies_of(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def assert_equal_tensors(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def config_with(**train_settings):
    """CONFIG with other settings of the section `train`."""
    train = replace(CONFIG.train, **train_settings)
    return replace(CONFIG, train=train)


@pytest.mark.slow
def test_a_step_equals_plain_torch_with_torchvision():
    """Three steps, so that momentum counts; weights, statistics and loss to 1e-6."""
    lr = 0.01
    state = build_state(CONFIG, 10, CPU)
    state.model.train()
    reference = torchvision.models.resnet18(num_classes=10)
    reference = reference.to(memory_format=torch.channels_last)
    reference.load_state_dict(state.model.state_dict())
    reference.train()
    optimizer = torch.optim.SGD(
        reference.parameters(),
        lr=lr,
        momentum=0.9,
        weight_decay=1e-4,
        nesterov=True,
    )
    batch = make_batch(8)

    for _ in range(3):
        counts, norm = do_step(state, [batch], lr)

        optimizer.zero_grad()
        logits = reference(batch.images)
        expected_loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
        expected_loss.backward()
        expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), float("inf"))
        optimizer.step()

        loss = counts.result()["loss"]
        assert loss == pytest.approx(expected_loss.item(), abs=1e-6)
        assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)

    assert state.step == 3
    expected = reference.state_dict()
    for name, tensor in state.model.state_dict().items():
        errors = (tensor - expected[name]).abs()
        assert errors.max() <= 1e-6, name


def test_accumulated_micro_steps_equal_one_batch():
    """Without batch norm, whose statistics are those of a micro-step, four micro-batches of 2 are
    one of 8.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    net = net.double()
    whole = make_batch(8, image=8, dtype=torch.float64)
    micro_batches = []
    for start in range(0, 8, 2):
        part = slice(start, start + 2)
        micro_batch = Batch(
            whole.images[part],
            whole.labels[part],
            whole.indices[part],
        )
        micro_batches.append(micro_batch)

    def update_with(batches):
        model = copy.deepcopy(net)
        optimizer = build_optimizer(OptimConfig(), model)
        state = state_of(model, optimizer)
        counts, norm = do_step(state, batches, lr=0.1)
        return counts.result(), norm, model.state_dict()

    counts, norm, weights = update_with([whole])
    other_counts, other_norm, other_weights = update_with(micro_batches)
    assert counts == pytest.approx(other_counts)
    torch.testing.assert_close(norm, other_norm, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(weights, other_weights, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_clipping_bounds_the_update():
    max_norm = 0.5
    config = replace(
        config_with(clip_grad_norm=max_norm),
        optim=OptimConfig(weight_decay=0.0, momentum=0.0),
    )
    state = build_state(config, 10, CPU)
    before = copies_of(state.model.parameters())

    _, norm = do_step(state, [make_batch(4)], 1.0, config)

    assert norm > max_norm, "the norm before clipping is what is logged"
    changes = []
    for parameter, old in zip(state.model.parameters(), before, strict=True):
        change = (parameter - old).double()
        changes.append(change.flatten())
    norm_of_update = torch.cat(changes).norm().item()
    assert norm_of_update == pytest.approx(max_norm, rel=1e-3)


@pytest.mark.slow
def test_an_update_that_is_not_finite_leaves_no_trace_and_is_counted():
    """Not in weights, momentum, running statistics or average; also when it is the very first
    update, where a fused kernel would create its momentum from uninitialised memory.
    """
    config = config_with(ema_decay=0.5)
    state = build_state(config, 10, CPU)
    models = (state.model, state.ema.model)
    before = copy.deepcopy(state.model.state_dict())
    nonfinite = NonFinite(state.model, 100)
    bad = make_bad_batch(4)
    good = make_batch(4, seed=1)
    _, last_of_longest_row = nonfinite.longest_row()
    assert last_of_longest_row == 0

    for num_skipped in (1, 2):
        do_step(state, [bad], 0.1, config, nonfinite)
        assert int(nonfinite.in_row) == num_skipped
        for model in models:
            for name, tensor in model.state_dict().items():
                # The number of batches that batch norm has seen may change.
                if tensor.is_floating_point():
                    assert torch.equal(tensor, before[name]), name
        for of_parameter in state.optimizer.state.values():
            assert not of_parameter["momentum_buffer"].any()

    for batch in (good, good, good, bad):
        do_step(state, [batch], 0.1, config, nonfinite)
    assert int(nonfinite.in_row) == 1
    assert int(nonfinite.total) == 3
    assert nonfinite.longest_row() == (101, 102)
    assert not torch.equal(state.model.conv1.weight, before["conv1.weight"])
    for model in models:
        for name, tensor in model.state_dict().items():
            assert tensor.isfinite().all(), name


def test_fp16_scaler_lowers_its_scale_and_skips():
    config = config_with(precision="fp16")
    state = build_state(config, 10, CPU)
    before = copies_of(state.model.parameters())
    bad = make_bad_batch(2, image=32)

    do_step(state, [bad], 0.1, config)

    assert state.scaler.get_scale() == 32768.0
    assert_equal_tensors(before, state.model.parameters())


LR_THAT_LEARNS = {
    "sgd": 0.05,
    "lars": 0.5,
    "lamb": 0.02,
    "rmsprop": 0.01,
    "adamw": 0.005,
}


@pytest.mark.parametrize("kind", LR_THAT_LEARNS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_optimizer_learns_skips_and_scales(kind, precision):
    """One update that is not finite, which leaves weights and state, then twelve that lower the
    loss.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    config = replace(CONFIG, train=TrainConfig(precision=precision))
    optimizer = build_optimizer(OptimConfig(kind=kind, trust_coefficient=0.02), net)
    state = state_of(net, optimizer, precision)
    nonfinite = NonFinite(net, 0)
    weights_before = copies_of(net.parameters())
    state_before = copy.deepcopy(optimizer.state_dict()["state"])

    bad = make_bad_batch(4, image=16)
    do_step(state, [bad], 0.1, config, nonfinite)

    assert_equal_tensors(weights_before, net.parameters())
    state_after = optimizer.state_dict()["state"]
    for number, tensors in state_after.items():
        for name, tensor in tensors.items():
            # AdamW has made its state in this update.
            expected = torch.zeros_like(tensor)
            if number in state_before:
                expected = state_before[number][name]
            assert torch.equal(tensor, expected), name

    good = make_batch(8, image=16, seed=1)
    lr = LR_THAT_LEARNS[kind]
    losses = []
    for _ in range(12):
        counts, _ = do_step(state, [good], lr, config, nonfinite)
        result = counts.result()
        losses.append(result["loss"])
    first_loss = losses[0]
    last_loss = losses[-1]
    assert last_loss < 0.7 * first_loss, losses
    assert int(nonfinite.total) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "loss"),
    [
        ("resnet20", "sgd", "ce"),
        ("resnet50", "sgd", "bce"),
        ("resnet20", "lars", "ce"),
        ("resnet20", "lamb", "bce"),
        ("resnet20", "rmsprop", "ce"),
        ("resnet20", "adamw", "ce"),
    ],
)
def test_the_whole_step_runs_on_meta(name, kind, loss):
    """No tensor on the wrong device, no stray .item(): either would raise on a device without data.

    In fp32, since autocast does not know this device.
    """
    config = replace(
        CONFIG,
        model=ModelConfig(name=name),
        optim=OptimConfig(kind=kind),
        train=TrainConfig(
            precision="fp32",
            global_batch_size=8,
            clip_grad_norm=1.0,
            ema_decay=0.999,
            label_smoothing=0.1,
            grad_accum_steps=2,
            loss=loss,
            bce_target_threshold=0.2,
        ),
        augment=AugmentConfig(mixup_alpha=0.2),
    )
    with torch.device("meta"):
        state = build_state(config, 1000, torch.device("meta"))
    micro_batches = [make_batch(4, image=224, device="meta") for _ in range(2)]

    counts, norm = do_step(state, micro_batches, 0.1, config)

    assert counts.num.device.type == "meta"
    assert norm.device.type == "meta"
    for parameter in state.model.parameters():
        assert parameter.device.type == "meta"


@pytest.mark.slow
def test_views_are_averaged_as_probabilities():
    """Two views and their mirror images: the mean of four softmaxes, and its cross-entropy."""
    torch.manual_seed(0)
    model = MODELS["resnet18"](num_classes=10)
    model.eval()
    batch = make_batch(6)
    first_view = batch.images
    second_view = make_batch(6, image=96, seed=1).images
    with_two_views = replace(batch, other_views=(second_view,))
    loader = ListLoader([with_two_views], num_samples=6)
    loader.mirrored = True

    counts = evaluate(model, loader, OneProcess(), FP32)
    result = counts.result()

    views = [
        first_view,
        first_view.flip(3),
        second_view,
        second_view.flip(3),
    ]
    probabilities = []
    for images in views:
        with torch.no_grad():
            logits = model(images)
        probabilities.append(logits.double().softmax(1))
    mean = torch.stack(probabilities).mean(0)
    expected_loss = F.nll_loss(mean.log(), batch.labels)
    assert result["loss"] == pytest.approx(expected_loss.item(), rel=1e-6)
    is_correct = mean.argmax(1) == batch.labels
    assert result["correct1"] == int(is_correct.sum())


def test_evaluation_counts_each_image_once():
    """An image without a label counts, and is no hit."""
    torch.manual_seed(0)
    model = MODELS["resnet18"](num_classes=10)
    model.train()
    first = make_batch(5, seed=1)
    last = make_batch(3, seed=2)
    last.labels[1] = IGNORED_LABEL
    num = 8
    # None is a round in which this rank has no images.
    loader = ListLoader([first, None, last], num)

    counts = evaluate(model, loader, OneProcess(), FP32)
    result = counts.result()

    assert model.training
    model.eval()
    with torch.no_grad():
        logits_of_first = model(first.images)
        logits_of_last = model(last.images)
    logits = torch.cat([logits_of_first, logits_of_last])
    labels = torch.cat([first.labels, last.labels])
    is_label = logits.topk(5).indices == labels[:, None]
    in_first_place = is_label[:, 0]
    in_first_five = is_label.any(1)
    loss_sum = F.cross_entropy(
        logits,
        labels,
        reduction="sum",
        ignore_index=IGNORED_LABEL,
    )
    expected_loss = loss_sum.item() / num
    assert result["num"] == num
    assert result["correct1"] == int(in_first_place.sum())
    assert result["correct5"] == int(in_first_five.sum())
    assert result["loss"] == pytest.approx(expected_loss, rel=1e-5)


def test_evaluation_refuses_a_miscount():
    model = MODELS["resnet18"](num_classes=10)
    loader = ListLoader([make_batch(5)], num_samples=6)
    with pytest.raises(AssertionError, match="evaluated 5 of 6 images"):
        evaluate(model, loader, OneProcess(), FP32)


def test_evaluation_stops_when_asked():
    model = MODELS["resnet18"](num_classes=10)
    loader = ListLoader([make_batch(5)] * 3, num_samples=15)
    # The third batch would not be asked for.
    answers = iter([0, 15])

    def poll():
        return next(answers)

    assert evaluate(model, loader, OneProcess(), FP32, poll) is None


def test_what_happens_at_intervals_also_happens_at_the_end():
    def steps_of(interval):
        total = 10
        return [step for step in range(total + 1) if is_due(step, interval, total)]

    assert steps_of(interval=4) == [4, 8, 10]
    assert steps_of(interval=0) == [10]


def test_fresh_weights_depend_on_the_seed_alone():
    """So that every rank starts with the same weights."""
    with_seed_1 = replace(CONFIG, seed=1)
    model = build_state(CONFIG, 10, CPU).model
    again = build_state(CONFIG, 10, CPU).model
    other_seed = build_state(with_seed_1, 10, CPU).model
    assert_equal_tensors(model.parameters(), again.parameters())
    assert not torch.equal(model.conv1.weight, other_seed.conv1.weight)


def test_the_warm_up_of_ddp_leaves_no_trace():
    state = build_state(config_with(precision="bf16"), 10, CPU)
    model = state.model
    before = copy.deepcopy(model.state_dict())

    engine.warm_up_ddp(NoSync(model), (2, 3, 32, 32), Precision("bf16", CPU))

    after = model.state_dict()
    assert_equal_tensors(before.values(), after.values())
    assert model.training
    for parameter in model.parameters():
        assert parameter.grad is None
