"""`resnet-dist evaluate`: top-1 and top-5 accuracy of a checkpoint.

Any number of ranks counts the same integers.
"""

import argparse
import json
import os
import tempfile
from contextlib import closing
from dataclasses import replace
from typing import Any

from resnet_dist import evaluation
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed import Runtime
from resnet_dist.models.zoo import check_image_size
from resnet_dist.precision import Precision
from resnet_dist.process import run_process
from resnet_dist.saved_network import SavedNetwork, build_network, load_into

Results = dict[str, Any]
"""The results of a command, of plain types."""


def run(
    saved: SavedNetwork,
    config: Config,
    options: argparse.Namespace,
) -> int:
    """Evaluate the weights of a checkpoint and, if it has them, the averaged weights.

    The main process prints the results. Nothing is written to the folders that the checkpoint
    names, because they may belong to another user or machine.

    Args:
        saved: The checkpoint.
        config: The settings of its run.
        options: `json`, whether to print a JSON object.

    Returns:
        The exit code.
    """

    def body(config: Config, runtime: Runtime) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            results = evaluate_network(saved, config, runtime, scratch)
        if not runtime.is_main:
            return 0
        text = describe_results(results)
        if options.json:
            text = json.dumps(results)
        print(text, flush=True)
        return 0

    return run_process(config, body)


def evaluate_network(
    saved: SavedNetwork,
    config: Config,
    runtime: Runtime,
    scratch: str,
) -> Results:
    """Evaluate a checkpoint on the validation set. Call it on every rank.

    Args:
        saved: The checkpoint.
        config: The settings of its run.
        runtime: The process group.
        scratch: A folder for temporary files.

    Returns:
        A dictionary with the keys

        - "step": the step of the checkpoint,
        - "model" and "ema": `Counts.result` of the weights and of the averaged weights,
        - "bad_images": how many images could not be decoded, if any.

    Raises:
        ValueError: The data does not fit the network.
    """
    check_image_size(config.model.name, config.data)
    data = _read_only(config.data, runtime, scratch)
    loader_config = replace(config, data=data, output_dir=scratch)
    loader = build_val_loader(loader_config, runtime)
    with closing(loader):
        num_classes = check_num_classes(config.model.num_classes, len(loader.class_names))
        _check_class_names(saved, loader, config.data.data_dir)
        model = build_network(saved, config, runtime.device)
        precision = Precision(config.train.precision, runtime.device)
        results: Results = {"step": saved.step}
        for kind in ("model", "ema"):
            if not saved.content[kind]:
                continue
            load_into(model, saved, kind)
            counts = evaluation.evaluate(model, loader, runtime, precision)
            assert counts is not None
            results[kind] = counts.result(num_classes)
        num_bad = runtime.sum_integer(loader.num_bad)
        if num_bad:
            results["bad_images"] = num_bad
    return results


def _read_only(
    data: DataConfig,
    runtime: Runtime,
    scratch: str,
) -> DataConfig:
    """Change the settings of the data so that nothing is written to data_dir.

    This concerns the embedded digits. Unless data_dir exists, they are written to the `scratch`
    folder of the main process.
    """
    if data.kind != "digits":
        return data
    if os.path.isdir(data.data_dir):
        return replace(data, kind="folder")
    main_scratch = runtime.broadcast_object(scratch)
    folder = os.path.join(main_scratch, "digits")
    return replace(data, data_dir=folder)


def _check_class_names(
    saved: SavedNetwork,
    loader: ValLoader,
    data_dir: str,
) -> None:
    """Raise ValueError if the data set has other classes than the checkpoint."""
    expected = list(saved.class_names)
    found = list(loader.class_names)
    if found != expected:
        raise ValueError(
            f"data.data_dir is {data_dir!r}: its classes are not those of the checkpoint, in the "
            "same order; take the data set that it was trained on"
        )


def describe_results(results: Results) -> str:
    """Format the results of `evaluate_network` as lines of text."""
    titles = {
        "model": "weights",
        "ema": "averaged weights",
    }
    lines = [f"step {results['step']}"]
    for kind, title in titles.items():
        if kind in results:
            counts = _describe_counts(results[kind])
            lines.append(f"{title}: {counts}")
    if "bad_images" in results:
        lines.append(f"{results['bad_images']} images cannot be decoded and count as misses")
    return "\n".join(lines)


def _describe_counts(counts: Results) -> str:
    """Format `Counts.result` as one line of text."""
    num = counts["num"]
    parts = [f"top-1 {counts['top1']:.3f} % ({counts['correct1']}/{num})"]
    # There is no top-5 accuracy with fewer than six classes.
    if "top5" in counts:
        parts.append(f"top-5 {counts['top5']:.3f} % ({counts['correct5']}/{num})")
    parts.append(f"loss {counts['loss']:.4f}")
    return ", ".join(parts)
