"""`resnet-dist benchmark --determinism`: the price of `train.deterministic`.

The same training with and without it takes turns in one process. In each mode two trainings from
the same start are compared as well: equal weights within one process say little about another
process, where cuDNN may choose other algorithms by timing.
"""

import argparse
import hashlib
import json
import os
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from resnet_dist.commands.benchmark_parts import (
    Step,
    build_training,
    step_on_one_batch,
    time_in_turns,
)
from resnet_dist.config import Config
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import set_arithmetic

_COMPARED_STEPS = 8

_MODES = {"default": False, "deterministic": True}


def measure_determinism(config: Config, runtime: Runtime, options: argparse.Namespace) -> int:
    """Measure both modes in turns, and print the price of the deterministic one.

    Args:
        config: The config of the run; its `train.deterministic` has no influence.
        runtime: The ranks and the device of this one.
        options: `windows`, `steps` and `json` of the command line.

    Returns:
        The exit code, 0.
    """
    result = price_of_determinism(config, runtime, options.windows, options.steps)
    if runtime.is_main:
        _print_price(result, options.json)
    return 0


def price_of_determinism(
    config: Config, runtime: Runtime, windows: int, steps_per_window: int, trainings: int = 2
) -> dict[str, Any]:
    """Measure both modes in turns.

    Args:
        config: The config of the run; its `train.deterministic` has no influence.
        runtime: The ranks and the device of this one.
        windows: Number of turns of each mode.
        steps_per_window: Length of a turn.
        trainings: How many trainings of each mode are compared.

    Returns:
        The speeds and the price; equal_weights says for each mode whether two trainings ended with
        equal weights.
    """
    # PyTorch reads this once, at the first matrix product, and both modes run in this process.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    steps: dict[str, Step] = {}
    is_repeatable = {}
    for name, is_deterministic in _MODES.items():
        mode = replace(config, train=replace(config.train, deterministic=is_deterministic))
        set_mode(config, runtime.device, is_deterministic)
        digests = []
        for _ in range(trainings):
            parts = build_training(mode, runtime, steps_per_window)
            step = step_on_one_batch(parts)
            for _ in range(_COMPARED_STEPS):
                step()
            digests.append(digest_of_weights(parts.state.model))
            parts.train_loader.close()
        is_repeatable[name] = len(set(digests)) == 1
        steps[name] = _in_mode(step, config, runtime.device, is_deterministic)

    seconds = time_in_turns(steps, runtime.device, windows, steps_per_window)
    set_mode(config, runtime.device, config.train.deterministic)
    result = _result(config, runtime, seconds)
    result["equal_weights"] = is_repeatable
    return result


def set_mode(config: Config, device: torch.device, is_deterministic: bool) -> None:
    """Set PyTorch's switches as a run with or without `train.deterministic` does."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    train = replace(config.train, deterministic=is_deterministic)
    set_arithmetic(train, device)


def digest_of_weights(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers of a network. Waits for the device."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _in_mode(step: Step, config: Config, device: torch.device, is_deterministic: bool) -> Step:
    """A step that sets its mode first, which takes microseconds."""

    def step_in_mode() -> None:
        set_mode(config, device, is_deterministic)
        step()

    return step_in_mode


def _result(config: Config, runtime: Runtime, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The medians and the price.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        seconds: Seconds of a step in each window, by mode.
    """
    images_per_second = {}
    for name, of_mode in seconds.items():
        images_per_second[name] = config.train.global_batch_size / statistics.median(of_mode)
    price = 1 - images_per_second["deterministic"] / images_per_second["default"]
    return {
        "model": config.model.name,
        "crop": config.data.train_crop_size,
        "precision": config.train.precision,
        "device": runtime.device.type,
        "ranks": runtime.world_size,
        "global_batch_size": config.train.global_batch_size,
        "windows": len(seconds["default"]),
        "images_per_second": images_per_second,
        "price": price,
    }


_HEADING = """\
{model} at {crop}, {precision}, {ranks} {device} ranks, batch {global_batch_size}; \
medians of {windows} windows:"""


def _print_price(result: dict[str, Any], as_json: bool) -> None:
    """Print the result as text, or as one line of JSON."""
    if as_json:
        print(json.dumps(result))
        return
    print(_HEADING.format(**result))
    for name, speed in result["images_per_second"].items():
        weights = "equal" if result["equal_weights"][name] else "different"
        print(f"  {name:14}{speed:9.1f} images/s, two trainings end with {weights} weights")
    print(f"  price         {result['price']:9.1%}")
