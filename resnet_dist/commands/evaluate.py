"""`resnet-dist evaluate`: top-1 and top-5 accuracy of a network.

Any number of ranks counts the same integers.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from resnet_dist.checkpoints.saved_network import SavedNetwork, build_network, load_into
from resnet_dist.commands.evaluate_details import (
    DetailFiles,
    DetailWriter,
    check_detail_files,
)
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_val_loader
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation import loop as evaluation
from resnet_dist.evaluation.evaluation_file import EvaluatedNetwork
from resnet_dist.evaluation.intervals import wilson_interval
from resnet_dist.evaluation.sets.classes import (
    Classes,
    ClassMap,
    ClassMask,
    RelabelledLoader,
    map_classes,
)
from resnet_dist.evaluation.sets.layouts import open_folder
from resnet_dist.metrics import Counts
from resnet_dist.models.zoo import check_image_size
from resnet_dist.precision import build_precision
from resnet_dist.text import printable

Results = dict[str, Any]
"""The results of a command, of plain types."""

# An accuracy of at most this many times that of guessing is suspicious.
_TIMES_GUESSING = 3


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate a network on."""

    data: str = ""
    """folder of another data set; empty: the validation set of the settings"""
    classes: Classes = ""
    """what to do with the logits of classes that the data set does not have"""
    files: DetailFiles = DetailFiles()
    """files about each image and each class"""


def run(
    saved: SavedNetwork,
    config: Config,
    options: argparse.Namespace,
) -> int:
    """Evaluate the weights of a checkpoint and, if it has them, the averaged weights.

    The main process prints the results. Nothing is written to the folders that the checkpoint
    names, because they may belong to another user or machine.

    Args:
        saved: The weights.
        config: The settings of their run.
        options: `json`, whether to print a JSON object; `data_folder`, another data set; `classes`,
            see `EvaluationRequest`; `predictions` and `details`, see `DetailFiles`.

    Returns:
        The exit code.
    """
    files = DetailFiles(options.predictions, options.details)
    request = EvaluationRequest(options.data_folder, options.classes or "", files)

    def body(config: Config, runtime: Runtime) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            results = evaluate_network(saved, config, runtime, scratch, request)
        if not runtime.is_main:
            return 0
        print_remarks(results["remarks"])
        text = describe_results(results)
        if options.json:
            text = json.dumps(results)
        print(text, flush=True)
        return 0

    return run_process(config, body)


def print_remarks(remarks: Sequence[str]) -> None:
    """Print sentences about what was assumed or found to standard error."""
    for remark in remarks:
        print(f"note: {printable(remark)}", file=sys.stderr, flush=True)


def evaluate_network(
    saved: SavedNetwork,
    config: Config,
    runtime: Runtime,
    scratch: str,
    request: EvaluationRequest = EvaluationRequest(),
) -> Results:
    """Evaluate a network on a data set. Call it on every rank.

    Args:
        saved: The weights.
        config: The settings of their run.
        runtime: The process group.
        scratch: A folder for temporary files.
        request: What to evaluate on.

    Returns:
        A dictionary with the keys

        - "weights": the file,
        - "step": the step of the checkpoint; None for weights of another program,
        - "model" and "ema": `Counts.result` of the weights and of the averaged weights,
        - "num_classes": the number of classes that an image may be assigned to,
        - "bad_images": how many images could not be decoded, if any,
        - "remarks": sentences for the user.

    Raises:
        ValueError: The data does not fit the network, or the logits are not finite.
    """
    check_image_size(config.model.name, config.data)
    runtime.on_main(lambda: check_detail_files(request.files))
    place = request.data or config.data.data_dir
    loader = _open_images(config, runtime, scratch, request)
    with closing(loader):
        names = saved.names_or(loader.class_names)
        class_map = map_classes(loader.class_names, names, request.classes, printable(place))
        results: Results = {
            "weights": str(saved.path),
            "step": None if saved.is_foreign else saved.step,
            "num_classes": class_map.num_competing,
        }
        remarks = [*saved.remarks, *class_map.remarks]
        model = build_network(saved, config, runtime.device)
        kinds = [kind for kind in ("model", "ema") if saved.content[kind]]
        for kind in kinds:
            load_into(model, saved, kind)
            # The details are those of the averaged weights, if there are any.
            files = request.files if kind == kinds[-1] else DetailFiles()
            network = _describe_network(saved, kind, config, class_map)
            writer = DetailWriter(files, config.data, network, class_map.outputs)
            counts = count_mapped(model, loader, class_map, config, runtime, writer.collector)
            results[kind] = counts.result(class_map.num_competing)
            writer.write(loader, runtime)
            hint = hint_at_guessing(results[kind]["top1"], class_map, saved.reported_top1)
            remarks.extend(hint)
        num_bad = runtime.sum_integer(loader.num_bad)
        if num_bad:
            results["bad_images"] = num_bad
        results["remarks"] = remarks
    return results


def _open_images(
    config: Config, runtime: Runtime, scratch: str, request: EvaluationRequest
) -> ValLoader:
    """Build this rank's loader of the images; see `evaluate_network`."""
    has_folder = request.data or config.data.data_dir
    if config.data.kind == "folder" and not has_folder:
        raise ValueError(
            "--data is missing: name the folder of the data set, since the weights do not say it"
        )
    data = _read_only(config.data, runtime, scratch)
    loader_config = replace(config, data=data, output_dir=scratch)
    if request.data:
        return open_folder(request.data, loader_config, runtime)
    return build_val_loader(loader_config, runtime)


def _describe_network(
    saved: SavedNetwork, kind: str, config: Config, class_map: ClassMap
) -> EvaluatedNetwork:
    """What the files about an evaluation say about its network."""
    num_competing = None
    if class_map.is_masked:
        num_competing = class_map.num_competing
    return EvaluatedNetwork(
        name=config.model.name,
        weights="averaged" if kind == "ema" else "raw",
        step=0 if saved.is_foreign else saved.step,
        class_names=list(class_map.names),
        num_competing=num_competing,
    )


def count_mapped(
    model: nn.Module,
    loader: ValLoader,
    class_map: ClassMap,
    config: Config,
    runtime: Runtime,
    collect: evaluation.Collector | None = None,
) -> Counts:
    """Evaluate a network on a data set whose classes are a part of its own, or in another order.

    Args:
        model: The network.
        loader: The data set.
        class_map: Which output of the network each class of the data set is.
        config: The settings: `train.precision`.
        runtime: The process group.
        collect: Gets each batch and its logits. The labels are outputs of the network.

    Raises:
        ValueError: Some logits are not finite.
    """
    relabelled = RelabelledLoader(loader, class_map, runtime.device)
    network = model
    if class_map.is_masked:
        network = ClassMask(model, class_map.outputs, len(class_map.names))
    precision = build_precision(config.train, runtime.device)
    counts = evaluation.evaluate(network, relabelled, runtime, precision, collect=collect)
    assert counts is not None
    if not counts.loss_sum.isfinite():
        raise ValueError(
            f"train.precision is {config.train.precision}: the network's logits are NaN or "
            "infinite on some images: evaluate with --train.precision fp32; if they still are, "
            "the training has diverged: take an earlier checkpoint"
        )
    return counts


def hint_at_guessing(top1: float, class_map: ClassMap, reported: float | None) -> list[str]:
    """What is usually wrong if a good network is hardly better than guessing.

    Args:
        top1: The accuracy in percent.
        class_map: The classes.
        reported: The accuracy in percent that the weights claim; None for none.

    Returns:
        One sentence, or none.
    """
    suspicious = _TIMES_GUESSING * 100 / class_map.num_competing
    if reported is None or top1 > suspicious or reported <= 2 * suspicious:
        return []
    return [
        f"top-1 is {top1:.2f} %, hardly better than guessing among {class_map.num_competing} "
        f"classes, though the weights report {reported:.2f} %. Usually the class folders are in "
        "another order than the outputs of the network, the pixels are normalised in another way "
        "(data.mean, data.std), or model options differ that have no weights (model.shortcut). "
        "Only on images that were chosen because networks fail on them (ImageNet-A) is it normal"
    ]


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


def describe_results(results: Results) -> str:
    """Format the results of `evaluate_network` as lines of text."""
    titles = {
        "model": "weights",
        "ema": "averaged weights",
    }
    lines = [printable(results["weights"])]
    if results["step"] is not None:
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
    top1 = wilson_interval(counts["correct1"], num)
    parts = [
        f"top-1 {counts['top1']:.3f} % ({counts['correct1']}/{num})",
        f"95 % interval {top1.low:.2f} to {top1.high:.2f} %",
    ]
    # There is no top-5 accuracy with fewer than six classes.
    if "top5" in counts:
        parts.append(f"top-5 {counts['top5']:.3f} % ({counts['correct5']}/{num})")
    parts.append(f"loss {counts['loss']:.4f}")
    return ", ".join(parts)
