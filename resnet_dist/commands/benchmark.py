"""`resnet-dist benchmark`: what the whole loop costs beside a bare one, in the same process, taking turns.

The bare loop is forward, backward and update on one fixed batch, with the same model, DDP and optimizer. The whole loop
is engine.train with its data path, metrics, gradient norm, signals and log. Machines are noisy: the two alternate, the
medians of many short windows are compared, and the processor's time per image, which hardly depends on what else the
machine does, is given beside the clock's.
"""

import json
import resource
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from resnet_dist import engine
from resnet_dist import run as composition
from resnet_dist.checkpoint import Saver
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader
from resnet_dist.distributed import Runtime, StopSignal
from resnet_dist.log import Log
from resnet_dist.schedule import build_schedule


class _NoImages:
    """A validation set of nothing, so that the loop's last evaluation takes no time."""

    num_samples = rounds = num_bad = 0
    mirrored, class_names = False, ()

    def __iter__(self):
        return iter(())

    def close(self) -> None:
        """Nothing to close."""


class _Records(Log):
    """A log that keeps the figures and says nothing."""

    def metrics(self, step: int, values: dict) -> None:
        """Keep what a log line would say."""
        self.lines.append(values)


def measure(config: Config, runtime: Runtime, options) -> int:
    """Build the run, alternate the two loops in `options.windows` windows of `options.steps`, report.

    Each window begins with a quarter as many steps not counted.
    """
    local = composition.check_layout(config.train.global_batch_size, runtime.world_size, config.train.grad_accum_steps)
    loader = build_train_loader(
        config.data, runtime, augment=config.augment, seed=config.seed, dtype=engine.DTYPES[config.train.precision],
        output_dir=config.output_dir, grad_accum_steps=config.train.grad_accum_steps,
        global_batch_size=config.train.global_batch_size)
    interval = max(1, options.steps // 4)                # a log line each, the first of a window is not counted
    plan = replace(composition.build_plan(config, loader.steps_per_epoch), eval_interval_steps=0,
                   checkpoint_interval_steps=(0,), log_interval_steps=interval, max_nonfinite_steps=10**9)
    state = composition.build_state(config, len(loader.class_names), runtime.device)
    model = composition.wrap_ddp(state.model, runtime.device)
    engine.settle_buckets(model, config.data.train_crop_size, config.train.precision, runtime.device)
    schedule = build_schedule(config.schedule, 1e-4, plan.steps_per_epoch, 10**9)
    saver = Saver(composition.checkpoint_folder(config), 1, {}, print, is_main=False)
    log = _Records(config.log, config.output_dir, False, {})
    bare, whole, waits, cpu_bare, cpu_whole = [], [], [], [], []
    batch = next(loader.batches(0, 1))
    for _ in range(options.windows):
        speed, cpu = bare_loop(model, state, batch, plan, interval, 4 * interval, runtime)
        bare.append(speed)
        cpu_bare.append(cpu)
        log.lines, cpu = [], time.process_time()
        stop_signal = StopSignal(runtime.cpu_group)
        engine.train(model, state, loader, _NoImages(), schedule, replace(plan, total_steps=state.step + 5 * interval),
                     runtime, saver, log, stop_signal)
        stop_signal.finish()
        stop_signal.close()
        # Of the whole window: the loader works ahead, and what it does for the first steps must not be left out.
        cpu_whole.append((time.process_time() - cpu) / (5 * interval * local * plan.grad_accum_steps))
        lines = [line for line in log.lines if "train/loss" in line][1:]
        whole.append(config.train.global_batch_size / statistics.mean(line["train/step_seconds"] for line in lines))
        waits.append(statistics.mean(line["train/data_wait_fraction"] for line in lines))
    loader.close()
    if runtime.is_main:
        report(config, runtime, local, {"bare": bare, "whole": whole, "waits": waits, "cpu_bare": cpu_bare,
                                        "cpu_whole": cpu_whole}, options.json)
    return 0


def bare_loop(model, state, batch, plan: engine.Plan, warm_up: int, steps: int, runtime: Runtime
              ) -> tuple[float, float]:
    """Forward, backward and update on one batch: images per second over all ranks, processor seconds per image."""
    optimizer = state.optimizer
    optimizer.found_inf = None

    def step() -> torch.Tensor:
        with engine.autocast(runtime.device, plan.precision):
            logits = model(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(warm_up):
        step().item()                                    # .item() waits for the device
    runtime.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss = step()
    loss.item()
    images = steps * len(batch.labels)
    return images * runtime.world_size / (time.perf_counter() - started), (time.process_time() - cpu) / images


def report(config: Config, runtime: Runtime, local: int, windows: dict[str, list], as_json: bool) -> None:
    """Medians, and the ratios pair by pair."""
    ratios = [whole / bare for whole, bare in zip(windows["whole"], windows["bare"], strict=True)]
    cpu_ratios = [bare / whole for whole, bare in zip(windows["cpu_whole"], windows["cpu_bare"], strict=True)]
    median = {name: statistics.median(values) for name, values in windows.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    result = {
        "model": config.model.name, "crop": config.data.train_crop_size, "precision": config.train.precision,
        "device": runtime.device.type, "ranks": runtime.world_size, "local_batch_size": local,
        "whole_images_per_second": median["whole"], "bare_images_per_second": median["bare"],
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "cpu_ms_per_image_whole": 1e3 * median["cpu_whole"], "cpu_ms_per_image_bare": 1e3 * median["cpu_bare"],
        "cpu_ratio": statistics.median(cpu_ratios), "data_wait_fraction": median["waits"],
        "peak_memory_gib_per_rank": peak,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"{result['model']} at {result['crop']}, {result['precision']}, {result['ranks']} {result['device']} ranks * "
          f"{local} images, medians of {len(ratios)} windows")
    for name, remark in (("whole", f"waits for data {100 * result['data_wait_fraction']:.1f} % of the time"),
                         ("bare", "on one fixed batch")):
        print(f"  {name:5} loop   {result[f'{name}_images_per_second']:8.1f} images/s, "
              f"{result[f'cpu_ms_per_image_{name}']:.2f} ms of processor time an image, {remark}")
    print(f"  ratio        {result['ratio']:8.3f} ({result['ratio_min']:.3f} to {result['ratio_max']:.3f}), "
          f"of processor time {result['cpu_ratio']:.3f}\n"
          f"  peak memory  {peak:8.2f} GiB per rank")
