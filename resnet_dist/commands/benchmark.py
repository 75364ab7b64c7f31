"""`resnet-dist benchmark`: what the whole loop costs beside a bare one, in the same process, taking
turns.

The bare loop is forward, backward and update on one fixed batch, with the same model, DDP and
optimizer. The whole loop is engine.train with its data path, metrics, gradient norm, signals and
log. Machines are noisy: the two alternate, the medians of many short windows are compared, and the
processor's time per image, which hardly depends on what else the machine does, is given beside the
clock's.
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
from resnet_dist.precision import autocast
from resnet_dist.schedule import build_schedule


def measure(config: Config, runtime: Runtime, options) -> int:
    """Build the run, alternate the two loops in `options.windows` windows of `options.steps`,
    report.

    Each window begins with a quarter as many steps not counted.
    """
    local = composition.check_layout(
        config.train.global_batch_size, runtime.world_size, config.train.grad_accum_steps
    )
    loader = build_train_loader(config, runtime)
    interval = max(1, options.steps // 4)  # a log line each, the first of a window is not counted
    plan = replace(
        composition.build_plan(config, loader.steps_per_epoch),
        eval_interval_steps=0,
        checkpoint_interval_steps=(0,),
        log_interval_steps=interval,
        max_nonfinite_steps=10**9,
    )
    state = composition.build_state(config, len(loader.class_names), runtime.device)
    model = composition.wrap_ddp(state.model, runtime.device)
    engine.settle_buckets(
        model, config.data.train_crop_size, config.train.precision, runtime.device
    )
    schedule = build_schedule(config.schedule, 1e-4, plan.steps_per_epoch, 10**9)
    saver = Saver(composition.checkpoint_folder(config), 1, {}, print, is_main=False)
    log, lines = Log(config.log, config.output_dir, False, {}), []
    log.metrics = lambda step, values: lines.append(values)  # it keeps the figures and says nothing
    windows, batch = [], next(loader.batches(0, 1))
    for _ in range(options.windows):
        bare, cpu_bare = bare_loop(model, state, batch, plan, interval, 4 * interval, runtime)
        lines.clear()
        cpu, stop_signal, end = (
            time.process_time(),
            StopSignal(runtime.cpu_group, runtime.watchdog),
            state.step + 5 * interval,
        )
        state.evaluated_step = end  # no evaluation at the end
        engine.train(
            model,
            state,
            loader,
            None,
            schedule,
            replace(plan, total_steps=end),
            runtime,
            saver,
            log,
            stop_signal,
        )
        stop_signal.finish()
        stop_signal.close()
        # Of the whole window: the loader works ahead, and what it does for the first steps must not
        # be left out.
        cpu_whole = (time.process_time() - cpu) / (5 * interval * local * plan.grad_accum_steps)
        seconds, waits = (
            statistics.mean(line[f"train/{name}"] for line in lines[1:])
            for name in ("step_seconds", "data_wait_fraction")
        )
        whole = config.train.global_batch_size / seconds
        windows.append(
            {
                "whole_images_per_second": whole,
                "bare_images_per_second": bare,
                "ratio": whole / bare,
                "cpu_ms_per_image_whole": 1e3 * cpu_whole,
                "cpu_ms_per_image_bare": 1e3 * cpu_bare,
                "cpu_ratio": cpu_bare / cpu_whole,
                "data_wait_fraction": waits,
            }
        )
    loader.close()
    if runtime.is_main:
        report(config, runtime, local, windows, options.json)
    return 0


def bare_loop(
    model, state, batch, plan: engine.Plan, warm_up: int, steps: int, runtime: Runtime
) -> tuple[float, float]:
    """Forward, backward and update on one batch: images per second over all ranks, processor
    seconds per image.
    """
    optimizer = state.optimizer
    optimizer.found_inf = None

    def step() -> torch.Tensor:
        with autocast(runtime.device, plan.precision):
            logits = model(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(warm_up):
        step().item()  # .item() waits for the device
    runtime.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss = step()
    loss.item()
    images = steps * len(batch.labels)
    return images * runtime.world_size / (time.perf_counter() - started), (
        time.process_time() - cpu
    ) / images


def report(
    config: Config, runtime: Runtime, local: int, windows: list[dict], as_json: bool
) -> None:
    """Print the medians of the windows, as text or JSON."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if runtime.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    ratios = [window["ratio"] for window in windows]
    result = {
        "model": config.model.name,
        "crop": config.data.train_crop_size,
        "precision": config.train.precision,
        "device": runtime.device.type,
        "ranks": runtime.world_size,
        "local_batch_size": local,
        "windows": len(windows),
        **{name: statistics.median(window[name] for window in windows) for name in windows[0]},
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "peak_memory_gib_per_rank": peak,
    }
    if as_json:
        print(json.dumps(result))
        return
    print(
        """{model} at {crop}, {precision}, {ranks} {device} ranks * {local_batch_size} images; of {windows} windows:
  whole loop   {whole_images_per_second:8.1f} images/s, {cpu_ms_per_image_whole:.2f} ms of processor time an image
  bare loop    {bare_images_per_second:8.1f} images/s, {cpu_ms_per_image_bare:.2f} ms, on one fixed batch
  ratio        {ratio:8.3f} ({ratio_min:.3f} to {ratio_max:.3f}), of processor time {cpu_ratio:.3f}
  data wait    {data_wait_fraction:8.1%} of the time
  peak memory  {peak_memory_gib_per_rank:8.2f} GiB per rank""".format(**result)
    )
