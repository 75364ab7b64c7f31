"""torch.compile of the network: what is compiled, how often, and that ranks agree on it.

The backend is not inductor but one that runs the traced graph, except in the long tests: tracing,
guards, agreement and DDP's hooks are the same.
"""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from dist_utils import equal_trees, run_app, run_ranks
from test_engine import FP32, NoSync, make_batch, rule_of
from torch import nn

from resnet_dist import compilation, engine
from resnet_dist.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.compilation import (
    NetworkCompiler,
    describe_failure,
    inductor_options,
    is_compiled,
    parts_of,
    run_together,
    start_compiler,
)
from resnet_dist.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.distributed import Runtime
from resnet_dist.engine import train_step
from resnet_dist.evaluation import predict_logits
from resnet_dist.forward import train_mode
from resnet_dist.models.resnet import BasicBlock, ResNet
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import resolve_settings
from resnet_dist.state import build_state, wrap_ddp

CPU = torch.device("cpu")
TRAIN = TrainConfig(precision="fp32", compile=True)
PARTS = ["stem", "layer1", "layer2", "head"]


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """Trace the parts, but run their graphs as they are."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def runtime_of(rank=0, world_size=1, device=CPU):
    group = dist.group.WORLD if world_size > 1 else None
    return Runtime(rank, rank, world_size, world_size, device, group)


def tiny_state(train=TRAIN, **optim):
    """The state of a run with a network of two stages."""
    config = Config(model=ModelConfig(name="tiny"), train=train, optim=OptimConfig(**optim))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resnet_dist.models.build.MODELS", {"tiny": tiny_network})
        return config, build_state(config, 10, CPU)


def tiny_network(num_classes=10):
    return ResNet(BasicBlock, (1, 1), num_classes, stem="cifar", stem_channels=8, shortcut="A")


def steps(state, config, batches, lr=0.1):
    """Train on each batch (a list of micro-batches); returns the loss of each."""
    model, losses = NoSync(state.model), []
    nonfinite, rule = NonFinite(state.model, 0), rule_of(config)
    train_mode(state.model)
    for micro_batches in batches:
        counts, _ = train_step(model, state, micro_batches, lr, rule, nonfinite)
        losses.append(counts.result()["loss"])
    return losses


def test_a_compiled_network_does_what_it_does_uncompiled():
    """Parts, state-dict keys, weights after three updates with an average; nothing is compiled
    again, neither by an update nor by an evaluation.
    """
    train = replace(TRAIN, ema_decay=0.5, grad_accum_steps=2, clip_grad_norm=1.0)
    config, state = tiny_state(train)
    _, plain = tiny_state(train)
    before = copy.deepcopy(state.model.state_dict())
    compiler, problem = start_compiler(state.model, config.train, (4, 3, 16, 16), runtime_of())
    assert problem == ""
    assert list(compiler.parts) == PARTS
    assert compiler.num_graphs == 4
    assert equal_trees(dict(state.model.state_dict()), dict(before))
    assert [name for name, _ in state.model.named_modules()] == [
        name for name, _ in plain.model.named_modules()
    ]
    engine.warm_up_ddp(NoSync(state.model), (4, 3, 16, 16), FP32)
    batches = [[make_batch(4, 16, seed=2 * i), make_batch(4, 16, seed=2 * i + 1)] for i in range(3)]
    assert steps(state, config, batches) == pytest.approx(steps(plain, config, batches), rel=1e-5)
    for ours, theirs in ((state.model, plain.model), (state.ema.model, plain.ema.model)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert compiler.num_graphs == 4
    copied = copy.deepcopy(state.model)
    assert is_compiled(state.model)
    assert not is_compiled(copied)
    assert copied.parts()["stem"].method.__self__ is copied
