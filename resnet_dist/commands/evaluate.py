"""Top-1 and top-5 of a checkpoint: the same integer counts on any number of ranks."""

import argparse
import json
import os
import tempfile
from contextlib import closing
from dataclasses import replace
from typing import Any

from resnet_dist import engine
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


def run(saved: SavedNetwork, config: Config, options: argparse.Namespace) -> int:
    """Evaluate the weights of a checkpoint and, if it has them, the averaged ones.

    The main process prints the result. Nothing is written into the folders that the checkpoint
    names: it may be of another user or machine.
    """

    def body(config: Config, runtime: Runtime) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            results = evaluate_network(saved, config, runtime, scratch)
        if runtime.is_main:
            print(json.dumps(results) if options.json else describe_results(results), flush=True)
        return 0

    return run_process(config, body)


def evaluate_network(
    saved: SavedNetwork, config: Config, runtime: Runtime, scratch: str
) -> Results:
    """The counts of a checkpoint on the validation set; called by every rank.

    Returns:
        "step", and under "model" and "ema" what `Counts.result` gives for these weights; under
        "bad_images" how many images could not be decoded, if any.

    Raises:
        ValueError: The data does not fit the network.
    """
    check_image_size(config.model.name, config.data)
    data = _read_only(config.data, runtime, scratch)
    loader = build_val_loader(replace(config, data=data, output_dir=scratch), runtime)
    with closing(loader):
        num_classes = check_num_classes(config.model.num_classes, len(loader.class_names))
        _check_class_names(saved, loader, config.data.data_dir)
        model = build_network(saved, config, runtime.device)
        precision = Precision(config.train.precision, runtime.device)
        results: Results = {"step": saved.step}
        for kind in ("model", "ema"):
            if saved.content[kind]:
                load_into(model, saved, kind)
                counts = engine.evaluate(model, loader, runtime, precision)
                assert counts is not None
                results[kind] = counts.result(num_classes)
        bad_images = runtime.sum_integer(loader.num_bad)
        if bad_images:
            results["bad_images"] = bad_images
    return results


def _read_only(data: DataConfig, runtime: Runtime, scratch: str) -> DataConfig:
    """The data section such that nothing is written where it points to.

    The embedded digits are written to `scratch` of the main process unless their folder exists.
    """
    if data.kind != "digits":
        return data
    if os.path.isdir(data.data_dir):
        return replace(data, kind="folder")
    folder = os.path.join(runtime.broadcast_object(scratch), "digits")
    return replace(data, data_dir=folder)


def _check_class_names(saved: SavedNetwork, loader: ValLoader, data_dir: str) -> None:
    if list(saved.class_names) != list(loader.class_names):
        raise ValueError(
            f"data.data_dir is {data_dir!r}: its classes are not those of the checkpoint, in the "
            "same order; take the data set that it was trained on"
        )


def describe_results(results: Results) -> str:
    """The results as lines of text."""
    lines = [f"step {results['step']}"]
    for kind, title in (("model", "weights"), ("ema", "averaged weights")):
        if kind in results:
            lines.append(f"{title}: {_describe_counts(results[kind])}")
    if "bad_images" in results:
        lines.append(f"{results['bad_images']} images cannot be decoded and count as misses")
    return "\n".join(lines)


def _describe_counts(counts: Results) -> str:
    parts = [f"top-1 {counts['top1']:.3f} % ({counts['correct1']}/{counts['num']})"]
    if "top5" in counts:
        parts.append(f"top-5 {counts['top5']:.3f} % ({counts['correct5']}/{counts['num']})")
    parts.append(f"loss {counts['loss']:.4f}")
    return ", ".join(parts)
