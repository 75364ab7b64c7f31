"""Every network beside the ResNet family: its size, and that it trains, resumes, averages and evaluates.

All images are real scans, of the embedded digits, enlarged to a side at which the network still has something to see.
"""

import copy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from dist_utils import equal_trees, run_app, run_ranks
from test_engine import Alone, ListLoader, NoSync
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnet_dist import checkpoint, engine
from resnet_dist.checkpoint import TrainState
from resnet_dist.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.data.digits import load_digits
from resnet_dist.data.types import Batch
from resnet_dist.engine import NonFinite, evaluate, train_step
from resnet_dist.models.build import build_model
from resnet_dist.models.sync_batch_norm import SyncBatchNorm, convert_sync_batch_norm
from resnet_dist.models.zoo import ZOO, check_image_size
from resnet_dist.optim import build_optimizer
from resnet_dist.run import build_plan, build_state, wrap_ddp

CPU = torch.device("cpu")
# Parameters for 1000 classes that torchvision does not publish. LeNet-5: LeCun et al. 1998, section II.B, with three
# maps for one in C1 and a linear layer of 1000 at the end. Densenet-264: counted layer by layer below. The rest: timm.
COUNTS = {"lenet5": 456 + 12 + 1516 + 32 + 48120 + 10164 + 85 * 1000, "inception_v4": 42679816,
          "inception_resnet_v2": 55843464}
FILE_LIMIT = 16e6
"""parameters up to which the state goes through a file; a larger one is copied as it is before it is written"""


def digits(size, count):
    """The first digits, 0 to `count` - 1, as a batch of images [count, 3, size, size]."""
    pixels, labels = load_digits()
    images = torch.from_numpy(pixels[:count].astype(np.float32))[:, None] / 8 - 1
    images = F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    return Batch(images.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels[:count]),
                 np.arange(count))


def settings(name):
    """Side of the images, how many, learning rate and largest gradient (0 = as it is) that overfit in three steps."""
    own = {"lenet5": (32, 8, 1.0, 0.0), "alexnet": (63, 8, 1.0, 1.0), "googlenet": (64, 8, 0.03, 0.0),
           "inception_v3": (299, 2, 0.01, 0.0), "inception_v4": (75, 4, 0.02, 0.0),
           "inception_resnet_v2": (75, 4, 0.02, 0.0)}
    family = {"vgg": (32, 4, 0.3 if name.endswith("_bn") else 1.0, 1.0), "dense": (32, 8, 0.03, 0.0),
              "effic": (64, 4, 0.3, 1.0)}
    return own[name] if name in own else next(value for key, value in family.items() if name.startswith(key))


@pytest.fixture
def narrow(monkeypatch):
    """The two hidden layers of 4096 in VGG and AlexNet with 64, nine tenths of all weights; and nobody waits for a
    disk."""
    class Linear(nn.Linear):
        def __init__(self, inputs, outputs, *args, **options):
            width = {4096: 64}
            super().__init__(width.get(inputs, inputs), width.get(outputs, outputs), *args, **options)

    monkeypatch.setattr(nn, "Linear", Linear)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("name", ZOO)
def test_trains_resumes_averages_and_evaluates(name, narrow, tmp_path):
    """Three updates through the engine's step, in bf16, the third also from the saved state: the loss falls, and
    weights, momentum, average and statistics are the same, bit for bit."""
    size, count, lr, clip = settings(name)
    config = Config(model=ModelConfig(name=name), optim=OptimConfig(weight_decay=0.0),
                    train=TrainConfig(precision="bf16", ema_decay=0.9, clip_grad_norm=clip))
    state = build_state(config, 10, CPU)
    resumed, plan, batch = copy.deepcopy(state), build_plan(config, 10), digits(size, count)
    assert all(isinstance(m, SyncBatchNorm) for m in state.model.modules() if isinstance(m, _BatchNorm))

    def step(state):
        torch.manual_seed(1)                             # the same masks each time, so that they do not hide the fall
        counts, _ = train_step(NoSync(state.model.train()), state, [batch], lr, plan, NonFinite(state.model, 0))
        return counts.result()["loss"]

    losses = [step(state), step(state)]
    saved = checkpoint._copy_to_cpu({"format": checkpoint.FORMAT, **state.state_dict()})
    if sum(p.numel() for p in state.model.parameters()) < FILE_LIMIT:
        checkpoint.write_checkpoint(tmp_path / "a.pt", saved)
        saved = checkpoint.unpack_checkpoint(checkpoint.read_checkpoint(tmp_path / "a.pt"), "a.pt")
    losses.append(step(state))
    resumed.load_state_dict(saved)
    assert step(resumed) == losses[2]
    assert equal_trees(state.state_dict(), resumed.state_dict())
    print(name, losses)
    assert losses[2] < 0.9 * losses[0] and losses[0] < 10
    before = copy.deepcopy(state.model.state_dict())
    for model in (state.model, state.ema.model):
        result = evaluate(model, ListLoader([batch], count), Alone(), "bf16").result()
        assert result["num"] == count and np.isfinite(result["loss"])
    assert equal_trees(before, state.model.state_dict())


@pytest.mark.parametrize("name", ZOO)
def test_parameters_figures_and_conversion(name):
    """On meta, with 1000 classes. Conversion to torch's SyncBatchNorm leaves no other norm, and the same keys."""
    entry = ZOO[name]
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), 1000)
    count = sum(p.numel() for p in model.parameters())
    if entry.source.startswith("torchvision"):
        enum, weights = entry.source.split()[1].split(".")
        weights = torchvision.models.get_model_weights(name)[weights]
        published = weights.meta["_metrics"]["ImageNet-1K"]
        assert enum == type(weights).__name__
        assert count == weights.meta["num_params"]
        assert (entry.top1, entry.top5) == (published["acc@1"], published["acc@5"])
        assert [entry.size] == weights.transforms().crop_size
    elif name == "densenet264":
        assert count == densenet_parameters(32, (6, 12, 64, 48), 64)
    else:
        assert count == COUNTS[name]
    keys, norms = list(model.state_dict()), sum(isinstance(m, _BatchNorm) for m in model.modules())
    model = convert_sync_batch_norm(model, device_type="cuda")
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == norms
