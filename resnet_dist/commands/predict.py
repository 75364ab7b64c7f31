"""`resnet-dist predict`: the most probable classes of single images.

The images pass through the data loader and the forward pass of evaluation.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from resnet_dist.checkpoints.saved_network import (
    SavedNetwork,
    load_network,
    refuse_several_processes,
)
from resnet_dist.config import Config
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.sources.index import SUFFIXES, first_names, list_files
from resnet_dist.data.types import IGNORED_LABEL
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation import loop as evaluation
from resnet_dist.models.class_names import words_of
from resnet_dist.precision import build_precision
from resnet_dist.text import printable

SIGPIPE_EXIT_CODE = 141
"""128 + SIGPIPE: the reader of the output has closed it."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file."""

    path: str
    """the file"""
    problem: str
    """why the image cannot be used; empty if it can"""
    best: list[tuple[int, float]]
    """class indices and their probabilities, the most probable first"""


@dataclass(frozen=True)
class ClassNames:
    """What the outputs of a network are called."""

    folders: list[str]
    """the names of the classes in the data set, as n01440764"""
    words: list[str]
    """words for a person, as "tench"; the same as `folders` where there are none"""

    @staticmethod
    def of(saved: SavedNetwork, config: Config) -> "ClassNames":
        """The names of the classes of saved weights.

        Args:
            saved: The weights.
            config: The settings of their run: a file of words may lie in `data.data_dir`.
        """
        folders = saved.names_or(())
        return ClassNames(folders, words_of(folders, config.data.data_dir))


def run(
    saved: SavedNetwork,
    config: Config,
    options: argparse.Namespace,
) -> int:
    """Print the most probable classes of each image.

    An image that cannot be used gets an error message, and the others are predicted.

    Args:
        saved: The checkpoint.
        config: The settings of its run.
        options: `images`, the files; `top`, the number of classes of each; `json`, whether to print
            one JSON object per image.

    Returns:
        The exit code: 0, 1 if some images cannot be used, 2 if none can be used, and
        `SIGPIPE_EXIT_CODE` if the reader of the output has closed it.
    """

    def body(config: Config, runtime: Runtime) -> int:
        refuse_several_processes()
        model, weights = load_network(saved, config, runtime.device)
        files = options.images
        width = max(len(file) for file in files)
        print(f"{config.model.name}, {weights} weights of {saved.origin}", file=sys.stderr)
        for remark in saved.remarks:
            print(f"note: {remark}", file=sys.stderr)
        names = ClassNames.of(saved, config)
        # A file name may have bytes that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        num_good = 0
        try:
            for prediction in predict_files(model, files, config, runtime, options.top):
                _print(prediction, names, options.json, width)
                if not prediction.problem:
                    num_good += 1
        except OSError as problem:
            # The loader handles its own errors, so this one comes from standard output.
            return _handle_output_error(problem)
        if num_good == len(files):
            return 0
        if num_good > 0:
            return 1
        return 2

    return run_process(config, body)


def _handle_output_error(problem: OSError) -> int:
    """Handle an error of standard output.

    Returns:
        The exit code if the reader has closed it.

    Raises:
        ValueError: It cannot be written for another reason.
    """
    # Python flushes standard output when it exits, which would fail again.
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, sys.stdout.fileno())
    if isinstance(problem, BrokenPipeError):
        return SIGPIPE_EXIT_CODE
    raise ValueError(f"standard output cannot be written: {problem}") from problem


def _print(
    prediction: Prediction,
    names: ClassNames,
    as_json: bool,
    width: int,
) -> None:
    """Print the prediction for one file.

    Args:
        prediction: The prediction.
        names: What the classes are called.
        as_json: Whether to print a JSON object.
        width: Width of the column with the file name.
    """
    if as_json:
        record = _as_json(prediction, names)
        print(json.dumps(record), flush=True)
        return
    path = printable(prediction.path)
    if prediction.problem:
        print(f"error: {path}: {printable(prediction.problem)}", file=sys.stderr)
        return
    title = path
    for class_index, probability in prediction.best:
        percent = 100 * probability
        name = printable(names.words[class_index])
        print(f"{title:{width}}  {percent:6.2f} %  {name}")
        # Only the first line has the file name.
        title = ""
    sys.stdout.flush()


def _as_json(prediction: Prediction, names: ClassNames) -> dict[str, Any]:
    """The prediction for one file as plain types."""
    if prediction.problem:
        return {"path": prediction.path, "error": prediction.problem}
    predictions = []
    for class_index, probability in prediction.best:
        entry = {
            "class": names.folders[class_index],
            "index": class_index,
            "probability": probability,
        }
        if names.words != names.folders:
            entry["words"] = names.words[class_index]
        predictions.append(entry)
    return {"path": prediction.path, "predictions": predictions}


def predict_files(
    model: nn.Module,
    files: list[str],
    config: Config,
    runtime: Runtime,
    top: int,
) -> Iterator[Prediction]:
    """Predict the classes of image files, in batches as in evaluation.

    Args:
        model: The network, on the device of `runtime`.
        files: The paths of the images.
        config: The settings of the run that trained the network.
        runtime: A single process.
        top: Number of classes of each file.

    Yields:
        The prediction for each file, in order. Classes with equal logits are sorted by index, as in
        `Counts`.
    """
    index = list_files(files)
    precision = build_precision(config.train, runtime.device)
    with tempfile.TemporaryDirectory() as scratch:
        # Bad files must not be added to the quarantine.jsonl in output_dir.
        loader_config = replace(config, output_dir=scratch)
        loader = build_val_loader(loader_config, runtime, index=index)
        with closing(loader):
            for batch in loader:
                assert batch is not None, "a single process has no rounds without a batch"
                logits = evaluation.predict_logits(
                    model,
                    batch,
                    loader.mirrored,
                    precision,
                )
                best_of_batch = _most_probable(logits.cpu(), top)
                rows = batch.indices.tolist()
                labels = batch.labels.tolist()
                for row, label, best in zip(rows, labels, best_of_batch, strict=True):
                    problem = ""
                    if label == IGNORED_LABEL:
                        path = index.path(row)
                        problem = loader.quarantine.files[path]  # type: ignore[attr-defined]
                    yield Prediction(files[row], problem, best)


def _most_probable(logits: torch.Tensor, top: int) -> list[list[tuple[int, float]]]:
    """The `top` most probable classes of each row of logits [N, classes].

    Returns:
        For each row, class indices and their probabilities, the most probable first.
    """
    order = logits.argsort(
        dim=1,
        descending=True,
        stable=True,
    )
    class_indices = order[:, :top]
    probabilities = logits.softmax(1).gather(1, class_indices)
    rows = []
    for row_indices, row_probabilities in zip(
        class_indices.tolist(),
        probabilities.tolist(),
        strict=True,
    ):
        rows.append(list(zip(row_indices, row_probabilities, strict=True)))
    return rows


def find_images(words: list[str]) -> list[str]:
    """Find the files that the arguments of the command name.

    Args:
        words: Files, folders and "-". A folder stands for the images in it and in its sub-folders
            (by `SUFFIXES`, without hidden ones), sorted as in a data set. "-" stands for the paths
            on standard input, one per line, or separated by zero bytes if there are any.

    Raises:
        ValueError: There is no image at all, or none of the files exists.
    """
    files: list[str] = []
    for word in words:
        paths = [word]
        if word == "-":
            paths = _read_paths()
        for path in paths:
            if os.path.isdir(path):
                files.extend(_images_below(path))
            else:
                files.append(path)
    if not files:
        suffixes = ", ".join(SUFFIXES)
        raise ValueError(
            f"no image: name files, folders with {suffixes} in or below them, or - for a list"
        )
    for path in files:
        if os.path.exists(path):
            return files
    raise ValueError(f"no image: {printable(first_names(files))} does not exist")


def _read_paths() -> list[str]:
    """Read paths from standard input.

    Raises:
        ValueError: Standard input is an image.
    """
    data = sys.stdin.buffer.read()
    if data.startswith((b"\xff\xd8", b"\x89PNG")):
        raise ValueError(
            "- is a list of paths, but standard input is an image: name /dev/stdin for that"
        )
    separator = b"\n"
    if b"\0" in data:
        separator = b"\0"
    paths = []
    for line in data.split(separator):
        if line:
            paths.append(os.fsdecode(line))
    return paths


def _images_below(folder: str) -> Iterator[str]:
    """Find the images in a folder and in its sub-folders.

    Yields:
        The paths of the images, and then the folders that cannot be listed, so that they are
        reported as images that cannot be read.
    """
    unreadable: list[str] = []

    def remember(problem: OSError) -> None:
        unreadable.append(str(problem.filename))

    for root, folders, names in os.walk(folder, onerror=remember, followlinks=True):
        visited = []
        for name in sorted(folders):
            if not name.startswith(".") and not _leads_back(root, name):
                visited.append(name)
        # os.walk visits the sub-folders that are left in this list.
        folders[:] = visited
        for name in sorted(names):
            is_hidden = name.startswith(".")
            if not is_hidden and name.lower().endswith(SUFFIXES):
                yield os.path.join(root, name)
    yield from unreadable


def _leads_back(root: str, name: str) -> bool:
    """Whether the sub-folder `name` links to `root` or to a parent of it: an endless walk."""
    path = os.path.join(root, name)
    target = os.path.realpath(path) + "/"
    real_root = os.path.realpath(root) + "/"
    return real_root.startswith(target)
