"""The data sets of a suite: their parts, and how the images of a part are loaded."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.sets.arrays import (
    CIFAR10_CLASSES,
    ArrayLoader,
    ImageArrays,
    read_arrays,
    read_cifar10,
)
from resnet_dist.evaluation.sets.corruptions import (
    ALEXNET_ERRORS,
    SEVERITIES,
    find_corruption,
    part_name,
)
from resnet_dist.evaluation.sets.layouts import open_folder
from resnet_dist.evaluation.sets.suite_file import SuiteEntry


@dataclass(frozen=True)
class Part:
    """A part of a data set that is evaluated in one go."""

    name: str
    """for instance "fog/3"; empty if the data set has only one part"""
    open: Callable[[Config, Runtime], ValLoader]
    """builds this rank's loader; call it on every rank. It raises ValueError on every rank"""


def parts_of(entry: SuiteEntry) -> list[Part]:
    """The parts of a data set, in the order in which they are evaluated."""
    if entry.kind == "imagenet_c":
        return _corrupted_parts(entry, _open_imagenet_c)
    if entry.kind == "cifar10_c":
        return _corrupted_parts(entry, _open_cifar10_c)
    open_whole = _open_folder
    if entry.kind == "cifar10_1":
        open_whole = _open_cifar10_1
    elif entry.kind == "cifar10":
        open_whole = _open_cifar10
    whole = Part("", partial(open_whole, entry))
    return [whole]


_OpenCorrupted = Callable[[str, str, int, Config, Runtime], ValLoader]


def _corrupted_parts(entry: SuiteEntry, open_part: _OpenCorrupted) -> list[Part]:
    """The 75 parts of a corrupted data set.

    Args:
        entry: The data set.
        open_part: Builds the loader from the folder, the corruption, the severity, the settings
            and the process group.
    """
    parts = []
    for corruption in ALEXNET_ERRORS:
        for severity in SEVERITIES:
            part = Part(
                name=part_name(corruption, severity),
                open=partial(open_part, entry.data, corruption, severity),
            )
            parts.append(part)
    return parts


def _open_folder(entry: SuiteEntry, config: Config, runtime: Runtime) -> ValLoader:
    """A data set of class folders or tar shards."""
    return open_folder(entry.data, config, runtime, f"sets.{entry.name}.data")


def _open_imagenet_c(
    folder: str, corruption: str, severity: int, config: Config, runtime: Runtime
) -> ValLoader:
    """One severity of a corruption of ImageNet-C: a folder of class folders.

    Its images are squares of 224 pixels already, which the authors feed as they are: there is no
    margin to crop. For a network that takes another size they are resized to it.
    """
    path = runtime.on_main(lambda: find_corruption(folder, corruption))
    place = os.path.join(path, str(severity))
    data = replace(config.data, val_resize_size=config.data.val_crop_size)
    config_without_margin = replace(config, data=data)
    return open_folder(place, config_without_margin, runtime)


def _open_cifar10_c(
    folder: str, corruption: str, severity: int, config: Config, runtime: Runtime
) -> ValLoader:
    """One severity of a corruption of CIFAR-10-C, whose file holds all five."""

    def read() -> ImageArrays:
        return read_arrays(
            Path(folder, f"{corruption}.npy"),
            Path(folder, "labels.npy"),
            severity - 1,
            len(SEVERITIES),
        )

    return _open_arrays(read, config, runtime)


def _open_cifar10_1(entry: SuiteEntry, config: Config, runtime: Runtime) -> ValLoader:
    """CIFAR-10.1 (Recht et al. 2018): two .npy files."""
    folder = Path(entry.data)
    stem = f"cifar10.1_{entry.version}"

    def read() -> ImageArrays:
        return read_arrays(
            folder / f"{stem}_data.npy",
            folder / f"{stem}_labels.npy",
        )

    return _open_arrays(read, config, runtime)


def _open_cifar10(entry: SuiteEntry, config: Config, runtime: Runtime) -> ValLoader:
    """CIFAR-10: class folders, as `resnet-dist data download` writes them, or the original file."""
    folder = Path(entry.data)
    has_folders = runtime.on_main(lambda: (folder / "val").is_dir())
    if has_folders:
        return _open_folder(entry, config, runtime)
    return _open_arrays(lambda: read_cifar10(folder), config, runtime)


def _open_arrays(read: Callable[[], ImageArrays], config: Config, runtime: Runtime) -> ValLoader:
    """Build the loader of images that each rank reads for itself."""

    def count() -> int:
        return len(read().labels)

    # The main process finds what is wrong with the files, so that all ranks raise the same error.
    runtime.on_main(count)
    images = read()
    return ArrayLoader(images, CIFAR10_CLASSES, config, runtime)
