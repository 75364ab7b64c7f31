"""The most probable classes of single images.

They go through the loader and the forward pass of evaluation, as a list of files.
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

from torch import nn

from resnet_dist import engine
from resnet_dist.config import Config
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.sources.index import SUFFIXES, list_files, some
from resnet_dist.data.types import IGNORED_LABEL
from resnet_dist.distributed import Runtime
from resnet_dist.precision import Precision
from resnet_dist.process import run_process
from resnet_dist.saved_network import SavedNetwork, load_network
from resnet_dist.text import printable

SIGPIPE_EXIT_CODE = 141
"""128 + SIGPIPE: nobody reads the output any more."""


@dataclass(frozen=True)
class Prediction:
    """What the network says about one file."""

    path: str
    problem: str
    """why the image cannot be used; empty if it can"""
    best: list[tuple[int, float]]
    """class ids and their probabilities, the most probable first"""


def run(saved: SavedNetwork, config: Config, options: argparse.Namespace) -> int:
    """Print the `options.top` most probable classes of the files `options.images`.

    Returns 1 if an image cannot be used (it is named, the others go on), 2 if none can be used,
    and `SIGPIPE_EXIT_CODE` if nobody reads the output.
    """

    def body(config: Config, runtime: Runtime) -> int:
        model, weights = load_network(saved, config, runtime.device)
        files = options.images
        print(f"{config.model.name}, {weights} weights of step {saved.step}", file=sys.stderr)
        # The name of a file need not be text.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            good = 0
            for prediction in predict_files(model, files, config, runtime, options.top):
                _print(prediction, saved.class_names, options.json, max(map(len, files)))
                if not prediction.problem:
                    good += 1
        except OSError as problem:
            # Of standard output: the loader keeps its own errors.
            return _output_is_gone(problem)
        if good == len(files):
            return 0
        return 1 if good else 2

    return run_process(config, body)


def _output_is_gone(problem: OSError) -> int:
    """The exit code if standard output is closed. Raises ValueError if it cannot be written."""
    # Python flushes once more when it ends, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(problem, BrokenPipeError):
        return SIGPIPE_EXIT_CODE
    raise ValueError(f"standard output cannot be written: {problem}") from problem


def _print(prediction: Prediction, names: list[str], as_json: bool, width: int) -> None:
    if as_json:
        print(json.dumps(_as_json(prediction, names)), flush=True)
        return
    path = printable(prediction.path)
    if prediction.problem:
        print(f"error: {path}: {printable(prediction.problem)}", file=sys.stderr)
        return
    for row, (class_id, share) in enumerate(prediction.best):
        title = path if row == 0 else ""
        print(f"{title:{width}}  {100 * share:6.2f} %  {printable(names[class_id])}")
    sys.stdout.flush()


def _as_json(prediction: Prediction, names: list[str]) -> dict[str, Any]:
    if prediction.problem:
        return {"path": prediction.path, "error": prediction.problem}
    best = [
        {"class": names[class_id], "index": class_id, "probability": share}
        for class_id, share in prediction.best
    ]
    return {"path": prediction.path, "predictions": best}


def predict_files(
    model: nn.Module, files: list[str], config: Config, runtime: Runtime, top: int
) -> Iterator[Prediction]:
    """The `top` most probable classes of each file, in order.

    Batches are those of evaluation. Equal logits rank by class id, as in `Counts`.
    """
    index = list_files(files)
    precision = Precision(config.train.precision, runtime.device)
    # The files are not those of the run: they must not enter its quarantine.jsonl.
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(
            build_val_loader(replace(config, output_dir=scratch), runtime, index=index)
        ) as loader,
    ):
        for batch in loader:
            assert batch is not None, "a single process has no rounds without a batch"
            logits = engine.predict_logits(model, batch, loader.mirrored, precision).cpu()
            order = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
            shares = logits.softmax(1).gather(1, order)
            labels = batch.labels.tolist()
            for place, row in enumerate(batch.indices.tolist()):
                problem = ""
                if labels[place] == IGNORED_LABEL:
                    problem = loader.quarantine.files[index.path(row)]  # type: ignore[attr-defined]
                best = list(zip(order[place].tolist(), shares[place].tolist(), strict=True))
                yield Prediction(files[row], problem, best)


def find_images(words: list[str]) -> list[str]:
    """The files that the arguments of the command name.

    A folder stands for the images (by `SUFFIXES`, not hidden) in it and below, sorted as in a data
    set. "-" stands for paths on standard input, one a line, or before each zero byte if there are
    any.

    Raises:
        ValueError: There is no image at all, or none of the named files exists.
    """
    files: list[str] = []
    for word in words:
        paths = _read_paths() if word == "-" else [word]
        for path in paths:
            if os.path.isdir(path):
                files.extend(_images_below(path))
            else:
                files.append(path)
    if not files:
        raise ValueError(
            f"no image: name files, folders with {', '.join(SUFFIXES)} in or below them, or - for "
            "a list"
        )
    if not any(os.path.exists(path) for path in files):
        raise ValueError(f"no image: {printable(some(files))} does not exist")
    return files


def _read_paths() -> list[str]:
    """The paths on standard input. Raises ValueError if it is an image itself."""
    data = sys.stdin.buffer.read()
    if data.startswith((b"\xff\xd8", b"\x89PNG")):
        raise ValueError(
            "- is a list of paths, but standard input is an image: name /dev/stdin for that"
        )
    separator = b"\0" if b"\0" in data else b"\n"
    return [os.fsdecode(line) for line in data.split(separator) if line]


def _images_below(folder: str) -> Iterator[str]:
    """The images in and below a folder; a folder that cannot be listed stands for itself."""
    unreadable: list[str] = []

    def note(problem: OSError) -> None:
        unreadable.append(str(problem.filename))

    for root, folders, names in os.walk(folder, onerror=note, followlinks=True):
        shown = [name for name in folders if not name.startswith(".")]
        # os.walk goes on into what is left in this list.
        folders[:] = sorted(name for name in shown if not _leads_back(root, name))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                yield os.path.join(root, name)
    yield from unreadable


def _leads_back(root: str, name: str) -> bool:
    """Whether a sub-folder links to `root` or a folder above it: a walk would not end."""
    inside = os.path.realpath(root) + "/"
    target = os.path.realpath(os.path.join(root, name)) + "/"
    return inside.startswith(target)
