"""`resnet-dist plan`: its memory against what was measured, and its steps by hand."""

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resnet_dist import cli
from resnet_dist.config import Config, DataConfig, ModelConfig, TrainConfig
from resnet_dist.step_memory import _Storages, measure_step_memory

GIB = 2**30


def plan(capsys, *words):
    assert cli.main(["plan", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


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


def test_the_plan_of_the_quickstart(capsys):
    found = plan(capsys, "--config", "quickstart", "--gpus", "2", "--hours", "0.1")
    assert (found["local_batch_size"], found["steps_per_epoch"], found["total_steps"]) == (
        32,
        22,
        308,
    )
    assert found["images_per_second"] == pytest.approx(308 * 64 / 360)
    memory = found["memory"]
    assert memory["num_parameters"] == 269_722
    assert memory["optimizer"] == 4 * 269_722
    # Twice the images take twice the memory, but for the gradients.
    double = plan(capsys, "--config", "quickstart", "--gpus", "1", "--memory_gib", "1")
    assert 1.8 < double["memory"]["step"] / memory["step"] < 2.01
    fitting = double["most_local_batch"]
    at_the_limit = ("--config", "quickstart", "--train.global_batch_size", str(fitting))
    total = plan(capsys, *at_the_limit)["memory"]["total"]
    assert 0.97 * GIB < total < 1.02 * GIB


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


@pytest.mark.long
def test_the_memory_is_near_that_of_an_h100():
    """ResNet-50, bf16, eager, one GPU, as docs/gpu.md has it: within 15 %."""
    config = Config(
        model=ModelConfig(name="resnet50", num_classes=1000), train=TrainConfig(precision="bf16")
    )
    for local_batch_size, measured in ((256, 10.9), (1024, 43.0)):
        found = measure_step_memory(config, local_batch_size).total / GIB
        print(f"batch {local_batch_size}: {found:.2f} GiB, measured {measured}")
        assert abs(found / measured - 1) < 0.15


# A step in a process of its own: how much memory it takes beyond what the process has already.
STEP = """
import json, re, sys
import torch
from resnet_dist.config import Config, ModelConfig, TrainConfig, OptimConfig
from resnet_dist.state import build_state
import torch.nn.functional as F
from dataclasses import replace
from resnet_dist.forward import all_logits

name, batch, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
config = Config(model=ModelConfig(name=name, num_classes=1000, sync_batch_norm=False))
config = replace(config, train=TrainConfig(precision="fp32"))

def kibibytes(key):
    status = open("/proc/self/status").read()
    return int(re.search(key + r":\\s+(\\d+)", status).group(1))

def step(model, optimizer, batch):
    images = torch.rand(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64)
    losses = [F.cross_entropy(logits, labels) for logits in all_logits(model(images))]
    sum(losses).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

state = build_state(config, 1000, torch.device("cpu"))
state.model.train()
optimizer = torch.optim.SGD(state.model.parameters(), lr=0.1, momentum=0.9)
# The libraries load and compile their kernels in the first step.
step(state.model, optimizer, 2)
before = kibibytes("VmRSS")
step(state.model, optimizer, batch)
print(json.dumps((kibibytes("VmHWM") - before) * 1024))
"""

NETWORKS = {
    "resnet18": (160, 160),
    "resnet50": (48, 160),
    "vgg11_bn": (64, 128),
    "mobilenet_v2": (64, 160),
    "preresnet110": (256, 32),
}


@pytest.mark.long
def test_the_memory_is_near_that_of_five_networks_on_the_cpu():
    """Within 10 % of the peak of the process, weights and state of the optimizer included."""
    wrong = []
    for name, (batch, side) in NETWORKS.items():
        command = [sys.executable, "-c", STEP, name, str(batch), str(side)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stderr
        config = Config(
            model=ModelConfig(name=name, num_classes=1000),
            data=DataConfig(train_crop_size=side),
            train=TrainConfig(precision="fp32"),
        )
        planned = measure_step_memory(config, batch)
        measured = planned.weights + planned.optimizer + json.loads(done.stdout.splitlines()[-1])
        ratio = planned.total / measured
        print(f"{name}: planned {planned.total / GIB:.3f} GiB, measured {measured / GIB:.3f}")
        if abs(ratio - 1) > 0.1:
            wrong.append(f"{name}: {ratio:.3f}")
    assert wrong == []
