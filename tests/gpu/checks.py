"""All checks by name, and a program that runs some of them, one line of JSON for each.

    python tests/gpu/checks.py [--device cuda|cpu] [--small] [NAME ...]

`report.py` runs it in a process of its own, and starts another one for the rest if it dies: a GPU
that has failed once fails in every later check of its process.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import check_caches
import check_data
import check_evaluation
import check_ranks
import check_training
import torch
from places import Place, SkippedCheckError


@dataclass(frozen=True)
class Check:
    """A check, and what it costs."""

    run: Callable[[Place, Path], str]
    """raises an error if the check fails; returns what it found"""
    seconds: int
    """its limit on a GPU"""
    cheap: bool = True
    """whether the CPU tests run it, at a small size"""
    guess: str = ""
    """its thresholds that no measurement on a GPU stands behind"""


# In the order in which they run: the most important first, since the time may run out.
CHECKS = {
    "jpeg_decoder": Check(check_data.jpeg_decoder, 20),
    "evaluation_pixels": Check(check_data.evaluation_pixels, 20),
    "array_evaluation": Check(check_evaluation.array_evaluation, 20),
    "training_pixels": Check(
        check_data.training_pixels, 20, guess="mean 0.5, largest 24 levels with bicubic filters"
    ),
    "no_host_sync": Check(check_training.no_host_sync, 90),
    "compile_equals_eager": Check(
        check_training.compile_equals_eager, 60, cheap=False, guess="losses within 0.2 %"
    ),
    "deterministic_and_resumed": Check(check_training.deterministic_and_resumed, 150, cheap=False),
    "compile_modes": Check(
        check_training.compile_modes, 120, cheap=False, guess="losses within 5 %"
    ),
    "batches_under_load": Check(check_data.batches_under_load, 30),
    "augmentation_pixels": Check(
        check_data.augmentation_pixels, 30, guess="mean 0.05, largest 2 levels; warps: mean 1"
    ),
    "fp16_with_scaler": Check(
        check_training.fp16_with_scaler,
        60,
        guess="80 % of the losses are finite; they fall by 10 %",
    ),
    "optimizers_equal_the_cpu": Check(
        check_training.optimizers_equal_the_cpu, 10, guess="weights within 1e-5"
    ),
    "norm_on_two_ranks": Check(check_ranks.norm_on_two_ranks, 60, guess="within 1e-4"),
    "out_of_memory_is_explained": Check(check_training.out_of_memory_is_explained, 40),
    "training_caches": Check(check_caches.training_caches, 30),
    "evaluation_cache": Check(check_caches.evaluation_cache, 20),
    "memory_stays_flat": Check(check_data.memory_stays_flat, 60, guess="150 MiB"),
    "lost_rank_over_nccl": Check(check_ranks.lost_rank_over_nccl, 150, cheap=False),
    "quickstart": Check(check_ranks.quickstart, 150, cheap=False),
}


def run_check(name: str, place: Place) -> dict[str, object]:
    """Run a check in a folder of its own.

    Returns:
        Its name, "outcome" (passed, failed or skipped), "seconds" and "text".
    """
    start = time.perf_counter()
    outcome = "passed"
    with tempfile.TemporaryDirectory(prefix=f"{name}_") as folder:
        try:
            text = CHECKS[name].run(place, Path(folder))
        except SkippedCheckError as reason:
            outcome = "skipped"
            text = str(reason)
        except Exception as problem:
            outcome = "failed"
            text = f"{type(problem).__name__}: {problem}\n{traceback.format_exc()[-1500:]}"
    seconds = round(time.perf_counter() - start, 1)
    return {"name": name, "outcome": outcome, "seconds": seconds, "text": text}


def main(arguments: list[str] | None = None) -> int:
    """Run checks; returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", 0)
    place = Place(device, not options.small)
    failed = False
    for name in options.names or CHECKS:
        print(json.dumps({"name": name, "outcome": "started"}), flush=True)
        result = run_check(name, place)
        failed = failed or result["outcome"] == "failed"
        print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
