"""The commands that take the weights of a network: evaluate, predict and export.

This module reads their options. What they need beyond is imported when they run.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jsonargparse import Namespace

from resnet_dist.config import Config, ModelConfig
from resnet_dist.settings.options import (
    CommandLine,
    Parser,
    add_config_options,
    add_json_option,
    config_or_print,
    is_first_rank,
    print_error,
)
from resnet_dist.settings.reading import build_config
from resnet_dist.settings.rules import PositiveInt
from resnet_dist.text import printable

if TYPE_CHECKING:
    from resnet_dist.checkpoints.saved_network import SavedNetwork

_Command: TypeAlias = Callable[["SavedNetwork", Config, argparse.Namespace], int]


def _add_weights_options(parser: Parser) -> None:
    parser.add_path(
        "--weights",
        metavar="W",
        help="the network: the folder of a run; a checkpoint; a .pth or .safetensors file of "
        "torchvision, timm or NVIDIA, with --model.name; or torchvision:resnet50:IMAGENET1K_V2",
    )
    parser.add_path(
        "--checkpoint",
        dest="checkpoint_file",
        metavar="PATH",
        help="as --weights",
    )
    add_config_options(parser)


def add_evaluate_options(parser: Parser) -> None:
    """Add the options of `resnet-dist evaluate`."""
    parser.add_path(
        "--data",
        dest="data_folder",
        default="",
        metavar="DIR",
        help="folder of another data set: with val/ in it, or of class folders itself",
    )
    parser.add_option(
        "--classes",
        choices=["present", "all"],
        help="for a data set with part of the classes: present: only its classes compete; all: "
        "the logits of the others are kept",
    )
    parser.add_path(
        "--suite",
        default="",
        metavar="FILE",
        help="YAML file with several data sets: evaluate all, and write one table",
    )
    parser.add_path(
        "--output",
        default="",
        metavar="DIR",
        help="with --suite: folder for the table; empty: NAME_results for NAME.yaml",
    )
    parser.add_path(
        "--predictions",
        default="",
        metavar="FILE.parquet",
        help="also write the five most probable classes and the loss of each image",
    )
    parser.add_path(
        "--details",
        default="",
        metavar="FILE.json",
        help="also write accuracy per class, confusions, calibration and some images, for "
        "`resnet-dist report`",
    )
    add_json_option(parser)
    _add_weights_options(parser)


def run_evaluate(line: CommandLine) -> int:
    """Run `resnet-dist evaluate`."""
    name = _weights_name(line)
    typed = line.typed()
    has_suite = _is_given(typed, "suite")
    for option, key in (("data", "data_folder"), ("classes", "classes")):
        if has_suite and _is_given(typed, key):
            line.parser.error(f"--{option} and --suite exclude each other: name it in the suite")
    for option in ("predictions", "details"):
        if has_suite and _is_given(typed, option):
            line.parser.error(f"--{option} and --suite exclude each other: evaluate one set alone")
    if _is_given(typed, "output") and not has_suite:
        line.parser.error("--output is for the table of a --suite")

    from resnet_dist.commands import evaluate

    own_options = (
        "json",
        "data_folder",
        "classes",
        "suite",
        "output",
        "predictions",
        "details",
    )
    run = evaluate.run
    if has_suite:
        from resnet_dist.commands import evaluate_suite

        run = evaluate_suite.run
    return _run_on_weights(line, name, run, own_options)


def add_predict_options(parser: Parser) -> None:
    """Add the options of `resnet-dist predict`."""
    parser.add_path(
        "images", nargs="*", metavar="IMAGE", help="file; folder; - reads paths from stdin"
    )
    parser.add_option(
        "--top", type=PositiveInt, default=5, metavar="K", help="number of classes to print"
    )
    parser.add_option(
        "--json", action="store_true", help="print one JSON object per image, also for errors"
    )
    _add_weights_options(parser)


def run_predict(line: CommandLine) -> int:
    """Run `resnet-dist predict`."""
    name = _weights_name(line)

    from resnet_dist.commands import predict

    # Before the network is loaded: a wrong name should not take that long to be noticed.
    try:
        images = predict.find_images(line.options().images)
    except ValueError as problem:
        print_error(problem)
        return 2

    def run(saved: "SavedNetwork", config: Config, options: argparse.Namespace) -> int:
        options.images = images
        return predict.run(saved, config, options)

    return _run_on_weights(line, name, run, ("top", "json"))


def add_export_options(parser: Parser) -> None:
    """Add the options of `resnet-dist export`."""
    parser.add_option(
        "--to",
        choices=["onnx", "torch_export", "safetensors", "torchvision"],
        help="file format",
    )
    parser.add_path("--output", metavar="FILE", help="file to write")
    parser.add_option(
        "--raw_weights", action="store_true", help="export the trained weights instead of their EMA"
    )
    _add_weights_options(parser)


def run_export(line: CommandLine) -> int:
    """Run `resnet-dist export`."""
    name = _weights_name(line)
    typed = line.typed()
    for option in ("to", "output"):
        if not _is_given(typed, option):
            line.parser.error(f"--{option} is missing")

    from resnet_dist.commands import export

    return _run_on_weights(line, name, export.run, ("to", "output", "raw_weights"))


def _is_given(typed: Namespace, key: str) -> bool:
    """Whether an option was given. A section of the same name may stand in its place."""
    return key in typed and not isinstance(typed[key], Namespace)


def _weights_name(line: CommandLine) -> str:
    """The value of --weights or --checkpoint. Ends the process unless there is exactly one."""
    typed = line.typed()
    names = []
    for key in ("weights", "checkpoint_file"):
        if _is_given(typed, key):
            names.append(str(typed[key]))
    if not names:
        line.parser.error("--weights W is missing: a run folder, a checkpoint or another file")
    if len(names) > 1:
        line.parser.error("--weights and --checkpoint mean the same: give one of them")
    return names[0]


def _run_on_weights(
    line: CommandLine,
    name: str,
    run: _Command,
    names: tuple[str, ...],
) -> int:
    """Read weights and call `run(weights, config, options)`.

    The settings are those that belong to the weights, changed by files and options.

    Args:
        line: The command line.
        name: What --weights is.
        run: The work of the command; it returns the exit code.
        names: The command's own options.

    Returns:
        The exit code.
    """
    from resnet_dist.checkpoints.saved_network import ForeignWeights, open_weights

    with contextlib.suppress(KeyboardInterrupt):
        try:
            opened = open_weights(name)
            config, options = config_or_print(line, defaults=opened.settings)
            if isinstance(opened, ForeignWeights):
                saved = opened.fit(config)
            else:
                saved = opened
                _refuse_other_network(line, config.model, build_config(saved.settings).model)
        except ValueError as problem:
            _print_problem(problem)
            return 2

        own_options = argparse.Namespace(checkpoint=str(Path(name)))
        for option in names:
            value = options[option]
            # With an option --data.key, jsonargparse puts the section `data` here.
            if isinstance(value, Namespace):
                value = line.typed().get(option, "")
            setattr(own_options, option, value)
        return run(saved, config, own_options)
    return 130


def _print_problem(problem: ValueError) -> None:
    """Print an error, whose first line may be followed by a table of tensors."""
    if not is_first_rank():
        return
    first, *others = str(problem).splitlines()
    print(f"error: {printable(first)}", file=sys.stderr)
    for other in others:
        print(printable(other), file=sys.stderr)


def _refuse_other_network(line: CommandLine, asked: ModelConfig, saved: ModelConfig) -> None:
    """End the process if the options change the network of the checkpoint."""
    asked_values = asdict(asked)
    saved_values = asdict(saved)
    for name, value in asked_values.items():
        saved_value = saved_values[name]
        if value != saved_value:
            line.parser.error(
                f"model.{name} is {value!r}, and {saved_value!r} in the checkpoint: "
                "the settings of model are the checkpoint's and cannot be changed"
            )
