"""The state of a run from its config: network, optimizer, gradient scaler and average."""

import warnings

import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint import TrainState
from resnet_dist.config import Config
from resnet_dist.ema import Ema
from resnet_dist.models.build import build_model
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.models.weights import freeze
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import build_precision
from resnet_dist.rng import derive_seed


def build_state(config: Config, num_classes: int, device: torch.device) -> TrainState:
    """Build the state at step 0. The initial weights are equal on every rank and device.

    Args:
        config: The config of the run.
        num_classes: Number of logits.
        device: The device of this rank.
    """
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = build_model(config.model, num_classes)
    if config.model.sync_batch_norm:
        model = convert_sync_batch_norm(model)
    freeze(model, config.optim.unfreeze_from)
    model = model.to(device)
    model = model.to(memory_format=torch.channels_last)

    train = config.train
    optimizer = build_optimizer(config.optim, model)
    precision = build_precision(train, device)
    ema = None
    if train.ema_decay:
        ema = Ema(model, train.ema_decay)
    return TrainState(
        model=model,
        optimizer=optimizer,
        scaler=precision.gradient_scaler(),
        ema=ema,
    )


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """Wrap the network in DistributedDataParallel.

    Each rank keeps its own buffers: SyncBatchNorm computes equal ones on every rank.
    """
    device_ids = None
    if device.type == "cuda":
        device_ids = [device.index]
    with warnings.catch_warnings():
        # Newer versions of torch want another name for this option, which older ones lack.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=device_ids,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
