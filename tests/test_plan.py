"""`resnet-dist plan`: its memory against what was measured, and its steps by hand."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_dist import cli
from resnet_dist.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.forward import all_logits
from resnet_dist.models.build import MODELS, build_model
from resnet_dist.resources.step_cost import count_step
from resnet_dist.resources.step_memory import _Storages, measure_batch_memory, measure_step_memory
from resnet_dist.teacher import find_teacher

GIB = 2**30


def test_storages_are_counted_from_their_operation_until_they_are_freed():
    with FakeTensorMode():
        known = torch.empty(1000)
        with _Storages() as storages:
            storages.ignore(known)
            first = known + 1
            view = first.view(10, 100)
            second = view * 2
            del first, view
            third = second + known.view(10, 100)
            del second
            fourth = third.sum()
    # At most two of the large ones at the same time, each of 4,000 bytes.
    assert storages.peak == 8000
    assert fourth.shape == ()


@pytest.mark.slow
def test_the_plan_of_the_quickstart(capsys):
    words = ["plan", "--json", "--config", "quickstart", "--data.train_crop_size", "32"]
    words += ["--gpus", "2", "--hours", "0.1", "--memory_gib", "1"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["local_batch_size"] == 32
    assert found["steps_per_epoch"] == 22
    assert found["total_steps"] == 308
    assert found["images_per_second"] == pytest.approx(308 * 64 / 360)
    memory = found["memory"]
    assert memory["num_parameters"] == 269_722
    assert memory["optimizer"] == 4 * 269_722
    changes = {"data.train_crop_size": 32, "train.precision": "bf16", "model.num_classes": 10}
    config = Config.from_yaml("quickstart", changes=changes)
    # Twice the images take twice the memory, but for the gradients.
    assert 1.8 < measure_step_memory(config, 64).step / memory["step"] < 2.01
    at_the_limit = measure_step_memory(config, found["most_local_batch"])
    assert 0.97 * GIB < at_the_limit.total < 1.02 * GIB


def test_what_does_not_fit_together_is_refused(capsys):
    problems = {
        ("--gpus", "3"): "does not divide by 3 ranks",
        ("--images", "10"): "an epoch must have at least one step",
        ("--data.kind", "folder", "--data.data_dir", "/nowhere"): "/nowhere",
    }
    for words, sentence in problems.items():
        assert cli.main(["plan", "--config", "quickstart", *words]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "--gpus", "0"])


@pytest.mark.slow
def test_the_memory_is_near_that_of_an_h100():
    """ResNet-50, bf16, eager, one GPU, as docs/gpu.md has it: 10.9 GiB with 256 images, 43.0 GiB
    with 1,024.
    """
    model = ModelConfig(name="resnet50", num_classes=1000)
    train = TrainConfig(precision="bf16")
    config = Config(model=model, train=train)
    step = measure_step_memory(config, 256)
    assert step.total / GIB == pytest.approx(10.9, rel=0.05)
    memory = measure_batch_memory(config, 256, step)
    assert memory.most_images(43.0 * GIB) == pytest.approx(1024, rel=0.05)


def test_the_memory_of_the_state():
    """SGD has one value for each weight, LAMB two; an average has the buffers, too."""
    model = ModelConfig(name="resnet18", num_classes=10)
    data = DataConfig(train_crop_size=32)
    averaged = TrainConfig(precision="fp32", ema_decay=0.9)
    lamb = Config(model=model, data=data, optim=OptimConfig("lamb"), train=averaged)
    memory = measure_step_memory(lamb, 2)
    assert memory.optimizer == 2 * 4 * memory.num_parameters
    assert memory.average == memory.weights > 4 * memory.num_parameters


@pytest.mark.slow
def test_a_teacher_takes_memory_and_arithmetic(capsys, tmp_path):
    """Its weights, and its forward pass, which keeps nothing for a backward pass: a third of the
    arithmetic of a network that is trained.
    """
    file = tmp_path / "teacher.pth"
    torch.save(MODELS["resnet20"](num_classes=10).state_dict(), file)
    words = ["plan", "--json", "--config", "quickstart", "--train.teacher", str(file)]
    assert cli.main([*words, "--train.teacher_model", "resnet20"]) == 0
    taught = json.loads(capsys.readouterr().out)
    # The teacher is the same network.
    changes = {"train.precision": "bf16", "model.num_classes": 10}
    config = Config.from_yaml("quickstart", changes=changes)
    alone = measure_step_memory(config, 64)
    assert taught["memory"]["teacher"] == alone.weights
    # What the teacher computes is gone before the network has as much.
    assert taught["memory"]["step"] == pytest.approx(alone.step, rel=0.02)
    flops = count_step(config).flops_per_image
    assert taught["flops_per_image"] == pytest.approx(4 / 3 * flops, rel=0.02)
    assert cli.main(["plan", "--config", "quickstart", "--train.teacher", "nowhere.pth"]) == 2
    assert "does not exist" in capsys.readouterr().err
    published = TrainConfig(teacher="torchvision:resnet152:IMAGENET1K_V2")
    assert find_teacher(Config(train=published)) == ModelConfig("resnet152", num_classes=1000)
    assert find_teacher(Config()) is None


NETWORKS = {
    "resnet18": (32, 160),
    "resnet50": (12, 160),
    "vgg11_bn": (16, 128),
    "googlenet": (24, 160),
    "preresnet110": (64, 32),
}


def measured_peak(model, local_batch_size, side):
    """The largest sum of PyTorch's allocations during a step, in bytes, by its profiler."""

    def step(num_images):
        images = torch.rand(num_images, 3, side, side)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(num_images, dtype=torch.int64)
        losses = [F.cross_entropy(logits, labels) for logits in all_logits(model(images))]
        sum(losses).backward()
        model.zero_grad(set_to_none=True)

    # The libraries prepare their kernels in the first step.
    step(2)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(local_batch_size)
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    events.sort(key=lambda event: event.start_ns())
    assert len(events) > 100
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.long
def test_the_memory_is_near_that_of_five_networks_on_the_cpu():
    """Within 10 %, weights and state of the optimizer included."""
    wrong = []
    for name, (local_batch_size, side) in NETWORKS.items():
        config = Config(
            model=ModelConfig(name=name, num_classes=1000, sync_batch_norm=False),
            data=DataConfig(train_crop_size=side),
            train=TrainConfig(precision="fp32"),
        )
        planned = measure_step_memory(config, local_batch_size)
        model = build_model(config.model, 1000).to(memory_format=torch.channels_last).train()
        peak = measured_peak(model, local_batch_size, side)
        measured = planned.weights + planned.optimizer + peak
        ratio = planned.total / measured
        print(f"{name}: planned {planned.total / GIB:.3f} GiB, measured {measured / GIB:.3f}")
        if abs(ratio - 1) > 0.1:
            wrong.append(f"{name}: {ratio:.3f}")
    assert wrong == []
