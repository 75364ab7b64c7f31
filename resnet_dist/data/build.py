"""Build this rank's loaders from the config."""

import os

from resnet_dist.addresses import is_url
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.pixels.cache_fill import build_train_cache
from resnet_dist.data.pixels.decoding import LoaderSettings
from resnet_dist.data.pixels.kept_batches import KeptBatches, fits
from resnet_dist.data.pixels.loader import DaliTrainLoader, DaliValLoader
from resnet_dist.data.pixels.synthetic import SyntheticTrainLoader, SyntheticValLoader
from resnet_dist.data.sampling import augment
from resnet_dist.data.sampling.order import BatchLayout
from resnet_dist.data.sources.digits import write_digits
from resnet_dist.data.sources.index import Index, check_same_classes
from resnet_dist.data.sources.scan import build_index
from resnet_dist.data.sources.val_index import build_val_index
from resnet_dist.data.types import TrainLoader, ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import build_precision

_MOST_GPU_THREADS = 8
"""More threads hardly help a decoder whose work is on the GPU."""


def build_loaders(
    config: Config, runtime: Runtime, *, cached: bool = False
) -> tuple[TrainLoader, ValLoader]:
    """Build this rank's loaders of both splits. Call it on every rank.

    Args:
        config: the config of the run.
        runtime: this rank.
        cached: keep decoded images in memory, as `data.train_cache` and `data.val_cache` say.

    Raises:
        ValueError: on every rank, when the data folder cannot be used or its two splits have
            different classes.
    """
    train_loader = build_train_loader(config, runtime, cached=cached)
    val_loader = build_val_loader(config, runtime, cached=cached)
    check_same_classes(train_loader.class_names, val_loader.class_names)
    return train_loader, val_loader


def build_train_loader(config: Config, runtime: Runtime, *, cached: bool = False) -> TrainLoader:
    """Build this rank's loader of the training set. Call it on every rank.

    Batches are on the runtime's device, in the precision of `train.precision`. Broken files are
    recorded in `quarantine.jsonl` in `output_dir`.

    Args:
        config: the config of the run.
        runtime: this rank.
        cached: keep decoded images in memory, as `data.train_cache` says.

    Raises:
        ValueError: on every rank, when the data folder cannot be used or holds fewer images than
            one global batch.
    """
    data = config.data
    layout = BatchLayout(
        config.train.global_batch_size,
        config.train.grad_accum_steps,
        runtime.rank,
        runtime.world_size,
    )
    settings = _loader_settings(config, runtime)
    if data.kind == "synthetic":
        return SyntheticTrainLoader(
            data, seed=config.seed, layout=layout, device=settings.device, dtype=settings.dtype
        )
    index = build_train_index(data, runtime)
    cache = None
    remarks = []
    if cached and data.train_cache != "off":
        slots = augment.num_slots(config.augment)
        cache, remark = build_train_cache(index, data, settings, runtime, slots)
        remarks.append(remark)
    loader = DaliTrainLoader(
        index,
        data,
        config.augment,
        seed=config.seed,
        layout=layout,
        settings=settings,
        cache=cache,
    )
    loader.new_remarks += remarks
    return loader


def build_val_loader(
    config: Config, runtime: Runtime, *, index: Index | None = None, cached: bool = False
) -> ValLoader:
    """Build this rank's loader of the validation set, like `build_train_loader`.

    Args:
        config: the config of the run.
        runtime: this rank.
        index: the images to load in place of the validation set.
        cached: keep decoded images in memory, as `data.val_cache` says.
    """
    data = config.data
    settings = _loader_settings(config, runtime)
    if data.kind == "synthetic" and index is None:
        return SyntheticValLoader(
            data,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=settings.device,
            dtype=settings.dtype,
        )
    if index is None:
        index = _build_val_index(data, runtime)
    kept = None
    remarks = []
    if cached and data.val_cache != "off":
        share = -(-len(index) // runtime.world_size)
        problem = fits(data, share, runtime.local_world_size)
        if problem is None:
            kept = KeptBatches()
        else:
            remarks.append(f"validation cache: off, since {problem}")
    loader = DaliValLoader(
        index,
        data,
        rank=runtime.rank,
        world_size=runtime.world_size,
        settings=settings,
        kept=kept,
    )
    loader.new_remarks += remarks
    return loader


def _loader_settings(config: Config, runtime: Runtime) -> LoaderSettings:
    """Where and how the loaders of this rank work."""
    return LoaderSettings(
        device=runtime.device,
        dtype=build_precision(config.train, runtime.device).dtype,
        threads=_num_threads(config.data, runtime),
        output_dir=config.output_dir,
        decoder=config.decoder,
    )


def build_train_index(data: DataConfig, runtime: Runtime) -> Index:
    """The training images. Raises ValueError on every rank if the data folder cannot be used."""
    return _build_index(data, runtime, "train", data.exclude)


def _build_index(data: DataConfig, runtime: Runtime, split: str, exclude: str = "") -> Index:
    """The images of a split without those listed in the file `exclude`.

    The embedded digits are written to `data_dir` by the main process first.
    """
    if data.kind == "digits":
        if is_url(data.data_dir):
            raise ValueError(
                f"data.data_dir is {data.data_dir!r}: the digits of data.kind digits are written "
                f"to a folder on a disk; name one"
            )
        runtime.long_on_main(lambda: write_digits(data.data_dir))
    return build_index(data.data_dir, split, runtime, exclude, data.rescan)


def _build_val_index(data: DataConfig, runtime: Runtime) -> Index:
    """The images of the validation set, which may be in parquet files."""
    if data.kind == "digits":
        return _build_index(data, runtime, "val")
    return build_val_index(data.data_dir, "val", runtime, data.rescan)


def _num_threads(data: DataConfig, runtime: Runtime) -> int:
    """Number of decoding threads: `data.threads`, or its default for the device."""
    if data.threads:
        return data.threads
    num_cores = len(os.sched_getaffinity(0))
    share = max(1, num_cores // runtime.local_world_size)
    if runtime.device.type == "cuda":
        return min(share, _MOST_GPU_THREADS)
    return share
