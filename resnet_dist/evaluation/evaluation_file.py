"""`evaluation.json`: what is known about an evaluation beyond its counts, for `report`.

It holds the accuracy of each class, the confusions, the calibration, whether each image is a hit,
and a few images. Each training writes it into its output_dir after the last evaluation.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.arrays import BoolArray, IntArray
from resnet_dist.evaluation.calibration import (
    Bin,
    Calibration,
    TemperatureScaling,
    measure_calibration,
)
from resnet_dist.evaluation.confusion import (
    ClassResult,
    Confusion,
    find_confusions,
    results_per_class,
)
from resnet_dist.evaluation.image_collector import Collected, GalleryImage
from resnet_dist.evaluation.per_image import ImageResults
from resnet_dist.files import write_file
from resnet_dist.metrics import FIRST_TOP5_CLASSES
from resnet_dist.text import printable

EVALUATION_FILE = "evaluation.json"
"""Name of the file in the output_dir of a run."""

_FORMAT = 1


@dataclass(frozen=True)
class EvaluatedNetwork:
    """What was evaluated."""

    name: str
    """`model.name`"""
    weights: str
    """raw or averaged"""
    step: int
    """number of updates that the weights were trained for"""
    class_names: list[str]
    num_competing: int | None = None
    """number of classes that an image may be assigned to; None for all"""

    @property
    def has_top5(self) -> bool:
        """Whether top-5 says anything: among five classes every image is a hit."""
        num_classes = len(self.class_names)
        if self.num_competing is not None:
            num_classes = self.num_competing
        return num_classes >= FIRST_TOP5_CLASSES


@dataclass(frozen=True)
class GalleryEntry:
    """One image of the gallery."""

    path: str
    """`<class>/<file>` in the validation set"""
    label: int
    predicted: int
    confidence: float
    """probability of the predicted class"""
    png: str
    """the content of a PNG file, in base64"""


@dataclass(frozen=True, eq=False)
class EvaluationDetails:
    """The content of `evaluation.json`."""

    network: EvaluatedNetwork
    images: str
    """a hash of the paths and labels of all images, to tell whether two evaluations compare"""
    is_hit: BoolArray
    """[n]: whether the most probable class of each image is its label, in the order of the index"""
    num_top5_hits: int
    num_unreadable: int
    """images that could not be decoded"""
    classes: list[ClassResult]
    """the lowest accuracy first"""
    confusions: list[Confusion]
    """the most frequent first"""
    calibration: Calibration | None
    """None if no image could be decoded"""
    mistakes: list[GalleryEntry]
    """the most confident first"""
    hits: list[GalleryEntry]
    """the least confident first"""


def describe_evaluation(collected: Collected, network: EvaluatedNetwork) -> EvaluationDetails:
    """Compute all figures about an evaluation.

    Args:
        collected: The results of all images.
        network: What was evaluated.
    """
    results = collected.results
    num_classes = len(network.class_names)
    return EvaluationDetails(
        network=network,
        images=digest_of_images(collected.paths, results.labels),
        is_hit=results.is_hit,
        num_top5_hits=int(results.is_top5_hit.sum()),
        num_unreadable=int(np.sum(~results.is_readable)),
        classes=results_per_class(results, num_classes),
        confusions=find_confusions(results, num_classes),
        calibration=measure_calibration(results),
        mistakes=_gallery(collected.mistakes, collected),
        hits=_gallery(collected.hits, collected),
    )


def digest_of_images(paths: Sequence[str], labels: IntArray) -> str:
    """A hash of the images of a validation set: their names and labels, in order."""
    digest = hashlib.sha256()
    for path, label in zip(paths, labels.tolist(), strict=True):
        line = f"{label} {path}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _gallery(images: Sequence[GalleryImage], collected: Collected) -> list[GalleryEntry]:
    """Describe images of the gallery."""
    results: ImageResults = collected.results
    entries = []
    for image in images:
        place = int(np.searchsorted(results.rows, image.row))
        entries.append(
            GalleryEntry(
                path=printable(collected.paths[place]),
                label=int(results.labels[place]),
                predicted=int(results.top_classes[place, 0]),
                confidence=float(results.confidences[place]),
                png=base64.b64encode(image.png).decode(),
            )
        )
    return entries


def write_evaluation(details: EvaluationDetails, path: Path) -> None:
    """Write an `evaluation.json`. Raises OSError."""
    packed = np.packbits(details.is_hit).tobytes()
    calibration = None
    if details.calibration is not None:
        calibration = asdict(details.calibration)
    content = {
        "format": _FORMAT,
        "network": asdict(details.network),
        "images": details.images,
        "num": len(details.is_hit),
        "is_hit": base64.b64encode(packed).decode(),
        "num_top5_hits": details.num_top5_hits,
        "num_unreadable": details.num_unreadable,
        "classes": [asdict(each) for each in details.classes],
        "confusions": [asdict(each) for each in details.confusions],
        "calibration": calibration,
        "mistakes": [asdict(each) for each in details.mistakes],
        "hits": [asdict(each) for each in details.hits],
    }
    write_file(path, json.dumps(content) + "\n")


def read_evaluation(path: Path) -> EvaluationDetails:
    """Read an `evaluation.json`.

    Raises:
        ValueError: The file cannot be read, is damaged, or is of another kind.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError("it has another format")
        return _unpack(content)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{printable(path)} is no evaluation that this version can read, or it is damaged "
            f"({printable(error)}): write it again with `resnet-dist evaluate --details FILE`"
        ) from error


def _unpack(content: dict[str, Any]) -> EvaluationDetails:
    """Build the details from the content of the file.

    Raises:
        ValueError, KeyError, TypeError: The content is damaged.
    """
    packed = base64.b64decode(content["is_hit"], validate=True)
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8))
    num = content["num"]
    if not 0 < num <= len(bits):
        raise ValueError("the number of images is wrong")
    return EvaluationDetails(
        network=EvaluatedNetwork(**content["network"]),
        images=str(content["images"]),
        is_hit=bits[:num].astype(bool),
        num_top5_hits=int(content["num_top5_hits"]),
        num_unreadable=int(content["num_unreadable"]),
        classes=[ClassResult(**each) for each in content["classes"]],
        confusions=[Confusion(**each) for each in content["confusions"]],
        calibration=_unpack_calibration(content["calibration"]),
        mistakes=[GalleryEntry(**each) for each in content["mistakes"]],
        hits=[GalleryEntry(**each) for each in content["hits"]],
    )


def _unpack_calibration(content: dict[str, Any] | None) -> Calibration | None:
    """Build the calibration from its part of the file, which is null without readable images."""
    if content is None:
        return None
    scaling = None
    if content["scaling"] is not None:
        scaling = TemperatureScaling(**content["scaling"])
    return Calibration(
        num=content["num"],
        loss=content["loss"],
        brier=content["brier"],
        bins=[Bin(**each) for each in content["bins"]],
        bins_of_equal_mass=[Bin(**each) for each in content["bins_of_equal_mass"]],
        scaling=scaling,
    )
