"""From the data section of the config to this rank's two loaders."""

import os

import torch

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.pixels.loader import DaliTrainLoader, DaliValLoader
from resnet_dist.data.pixels.synthetic import SyntheticTrainLoader, SyntheticValLoader
from resnet_dist.data.sources.digits import write_digits
from resnet_dist.data.sources.index import Index
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.types import TrainLoader, ValLoader
from resnet_dist.distributed import Runtime


def build_train_loader(
    config: DataConfig,
    runtime: Runtime,
    *,
    seed: int,
    global_batch_size: int,
    grad_accum_steps: int,
    dtype: torch.dtype,
    output_dir: str,
    augment: AugmentConfig | None = None,
) -> TrainLoader:
    """This rank's share of the training set; call it on every rank.

    Batches are of `dtype` on the runtime's device; `output_dir` takes quarantine.jsonl. Raises
    ValueError on every rank when the data folder is not as it must be, or holds fewer images than
    one global batch.
    """
    if config.kind == "synthetic":
        return SyntheticTrainLoader(
            config,
            runtime,
            seed=seed,
            dtype=dtype,
            global_batch_size=global_batch_size,
            grad_accum_steps=grad_accum_steps,
        )
    return DaliTrainLoader(
        _index(config, runtime, "train", config.exclude),
        config,
        augment or AugmentConfig(),
        seed=seed,
        global_batch_size=global_batch_size,
        grad_accum_steps=grad_accum_steps,
        rank=runtime.rank,
        world_size=runtime.world_size,
        dtype=dtype,
        device=runtime.device,
        threads=_threads(config, runtime),
        output_dir=output_dir,
    )


def build_val_loader(
    config: DataConfig,
    runtime: Runtime,
    *,
    dtype: torch.dtype,
    output_dir: str,
    index: Index | None = None,
) -> ValLoader:
    """This rank's share of the validation set, or of the images of `index`, as
    `build_train_loader`.
    """
    if config.kind == "synthetic" and not index:
        return SyntheticValLoader(config, runtime, dtype=dtype)
    return DaliValLoader(
        index or _index(config, runtime, "val"),
        config,
        rank=runtime.rank,
        world_size=runtime.world_size,
        dtype=dtype,
        device=runtime.device,
        threads=_threads(config, runtime),
        output_dir=output_dir,
    )


def _index(config: DataConfig, runtime: Runtime, split: str, exclude: str = "") -> Index:
    """The images of a split, but those of the list `exclude`; the digits are written by one process
    first.
    """
    if config.kind == "digits":
        runtime.on_main(lambda: write_digits(config.data_dir))
    return build_index(config.data_dir, split, runtime, exclude)


def _threads(config: DataConfig, runtime: Runtime) -> int:
    """Threads of the loader: as the config says; else what feeds a GPU's decoder, or a fair share
    of the cores.
    """
    share = max(1, len(os.sched_getaffinity(0)) // runtime.local_world_size)
    return config.threads or (4 if runtime.device.type == "cuda" else share)
