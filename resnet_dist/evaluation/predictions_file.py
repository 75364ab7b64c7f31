"""The predictions of a network for each image, as a Parquet file.

Columns: path, label, top_classes and top_probabilities (lists of five, or of as many as there are
classes), loss. The rows are in the order of the data set's index, on any number of ranks. pyarrow
is imported when a file is written or read.
"""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from resnet_dist.data.arrays import BoolArray
from resnet_dist.evaluation.evaluation_file import EvaluatedNetwork, digest_of_images
from resnet_dist.evaluation.image_collector import Collected
from resnet_dist.files import write_file
from resnet_dist.text import first_line, printable

if TYPE_CHECKING:
    import pyarrow

# The key of our description among the metadata of the file.
_METADATA_KEY = b"resnet_dist"


@dataclass(frozen=True, eq=False)
class Predictions:
    """What `report` reads from a file of predictions."""

    network: EvaluatedNetwork
    images: str
    """a hash of the paths and labels of all images"""
    is_hit: BoolArray
    """[n]: whether the most probable class of each image is its label"""
    num_top5_hits: int


def check_can_write_predictions() -> None:
    """Raise ValueError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(
            "--predictions needs pyarrow: pip install resnet-dist[predictions]"
        ) from None


def write_predictions(collected: Collected, network: EvaluatedNetwork, path: Path) -> None:
    """Write the predictions for all images.

    An image that could not be decoded has its label, and null in the other columns.

    Raises:
        OSError: The file cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(_columns(collected))
    description = json.dumps(asdict(network)).encode()
    table = table.replace_schema_metadata({_METADATA_KEY: description})
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    write_file(path, content.getvalue())


def _columns(collected: Collected) -> dict[str, "pyarrow.Array"]:
    """The columns of the file."""
    import pyarrow

    results = collected.results
    is_missing = ~results.is_readable
    num_top = results.top_classes.shape[1]
    class_lists = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(results.top_classes.astype(np.int32).ravel()),
        num_top,
        mask=pyarrow.array(is_missing),
    )
    probability_lists = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(results.top_probabilities.astype(np.float32).ravel()),
        num_top,
        mask=pyarrow.array(is_missing),
    )
    return {
        "path": pyarrow.array(collected.paths, pyarrow.string()),
        "label": pyarrow.array(results.labels.astype(np.int32)),
        "top_classes": class_lists,
        "top_probabilities": probability_lists,
        "loss": pyarrow.array(results.losses.astype(np.float32), mask=is_missing),
    }


def read_predictions(path: Path) -> Predictions:
    """Read a file that `write_predictions` has written.

    Raises:
        ValueError: The file cannot be read, is damaged or of another kind, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{printable(path)} needs pyarrow: pip install resnet-dist[predictions]"
        ) from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()))
        return _unpack(table)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ValueError(f"{printable(path)} cannot be read: {reason}") from error
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{printable(path)} holds no predictions of `resnet-dist evaluate`, or it is damaged "
            f"({first_line(error)}): write it again with `resnet-dist evaluate --predictions FILE`"
        ) from error


def _unpack(table: "pyarrow.Table") -> Predictions:
    """Read the columns that `report` needs.

    Raises:
        ValueError, KeyError, TypeError: The table is of another kind.
    """
    metadata = table.schema.metadata or {}
    if _METADATA_KEY not in metadata:
        raise ValueError("it does not say which network was evaluated")
    network = EvaluatedNetwork(**json.loads(metadata[_METADATA_KEY]))
    if not table.num_rows:
        raise ValueError("it has no rows")
    labels = table["label"].to_numpy().astype(np.int64)
    paths = table["path"].to_pylist()
    is_hit = []
    num_top5_hits = 0
    for label, classes in zip(labels.tolist(), table["top_classes"].to_pylist(), strict=True):
        # Null for an image that could not be decoded.
        if classes is None:
            is_hit.append(False)
            continue
        is_hit.append(classes[0] == label)
        if label in classes:
            num_top5_hits += 1
    return Predictions(
        network=network,
        images=digest_of_images(paths, labels),
        is_hit=np.array(is_hit),
        num_top5_hits=num_top5_hits,
    )
