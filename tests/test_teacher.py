"""Distillation: the loss against its formula, whole runs, and teachers that do not fit."""

import copy
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from dist_utils import equal_trees, in_double, last_checkpoint, run_app, small_run
from engine_utils import CPU, NoSync, make_batch, state_of
from image_files import OneProcess
from torch import nn

from resnet_dist import cli
from resnet_dist.checkpoints.state import build_state
from resnet_dist.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from resnet_dist.engine import train_step
from resnet_dist.losses import mixed_cross_entropy
from resnet_dist.mix import mix_images
from resnet_dist.models.build import MODELS
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.run import build_update_rule
from resnet_dist.teacher import Teacher, load_teacher

TRAIN = TrainConfig(
    precision="fp32",
    global_batch_size=8,
    grad_accum_steps=2,
    label_smoothing=0.1,
    distillation_weight=0.7,
    distillation_temperature=3.0,
    ema_decay=0.9,
)


def small_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, 10),
    )


def as_teacher(network):
    network.eval()
    network.requires_grad_(False)
    return Teacher(network, "", "", ())


def distillation_loss(network, teacher, images, labels, shares):
    """Hinton et al. 2015, with the weight and the temperature of TRAIN: the loss of each image."""
    weight = 0.7
    temperature = 3.0
    logits = network(images)
    log_probabilities = torch.log_softmax(logits / temperature, 1)
    of_teacher = torch.softmax(teacher(images) / temperature, 1)
    differences = of_teacher.log() - log_probabilities
    divergence = (of_teacher * differences).sum(1)
    of_labels = mixed_cross_entropy(logits, labels, shares, 0.1)
    return (1 - weight) * of_labels + weight * temperature**2 * divergence


def test_an_update_is_that_of_the_formula():
    """In double, with mixup and two micro-batches. The teacher stays as it is."""
    config = Config(train=TRAIN, augment=AugmentConfig(mixup_alpha=0.4))
    lr = 0.1
    network = small_network(0).double()
    teacher = small_network(1).double()
    # Without dropout, since the two networks would drop other features.
    network[5].p = 0.0
    before = copy.deepcopy(teacher.state_dict())
    reference = copy.deepcopy(network)
    optimizer = build_optimizer(config.optim, network)
    rule = build_update_rule(config, CPU, teacher=as_teacher(teacher))
    batches = [
        make_batch(4, image=8, seed=2, dtype=torch.float64),
        make_batch(4, image=8, seed=3, dtype=torch.float64),
    ]

    counts, norm = train_step(
        NoSync(network),
        state_of(network, optimizer),
        batches,
        lr,
        rule,
        NonFinite(network, 0),
    )

    # The loss and the gradient.
    loss = 0.0
    for micro_step, batch in enumerate(batches):
        mixing = rule.mixing(0, micro_step)
        images, shares = mix_images(batch.images, mixing)
        losses = distillation_loss(reference, teacher, images, batch.labels, shares)
        loss = loss + losses.mean() / len(batches)
    loss.backward()
    assert counts.result()["loss"] == pytest.approx(loss.item(), rel=1e-12)
    gradients = [parameter.grad for parameter in reference.parameters()]
    expected_norm = nn.utils.get_total_norm(gradients)
    assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-12)

    # The update.
    reference_optimizer = build_optimizer(config.optim, reference)
    for group in reference_optimizer.param_groups:
        group["lr"] = lr
    reference_optimizer.step()
    torch.testing.assert_close(
        network.state_dict(),
        reference.state_dict(),
        rtol=1e-12,
        atol=1e-14,
    )

    # The teacher.
    assert equal_trees(teacher.state_dict(), before)
    for parameter in teacher.parameters():
        assert parameter.grad is None


@pytest.mark.slow
def test_the_whole_step_runs_on_meta():
    """Nothing waits for the device."""
    config = Config(
        model=ModelConfig(name="resnet20"),
        train=TRAIN,
        augment=AugmentConfig(cutmix_alpha=1.0),
    )
    meta = torch.device("meta")
    with meta:
        state = build_state(config, 10, meta)
        resnet32 = MODELS["resnet32"](num_classes=10)
    batch = make_batch(4, image=32, device="meta")
    rule = build_update_rule(config, meta, teacher=as_teacher(resnet32))

    counts, norm = train_step(
        NoSync(state.model),
        state,
        [batch, batch],
        0.1,
        rule,
        NonFinite(state.model, 0),
    )

    assert counts.num.device.type == "meta"
    assert norm.device.type == "meta"
    for key in state.state_dict():
        assert "teacher" not in key


def distilled(digits, folder, teacher, world_size=1, entry=None):
    """Six steps with a teacher: the exit codes and what was printed."""
    arguments = small_run(
        data__data_dir=digits,
        output_dir=folder / "run",
        train__teacher=teacher,
        train__distillation_temperature=2,
        train__epochs=0.5,
        train__ema_decay=0.9,
        train__grad_accum_steps=2,
        schedule__warmup_epochs=0,
        augment__mixup_alpha=0.2,
        checkpoint__interval_steps=3,
    )
    folder.mkdir(exist_ok=True)
    output = folder / "printed"
    if entry is None:
        entry = in_double(cli.main)
    codes = run_app(world_size, ["train", *arguments], str(output), entry)
    return codes, output.read_text()


def weights_of(folder):
    content = last_checkpoint(folder / "run")
    assert content["step"] == 6
    return content


def terminated_at_step_3(arguments):
    """The command line's main, which gets a SIGTERM during its fourth step."""
    from resnet_dist import engine

    real = engine.train_step

    def train_step(model, state, *rest):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, state, *rest)

    engine.train_step = train_step
    return in_double(cli.main)(arguments)


@pytest.mark.slow
def test_runs_resume_exactly_and_do_not_depend_on_the_ranks(digits, checkpoint, tmp_path):
    """A resume with another teacher is refused; the same file at another place is the same one."""
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    ranks = tmp_path / "ranks"

    # Without interruption.
    codes, printed = distilled(digits, whole, checkpoint)
    assert codes == [0], printed
    assert re.search(r"teacher: resnet20 of \S+\.pt \(sha256 [0-9a-f]{12}\)", printed), printed
    expected = weights_of(whole)

    # Stopped, and resumed with the right teacher alone.
    codes, printed = distilled(digits, parts, checkpoint, entry=terminated_at_step_3)
    assert codes == [143], printed

    other_teacher = whole / "run" / "checkpoints" / "last.pt"
    codes, printed = distilled(digits, parts, other_teacher)
    assert codes == [2], printed
    assert "train.teacher_sha256 was" in printed, printed

    same_teacher = tmp_path / "moved.pt"
    shutil.copyfile(checkpoint, same_teacher)
    codes, printed = distilled(digits, parts, same_teacher)
    assert codes == [0], printed
    assert re.search("; step [1-5], from ", printed), printed
    resumed = weights_of(parts)
    for key in ("model", "ema", "optimizer", "best_top1"):
        assert equal_trees(expected[key], resumed[key]), key

    # On two ranks.
    codes, printed = distilled(digits, ranks, checkpoint, world_size=2)
    assert codes == [0, 0], printed
    assert printed.count("teacher: ") == 1, printed
    of_two_ranks = weights_of(ranks)
    for key in ("model", "ema"):
        torch.testing.assert_close(of_two_ranks[key], expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_missing_teacher_stops_every_rank(digits, tmp_path):
    codes, printed = distilled(
        digits,
        tmp_path,
        "nowhere.pt",
        world_size=2,
        entry=cli.main,
    )
    assert codes == [2, 2]
    assert printed.count("error") == 1
    assert "train.teacher is 'nowhere.pt', which does" in printed


@pytest.mark.slow
def test_teachers_that_do_not_fit(checkpoint, tmp_path):
    """Every message names the setting, and what to do."""
    of_five_classes = str(tmp_path / "five.pth")
    network = MODELS["resnet20"](num_classes=5)
    torch.save(network.state_dict(), of_five_classes)
    names = [str(digit) for digit in range(10)]

    def load(teacher, teacher_model="", names=names):
        train = replace(TRAIN, teacher=teacher, teacher_model=teacher_model)
        data = DataConfig(mean=(0.5, 0.5, 0.4), std=(0.5, 0.5, 0.5))
        config = Config(train=train, data=data)
        return load_teacher(config, names, OneProcess())

    assert load("") is None

    # Pairs of train.teacher and train.teacher_model.
    refused = {
        "which has 5 classes, and the data has 10": (of_five_classes, "resnet20"),
        "does not say which network": (of_five_classes, ""),
        "train.teacher is .* not all tensors fit resnet32": (of_five_classes, "resnet32"),
        "leave train.teacher_model empty": (checkpoint, "resnet56"),
        "torchvision has no such weights": ("torchvision:resnet50:V9", ""),
    }
    for message, (teacher, teacher_model) in refused.items():
        with pytest.raises(ValueError, match=message):
            load(teacher, teacher_model)

    fitting = load(of_five_classes, "resnet20", names[:5])
    assert fitting.warnings == ()

    one_other_name = ["x", *names[1:]]
    teacher = load(checkpoint, names=one_other_name)
    assert not teacher.network.training
    first, second = teacher.warnings
    assert "data.mean (0.5, 0.5, 0.5)" in first
    assert "other names" in second
