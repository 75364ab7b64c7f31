"""Images with several right labels: ReaL, the reassessed labels of ImageNet's validation set.

Beyer et al. 2020, "Are we done with ImageNet?". The file real.json is a list: entry i holds the
class ids of the image ILSVRC2012_val_<i + 1>.JPEG. An image whose list is empty is not counted.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from resnet_dist.data.arrays import IntArray
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import Batch
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.models.class_names import imagenet_ids
from resnet_dist.text import printable

_FILE_NAME = re.compile(r".*_val_(\d{8})\.\w+")
_NO_LABEL = -1


def read_label_sets(path: Path) -> list[list[int]]:
    """Read real.json.

    Returns:
        For each image of the validation set its class ids, in the order of the file names.

    Raises:
        ValueError: The file cannot be read, or does not hold lists of class ids.
    """
    title = f"labels: {printable(path)}"
    try:
        text = path.read_text()
        content = json.loads(text)
    except (OSError, ValueError) as problem:
        raise ValueError(f"{title} cannot be read as JSON: {printable(problem)}") from problem
    if not isinstance(content, list) or not content:
        raise ValueError(f"{title} is not a list with an entry for each image")
    for number, entry in enumerate(content):
        _check_labels_of_image(entry, f"{title}: entry {number}")
    return content


def _check_labels_of_image(entry: object, place: str) -> None:
    """Raise ValueError if an entry of real.json is no list of class ids."""
    if not isinstance(entry, list):
        raise ValueError(f"{place} is not a list of classes")
    num_classes = len(imagenet_ids())
    for label in entry:
        is_number = isinstance(label, int) and not isinstance(label, bool)
        is_known = is_number and 0 <= label < num_classes
        if not is_known:
            unknown = printable(label)
            last = num_classes - 1
            raise ValueError(
                f"{place} has the unknown class {unknown}: class ids go from 0 to {last}"
            )


def sets_of_rows(index: Index, label_sets: list[list[int]], names: Sequence[str]) -> IntArray:
    """The label sets of the images of a data set, as outputs of a network.

    Args:
        index: The images; their file names have the number of the image.
        label_sets: What `read_label_sets` returned.
        names: The names of the outputs of the network, with ImageNet's WordNet ids.

    Returns:
        int64 [images, K]: the outputs of each image, filled up with -1.

    Raises:
        ValueError: The network does not have ImageNet's classes, or a file name has no number.
    """
    outputs = _outputs_of_imagenet(names)
    most_labels = max(map(len, label_sets))
    shape = (len(index), max(1, most_labels))
    rows = np.full(shape, _NO_LABEL, dtype=np.int64)
    for row in range(len(index)):
        name = index.name(row)
        number = _number_of_image(name, len(label_sets))
        labels = label_sets[number - 1]
        num_labels = len(labels)
        rows[row, :num_labels] = outputs[labels]
    return rows


def _outputs_of_imagenet(names: Sequence[str]) -> IntArray:
    """The output of each of ImageNet's classes, int64 [1000].

    Args:
        names: The names of the outputs.

    Raises:
        ValueError: A class has no output.
    """
    output_of = {}
    for output, name in enumerate(names):
        output_of[name] = output
    outputs = []
    for wnid in imagenet_ids():
        if wnid not in output_of:
            raise ValueError(
                "labels: they are those of ImageNet, and the network does not have ImageNet's "
                "1,000 classes by their WordNet ids"
            )
        outputs.append(output_of[wnid])
    return np.array(outputs)


def _number_of_image(name: str, num_images: int) -> int:
    """The number in the name of a file of ImageNet's validation set, from 1 to `num_images`."""
    found = _FILE_NAME.fullmatch(name)
    if found is not None:
        number = int(found[1])
        if 1 <= number <= num_images:
            return number
    raise ValueError(
        f"labels: the image {printable(name)} is not named as ILSVRC2012_val_00000001.JPEG "
        f"with a number from 1 to {num_images}: name ImageNet's validation set"
    )


class LabelSetCounter:
    """Counts the images whose most probable class is one of their labels.

    Pass it to `evaluate` as `collect`.

    Args:
        sets: What `sets_of_rows` returned.
        device: The device of the logits.
    """

    def __init__(self, sets: IntArray, device: torch.device) -> None:
        self._sets = torch.from_numpy(sets).to(device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def __call__(self, batch: Batch, logits: torch.Tensor) -> None:
        """Count a batch with logits [B, C]. An image that cannot be decoded is a miss."""
        rows = torch.from_numpy(batch.indices)
        rows = rows.to(logits.device)
        # [B, K], filled up with a number that is no class.
        sets = self._sets[rows]
        is_label = sets != _NO_LABEL
        best = _first_of_highest(logits)
        is_best = sets == best.unsqueeze(1)

        has_labels = is_label.any(1)
        is_decoded = batch.labels >= 0
        is_hit = has_labels & is_best.any(1) & is_decoded
        counts = torch.stack([is_hit.sum(), has_labels.sum()])
        self._counts += counts

    def reduce(self, runtime: Runtime) -> tuple[int, int]:
        """Add up the counts of all ranks. Call it on every rank.

        Returns:
            The number of images whose most probable class is one of their labels, and of images
            with labels.
        """
        # The reduction takes floating-point numbers, which are exact up to 2^53.
        counts = self._counts.double()
        totals = runtime.all_reduce_sum(counts)
        num_hits, num_images = totals.long().tolist()
        return num_hits, num_images


def _first_of_highest(logits: torch.Tensor) -> torch.Tensor:
    """The class with the highest logit, the first one of equals: int64 [B].

    With a NaN among the logits it is a number that is no class.
    """
    num_classes = logits.shape[1]
    highest = logits.amax(1, keepdim=True)
    classes = torch.arange(num_classes, device=logits.device)
    candidates = classes.where(logits == highest, num_classes)
    return candidates.amin(1)
