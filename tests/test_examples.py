"""The examples: the training in plain PyTorch has our loss curve, and the notebook runs."""

import importlib.util
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from dist_utils import logged_lines, options
from nbclient import NotebookClient

from resnet_dist import cli
from resnet_dist.data.sources.digits import write_digits

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 1
WARMUP_EPOCHS = 0.5
STEPS = 22

# Both compute the same operations in fp32, and the curves were equal to 2.3e-7, the rounding of the
# mean loss. A different rounding inside the network would grow with each update, to 0.05 here.
TOLERANCE = 1e-5


def load_minimal():
    """The example as a module: examples/ is no package."""
    spec = importlib.util.spec_from_file_location("minimal", ROOT / "examples/minimal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_losses(digits, folder):
    settings = options(
        config=ROOT / "configs/quickstart.yaml",
        data__data_dir=digits,
        output_dir=folder,
        train__epochs=EPOCHS,
        train__precision="fp32",
        model__sync_batch_norm="false",
        schedule__warmup_epochs=WARMUP_EPOCHS,
        log__interval_steps=1,
        log__wandb="disabled",
    )
    assert cli.main(["train", *settings]) == 0
    lines = logged_lines(folder)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    (top1,) = [line["val/top1"] for line in lines if "val/top1" in line]
    return np.array(losses), top1


@pytest.mark.slow
def test_minimal_has_our_loss_curve(tmp_path):
    digits = tmp_path / "digits"
    write_digits(str(digits))
    losses, top1 = our_losses(digits, tmp_path / "run")
    minimal = load_minimal()
    minimal.WARMUP_EPOCHS = WARMUP_EPOCHS
    model, others = minimal.train(digits, EPOCHS)
    assert len(losses) == len(others) == STEPS
    difference = np.abs(losses - np.array(others)).max()
    print(f"largest difference of the losses: {difference:.2g}")
    assert difference < TOLERANCE
    assert losses[-5:].mean() < losses[:5].mean() - 0.2
    assert abs(top1 - minimal.evaluate(model, digits)) < 1.0


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Every cell, in an empty folder; the fine-tuned network is better than chance (20 %)."""
    notebook = nbformat.read(ROOT / "examples/finetune.ipynb", as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    top1 = float(re.search(r"^top-1 (\S+) % of \d+ images, classes \('5'", printed, re.M)[1])
    assert top1 > 40, printed
