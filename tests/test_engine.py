"""One training step and one evaluation, against plain torch and on devices that are not there."""

import contextlib
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from resnet_dist import engine
from resnet_dist.checkpoints.checkpoint import TrainState
from resnet_dist.checkpoints.state import build_state
from resnet_dist.config import AugmentConfig, Config, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.data.types import IGNORED_LABEL, Batch
from resnet_dist.engine import train_step
from resnet_dist.evaluation.loop import evaluate
from resnet_dist.metrics import Counts
from resnet_dist.models.build import MODELS
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.plan import is_due
from resnet_dist.precision import Precision
from resnet_dist.run import build_update_rule

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(name="resnet18", sync_batch_norm=False),
    train=TrainConfig(precision="fp32", label_smoothing=0.1),
    optim=OptimConfig(weight_decay=1e-4, momentum=0.9, nesterov=True),
)


class Alone:
    """The runtime of a single process without a process group."""

    device, rank, world_size, is_main = torch.device("cpu"), 0, 1, True

    def all_reduce_sum(self, tensor):
        return tensor

    def broadcast_buffers(self, model):
        pass


class NoSync(nn.Module):
    """What the step needs of a DDP wrapper when there is one rank."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)

    def no_sync(self):
        return contextlib.nullcontext()


def make_batch(size, image=64, classes=10, seed=0, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, image, image, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(classes, (size,), generator=generator)
    return Batch(images.to(device, dtype), labels.to(device), np.arange(size))


FP32 = Precision("fp32", CPU)


def rule_of(config, device=CPU):
    return build_update_rule(config, device)


def test_a_step_equals_plain_torch_with_torchvision():
    """Three steps, so that momentum counts; weights, statistics and loss to 1e-6."""
    state = build_state(CONFIG, 10, CPU)
    reference = torchvision.models.resnet18(num_classes=10).to(memory_format=torch.channels_last)
    reference.load_state_dict(state.model.state_dict())
    optimizer = torch.optim.SGD(
        reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )
    batch, rule, nonfinite = make_batch(8), rule_of(CONFIG), NonFinite(state.model, 0)
    reference.train(), state.model.train()
    for _ in range(3):
        counts, grad_norm = train_step(NoSync(state.model), state, [batch], 0.01, rule, nonfinite)
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(batch.images), batch.labels, label_smoothing=0.1)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), float("inf"))
        optimizer.step()
        assert counts.result()["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
    assert state.step == 3
    for (name, ours), theirs in zip(
        state.model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        assert (ours - theirs).abs().max() <= 1e-6, name


def test_accumulated_micro_steps_equal_one_batch():
    """Without batch norm, whose statistics are those of a micro-step, four micro-batches of 2 are
    one of 8.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ).double()
    whole = make_batch(8, image=8, dtype=torch.float64)
    parts = [
        Batch(whole.images[i : i + 2], whole.labels[i : i + 2], whole.indices[i : i + 2])
        for i in range(0, 8, 2)
    ]
    results = []
    for micro_batches in ([whole], parts):
        model = copy.deepcopy(net)
        state = TrainState(
            model, build_optimizer(OptimConfig(), model), torch.amp.GradScaler("cpu", enabled=False)
        )
        counts, norm = train_step(
            NoSync(model), state, micro_batches, 0.1, rule_of(CONFIG), NonFinite(state.model, 0)
        )
        results.append((counts.result(), norm, model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-12, atol=1e-14)


def test_clipping_bounds_the_update():
    config = replace(
        CONFIG,
        train=replace(CONFIG.train, clip_grad_norm=0.5),
        optim=OptimConfig(weight_decay=0.0, momentum=0.0),
    )
    state = build_state(config, 10, CPU)
    before = copy.deepcopy(state.model)
    _, norm = train_step(
        NoSync(state.model), state, [make_batch(4)], 1.0, rule_of(config), NonFinite(state.model, 0)
    )
    assert norm > 0.5  # the norm before clipping is what is logged
    pairs = zip(state.model.parameters(), before.parameters(), strict=True)
    moved = torch.cat([(a - b).double().flatten() for a, b in pairs])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_an_update_that_is_not_finite_leaves_no_trace_and_is_counted():
    """Not in weights, momentum, running statistics or average; also when it is the very first
    update, where a fused kernel would create its momentum from uninitialised memory.
    """
    config = replace(CONFIG, train=replace(CONFIG.train, ema_decay=0.5))
    state = build_state(config, 10, CPU)
    before = copy.deepcopy(state.model.state_dict())
    nonfinite, rule = NonFinite(state.model, 100), rule_of(config)
    bad, good = make_batch(4), make_batch(4, seed=1)
    bad.images[0, 0, 0, 0] = float("inf")
    assert nonfinite.longest_row()[1] == 0
    for in_row in (1, 2):
        train_step(NoSync(state.model), state, [bad], 0.1, rule, nonfinite)
        assert int(nonfinite.in_row) == in_row
        for model in (state.model, state.ema.model):
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]) or not value.is_floating_point(), name
        assert all(not s["momentum_buffer"].any() for s in state.optimizer.state.values())
    for _ in range(3):
        train_step(NoSync(state.model), state, [good], 0.1, rule, nonfinite)
    train_step(NoSync(state.model), state, [bad], 0.1, rule, nonfinite)
    assert (int(nonfinite.in_row), int(nonfinite.total)) == (1, 3)
    assert nonfinite.longest_row() == (101, 102)
    assert not torch.equal(state.model.conv1.weight, before["conv1.weight"])
    for model in (state.model, state.ema.model):
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_fp16_scaler_lowers_its_scale_and_skips():
    config = replace(CONFIG, train=replace(CONFIG.train, precision="fp16"))
    state = build_state(config, 10, CPU)
    weights = [p.detach().clone() for p in state.model.parameters()]
    bad = make_batch(2, image=32)
    bad.images[0, 0, 0, 0] = float("inf")
    train_step(NoSync(state.model), state, [bad], 0.1, rule_of(config), NonFinite(state.model, 0))
    assert state.scaler.get_scale() == 32768.0
    assert all(torch.equal(a, b) for a, b in zip(weights, state.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sgd", "lars", "lamb", "rmsprop", "adamw"])
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
    state = TrainState(
        net,
        build_optimizer(OptimConfig(kind=kind, trust_coefficient=0.02), net),
        torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
    )
    before = [p.detach().clone() for p in state.model.parameters()]
    bad, good = make_batch(4, image=16), make_batch(8, image=16, seed=1)
    bad.images[0, 0, 0, 0] = float("inf")
    rule, nonfinite, losses = rule_of(config), NonFinite(state.model, 0), []
    first = copy.deepcopy(state.optimizer.state_dict()["state"])
    train_step(NoSync(state.model), state, [bad], 0.1, rule, nonfinite)
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    for number, tensors in state.optimizer.state_dict()["state"].items():
        for name, tensor in tensors.items():  # AdamW has made its state in this update, as zeros
            assert torch.equal(tensor, first[number][name]) if number in first else not tensor.any()
    for _ in range(12):
        lr = {"sgd": 0.05, "lars": 0.5, "lamb": 0.02, "rmsprop": 0.01, "adamw": 0.005}[kind]
        counts, _ = train_step(NoSync(state.model), state, [good], lr, rule, nonfinite)
        losses.append(counts.result()["loss"])
    assert losses[-1] < 0.7 * losses[0], losses
    assert int(nonfinite.total) == 1


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
    batches = [make_batch(4, image=224, device="meta") for _ in range(2)]
    nonfinite = NonFinite(state.model, 0)
    counts, norm = train_step(NoSync(state.model), state, batches, 0.1, rule_of(config), nonfinite)
    assert counts.num.device.type == norm.device.type == "meta"
    assert all(p.device.type == "meta" for p in state.model.parameters())


class ListLoader:
    """A validation loader over given batches."""

    mirrored = False

    def __init__(self, batches, num_samples):
        self.items, self.num_samples, self.rounds = batches, num_samples, len(batches)

    def __iter__(self):
        return iter(self.items)


def test_views_are_averaged_as_probabilities():
    """Two views and their mirror images: the mean of four softmaxes, and its cross-entropy."""
    torch.manual_seed(0)
    model = MODELS["resnet18"](num_classes=10).eval()
    first, second = make_batch(6), make_batch(6, image=96, seed=1)
    loader = ListLoader([replace(first, other_views=(second.images,))], 6)
    loader.mirrored = True
    counts = evaluate(model, loader, Alone(), FP32).result()
    with torch.no_grad():
        views = [
            images for view in (first.images, second.images) for images in (view, view.flip(3))
        ]
        mean = torch.stack([model(images).double().softmax(1) for images in views]).mean(0)
    assert counts["loss"] == pytest.approx(
        -mean.log().gather(1, first.labels[:, None]).mean().item(), rel=1e-6
    )
    assert counts["correct1"] == int((mean.argmax(1) == first.labels).sum())


def test_evaluation_counts_each_image_once():
    torch.manual_seed(0)
    model = MODELS["resnet18"](num_classes=10).train()
    batches = [make_batch(5, seed=1), None, make_batch(3, seed=2)]
    batches[2].labels[1] = IGNORED_LABEL
    result = evaluate(model, ListLoader(batches, 8), Alone(), FP32).result()
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(b.images) for b in batches if b])
    labels = torch.cat([b.labels for b in batches if b])
    top5 = logits.topk(5).indices
    assert result["num"] == 8
    assert result["correct1"] == int((top5[:, 0] == labels).sum())
    assert result["correct5"] == int((top5 == labels[:, None]).any(1).sum())
    expected = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL) / 8
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_refuses_a_miscount_and_stops_when_asked():
    model = MODELS["resnet18"](num_classes=10)
    with pytest.raises(AssertionError, match="evaluated 5 of 6 images"):
        evaluate(model, ListLoader([make_batch(5)], 6), Alone(), FP32)
    calls = iter([0, 15])
    assert (
        evaluate(model, ListLoader([make_batch(5)] * 3, 15), Alone(), FP32, lambda: next(calls))
        is None
    )


def test_top5_of_few_classes_and_counts_add_up():
    a = Counts.of(
        torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]), torch.tensor([1.0, 2.0])
    )
    total = (a + a).result()
    assert (total["correct1"], total["correct5"], total["num"], total["loss"]) == (2, 4, 4, 1.5)


def test_due():
    assert [step for step in range(11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(11) if is_due(step, 0, 10)] == [10]


def test_deterministic_initialisation_on_every_rank():
    a, b = (build_state(CONFIG, 10, CPU).model for _ in range(2))
    c = build_state(replace(CONFIG, seed=1), 10, CPU).model
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.conv1.weight, c.conv1.weight)


def test_the_warm_up_of_ddp_leaves_no_trace():
    config = replace(CONFIG, train=replace(CONFIG.train, precision="bf16"))
    state = build_state(config, 10, CPU)
    before = copy.deepcopy(state.model.state_dict())
    engine.warm_up_ddp(NoSync(state.model), (2, 3, 32, 32), Precision("bf16", CPU))
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), state.model.state_dict().values(), strict=True)
    )
    assert state.model.training and all(p.grad is None for p in state.model.parameters())
