"""Checkpoints of a small network, for tests to write, damage and read."""

from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint import Saver, TrainState
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.checkpoints.run_folder import newest_valid
from resnet_dist.config import Config, OptimConfig, to_dict
from resnet_dist.ema import Ema
from resnet_dist.optim import build_optimizer

FACTS = {
    "config": to_dict(Config()),
    "num_samples": 100,
    "fingerprint": "f",
    "class_names": ["a", "b"],
}


def make_state(seed=0, precision="fp32"):
    """The state of a training of a small network, before its first step."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    # The first forward pass gives the lazy layer its shape.
    model(torch.zeros(2, 3, 5, 5))
    return TrainState(
        model,
        build_optimizer(OptimConfig(), model),
        torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
        Ema(model, 0.9),
    )


def make_saver(folder, keep=3):
    """A saver of the main process, and the list of the warnings that it prints."""
    warnings = []
    saver = Saver(
        Path(folder),
        keep,
        FACTS,
        warnings.append,
        is_main=True,
    )
    return saver, warnings


def save(saver, state):
    """Save, and wait until the file is written."""
    saver.save(state)
    saver.wait()


def save_steps(folder, steps, keep=3, best=()):
    """Save a checkpoint of each of the `steps`; those in `best` are the best so far.

    The first weight of the network is filled with the number of the step.
    """
    saver, warnings = make_saver(folder, keep)
    state = make_state()
    first_weight = next(state.model.parameters())
    for step in steps:
        state.step = step
        if step in best:
            state.best_step = step
        with torch.no_grad():
            first_weight.fill_(float(step))
        saver.save(state)
    saver.wait()
    return saver, warnings


def load_content(path):
    """The content of a checkpoint, which must be whole."""
    payload = read_checkpoint(path)
    return unpack_checkpoint(payload, path.name)


def load_newest(folder):
    """The state that the newest checkpoint of a folder holds; a warning fails the test."""
    state = make_state()
    newest = newest_valid(folder, pytest.fail)
    state.load_state_dict(load_content(newest))
    return state


def name_of_newest(folder):
    """The file name of the newest valid checkpoint; a warning fails the test."""
    newest = newest_valid(folder, pytest.fail)
    return newest.name
