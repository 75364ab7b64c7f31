"""Checkpoints of a small network, for tests to write, damage and read."""

from pathlib import Path

import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint import Saver, TrainState
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
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 5, 5))
    return TrainState(
        model,
        build_optimizer(OptimConfig(), model),
        torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
        Ema(model, 0.9),
    )


def make_saver(folder, keep=3):
    warnings = []
    return Saver(Path(folder), keep, FACTS, warnings.append, is_main=True), warnings


def save_steps(folder, steps, keep=3, best=()):
    saver, warnings = make_saver(folder, keep)
    state = make_state()
    for step in steps:
        state.step = step
        if step in best:
            state.best_step = step
        with torch.no_grad():
            next(state.model.parameters()).fill_(float(step))
        saver.save(state)
    saver.wait()
    return saver, warnings
