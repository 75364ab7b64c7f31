"""The most probable classes of single images: evaluation's loader and forward pass over a list of
files.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from resnet_dist import engine
from resnet_dist.config import Config
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.sources.index import SUFFIXES, list_files
from resnet_dist.data.types import IGNORED_LABEL
from resnet_dist.distributed import Runtime
from resnet_dist.precision import Precision
from resnet_dist.process import run_process
from resnet_dist.state import load_network


def run(saved: dict, config: Config, options: argparse.Namespace) -> int:
    """Print the options.top most probable classes of options.images, as evaluation sees them.
    Returns 1 if an image cannot be used (it is named, the others go on), 2 if none can, 141
    (SIGPIPE's) if nobody reads on.
    """

    def body(config: Config, runtime: Runtime) -> int:
        model, weights = load_network(saved, config, runtime.device)
        files, names, good = find_images(options.images), saved["class_names"], 0
        width = max(map(len, files))
        print(f"{config.model.name}, {weights} weights of step {saved['step']}", file=sys.stderr)
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a file's name may be what no encoding has
        try:
            for path, problem, best in predict(model, files, config, runtime, options.top):
                good += not problem
                if options.json:
                    best = [
                        {"class": names[i], "index": i, "probability": share} for i, share in best
                    ]
                    told = {"error": problem} if problem else {"predictions": best}
                    print(json.dumps({"path": path, **told}), flush=True)
                elif problem:
                    print(f"error: {path}: {problem}", file=sys.stderr)
                else:
                    print(
                        *(
                            f"{'' if row else path:{width}}  {100 * share:6.2f} %  {names[i]}"
                            for row, (i, share) in enumerate(best)
                        ),
                        sep="\n",
                        flush=True,
                    )
        except OSError as problem:  # of standard output: the loader keeps its own
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # Python flushes once more at its end
            if isinstance(problem, BrokenPipeError):
                return 141
            raise ValueError(f"standard output cannot be written: {problem}") from problem
        return (1 if good else 2) if good < len(files) else 0

    return run_process(config, body)


def predict(model, files: list[str], config: Config, runtime: Runtime, top: int) -> Iterator[tuple]:
    """For each file, in order: path, "" or what is wrong with it, its `top` best as (class id,
    probability). Batches are those of evaluation. Equal logits rank by class id, as in Counts.
    """
    index = list_files(files)
    precision = Precision(config.train.precision, runtime.device)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(
            # The quarantine.jsonl of these images does not belong into the run's folder.
            build_val_loader(replace(config, output_dir=scratch), runtime, index=index)
        ) as loader,
    ):
        for batch in loader:
            logits = engine.predict_logits(model, batch, loader.mirrored, precision).cpu()
            order = logits.argsort(dim=1, descending=True, stable=True)[:, :top]
            columns = (
                batch.labels.tolist(),
                order.tolist(),
                logits.softmax(1).gather(1, order).tolist(),
            )
            for row, label, classes, shares in zip(batch.indices.tolist(), *columns, strict=True):
                problem = loader.quarantine.files[index.path(row)] if label == IGNORED_LABEL else ""
                yield files[row], problem, list(zip(classes, shares, strict=True))


def find_images(words: list[str]) -> list[str]:
    """The files that are named, and the images (SUFFIXES, not hidden) in and below folders, sorted
    as in a data set. "-" stands for words on standard input, one a line or before each zero byte.
    Raises ValueError where nothing is.
    """
    files, words = [], list(words)
    for word in words:  # which may grow
        if word == "-":
            data = sys.stdin.buffer.read()
            if data.startswith((b"\xff\xd8", b"\x89PNG")):
                raise ValueError(
                    "- is a list of paths, but standard input is an image: name /dev/stdin for that"
                )
            words += [
                os.fsdecode(line) for line in data.split(b"\0" if b"\0" in data else b"\n") if line
            ]
        elif not os.path.isdir(word):
            files.append(word)
        else:
            for root, folders, names in os.walk(
                word, onerror=lambda bad: files.append(bad.filename), followlinks=True
            ):
                folders[:] = sorted(
                    name
                    for name in folders
                    if name[0] != "."
                    and not f"{os.path.realpath(root)}/".startswith(  # links in a circle
                        f"{os.path.realpath(os.path.join(root, name))}/"
                    )
                )
                files.extend(
                    os.path.join(root, name)
                    for name in sorted(names)
                    if name[0] != "." and name.lower().endswith(SUFFIXES)
                )
    if not files:
        raise ValueError(
            f"no image: name files, folders with {', '.join(SUFFIXES)} in or below them, or - for a list"
        )
    return files
