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


def plan(capsys, *words):
    """What `resnet-dist plan` finds for the quickstart, as JSON."""
    assert cli.main(["plan", "--json", "--config", "quickstart", *words]) == 0
    return json.loads(capsys.readouterr().out)


def quickstart_on_gpu(**changes):
    """The quickstart as the plan sees it: in the precision of a GPU, with the classes of its
    data.
    """
    settings = {"train.precision": "bf16", "model.num_classes": 10}
    for name, value in changes.items():
        settings[name.replace("__", ".")] = value
    return Config.from_yaml("quickstart", changes=settings)


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
    found = plan(
        capsys,
        *("--data.train_crop_size", "32"),
        *("--gpus", "2"),
        *("--hours", "0.1"),
        *("--memory_gib", "1"),
    )
    assert found["local_batch_size"] == 32
    assert found["steps_per_epoch"] == 22
    assert found["total_steps"] == 308
    assert found["images_per_second"] == pytest.approx(308 * 64 / 360)
    memory = found["memory"]
    assert memory["num_parameters"] == 269_722
    assert memory["optimizer"] == 4 * 269_722

    # Twice the images take twice the memory, but for the gradients.
    config = quickstart_on_gpu(data__train_crop_size=32)
    with_64_images = measure_step_memory(config, 64)
    assert 1.8 < with_64_images.step / memory["step"] < 2.01
    at_the_limit = measure_step_memory(config, found["most_local_batch"])
    assert 0.97 * GIB < at_the_limit.total < 1.02 * GIB


def test_what_does_not_fit_together_is_refused(capsys):
    for words, sentence in (
        (["--gpus", "3"], "does not divide by 3 ranks"),
        (["--images", "10"], "an epoch must have at least one step"),
        (["--data.kind", "folder", "--data.data_dir", "/nowhere"], "/nowhere"),
    ):
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
    assert memory.average == memory.weights
    assert memory.weights > 4 * memory.num_parameters


@pytest.mark.slow
def test_a_teacher_takes_memory_and_arithmetic(capsys, tmp_path):
    """Its weights, and its forward pass, which keeps nothing for a backward pass: a third of the
    arithmetic of a network that is trained.
    """
    file = tmp_path / "teacher.pth"
    teacher = MODELS["resnet20"](num_classes=10)
    torch.save(teacher.state_dict(), file)
    taught = plan(
        capsys,
        *("--train.teacher", str(file)),
        *("--train.teacher_model", "resnet20"),
    )
    # The teacher is the same network.
    config = quickstart_on_gpu()
    alone = measure_step_memory(config, 64)
    assert taught["memory"]["teacher"] == alone.weights
    # What the teacher computes is gone before the network has as much.
    assert taught["memory"]["step"] == pytest.approx(alone.step, rel=0.02)
    flops = count_step(config).flops_per_image
    assert taught["flops_per_image"] == pytest.approx(4 / 3 * flops, rel=0.02)

    assert cli.main(["plan", "--config", "quickstart", "--train.teacher", "nowhere.pth"]) == 2
    assert "does not exist" in capsys.readouterr().err
    published = TrainConfig(teacher="torchvision:resnet152:IMAGENET1K_V2")
    section = find_teacher(Config(train=published))
    assert section == ModelConfig("resnet152", num_classes=1000)
    assert find_teacher(Config()) is None


# Network, images a step, side of an image.
NETWORKS = (
    ("resnet18", 32, 160),
    ("resnet50", 12, 160),
    ("vgg11_bn", 16, 128),
    ("googlenet", 24, 160),
    ("preresnet110", 64, 32),
)


def measured_peak(model, local_batch_size, side):
    """The largest sum of PyTorch's allocations during a step, in bytes, by its profiler."""

    def step(num_images):
        images = torch.rand(num_images, 3, side, side)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(num_images, dtype=torch.int64)
        logits_of_all_classifiers = all_logits(model(images))
        losses = [F.cross_entropy(logits, labels) for logits in logits_of_all_classifiers]
        sum(losses).backward()
        model.zero_grad(set_to_none=True)

    # The libraries prepare their kernels in the first step.
    step(2)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step(local_batch_size)
    events = profile.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    assert len(changes) > 100
    changes.sort(key=lambda event: event.start_ns())
    in_use = itertools.accumulate(event.nbytes() for event in changes)
    return max(in_use)


@pytest.mark.long
def test_the_memory_is_near_that_of_five_networks_on_the_cpu():
    """Within 10 %, weights and state of the optimizer included."""
    wrong = []
    for name, local_batch_size, side in NETWORKS:
        config = Config(
            model=ModelConfig(name=name, num_classes=1000, sync_batch_norm=False),
            data=DataConfig(train_crop_size=side),
            train=TrainConfig(precision="fp32"),
        )
        planned = measure_step_memory(config, local_batch_size)
        model = build_model(config.model, 1000).to(memory_format=torch.channels_last)
        model.train()
        peak = measured_peak(model, local_batch_size, side)
        measured = planned.weights + planned.optimizer + peak
        ratio = planned.total / measured
        print(f"{name}: planned {planned.total / GIB:.3f} GiB, measured {measured / GIB:.3f}")
        if abs(ratio - 1) > 0.1:
            wrong.append(f"{name}: {ratio:.3f}")
    assert wrong == []
