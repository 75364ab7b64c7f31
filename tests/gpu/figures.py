"""The figures of the report, part by part, one line of JSON for each.

    python tests/gpu/figures.py [--device cuda|cpu] [--small] [--photographs DIR] [PART ...]

`DIR` holds class folders of real photographs in `train/`, as `report.py` arranges them. What is
compared runs in turns in one process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from places import (
    Place,
    eager_and_compiled,
    of_network,
    resnet50,
    single_rank,
    synchronize,
    with_compile,
)

# isort: split
import numpy as np
import torch
from check_data import runtime_on
from more_figures import Figures, evaluation, first_convolution, norm
from PIL import Image

from resnet_dist.commands.bare_loop import BareSettings, build_bare_step
from resnet_dist.commands.benchmark import compare_loops
from resnet_dist.commands.benchmark_determinism import price_of_determinism
from resnet_dist.commands.benchmark_parts import (
    Step,
    build_training,
    host_seconds,
    step_on_one_batch,
    time_in_turns,
)
from resnet_dist.commands.benchmark_profile import profile_steps
from resnet_dist.commands.device_rates import measure_device
from resnet_dist.commands.energy import EnergyMeter
from resnet_dist.commands.plain_loaders import (
    MakeBatches,
    plain_dali,
    plain_dali_whole_image,
    plain_torchvision,
)
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.pixels.probe import describe_jpeg_decoder
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import Precision, resolve_precision, set_arithmetic


@dataclass(frozen=True)
class Part:
    """One part of the figures, and what it costs."""

    measure: Callable[[Place, Path | None, Path], Figures]
    """takes the place, the photographs and a folder for files"""
    seconds: int
    """its limit on a GPU"""
    title: str
    needs_photographs: bool = False
    goal: str = ""
    """what it is compared with: a goal, or what was measured before"""


def device(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """What the device can do, and which decoder serves JPEGs."""
    rates = measure_device(place.device)
    return {
        "matrix product, TFLOP/s": rates.matrix_flops / 1e12,
        "type": rates.dtype,
        "memory, GB/s": rates.memory_bytes / 1e9,
        "decoder": describe_jpeg_decoder(place.device)[1],
    }


def synthetic(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """The bare torchvision loop and our step, each eager and compiled, in turns."""
    config = resnet50(place, folder)
    batch_size = config.train.global_batch_size
    bare = BareSettings(
        network=config.model.name,
        batch_size=batch_size,
        image_size=config.data.train_crop_size,
        precision=Precision(resolve_precision("auto", place.device), place.device),
    )
    set_arithmetic(config.train, place.device)
    with single_rank(place) as runtime:
        steps = {}
        first_seconds = {}
        for name, build in step_builders(place, bare, config, runtime).items():
            start = time.perf_counter()
            steps[name] = build()
            steps[name]()
            synchronize(place)
            first_seconds[name] = time.perf_counter() - start
        seconds = time_in_turns(steps, place.device, place.size(4, 1), place.size(25, 2))
        meter = EnergyMeter(place.device)
        rows = {}
        for name, step in steps.items():
            step_seconds = statistics.median(seconds[name])
            rows[name] = {
                "images/s": batch_size / step_seconds,
                "ms a step": 1e3 * step_seconds,
                "first step, s": first_seconds[name],
                "host, ms": milliseconds(host_seconds(step, place.device)),
                "J an image": joules_per_image(step, meter, place, batch_size),
            }
    return {"rows": rows, "batch": batch_size, "precision": bare.precision.name}


def step_builders(
    place: Place,
    bare: BareSettings,
    config: Config,
    runtime: Runtime,
) -> dict[str, Callable[[], Step]]:
    """Functions that build the bare step and our step: eager, and on a GPU compiled too."""

    def build_ours(variant: Config) -> Step:
        parts = build_training(variant, runtime, 10)
        return step_on_one_batch(parts)

    builders: dict[str, Callable[[], Step]] = {"bare eager": partial(build_bare_step, bare)}
    if place.is_cuda:
        bare_compiled = replace(bare, compiled=True)
        builders["bare compiled"] = partial(build_bare_step, bare_compiled)
    for name, variant in eager_and_compiled(place, config).items():
        builders[f"ours {name}"] = partial(build_ours, variant)
    return builders


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as milliseconds."""
    return None if seconds is None else 1e3 * seconds


def joules_per_image(
    step: Callable[[], None], meter: EnergyMeter, place: Place, batch_size: int
) -> float | None:
    """The energy of an image, over 40 steps; None where it cannot be read."""
    before = meter.joules()
    if before is None:
        return None
    for _ in range(40):
        step()
    synchronize(place)
    after = meter.joules()
    assert after is not None
    return (after - before) / (40 * batch_size)


def loaders(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """Our loader, DALI for the same work, DALI's usual pipeline, and torchvision, in turns."""
    assert photographs is not None
    batch_size = place.size(256, 4)
    config = jpeg_config(place, photographs, folder, batch_size)
    ours = build_train_loader(config, runtime_on(place.device))
    train = str(photographs / "train")
    threads = ours.threads
    same_work = plain_dali_whole_image(train, config.data, batch_size, threads, place.device)
    random_window = plain_dali(train, config.data, batch_size, threads, place.device)
    contenders: dict[str, MakeBatches] = {
        "ours": ours.batches,
        "DALI, the same work": same_work,
        "DALI, random window": random_window,
    }
    torchvision = plain_torchvision(train, config.data, batch_size, threads)
    if torchvision is not None and place.is_full:
        contenders["torchvision"] = torchvision

    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    num_batches = place.size(24, 2)
    for window in range(place.size(4, 2)):
        # The first window warms up.
        is_measured = window > 0
        for name, make in contenders.items():
            # torchvision is ten times slower: a few of its batches are enough.
            length = 3 if name == "torchvision" else num_batches
            seconds = time_batches(make, window * num_batches, length, place)
            if is_measured:
                speeds[name].append(length * batch_size / seconds)
    ours.close()

    our_speed = statistics.median(speeds["ours"])
    rows = {}
    for name, speeds_of_loader in speeds.items():
        speed = statistics.median(speeds_of_loader)
        rows[name] = {"images/s": speed, "ours / it": our_speed / speed}
    return {"rows": rows, "batch": batch_size, "threads": threads}


def time_batches(make: MakeBatches, start: int, length: int, place: Place) -> float:
    """Seconds for batches [start, start + length) of a loader."""
    synchronize(place)
    begun = time.perf_counter()
    for _ in make(start, start + length):
        pass
    synchronize(place)
    return time.perf_counter() - begun


def jpeg_config(place: Place, photographs: Path, folder: Path, batch_size: int) -> Config:
    """ResNet-50 on the photographs."""
    config = resnet50(place, folder)
    data = DataConfig(data_dir=str(photographs), train_crop_size=config.data.train_crop_size)
    train = replace(config.train, global_batch_size=batch_size)
    return replace(config, data=data, train=train)


def decoders(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """Whole images with Pillow's chroma upsampling against windows without it, in turns."""
    assert photographs is not None
    train = photographs / "train"
    batch_size = place.size(256, 4)
    pipelines = {}
    for name in ("whole image", "window"):
        pipeline = decoder_pipeline(place, train, batch_size, name)
        for _ in range(3):
            pipeline.run()
        pipelines[name] = pipeline

    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    runs = place.size(20, 2)
    for _ in range(place.size(4, 1)):
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            for _ in range(runs):
                pipeline.run()
            synchronize(place)
            seconds = time.perf_counter() - start
            speeds[name].append(runs * batch_size / seconds)

    rows = {}
    for name, speeds_of_decoder in speeds.items():
        speed = statistics.median(speeds_of_decoder)
        rows[name] = {"images/s": speed, **difference_from_pillow(place, train, name)}
    return {"rows": rows, "batch": batch_size}


def decoder_pipeline(place: Place, train: Path, batch_size: int, name: str) -> Any:
    """Decode a random window and resize it to 224 pixels, with one of the two decoders."""
    from nvidia.dali import fn

    def define() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(file_root=str(train), random_shuffle=True)
        pixels, _, _ = decoded_window(encoded, name, place)
        return (fn.resize(pixels, size=[224, 224]),)

    return built_pipeline(place, batch_size, define)


def decoded_window(encoded: Any, name: str, place: Place) -> tuple[Any, Any, Any]:
    """A random window, with its anchor and extent, in the DALI graph that is being defined."""
    from nvidia.dali import fn

    decoder = "mixed" if place.is_cuda else "cpu"
    options = {"device": decoder, "adjust_orientation": False}
    anchor, extent = fn.random_crop_generator(fn.peek_image_shape(encoded))
    if name == "whole image":
        pixels = fn.decoders.image(encoded, jpeg_fancy_upsampling=True, **options)
        pixels = fn.slice(pixels, start=anchor, shape=extent, axes=(0, 1))
    else:
        pixels = fn.decoders.image_slice(encoded, anchor, extent, axes=(0, 1), **options)
    return pixels, anchor, extent


def built_pipeline(place: Place, batch_size: int, define: Callable[[], tuple[Any, ...]]) -> Any:
    """A DALI pipeline, ready to run."""
    from nvidia import dali

    device_id = place.device.index if place.is_cuda else None
    pipeline = dali.Pipeline(batch_size, place.size(8, 1), device_id, seed=1)
    with pipeline:
        pipeline.set_outputs(*define())
    pipeline.build()
    return pipeline


def difference_from_pillow(place: Place, train: Path, name: str) -> Figures:
    """How far the windows of some photographs are from Pillow's pixels, in levels of 0 to 255."""
    from nvidia.dali import fn

    number = place.size(64, 4)
    paths = sorted(train.rglob("*.jpg"))[:number]

    def define() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(files=[str(path) for path in paths])
        return decoded_window(encoded, name, place)

    pipeline = built_pipeline(place, len(paths), define)
    windows, anchors, extents = pipeline.run()
    if place.is_cuda:
        windows = windows.as_cpu()
    means = []
    worst = 0
    for path, pixels, anchor, extent in zip(paths, windows, anchors, extents, strict=True):
        top, left = np.array(anchor).tolist()
        height, width = np.array(extent).tolist()
        whole = np.asarray(Image.open(path).convert("RGB"), np.int16)
        expected = whole[top : top + height, left : left + width]
        difference = np.abs(expected - np.array(pixels))
        means.append(float(difference.mean()))
        worst = max(worst, int(difference.max()))
    return {
        "mean difference from Pillow, levels": statistics.mean(means),
        "largest": worst,
    }


def jpeg_loop(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """The whole loop on photographs beside a bare loop on one batch, compiled on a GPU."""
    assert photographs is not None
    config = jpeg_config(place, photographs, folder, place.size(256, 4))
    if place.is_cuda:
        config = with_compile(config, True)
    with single_rank(place) as runtime:
        result, no_energy = compare_loops(config, runtime, place.size(3, 1), place.size(40, 4))
    return {**result, "no energy": no_energy}


def determinism(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """The price of train.deterministic, eager and compiled."""
    windows = place.size(3, 1)
    steps = place.size(15, 2)
    variants = eager_and_compiled(place, resnet50(place, folder))
    rows = {}
    for name, variant in variants.items():
        with single_rank(place) as runtime:
            found = price_of_determinism(variant, runtime, windows, steps, trainings=1)
        speeds = found["images_per_second"]
        rows[name] = {
            "default, images/s": speeds["default"],
            "deterministic, images/s": speeds["deterministic"],
            "price": found["price"],
        }
    return {"rows": rows}


def kernels(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """Where the time of our step goes, by kind of kernel."""
    config = resnet50(place, folder)
    if place.is_cuda:
        config = with_compile(config, True)
    with single_rank(place) as runtime:
        set_arithmetic(config.train, place.device)
        parts = build_training(config, runtime, 10)
        step = step_on_one_batch(parts)
        table = profile_steps(step, place.device, folder / "trace.json")
    assert table is not None
    rows = {}
    for kind in table.kinds:
        rows[kind.name] = {
            "ms a step": kind.milliseconds,
            "share": kind.share,
            "calls": kind.count,
        }
    return {"rows": rows, "ms a step": table.step_milliseconds}


def host_time(place: Place, photographs: Path | None, folder: Path) -> Figures:
    """The host's time for a step of ResNet-20 at 32 pixels with batch 128."""
    config = of_network(place, folder, "resnet20", place.size(32, 8), place.size(128, 4))
    variants = eager_and_compiled(place, config)
    if place.is_cuda:
        graphs = replace(variants["compiled"].train, compile_mode="reduce-overhead")
        variants["compiled, reduce-overhead"] = replace(config, train=graphs)
    rows = {}
    for name, variant in variants.items():
        with single_rank(place) as runtime:
            set_arithmetic(variant.train, place.device)
            parts = build_training(variant, runtime, 10)
            step = step_on_one_batch(parts)
            seconds = time_in_turns({name: step}, place.device, place.size(3, 1), place.size(50, 2))
            rows[name] = {
                "host, ms": milliseconds(host_seconds(step, place.device)),
                "ms a step": 1e3 * statistics.median(seconds[name]),
            }
    return {"rows": rows}


# The most important first, since the time may run out.
PARTS = {
    "device": Part(device, 40, "The device"),
    "decoders": Part(
        decoders,
        50,
        "JPEG decoders alone",
        needs_photographs=True,
        goal="one H100, commit 89aca0e: whole image mean 0.002 and at most 3 levels from Pillow, "
        "window mean 0.14 and at most 57",
    ),
    "synthetic": Part(
        synthetic,
        170,
        "ResNet-50 on random pixels",
        goal="one H100, commit 89aca0e, bf16, batch 256: bare eager 4,005 images/s, bare compiled "
        "5,658, ours eager 3,927",
    ),
    "loaders": Part(
        loaders,
        70,
        "Loaders",
        needs_photographs=True,
        goal="goal: at least 0.85 of DALI for the same work",
    ),
    "jpeg_loop": Part(
        jpeg_loop,
        110,
        "ResNet-50 on photographs",
        needs_photographs=True,
        goal="goal: ratio at least 0.97, data wait under 2 %",
    ),
    "evaluation": Part(
        evaluation,
        90,
        "Evaluation of 50,000 images",
        goal="goal: a repeated one at most 4 s on an H100",
    ),
    "norm": Part(
        norm,
        110,
        "SyncBatchNorm's collectives in a group of one rank",
        goal="goal: at most 3 %",
    ),
    "determinism": Part(
        determinism,
        110,
        "The price of train.deterministic",
        goal="one H100, commit 89aca0e: 8.2 % for a bare eager loop",
    ),
    "kernels": Part(kernels, 60, "Where a step goes"),
    "first_convolution": Part(first_convolution, 40, "The first convolution, with 3 or 4 channels"),
    "host_time": Part(
        host_time,
        90,
        "Host time of a small network",
        goal="goal: at most 2 ms",
    ),
}


def run_part(name: str, place: Place, photographs: Path | None) -> Iterator[dict[str, Any]]:
    """Measure one part: a line that it starts, then its result."""
    yield {"name": name, "outcome": "started"}
    part = PARTS[name]
    start = time.perf_counter()
    outcome = "passed"
    text = ""
    figures: Figures = {}
    if part.needs_photographs and photographs is None:
        outcome = "skipped"
        text = "needs real photographs: --photographs DIR"
    else:
        with tempfile.TemporaryDirectory(prefix=f"{name}_") as folder:
            try:
                figures = part.measure(place, photographs, Path(folder))
            except Exception as problem:
                outcome = "failed"
                text = f"{type(problem).__name__}: {problem}\n{traceback.format_exc()[-1500:]}"
    seconds = round(time.perf_counter() - start, 1)
    yield {"name": name, "outcome": outcome, "seconds": seconds, "text": text, "figures": figures}


def main(arguments: list[str] | None = None) -> int:
    """Measure parts; returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--photographs", type=Path, help="folder with train/CLASS/*.jpg")
    options = parser.parse_args(arguments)
    place = Place(torch.device("cpu"), not options.small)
    if options.device == "cuda":
        place = replace(place, device=torch.device("cuda", 0))
    else:
        torch.set_num_threads(1)
    failed = False
    for name in options.names or PARTS:
        for line in run_part(name, place, options.photographs):
            failed = failed or line["outcome"] == "failed"
            print(json.dumps(line), flush=True)
        torch._dynamo.reset()
        if place.is_cuda:
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
