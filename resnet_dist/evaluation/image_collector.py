"""Collect the result of each image during an evaluation, and images for a gallery."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.loader import DaliValLoader
from resnet_dist.data.types import IGNORED_LABEL, Batch, ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.per_image import (
    MOST_TOP_CLASSES,
    ImageResults,
    join_results,
    temperature_grid,
)
from resnet_dist.evaluation.pictures import to_levels, to_png
from resnet_dist.text import printable

GALLERY_SIZE = 12
"""Number of mistakes, and of hits, in the gallery."""

_THUMBNAIL_SIDE = 96


@dataclass(frozen=True, order=True)
class GalleryImage:
    """An image of the gallery. The order is by priority, and then by row."""

    priority: float
    """the larger, the sooner the image is shown"""
    minus_row: int
    """minus the row of the index, so that of equal priorities the first row is preferred"""
    png: bytes
    """the image as the network sees it, at most 96 pixels wide"""

    @property
    def row(self) -> int:
        """The row of the index."""
        return -self.minus_row


@dataclass(frozen=True)
class Collected:
    """What all ranks have collected, on the main process."""

    results: ImageResults
    """the results of all images, with the labels of the index"""
    paths: list[str]
    """the name of each image in the validation set, as `<class>/<file>`"""
    mistakes: list[GalleryImage]
    """the wrong predictions with the highest confidence, the most confident first"""
    hits: list[GalleryImage]
    """the right predictions with the lowest confidence, the least confident first"""


@dataclass(frozen=True)
class _Own:
    """What one rank has collected."""

    parts: list[ImageResults]
    """one item, or none if the rank had no batch"""
    mistakes: list[GalleryImage]
    hits: list[GalleryImage]


class ImageCollector:
    """Collect the results of this rank; pass it to `evaluate` as `collect`.

    Args:
        data: The section `data` of the config, whose normalization is undone for the gallery.
    """

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._parts: list[ImageResults] = []
        self._mistakes: list[GalleryImage] = []
        self._hits: list[GalleryImage] = []

    def __call__(
        self,
        batch: Batch,
        logits: torch.Tensor,
    ) -> None:
        """Add a batch. It waits for the device.

        Args:
            batch: The images.
            logits: [B, C].
        """
        results = results_of_batch(batch, logits)
        self._parts.append(results)
        is_hit = results.is_hit
        for place, confidence in enumerate(results.confidences.tolist()):
            if not results.is_readable[place] or not results.is_finite[place]:
                continue
            if is_hit[place]:
                self._offer(self._hits, -confidence, batch, place)
            else:
                self._offer(self._mistakes, confidence, batch, place)

    def _offer(
        self,
        heap: list[GalleryImage],
        priority: float,
        batch: Batch,
        place: int,
    ) -> None:
        """Keep an image if it is among the first ones of the gallery so far."""
        minus_row = -int(batch.indices[place])
        is_full = len(heap) >= GALLERY_SIZE
        if is_full and (priority, minus_row) < (heap[0].priority, heap[0].minus_row):
            return
        png = self._thumbnail(batch.images[place])
        heapq.heappush(heap, GalleryImage(priority, minus_row, png))
        if is_full:
            heapq.heappop(heap)

    def _thumbnail(self, image: torch.Tensor) -> bytes:
        """A normalized image [3, H, W] as a small PNG."""
        levels = to_levels(image, self._data.mean, self._data.std)
        picture = Image.fromarray(levels)
        picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        return to_png(picture)

    def gather(
        self, loader: ValLoader, runtime: Runtime, outputs: Sequence[int] | None = None
    ) -> Collected | None:
        """Put the results of all ranks together. Every rank must call this.

        Args:
            loader: The validation set, which knows the labels and names of the images.
            runtime: The ranks.
            outputs: Which output of the network each class of the validation set is; None if they
                are the same.

        Returns:
            The results on the main process, None on the others.

        Raises:
            ValueError: On every rank, if the logits of an image are not finite.
        """
        collected = None
        gathered = runtime.gather_objects(self._own())

        def join() -> None:
            nonlocal collected
            assert gathered is not None
            collected = _join(gathered, loader, outputs)

        # An error is raised on every rank.
        runtime.on_main(join)
        return collected

    def _own(self) -> "_Own":
        """What this rank has collected."""
        parts = []
        # A rank may have no batch.
        if self._parts:
            parts = [join_results(self._parts)]
        return _Own(parts, self._mistakes, self._hits)


def _join(
    gathered: Sequence[_Own],
    loader: ValLoader,
    outputs: Sequence[int] | None,
) -> Collected:
    """Put the results of all ranks together, on the main process.

    Raises:
        ValueError: The logits of an image are not finite.
    """
    parts: list[ImageResults] = []
    mistakes: list[GalleryImage] = []
    hits: list[GalleryImage] = []
    for own in gathered:
        parts.extend(own.parts)
        mistakes.extend(own.mistakes)
        hits.extend(own.hits)
    results = join_results(parts)
    assert len(results) == loader.num_samples, "not all images were evaluated"
    results, paths = _with_labels_and_paths(results, loader, outputs)
    _check_finite(results, paths)
    return Collected(
        results=results,
        paths=paths,
        mistakes=heapq.nlargest(GALLERY_SIZE, mistakes),
        hits=heapq.nlargest(GALLERY_SIZE, hits),
    )


def _with_labels_and_paths(
    results: ImageResults, loader: ValLoader, outputs: Sequence[int] | None
) -> tuple[ImageResults, list[str]]:
    """Look up the names of the images, and the labels of those that could not be decoded."""
    if not isinstance(loader, DaliValLoader):
        return results, [f"image {row}" for row in results.rows.tolist()]
    paths = []
    for row in results.rows.tolist():
        name = loader.index.name(row)
        # A file name need not be valid UTF-8.
        encoded = name.encode("utf-8", "surrogateescape")
        paths.append(encoded.decode("utf-8", "replace"))
    known = loader.index.labels_of(results.rows)
    if outputs is not None:
        known = np.array(outputs, dtype=np.int64)[known]
    labels = np.where(results.is_readable, results.labels, known)
    return replace(results, labels=labels), paths


def _check_finite(
    results: ImageResults,
    paths: Sequence[str],
) -> None:
    """Raise ValueError if the logits of an image are not finite."""
    places = np.flatnonzero(~results.is_finite)
    if not len(places):
        return
    first = printable(paths[int(places[0])])
    raise ValueError(
        f"the network gives {len(places)} of {len(results)} images logits that are not finite "
        f"(first: {first}): its weights are damaged, or train.precision overflows; "
        "try --train.precision fp32"
    )


def results_of_batch(
    batch: Batch,
    logits: torch.Tensor,
) -> ImageResults:
    """The results of one batch.

    Args:
        batch: The images, with their labels; IGNORED_LABEL for one that could not be decoded.
        logits: [B, C], at least float32.
    """
    logits = logits.float()
    num_top = min(MOST_TOP_CLASSES, logits.shape[1])
    has_label = batch.labels != IGNORED_LABEL
    labels = batch.labels.where(has_label, 0)
    # Minus infinity is the logit of a class that does not compete.
    is_broken = logits.isnan() | logits.isposinf()
    is_finite = ~is_broken.any(1)
    log_probabilities = logits.log_softmax(1)
    probabilities = log_probabilities.exp()
    # A stable sort ranks equal logits by class id.
    order = logits.argsort(dim=1, descending=True, stable=True)
    top = order[:, :num_top]
    targets = F.one_hot(labels, logits.shape[1])
    squares = (probabilities - targets).square()

    temperatures = torch.from_numpy(temperature_grid()).float().to(logits.device)
    losses = []
    confidences = []
    for temperature in temperatures:
        tempered = (logits / temperature).log_softmax(1)
        losses.append(F.nll_loss(tempered, labels, reduction="none"))
        confidences.append(tempered.amax(1).exp())
    return ImageResults(
        rows=np.asarray(batch.indices, dtype=np.int64),
        labels=_on_host(labels),
        is_readable=_on_host(has_label),
        is_finite=_on_host(is_finite),
        top_classes=_on_host(top),
        top_probabilities=_on_host(probabilities.gather(1, top)),
        losses=_on_host(F.nll_loss(log_probabilities, labels, reduction="none")),
        brier=_on_host(squares.sum(1)),
        tempered_losses=_on_host(torch.stack(losses, 1)),
        tempered_confidences=_on_host(torch.stack(confidences, 1)),
    )


def _on_host(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The values of a tensor as a NumPy array, which outlives inference mode."""
    array: np.ndarray[Any, Any] = tensor.cpu().numpy()
    copied: np.ndarray[Any, Any] = array.copy()
    return copied
