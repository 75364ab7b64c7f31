"""GPU memory and speed in the log, the energy counter, and the end of a rank without memory."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dist_utils import run_app

from resnet_dist import cli, engine
from resnet_dist.commands.energy import EnergyMeter
from resnet_dist.config import AugmentConfig, Config, TrainConfig
from resnet_dist.resources import host_memory, out_of_memory
from resnet_dist.resources.gpu_usage import GpuMemory, gpu_figures, read_gpu_memory
from resnet_dist.resources.out_of_memory import MemoryFacts, most_images
from resnet_dist.resources.step_memory import BatchMemory, StepMemory

GIB = 2**30
SMALL = [
    "--config",
    "configs/quickstart.yaml",
    "--data.train_crop_size",
    "8",
    "--train.global_batch_size",
    "120",
    "--train.epochs",
    "0.4",
    "--schedule.warmup_epochs",
    "0",
    "--log.interval_steps",
    "1",
    "--log.wandb",
    "disabled",
    "--data.threads",
    "1",
    "--distributed.threads",
    "1",
]


def test_figures_of_a_gpu():
    assert read_gpu_memory(torch.device("cpu")) is None
    assert gpu_figures(None, 4000.0, 8) == {}
    assert gpu_figures(GpuMemory(3 * GIB, 11 * GIB), 4000.0, 8) == {
        "gpu/images_per_second": 500.0,
        "gpu/memory_gib": 3.0,
        "gpu/peak_memory_gib": 11.0,
    }


@pytest.mark.slow
def test_out_of_memory_on_one_of_two_ranks_ends_both(digits, tmp_path):
    """The log line of a GPU comes before; then one sentence, and exit code 2 on both."""

    def entry(arguments):
        real = engine.train_step
        engine.read_gpu_memory = lambda device: GpuMemory(3 * GIB, 11 * GIB)
        # A batch of 60 takes 0.02 GiB; all that the process has is less.
        host_memory._free_in_control_groups = lambda: [16 * 2**20]

        def train_step(model, state, *rest):
            if os.environ["RANK"] == "1" and state.step == 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(model, state, *rest)

        engine.train_step = train_step
        return cli.main(arguments)

    output = tmp_path / "printed"
    arguments = ["train", *SMALL, "--data.data_dir", digits, "--output_dir", str(tmp_path / "run")]
    codes = run_app(2, arguments, str(output), entry)
    printed = output.read_text()
    assert codes == [2, 2], printed
    assert ", 3.0 GiB (peak 11.0)" in printed
    assert "per GPU" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("error"))
    for words in (
        "(rank 1): rank 1 is out of GPU memory at step 3",
        "with a local batch of 60 images: about ",
        "Set train.grad_accum_steps ",
        "or lower train.global_batch_size to ",
    ):
        assert words in line


def test_what_would_fit():
    def need_of_1000_images(step):
        """A GiB of weights, and `step` GiB that grow with the images."""
        parts = StepMemory(1000, weights=GIB, optimizer=0, average=0, step=step * GIB)
        return BatchMemory(parts, 1000, step * GIB / 1000)

    facts = MemoryFacts(need_of_1000_images(100), peak=40 * GIB, capacity=80 * GIB)
    assert most_images(facts) == int((0.88 * 80 - 1) * 10)
    # More was allocated than was computed, so that it is scaled.
    facts = MemoryFacts(need_of_1000_images(19), peak=40 * GIB, capacity=24 * GIB)
    assert most_images(facts) == int((0.88 * 24 / 2 - 1) / 19 * 1000)
    assert most_images(replace(facts, capacity=GIB)) == 0
    # What did not fit never fits.
    assert most_images(replace(facts, peak=0, capacity=80 * GIB)) == 999


def test_ways_out_fit_the_batch():
    config = Config(train=TrainConfig(global_batch_size=1024, grad_accum_steps=2))
    ways = out_of_memory._ways_out(config, 2, 100)
    assert ways[0] == "Set train.grad_accum_steps 8, which makes local batches of 64"
    assert ways[1] == "or lower train.global_batch_size to 400 or less"
    odd = replace(config, train=TrainConfig(global_batch_size=30))
    assert "grad_accum_steps 3," in out_of_memory._ways_out(odd, 2, 6)[0]
    mixed = replace(odd, augment=AugmentConfig(mixup_alpha=0.2))
    assert out_of_memory._ways_out(mixed, 2, 6)[0].startswith("Lower train.global_batch_size to 12")
    assert out_of_memory._ways_out(config, 2, 0) == ["Take a smaller network or smaller images"]


def test_an_evaluation_without_memory():
    runtime = SimpleNamespace(
        device=torch.device("cpu"),
        rank=3,
        local_world_size=1,
        watchdog=SimpleNamespace(step=70, phase="val"),
    )
    text = str(out_of_memory.out_of_memory_error(Config(), runtime))
    assert "rank 3 is out of GPU memory at step 70" in text
    assert "batches of 128 images: lower data.val_batch_size" in text


def test_energy_of_a_gpu(monkeypatch):
    assert "CPU" in EnergyMeter(torch.device("cpu")).problem
    asked = []

    class NVMLError(Exception):
        pass

    class FakeNvml(SimpleNamespace):
        def nvmlDeviceGetHandleByUUID(self, uuid):
            asked.append(uuid)
            return "handle"

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):
            assert handle == "handle"
            if self.broken:
                raise NVMLError("Not Supported")
            return 2500

    nvml = FakeNvml(NVMLError=NVMLError, nvmlInit=lambda: None, broken=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    properties = SimpleNamespace(uuid="1234-56")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 1)
    meter = EnergyMeter(gpu)
    assert asked == ["GPU-1234-56"]
    assert meter.problem == ""
    assert meter.joules() == 2.5
    nvml.broken = True
    meter = EnergyMeter(gpu)
    assert meter.problem == "NVML: Not Supported"
    assert meter.joules() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "resnet-dist[gpu]" in EnergyMeter(gpu).problem
