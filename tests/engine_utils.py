"""What the tests of training and evaluation steps need: batches, a process alone, a wrapper."""

import contextlib

import numpy as np
import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint import TrainState
from resnet_dist.config import Config, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.data.types import Batch
from resnet_dist.engine import train_step
from resnet_dist.nonfinite import NonFinite
from resnet_dist.precision import Precision
from resnet_dist.run import build_update_rule

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
CONFIG = Config(
    model=ModelConfig(name="resnet18", sync_batch_norm=False),
    train=TrainConfig(precision="fp32", label_smoothing=0.1),
    optim=OptimConfig(weight_decay=1e-4, momentum=0.9, nesterov=True),
)


class NoSync(nn.Module):
    """What the step needs of a DDP wrapper when there is one rank."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)

    def no_sync(self):
        return contextlib.nullcontext()


class ListLoader:
    """A validation loader over given batches."""

    mirrored = False

    def __init__(self, batches, num_samples):
        self.batches = batches
        self.num_samples = num_samples
        self.rounds = len(batches)

    def __iter__(self):
        return iter(self.batches)


def make_batch(size, image=64, classes=10, seed=0, device="cpu", dtype=torch.float32):
    """Normal numbers as images of `image` pixels, in channels_last, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, image, image, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (size,), generator=generator)
    return Batch(images.to(device, dtype), labels.to(device), np.arange(size))


def make_bad_batch(size, image=64):
    """A batch with an infinite pixel, whose update is not finite."""
    batch = make_batch(size, image)
    batch.images[0, 0, 0, 0] = float("inf")
    return batch


def state_of(model, optimizer, precision="fp32"):
    """The state of a training before its first step."""
    scaler = Precision(precision, CPU).gradient_scaler()
    return TrainState(model, optimizer, scaler)


def rule_of(config, device=CPU):
    return build_update_rule(config, device)


def do_step(state, micro_batches, lr, config=CONFIG, nonfinite=None):
    """One update of a network that is not wrapped; returns (counts, norm of the gradient)."""
    if nonfinite is None:
        nonfinite = NonFinite(state.model, 0)
    return train_step(NoSync(state.model), state, micro_batches, lr, rule_of(config), nonfinite)
