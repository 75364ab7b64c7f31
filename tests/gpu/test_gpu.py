"""What needs a GPU. None of these has run yet: the project has not been on a machine with one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_files import OneProcess, encode, picture, write_split

from resnet_dist.config import Config, DataConfig, TrainConfig
from resnet_dist.data.build import build_val_loader

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and this machine has none"
)


def test_the_quickstart_on_a_gpu(tmp_path):
    """NCCL, DALI's mixed decoder, torch's SyncBatchNorm, bf16."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
        "train.py",
        "--config",
        "configs/quickstart.yaml",
        "--distributed.device",
        "cuda",
        "--log.wandb",
        "disabled",
        "--output_dir",
        str(tmp_path / "run"),
        "--data.data_dir",
        str(tmp_path / "digits"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["val/top1"] >= 97


def test_evaluation_pixels_equal_the_cpus(tmp_path):
    """nvJPEG's decoder may round otherwise: on average less than one step of 1/255."""
    write_split(
        tmp_path, [encode(picture(80 + 9 * i, 150 - 7 * i, seed=i)) for i in range(12)], split="val"
    )
    data = DataConfig(
        data_dir=str(tmp_path), val_resize_size=72, val_crop_size=64, val_batch_size=8
    )
    config = Config(data=data, train=TrainConfig(precision="fp32"), output_dir=str(tmp_path))
    batches = {}
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        runtime = OneProcess()
        runtime.device = device
        loader = build_val_loader(config, runtime)
        batches[device.type] = torch.cat([batch.images.cpu() for batch in loader])
        loader.close()
    step = 1 / 255 / min(data.std)
    assert (batches["cpu"] - batches["cuda"]).abs().mean() < step
