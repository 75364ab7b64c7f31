"""Parquet files with images, as the Hugging Face hub has them.

Each row has an image (a struct of `bytes` and `path`) and a label. The names of the columns and of
the classes are in the metadata of the schema, under the key `huggingface`. The rows are stored in
compressed groups of about 100, so that one image cannot be read without its group. Such files are
read in order: by `resnet-dist data import-parquet`, which writes tar shards of them, and in
evaluation.

A class id is the position of the class in the sorted list of names, as in class folders. The names
of ImageNet's classes are replaced by their WordNet ids, which is what its folders are called.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resnet_dist.checkpoints.torchvision_weights import imagenet_words
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.sources.index import first_names
from resnet_dist.models.class_names import imagenet_ids
from resnet_dist.text import first_line, printable

SUFFIX = ".parquet"

_VAL_NAMES = ("val", "validation", "valid")
"""Names that data sets give to the validation set, the preferred one first."""

_METADATA_KEY = b"huggingface"
_ROWS_AT_ONCE = 32
_BUFFER_BYTES = 2**20
_DOWNLOAD_AGAIN = "download the file again"

# The first words of this share of ImageNet's classes have to agree: a few are spelled differently.
_ENOUGH_WORDS = 0.95


@dataclass(frozen=True)
class ParquetOptions:
    """What to take from parquet files; empty: what their metadata says."""

    image_column: str = ""
    label_column: str = ""
    class_names: tuple[str, ...] = ()
    """the names of the classes by label"""


@dataclass(frozen=True)
class _Columns:
    """The columns of a file."""

    image: str
    label: str
    class_names: tuple[str, ...]
    """by label"""


@dataclass(frozen=True)
class RowGroup:
    """A group of rows of a file."""

    path: str
    number: int
    """of the group in the file, from 0"""
    num_rows: int
    num_bytes: int
    """uncompressed size"""

    def fault(self, problem: object, way_out: str = _DOWNLOAD_AGAIN) -> ValueError:
        """The error for a group that cannot be used."""
        return ValueError(f"{self.path}, row group {self.number}: {problem}: {way_out}")


@dataclass(frozen=True)
class ParquetSplit:
    """The rows of the parquet files of a split, without the images."""

    image_column: str
    class_names: tuple[str, ...]
    """sorted; usable as names of folders"""
    groups: tuple[RowGroup, ...]
    labels: IntArray
    """int64 [n], positions in `class_names`, in the order of the files"""
    names: list[str]
    """n names, `<class>/<file>`, all different"""

    def images(self, group: RowGroup) -> Iterator[bytes]:
        """The files of the images of a group, in order.

        Raises:
            ValueError: if the group is damaged, or an image has no bytes.
        """
        return _read_images(group, self.image_column)


def find_parquet_files(data_dir: str, split: str) -> list[str]:
    """The parquet files of a split, sorted.

    These are the files in data_dir/`split`/, or files such as `train-00000-of-00294.parquet` in
    `data_dir` or data_dir/data/. The validation set may also be called validation or valid.

    Args:
        data_dir: the data folder.
        split: name of the split.

    Returns:
        Their paths; empty if there are none.
    """
    names = _VAL_NAMES if split == "val" else (split,)
    for name in names:
        found = _files_in(os.path.join(data_dir, name), prefix="")
        if found:
            return found
        for folder in (data_dir, os.path.join(data_dir, "data")):
            found = _files_in(folder, prefix=f"{name}-")
            if found:
                return found
    return []


def _files_in(folder: str, prefix: str) -> list[str]:
    """The paths of the parquet files in a folder whose names begin with `prefix`, sorted."""
    if not os.path.isdir(folder):
        return []
    paths = []
    for name in sorted(os.listdir(folder)):
        is_hidden = name.startswith(".")
        if name.startswith(prefix) and name.endswith(SUFFIX) and not is_hidden:
            paths.append(os.path.join(folder, name))
    return paths


def read_class_names(path: str) -> tuple[str, ...]:
    """Read the names of classes from a text file with one name a line, in the order of the labels.

    Raises:
        ValueError: if it cannot be read, or a name is empty.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--class_names {path} cannot be read ({error}): name a text file with one class a line"
        ) from None
    if not names or not all(name.strip() for name in names):
        raise ValueError(
            f"--class_names {path} has an empty line or none at all: it needs one class a line, in "
            f"the order of the labels"
        )
    return tuple(names)


def open_parquet(paths: Sequence[str], options: ParquetOptions = ParquetOptions()) -> ParquetSplit:
    """Read the labels and the file names of all rows of a split, without the images.

    Args:
        paths: the files, at least one.
        options: what to take from them.

    Raises:
        ValueError: if a file is damaged, has another schema, or a label is no class.
    """
    groups: list[RowGroup] = []
    labels: list[np.ndarray] = []
    files: list[str | None] = []
    columns: _Columns | None = None
    for path in paths:
        found = _find_columns(path, options)
        if columns is not None and found != columns:
            raise ValueError(
                f"{path} has other columns or classes than {paths[0]}: import files of one data "
                f"set and one version of it"
            )
        columns = found
        for group in _groups_of(path):
            group_labels, group_files = _read_rows(group, columns)
            groups.append(group)
            labels.append(group_labels)
            files += group_files
    assert columns is not None
    if not files:
        raise ValueError(f"the parquet files hold no row ({first_names(paths)}): {_DOWNLOAD_AGAIN}")

    folders = _folder_names(columns.class_names, options)
    order = np.argsort(np.array(folders))
    ids = np.argsort(order)
    stored_labels = np.concatenate(labels)
    class_of_rows = [folders[label] for label in stored_labels]
    return ParquetSplit(
        image_column=columns.image,
        class_names=tuple(sorted(folders)),
        groups=tuple(groups),
        labels=ids[stored_labels],
        names=_different_names(class_of_rows, files),
    )


def read_group(path: str, number: int) -> list[bytes]:
    """The files of all images of a row group, in order.

    Args:
        path: the parquet file.
        number: the number of the group in the file.

    Raises:
        ValueError: if the group is damaged, or an image has no bytes.
    """
    # The names of the classes were checked when the file was opened first.
    columns = _find_columns(path, ParquetOptions())
    group = _groups_of(path)[number]
    return list(_read_images(group, columns.image))


def _read_images(group: RowGroup, image_column: str) -> Iterator[bytes]:
    for batch in _read_batches(group, [f"{image_column}.bytes"]):
        for image in batch.column(0).flatten()[0]:
            data = image.as_py()
            if data is None:
                raise group.fault(
                    "an image has no bytes, only a path",
                    "take files that hold the images themselves (in the library datasets: "
                    "embed_external_files)",
                )
            yield data


def _import_pyarrow() -> Any:  # noqa: ANN401 - a module
    """The module pyarrow.parquet.

    Raises:
        ValueError: if pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet files need the package pyarrow: pip install 'resnet-dist[parquet]'"
        ) from None
    return pyarrow.parquet


def _open_file(path: str) -> Any:  # noqa: ANN401 - pyarrow.parquet.ParquetFile
    """Open a file and read its footer. Raises ValueError if it is no parquet file."""
    parquet = _import_pyarrow()
    try:
        # With pre_buffer, all columns of a group would be read at once.
        return parquet.ParquetFile(
            path,
            buffer_size=_BUFFER_BYTES,
            pre_buffer=False,
            page_checksum_verification=True,
        )
    # pyarrow's errors are ValueError or OSError, too.
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is no complete parquet file ({first_line(error)}): {_DOWNLOAD_AGAIN}"
        ) from None


def _groups_of(path: str) -> list[RowGroup]:
    with _open_file(path) as file:
        metadata = file.metadata
        groups = []
        for number in range(metadata.num_row_groups):
            found = metadata.row_group(number)
            group = RowGroup(path, number, found.num_rows, found.total_byte_size)
            groups.append(group)
        return groups


def _read_batches(group: RowGroup, columns: list[str]) -> Iterator[Any]:
    """The rows of some columns of a group, a few at a time.

    Raises:
        ValueError: if the group is damaged.
    """
    num_rows = 0
    with _open_file(group.path) as file:
        try:
            for batch in file.iter_batches(
                _ROWS_AT_ONCE, row_groups=[group.number], columns=columns, use_threads=False
            ):
                num_rows += batch.num_rows
                yield batch
        except (ValueError, OSError) as error:
            raise group.fault(f"it is damaged ({first_line(error)})") from None
    if num_rows != group.num_rows:
        raise group.fault(f"it has {num_rows} rows, and its header says {group.num_rows}")


def _read_rows(group: RowGroup, columns: _Columns) -> tuple[np.ndarray, list[str | None]]:
    """The labels and the file names of the rows of a group.

    Raises:
        ValueError: if a label is missing or no class.
    """
    labels: list[int | None] = []
    files: list[str | None] = []
    for batch in _read_batches(group, [f"{columns.image}.path", columns.label]):
        labels += batch.column(columns.label).to_pylist()
        # An image is a struct, of which only the path was read.
        (paths,) = batch.column(columns.image).flatten()
        files += paths.to_pylist()
    num_classes = len(columns.class_names)
    for row, label in enumerate(labels):
        is_class = label is not None and 0 <= label < num_classes
        if not is_class:
            raise _fault_of_label(group, row, label, num_classes)
    return np.array(labels, dtype=np.int64), files


def _fault_of_label(group: RowGroup, row: int, label: int | None, num_classes: int) -> ValueError:
    """The error for a row without a label, or with one that is no class."""
    problem = f"row {row} has the label {label}, and the classes are 0 to {num_classes - 1}"
    way_out = "check which data set and version this is"
    if label == -1:
        way_out = "this is a test set, whose labels are not published: import another split"
    return group.fault(problem, way_out)


def _find_columns(path: str, options: ParquetOptions) -> _Columns:
    """Find the columns of the image and of the label of a file, and the names of the classes.

    Raises:
        ValueError: if the schema is another one.
    """
    with _open_file(path) as file:
        schema = file.schema_arrow
    features = _features(schema.metadata)
    image = _find_column(path, schema, options.image_column, "image", features, "Image")
    label = _find_column(path, schema, options.label_column, "label", features, "ClassLabel")
    _check_types(path, schema, image, label)
    class_names = options.class_names or _stored_class_names(features, label)
    if not class_names:
        raise ValueError(
            f"{path} does not say the names of its classes (it has no metadata of Hugging Face for "
            f"the column {label}): give them with `resnet-dist data import-parquet --class_names "
            f"FILE`, one name a line in the order of the labels"
        )
    return _Columns(image, label, class_names)


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """The description of the columns by Hugging Face; empty if there is none."""
    if metadata is None:
        return {}
    text = metadata.get(_METADATA_KEY, b"{}")
    try:
        content = json.loads(text)
        features = content["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    if not isinstance(features, dict):
        return {}
    return features


def _find_column(
    path: str,
    schema: Any,  # noqa: ANN401 - pyarrow.Schema
    wanted: str,
    what: str,
    features: dict[str, Any],
    kind: str,
) -> str:
    """The name of a column.

    Args:
        path: the file, for messages.
        schema: its schema.
        wanted: the name that the user has given, or "".
        what: "image" or "label": the usual name.
        features: the description of the columns.
        kind: the type of the column in that description.

    Raises:
        ValueError: if there is no such column, or more than one.
    """
    names = schema.names
    option = f"`resnet-dist data import-parquet --{what}_column NAME`"
    if wanted:
        if wanted not in names:
            raise ValueError(
                f"{path} has no column {wanted}: choose one of {first_names(names, 20)}"
            )
        return wanted
    found = []
    for name, feature in features.items():
        is_described = name in names and isinstance(feature, dict)
        if is_described and feature.get("_type") == kind:
            found.append(name)
    if len(found) == 1:
        return found[0]
    if not found and what in names:
        return what
    if found:
        raise ValueError(
            f"{path} has several {what} columns, {first_names(found)}: choose one: {option}"
        )
    raise ValueError(
        f"{path} has no column {what}, only {first_names(names, 20)}: name the right one: {option}"
    )


def _check_types(path: str, schema: Any, image: str, label: str) -> None:  # noqa: ANN401
    """Raise ValueError unless the image is a struct of bytes and path, and the label an integer."""
    import pyarrow

    kind = schema.field(image).type
    is_struct = pyarrow.types.is_struct(kind)
    fields = {field.name for field in kind} if is_struct else set()
    if not {"bytes", "path"} <= fields:
        raise ValueError(
            f"{path}: the column {image} is {printable(kind)}, but an image of Hugging Face is a "
            f"struct of bytes and path: save the data set with an Image feature"
        )
    label_kind = schema.field(label).type
    if not pyarrow.types.is_integer(label_kind):
        raise ValueError(
            f"{path}: the column {label} is {printable(label_kind)}, but a label is an integer: "
            f"name another column with `resnet-dist data import-parquet --label_column NAME`"
        )


def _stored_class_names(features: dict[str, Any], label: str) -> tuple[str, ...]:
    """The names of the classes in the description of the columns; empty if there are none."""
    feature = features.get(label)
    if not isinstance(feature, dict):
        return ()
    names = feature.get("names")
    if not isinstance(names, list):
        return ()
    return tuple(map(str, names))


def _folder_names(class_names: tuple[str, ...], options: ParquetOptions) -> list[str]:
    """The names of the class folders, by label.

    Raises:
        ValueError: if two of them are the same.
    """
    if not options.class_names and _is_imagenet(class_names):
        return list(imagenet_ids())
    folders = [_folder_name(name) for name in class_names]
    known: dict[str, int] = {}
    for label, folder in enumerate(folders):
        if folder in known:
            raise ValueError(
                f"the classes {known[folder]} and {label} have the same name {printable(folder)}: "
                f"give different names with `resnet-dist data import-parquet --class_names FILE`"
            )
        known[folder] = label
    return folders


def _folder_name(class_name: str) -> str:
    """The name of a class as that of a folder: not empty, not hidden, and without slashes."""
    name = re.sub(r"[\x00-\x1f/]", "_", class_name.strip())
    if not name:
        return "_"
    if name.startswith("."):
        return "_" + name[1:]
    return name


def _is_imagenet(class_names: tuple[str, ...]) -> bool:
    """Whether these are the words of ImageNet's classes, in the usual order."""
    words = imagenet_words()
    if len(class_names) != len(words):
        return False
    num_same = 0
    for name, word in zip(class_names, words, strict=True):
        first_word, _, _ = name.partition(",")
        if first_word.strip().lower() == word.strip().lower():
            num_same += 1
    return num_same >= _ENOUGH_WORDS * len(words)


def _different_names(classes: list[str], files: list[str | None]) -> list[str]:
    """Give each image a name, `<class>/<file>`.

    The file name is that of the row. Where it is missing, or occurs twice in a class, it is made
    of the number of the row.
    """
    names: dict[str, None] = {}
    for row, (class_name, file) in enumerate(zip(classes, files, strict=True)):
        plain = (file or "").replace("\0", "_")
        # A name with a dot in front would be hidden.
        base = os.path.basename(plain).lstrip(".")
        stem, suffix = os.path.splitext(base)
        name = f"{class_name}/{base}"
        if not stem:
            name = f"{class_name}/{row:08d}.jpg"
        elif not suffix:
            name = f"{class_name}/{base}.jpg"
        if name in names:
            name = f"{class_name}/{row:08d}_{stem}{suffix or '.jpg'}"
        names[name] = None
    return list(names)
