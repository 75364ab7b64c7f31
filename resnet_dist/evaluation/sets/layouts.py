"""Where the images of an evaluation set are, and its loader."""

import os
from dataclasses import replace

from resnet_dist.config import Config
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.sources.index import Index
from resnet_dist.data.sources.parquet import find_parquet_files
from resnet_dist.data.sources.val_index import build_val_index
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed.runtime import Runtime

# Names of the splits of a data set. A folder with one of these is no folder of classes.
_SPLITS = ("train", "val", "valid", "validation", "test")


def find_split(folder: str) -> tuple[str, str]:
    """Find the images of `--data`.

    Args:
        folder: A data folder, whose images for evaluation are in val/; or a folder of class
            folders, tar shards or parquet files itself, as ImageNet-V2, -A and -R come; or a clone
            of a data set of the Hugging Face hub.

    Returns:
        (data folder, name of the split in it).
    """
    absolute = os.path.abspath(folder)
    if os.path.isdir(os.path.join(absolute, "val")) or not os.path.isdir(absolute):
        return folder, "val"
    for split in ("val", "test"):
        if find_parquet_files(absolute, split):
            return folder, split
    names = os.listdir(absolute)
    if not names or any(name in _SPLITS for name in names):
        # The error of build_index tells what is missing.
        return folder, "val"
    return os.path.split(absolute)


def open_folder(folder: str, config: Config, runtime: Runtime, key: str = "--data") -> ValLoader:
    """Build this rank's loader of an evaluation set. Call it on every rank.

    Args:
        folder: See `find_split`.
        config: The settings of the run.
        runtime: The process group.
        key: The option or key that names the folder, for error messages.

    Raises:
        ValueError: On every rank, if the folder cannot be used.
    """
    data_dir, split = runtime.on_main(lambda: find_split(folder))
    try:
        index = build_val_index(data_dir, split, runtime, config.data.rescan)
    except ValueError as problem:
        # The messages are about the setting of a training.
        raise ValueError(str(problem).replace("data.data_dir", key)) from problem
    data = replace(config.data, kind="folder", data_dir=data_dir)
    return build_val_loader(replace(config, data=data), runtime, index=index)


def index_of(loader: ValLoader) -> Index:
    """The index of a loader of image files.

    Raises:
        ValueError: Its images are not files.
    """
    index = getattr(loader, "index", None)
    if not isinstance(index, Index):
        raise ValueError("the images of this data set are not files, which is needed here")
    return index
