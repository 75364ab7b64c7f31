"""Images that come as arrays: CIFAR-10, CIFAR-10.1 and CIFAR-10-C in the files of their authors."""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnet_dist.config import Config
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.pixels.finish import EXACT_RESIZES, Normalizer, resize_and_crop, to_device
from resnet_dist.data.sampling.crops import View, val_geometry
from resnet_dist.data.sampling.order import val_batches
from resnet_dist.data.types import Batch
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import build_precision
from resnet_dist.text import printable

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""The classes of CIFAR-10 in the order of their numbers."""

_CIFAR_SIDE = 32

# Of the binary version: the class, and a byte for each of three colors of each pixel.
_RECORD_BYTES = 1 + 3 * _CIFAR_SIDE**2


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images of one size, in memory or mapped into it."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    """uint8 [n, height, width, 3]"""
    labels: IntArray
    """int64 [n], class ids"""


class ArrayLoader:
    """This rank's share of images that are arrays (see types.ValLoader).

    The pixels pass through the same resize, crop and normalisation as those of files.

    Args:
        images: The images.
        class_names: The name of each class id.
        config: The settings.
        runtime: The process group.
    """

    num_bad = 0

    def __init__(
        self,
        images: ImageArrays,
        class_names: tuple[str, ...],
        config: Config,
        runtime: Runtime,
    ) -> None:
        data = config.data
        cpu = torch.device("cpu")
        self.class_names = class_names
        self.num_samples = len(images.labels)
        self.mirrored = data.val_flip or data.val_crops == "ten"
        self._images = images
        self._data = data
        self._device = runtime.device
        self._dtype = build_precision(config.train, runtime.device).dtype
        self._normalize = Normalizer(data, self._dtype, cpu)
        self._resize = EXACT_RESIZES[data.val_interpolation]
        self._shares = val_batches(
            self.num_samples,
            data.val_batch_size,
            runtime.rank,
            runtime.world_size,
        )
        self.rounds = len(self._shares)

    def remarks(self) -> list[str]:
        """Nothing to say."""
        return []

    def close(self) -> None:
        """Nothing to stop."""

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where this rank has no batch left while other ranks have one."""
        for share in self._shares:
            if share is None:
                yield None
            else:
                rows = np.array(share, dtype=np.int64)
                yield self._batch(rows)

    def _batch(self, rows: IntArray) -> Batch:
        """The batch of some images.

        Args:
            rows: int64 [n], the numbers of the images.
        """
        pixels = np.array(self._images.pixels[rows])
        num_images, height, width, _ = pixels.shape
        heights = np.full(num_images, height)
        widths = np.full(num_images, width)
        geometry = val_geometry(heights, widths, self._data)
        images = torch.from_numpy(pixels)
        views = [self._cut(images, view) for view in geometry.views]
        labels = torch.from_numpy(self._images.labels[rows])
        return Batch(
            images=views[0],
            labels=to_device(labels, self._device),
            indices=rows,
            other_views=tuple(views[1:]),
        )

    def _cut(self, images: torch.Tensor, view: View) -> torch.Tensor:
        """Resize, crop and normalise images.

        Args:
            images: uint8 [n, height, width, 3].
            view: The window of each image.

        Returns:
            [n, 3, side, side] on the device.
        """
        side = view.side
        squares = []
        for number, image in enumerate(images):
            height, width = view.sizes[number].tolist()
            offset = view.offsets[number].tolist()
            square = resize_and_crop(image, (height, width), offset, 0, side, self._resize)
            squares.append(square)
        self._normalize.prepare(side)
        channels_last = torch.empty(len(squares), side, side, 3, dtype=self._dtype)
        self._normalize(torch.stack(squares), channels_last)
        on_device = to_device(channels_last, self._device)
        return on_device.permute(0, 3, 1, 2)


def read_arrays(pixels_path: Path, labels_path: Path, part: int = 0, parts: int = 1) -> ImageArrays:
    """Read images and labels from two .npy files, as CIFAR-10.1 and CIFAR-10-C have them.

    Args:
        pixels_path: uint8 [n, h, w, 3]; it is mapped into memory.
        labels_path: Integers [n].
        part: Which of equal parts of the rows to take, from 0: CIFAR-10-C has the five severities
            one after the other.
        parts: Number of parts.

    Raises:
        ValueError: A file is missing or damaged, or is not such an array.
    """
    pixels = _load(pixels_path)
    labels = _load(labels_path)
    _check_pixels(pixels, pixels_path)
    _check_labels(labels, labels_path)
    num_images = len(pixels)
    num_labels = len(labels)
    place = printable(pixels_path)
    if num_images != num_labels:
        raise ValueError(
            f"{place} holds {num_images} images, and {printable(labels_path.name)} {num_labels} "
            "labels: take both from the same source"
        )
    size, rest = divmod(num_images, parts)
    if num_images == 0 or rest > 0:
        raise ValueError(
            f"{place} holds {num_images} images, which do not divide into {parts} parts: take the "
            "file of the authors"
        )
    start = part * size
    rows = slice(start, start + size)
    labels_of_part = labels[rows].astype(np.int64)
    return ImageArrays(pixels[rows], labels_of_part)


def _load(path: Path) -> np.ndarray[Any, Any]:
    """Map a .npy file into memory. Raises ValueError if it cannot be used."""
    try:
        # Without pickles, which may run any code.
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as problem:
        raise ValueError(f"{printable(path)} does not exist") from problem
    except (OSError, ValueError, EOFError) as problem:
        raise ValueError(
            f"{printable(path)} is damaged, or no .npy file: {printable(problem)}"
        ) from problem
    return array


def _check_pixels(pixels: np.ndarray[Any, Any], path: Path) -> None:
    """Raise ValueError if an array does not hold images."""
    has_channels = pixels.ndim == 4 and pixels.shape[3] == 3
    if has_channels and pixels.dtype == np.uint8:
        return
    shape = list(pixels.shape)
    raise ValueError(
        f"{printable(path)} holds {pixels.dtype} {shape}, and not images uint8 "
        "[n, height, width, 3]: take the file of the authors"
    )


def _check_labels(labels: np.ndarray[Any, Any], path: Path) -> None:
    """Raise ValueError if an array does not hold class ids of CIFAR-10."""
    is_list = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if is_list:
        is_known = (labels >= 0) & (labels < len(CIFAR10_CLASSES))
        if is_known.all():
            return
    raise ValueError(
        f"{printable(path)} does not hold a list of class numbers from 0 to 9: take the file of "
        "the authors"
    )


def read_cifar10(folder: Path) -> ImageArrays:
    """Read the test images of CIFAR-10 from the file of its python or its binary version.

    Args:
        folder: cifar-10-batches-py or cifar-10-batches-bin, or the folder that holds one of them.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    for inner in ("", "cifar-10-batches-py", "cifar-10-batches-bin"):
        for name in ("test_batch", "test_batch.bin"):
            path = folder / inner / name
            if path.is_file():
                content = path.read_bytes()
                return parse_cifar10(path, content)
    raise ValueError(
        f"{printable(folder)} has neither test_batch (python version of CIFAR-10) nor "
        "test_batch.bin (binary version): name the folder that holds it"
    )


def parse_cifar10(path: Path, content: bytes) -> ImageArrays:
    """Parse a file of the binary version (`.bin`) or of the python version.

    Args:
        path: The name of the file, for messages.
        content: Its bytes.

    Raises:
        ValueError: It is damaged.
    """
    if path.suffix == ".bin":
        return _parse_binary(path, content)
    return _parse_pickle(path, content)


def _parse_binary(path: Path, content: bytes) -> ImageArrays:
    """Parse records: a byte with the class, and 3,072 bytes of red, green and blue."""
    num_bytes = len(content)
    if num_bytes == 0 or num_bytes % _RECORD_BYTES:
        raise ValueError(
            f"{printable(path)} is damaged: its size is no multiple of {_RECORD_BYTES}: get it "
            "again"
        )
    flat = np.frombuffer(content, np.uint8)
    records = flat.reshape(-1, _RECORD_BYTES)
    labels = records[:, 0]
    pixels = records[:, 1:]
    _check_labels(labels, path)
    return _to_arrays(pixels, labels)


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays, lists and texts. Anything else, which may run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  as in the base class
        """Look up a class or function that a pickle names.

        Raises:
            pickle.UnpicklingError: It is none of those that an array needs.
        """
        package = module.split(".")[0]
        if package == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it needs {module}.{name}")


def _parse_pickle(path: Path, content: bytes) -> ImageArrays:
    """Parse a dictionary of pixels and labels."""
    try:
        arrays_by_name = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels = np.asarray(arrays_by_name[b"data"], dtype=np.uint8)
        labels = np.asarray(arrays_by_name[b"labels"])
        arrays = _to_arrays(pixels, labels)
    # A damaged pickle raises many types.
    except Exception as problem:
        raise ValueError(
            f"{printable(path)} is damaged, or no file of CIFAR-10: {printable(problem)}"
        ) from problem
    _check_labels(labels, path)
    return arrays


def _to_arrays(pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> ImageArrays:
    """Put images into the usual order.

    Args:
        pixels: uint8 [n, 3072], ordered by channel, row and column.
        labels: Integers [n].
    """
    num_images = len(labels)
    channels_first = pixels.reshape(num_images, 3, _CIFAR_SIDE, _CIFAR_SIDE)
    channels_last = channels_first.transpose(0, 2, 3, 1)
    images = np.ascontiguousarray(channels_last)
    return ImageArrays(images, labels.astype(np.int64))
