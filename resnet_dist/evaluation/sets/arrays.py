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
from resnet_dist.precision import DTYPES, resolve_precision
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
        self.class_names = class_names
        self.num_samples = len(images.labels)
        self.mirrored = data.val_flip or data.val_crops == "ten"
        self._images = images
        self._data = data
        self._device = runtime.device
        precision = resolve_precision(config.train.precision, runtime.device)
        self._dtype = DTYPES[precision]
        self._normalize = Normalizer(data, self._dtype, torch.device("cpu"))
        self._resize = EXACT_RESIZES[data.val_interpolation]
        self._shares = val_batches(
            self.num_samples, data.val_batch_size, runtime.rank, runtime.world_size
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
                yield self._batch(np.array(share, dtype=np.int64))

    def _batch(self, rows: IntArray) -> Batch:
        """The batch of the rows, int64 [n]."""
        pixels = torch.from_numpy(np.array(self._images.pixels[rows]))
        heights = np.full(len(rows), pixels.shape[1])
        widths = np.full(len(rows), pixels.shape[2])
        geometry = val_geometry(heights, widths, self._data)
        views = [self._cut(pixels, view) for view in geometry.views]
        labels = torch.from_numpy(self._images.labels[rows])
        return Batch(views[0], to_device(labels, self._device), rows, tuple(views[1:]))

    def _cut(self, pixels: torch.Tensor, view: View) -> torch.Tensor:
        """One view of images, uint8 [n, h, w, 3]: [n, 3, side, side] on the device."""
        squares = []
        for number, image in enumerate(pixels):
            height, width = view.sizes[number].tolist()
            offset = view.offsets[number].tolist()
            square = resize_and_crop(image, (height, width), offset, 0, view.side, self._resize)
            squares.append(square)
        self._normalize.prepare(view.side)
        out = torch.empty(len(squares), view.side, view.side, 3, dtype=self._dtype)
        self._normalize(torch.stack(squares), out)
        return to_device(out, self._device).permute(0, 3, 1, 2)


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
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(
            f"{printable(pixels_path)} holds {pixels.dtype} {list(pixels.shape)}, and not images "
            "uint8 [n, height, width, 3]: take the file of the authors"
        )
    _check_labels(labels, labels_path)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{printable(pixels_path)} holds {len(pixels)} images, and "
            f"{printable(labels_path.name)} {len(labels)} labels: take both from the same source"
        )
    if len(labels) == 0 or len(labels) % parts:
        raise ValueError(
            f"{printable(pixels_path)} holds {len(pixels)} images, which do not divide into "
            f"{parts} parts: take the file of the authors"
        )
    size = len(labels) // parts
    rows = slice(part * size, (part + 1) * size)
    return ImageArrays(pixels[rows], labels[rows].astype(np.int64))


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


def _check_labels(labels: np.ndarray[Any, Any], path: Path) -> None:
    """Raise ValueError if labels are not integers from 0 to 9."""
    is_list = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not is_list or (len(labels) and (labels.min() < 0 or labels.max() > 9)):
        raise ValueError(
            f"{printable(path)} does not hold a list of class numbers from 0 to 9: take the file "
            "of the authors"
        )


def read_cifar10(folder: Path) -> ImageArrays:
    """Read the test images of CIFAR-10 from the file of its python or its binary version.

    Args:
        folder: cifar-10-batches-py or cifar-10-batches-bin, or the folder that holds one of them.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for name in ("test_batch", "test_batch.bin"):
            path = place / name
            if path.is_file():
                return parse_cifar10(path, path.read_bytes())
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
    raw = np.frombuffer(content, np.uint8)
    length = 1 + 3 * _CIFAR_SIDE**2
    if len(raw) == 0 or len(raw) % length:
        raise ValueError(
            f"{printable(path)} is damaged: its size is no multiple of {length}: get it again"
        )
    records = raw.reshape(-1, length)
    _check_labels(records[:, 0], path)
    return _to_arrays(records[:, 1:], records[:, 0])


class _PlainUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays, lists and texts. Anything else, which may run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  as in the base class
        """Look up a class or function that a pickle names."""
        is_of_numpy = module.split(".")[0] == "numpy"
        if is_of_numpy and name in ("_reconstruct", "ndarray", "dtype"):
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
    """Arrays of images, uint8 [n, 3072], whose values are ordered by channel, row and column."""
    channels_first = pixels.reshape(len(labels), 3, _CIFAR_SIDE, _CIFAR_SIDE)
    images = np.ascontiguousarray(channels_first.transpose(0, 2, 3, 1))
    return ImageArrays(images, labels.astype(np.int64))
