"""The training loop: one update, one evaluation, and the run that consists of them.

`train_loop` reads from top to bottom. There is one clock, `state.step`, the number of updates done.
Everything that is due is derived from it, so that a run that resumes at a step does what an
uninterrupted run does there.
"""

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_dist.checkpoints.checkpoint import Saver, TrainState
from resnet_dist.compilation import (
    NetworkCompiler,
    begin_step,
    compile_for,
    describe_compilation,
    example_images,
)
from resnet_dist.data.types import Batch, TrainLoader, ValLoader
from resnet_dist.distributed.process import ErrorTranslator, as_it_is, failures_reported_first
from resnet_dist.distributed.runtime import Runtime, StopSignal
from resnet_dist.distributed.watchdog import COMPILE_PHASE
from resnet_dist.evaluation.exhibits import Exhibits
from resnet_dist.evaluation.loop import evaluate
from resnet_dist.forward import all_logits, at_least_fp32, train_mode
from resnet_dist.logs.log import Log
from resnet_dist.losses import LossFor
from resnet_dist.metrics import Counts
from resnet_dist.mix import Mixing, mix_images
from resnet_dist.nonfinite import NonFinite, TooManyNonFiniteError
from resnet_dist.plan import Due, TrainPlan
from resnet_dist.precision import Precision
from resnet_dist.resources.compute_probe import ComputeProbe
from resnet_dist.resources.gpu_usage import gpu_figures, read_gpu_memory
from resnet_dist.resources.memory import peak_memory
from resnet_dist.rng import derive_seed
from resnet_dist.schedule import Schedule
from resnet_dist.timing import Clock


@dataclass(frozen=True)
class UpdateRule:
    """What one update computes, apart from its batches and its learning rate."""

    loss_for: LossFor
    mixing: Mixing
    precision: Precision
    global_batch_size: int
    """images of one update, over all ranks"""
    grad_accum_steps: int
    clip_grad_norm: float
    """largest L2 norm of the gradient; 0 = no clipping"""
    seed: int
    """of dropout and stochastic depth"""
    replays_graphs: bool = False
    """whether CUDA graphs are replayed, see `compilation.begin_step`"""


@dataclass(frozen=True)
class Training:
    """The parts of a run that the loop works on."""

    model: nn.Module
    """computes the logits and averages the gradient over the ranks: `state.model` in DDP"""
    state: TrainState
    train_loader: TrainLoader
    val_loader: ValLoader
    schedule: Schedule
    rule: UpdateRule
    plan: TrainPlan
    compiler: NetworkCompiler | None = None
    """compiles `state.model` for the images of a new size; None if it is not compiled"""


@dataclass(frozen=True)
class Services:
    """What the loop talks to: the other ranks, the checkpoints, the log and the user's signals."""

    runtime: Runtime
    saver: Saver
    log: Log
    stop_signal: StopSignal
    exhibits: Exhibits | None = None
    """pictures and details of the run; None for none"""
    translate_error: ErrorTranslator = as_it_is
    """from an error of the loop to the one that is printed"""

    def poll(self, step: int, phase: str) -> bool:
        """Tell the watchdog what this rank is doing; whether a signal asks for the end.

        A collective: every rank must call it at the same places.
        """
        self.beat(step, phase)
        return bool(self.stop_signal.poll())

    def beat(self, step: int, phase: str) -> None:
        """Tell the watchdog what this rank is doing."""
        assert self.runtime.watchdog is not None
        self.runtime.watchdog.beat(step, phase)


def train_step(
    model: nn.Module,
    state: TrainState,
    micro_batches: list[Batch],
    lr: float,
    rule: UpdateRule,
    nonfinite: NonFinite,
) -> tuple[Counts, torch.Tensor]:
    """Do one update from `grad_accum_steps` micro-batches; nothing in it waits for the device.

    An update whose gradient is not finite is skipped on the device, by the optimizer's `found_inf`;
    in fp16 the scaler decides that, from the same gradient. `model` computes the logits: the DDP
    wrapper of `state.model`.

    Returns:
        This rank's counts, and the L2 norm of the gradient (averaged over all samples of the
        update) before clipping.
    """
    begin_step(rule.replays_graphs)
    nonfinite.snapshot_statistics()
    counts = accumulate_gradient(model, state, micro_batches, rule)

    # The norm is equal on all ranks, so that all of them skip the update, or none.
    state.scaler.unscale_(state.optimizer)
    grad_norm = clip_gradient(state.optimizer, rule.clip_grad_norm)
    skipped = ~torch.isfinite(grad_norm)
    nonfinite.restore_if_skipped(skipped)

    apply_update(state, lr, skipped)
    return counts, grad_norm


def accumulate_gradient(
    model: nn.Module, state: TrainState, micro_batches: list[Batch], rule: UpdateRule
) -> Counts:
    """Add the gradient of all micro-batches to `.grad`; the last one averages it over the ranks.

    The losses of auxiliary heads, with the same targets, are added with the factor
    `state.model.auxiliary_weight`.

    Returns:
        The counts of the main logits, without those of the auxiliary heads.
    """
    counts = Counts.zero(micro_batches[0].images.device)
    num_micro_batches = len(micro_batches)
    auxiliary_weight = float(getattr(state.model, "auxiliary_weight", 0.0))
    for number, batch in enumerate(micro_batches, start=1):
        mix = rule.mixing(state.step, number - 1)
        images, shares = mix_images(batch.images, mix)
        loss_fn = rule.loss_for(images)
        with all_reduce_only_if(number == num_micro_batches, model):
            with rule.precision.autocast():
                logits = all_logits(model(images))

            losses = []
            for logits_of_head in logits:
                head_losses = loss_fn(at_least_fp32(logits_of_head), batch.labels, shares)
                losses.append(head_losses)
            objective = losses[0]
            for auxiliary_losses in losses[1:]:
                objective = objective + auxiliary_weight * auxiliary_losses

            mean = objective.mean() / num_micro_batches
            scaled = state.scaler.scale(mean)
            scaled.backward()  # type: ignore[no-untyped-call]
        batch_counts = Counts.of(logits[0].detach(), batch.labels, losses[0].detach())
        counts = counts + batch_counts
    return counts


def all_reduce_only_if(is_last: bool, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let the backward pass average the gradient over the ranks only in the last micro-batch."""
    if is_last:
        return contextlib.nullcontext()
    skip: contextlib.AbstractContextManager[None] = model.no_sync()  # type: ignore[operator]
    return skip


def clip_gradient(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clip the gradient of all parameters, in place.

    Args:
        optimizer: Its parameters have the gradient.
        max_norm: Largest L2 norm of the whole gradient; 0 leaves the gradient as it is.

    Returns:
        The L2 norm before clipping, a scalar on the device.
    """
    parameters = []
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameters.append(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
    grad_norm = nn.utils.get_total_norm(gradients, foreach=None)
    if max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, grad_norm, foreach=None)
    return grad_norm


def apply_update(state: TrainState, lr: float, skipped: torch.Tensor) -> None:
    """Do one optimizer step, update the EMA and count the step.

    Args:
        state: The state of training; its parameters have the unscaled gradient.
        lr: The learning rate, before the `lr_scale` of each parameter group.
        skipped: A bool scalar on the device; if true, weights and optimizer state keep their
            values.
    """
    optimizer: Any = state.optimizer
    for group in optimizer.param_groups:
        lr_scale = group.get("lr_scale", 1.0)
        group["lr"] = lr * lr_scale
    if optimizer.defaults["fused"]:
        # Read by fused optimizers and by `optim.GuardedOptimizer`.
        optimizer.grad_scale = None
        optimizer.found_inf = skipped.float()
    state.scaler.step(optimizer)
    state.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.ema:
        state.ema.update()
    state.step += 1


def warm_up_ddp(
    model: nn.Module,
    shape: tuple[int, ...],
    precision: Precision,
    replays_graphs: bool = False,
) -> None:
    """Let DDP build its final gradient buckets before the first update; the model is not changed.

    DDP rebuilds its buckets after the first backward pass. With more than two ranks the order of
    additions in an all-reduce depends on the place in the bucket. Without this warm-up the first
    update after a resume would round differently from the same update of an uninterrupted run.

    It runs two passes on zeros, with a zero gradient: the second forward pass rebuilds the buckets.
    The model is in training mode, since auxiliary heads have a gradient only there; the running
    statistics that this changes are restored. Dropout may draw random numbers: each training step
    seeds its generator anew.

    Args:
        model: The DDP model.
        shape: Of the images, [B, 3, H, W]: for a compiled network that of a micro-batch, since it
            would be compiled for another one too.
        precision: The precision and device of training.
        replays_graphs: Whether CUDA graphs are replayed.
    """
    train_mode(model)
    buffers_before = [buffer.clone() for buffer in model.buffers()]
    images = example_images(shape, precision)
    for _ in range(2):
        begin_step(replays_graphs)
        with precision.autocast():
            outputs = model(images)
        zeros = []
        for logits in all_logits(outputs):
            total = logits.float().sum()
            zeros.append(total * 0)
        objective = torch.stack(zeros).sum()
        objective.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    for buffer, value in zip(model.buffers(), buffers_before, strict=True):
        buffer.copy_(value)


def compile_for_new_size(
    parts: Training, images: torch.Tensor, window: "Window", services: Services
) -> None:
    """Compile the network if these are the first images of their size (progressive resizing)."""
    compiler = parts.compiler
    if compiler is None or images.shape in compiler.shapes:
        return
    services.beat(parts.state.step, COMPILE_PHASE)
    shape = tuple(images.shape)
    graphs_before = compiler.num_graphs
    with window.clock.excluded():
        seconds = compile_for(compiler, shape)
    num_graphs = compiler.num_graphs - graphs_before
    services.log.say(describe_compilation(num_graphs, shape, seconds))


class Window:
    """The steps since the last log line, and what is known about them."""

    def __init__(self, state: TrainState, device: torch.device) -> None:
        self.clock = Clock()
        self.probe = ComputeProbe(device)
        self.nonfinite = NonFinite(state.model, state.step)
        self.lr = 0.0
        self.grad_norm = torch.zeros((), device=device)
        self.restart(state.step, device)

    def restart(self, step: int, device: torch.device) -> None:
        """Begin the next window after `step` updates."""
        self.counts = Counts.zero(device)
        self.start_step = step

    def add(self, counts: Counts, grad_norm: torch.Tensor, lr: float, num_images: int) -> None:
        """Add one update."""
        self.counts = self.counts + counts
        self.grad_norm = grad_norm
        self.lr = lr
        self.clock.step(num_images)


@contextlib.contextmanager
def collection_by_hand() -> Iterator[None]:
    """Turn Python's garbage collector off: ranks would pause at different steps, and all wait.

    What exists at the start is never looked at again; the loop collects the rest at log lines.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextlib.contextmanager
def closing_batches(batches: Iterator[Batch]) -> Iterator[None]:
    """Close the loader's generator at the end, so that it stops to read ahead."""
    try:
        yield
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def train_loop(parts: Training, services: Services) -> int:
    """Train from `state.step` to `plan.total_steps`.

    Returns 0, or the number of the signal that ended it after a checkpoint. Raises
    TooManyNonFiniteError when `plan.max_nonfinite_steps` updates in a row were skipped.
    """
    state = parts.state
    plan = parts.plan
    rule = parts.rule
    device = services.runtime.device
    window = Window(state, device)
    batches = parts.train_loader.batches(state.step, plan.total_steps)
    train_mode(parts.model)
    reported_first = failures_reported_first(services.runtime, services.translate_error)
    with collection_by_hand(), closing_batches(batches), reported_first:
        while True:
            # 1. Log where it is due, and wherever the loop waits for the device anyway.
            stops = services.poll(state.step, "log")
            due = Due.at(state.step, plan)
            if state.step > window.start_step and (due.any or stops):
                services.saver.check_claim()
                log_training(parts, window, services)
                window.restart(state.step, device)
                gc.collect(1)

            # 2. Evaluate, once per due step. A signal ends it.
            if due.evaluation and not stops and state.evaluated_step != state.step:
                with window.clock.excluded():
                    stops = not evaluate_state(parts, services)

            # 3. Save a checkpoint. The saver skips what is saved already.
            if due.checkpoint or stops or state.best_step == state.step:
                with window.clock.excluded():
                    services.saver.save(state)

            # 4. Leave at the end, or when any rank was asked to.
            if stops or state.step >= plan.total_steps:
                return services.stop_signal.agreed

            # 5. Get the data.
            services.beat(state.step, "data")
            with window.clock.data_wait():
                micro_batches = [next(batches) for _ in range(rule.grad_accum_steps)]

            if services.exhibits is not None:
                services.exhibits.show_samples(state.step, micro_batches[0], rule.mixing)
            compile_for_new_size(parts, micro_batches[0].images, window, services)

            # 6. Update the weights. The seed is for dropout and stochastic depth.
            services.beat(state.step, "update")
            torch.manual_seed(derive_seed(rule.seed, "step", state.step, services.runtime.rank))
            lr = parts.schedule.lr(state.step)
            counts, grad_norm = train_step(
                parts.model, state, micro_batches, lr, rule, window.nonfinite
            )
            window.add(counts, grad_norm, lr, rule.global_batch_size)
            # Not while the next batch is waited for: see data.pixels.ahead.receive.
            del micro_batches
            services.log.progress(state.step)


def evaluate_state(parts: Training, services: Services) -> bool:
    """Evaluate the raw and the averaged weights, log both, and keep the best result.

    The averaged weights decide which result is best, if the run has them.

    Returns:
        False if a signal ended the evaluation; nothing is logged then.
    """
    state = parts.state
    loader = parts.val_loader
    runtime = services.runtime

    def poll() -> bool:
        return services.poll(state.step, "val")

    models = {"val": state.model}
    deciding = "val"
    weights = "raw"
    if state.ema:
        models["val_ema"] = state.ema.model
        deciding = "val_ema"
        weights = "averaged"
    collector = None
    if services.exhibits is not None and state.step >= parts.plan.total_steps:
        collector = services.exhibits.collector()
    results: dict[str, float | int] = {}
    for key, model in models.items():
        collect = None
        if key == deciding:
            collect = collector
        counts = evaluate(model, loader, runtime, parts.rule.precision, poll, collect)
        if counts is None:
            return False
        result = counts.result(len(loader.class_names))
        results |= with_prefix(key, result)

    for remark in loader.remarks():
        services.log.say(remark)
    num_bad = runtime.sum_integer(loader.num_bad)
    report_bad_images(num_bad, loader.num_samples, services.log)
    top1 = results[f"{deciding}/top1"]
    if top1 > state.best_top1:
        state.best_top1 = top1
        state.best_step = state.step
    state.evaluated_step = state.step
    results["train/epoch"] = state.step / parts.plan.steps_per_epoch
    results["val/best_top1"] = state.best_top1
    results["val/bad_images"] = num_bad
    services.log.metrics(state.step, results)
    if collector is not None:
        assert services.exhibits is not None
        services.exhibits.show_evaluation(state.step, weights, collector, loader)
    return True


def report_bad_images(num_bad: int, num_samples: int, log: Log) -> None:
    """Warn about validation images that cannot be decoded; ValueError if none of them can."""
    if not num_bad:
        return
    log.warn(
        f"{num_bad} of {num_samples} validation images cannot be decoded and count as misses; "
        "quarantine.jsonl names them"
    )
    if num_bad == num_samples:
        raise ValueError(
            f"none of the {num_samples} validation images can be decoded: see quarantine.jsonl"
        )


def figures_of_ranks(
    times: dict[str, float], probe_seconds: float, runtime: Runtime
) -> dict[str, list[float]]:
    """Figures of each rank, which show the rank that delays the others.

    The ranks wait for each other in every step, so the step time of each rank is that of the
    slowest one. A rank delays the others if its data wait is the longest, or if it computes slowly,
    which the probe shows.

    Args:
        times: `step_seconds` and `data_wait_fraction` of this rank.
        probe_seconds: Time of a fixed piece of work on this rank, see `ComputeProbe`.
        runtime: Gathers the numbers of all ranks.

    Returns:
        For each rank the seconds of waiting for data per step, seconds per step, seconds of the
        probe, and its largest memory.
    """
    step_seconds = times["step_seconds"]
    of_this_rank = {
        "ranks/data_seconds": times["data_wait_fraction"] * step_seconds,
        "ranks/step_seconds": step_seconds,
        "ranks/probe_seconds": probe_seconds,
        "ranks/memory_gib": peak_memory(runtime.device) / 2**30,
    }
    rows = runtime.gather_numbers(list(of_this_rank.values()))
    columns = zip(*rows, strict=True)
    figures = {}
    for key, values in zip(of_this_rank, columns, strict=True):
        figures[key] = [round(value, 6) for value in values]
    return figures


def log_training(parts: Training, window: Window, services: Services) -> None:
    """Log the steps of the window. Every rank must call it; it waits for the device.

    Raises:
        TooManyNonFiniteError: If too many updates in a row were skipped.
    """
    runtime = services.runtime
    state = parts.state
    counts = window.counts.reduce(runtime)
    result = counts.result(len(parts.train_loader.class_names))
    values: dict[str, Any] = {
        "train/epoch": state.step / parts.plan.steps_per_epoch,
        "train/loss": result["loss"],
        "train/top1": result["top1"],
        "train/lr": window.lr,
        "train/grad_norm": float(window.grad_norm),
        "train/skipped_updates": int(window.nonfinite.total),
        "train/bad_images": runtime.sum_integer(parts.train_loader.num_bad),
    }
    if "top5" in result:
        values["train/top5"] = result["top5"]
    times = window.clock.take()
    values |= with_prefix("train", times)
    # The device has done all its work: the counts were read.
    probe_seconds = window.probe.take()
    of_ranks = figures_of_ranks(times, probe_seconds, runtime)
    values |= of_ranks
    values["train/memory_gib"] = max(of_ranks["ranks/memory_gib"])
    memory = read_gpu_memory(runtime.device)
    values |= gpu_figures(memory, times["images_per_second"], runtime.world_size)
    services.log.metrics(state.step, values)
    check_nonfinite(window, parts.plan.max_nonfinite_steps)


def with_prefix(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The figures by their keys in metrics.jsonl, such as "val/top1"."""
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def check_nonfinite(window: Window, max_steps: int) -> None:
    """Raise TooManyNonFiniteError if `max_steps` or more updates in a row were skipped."""
    first, last = window.nonfinite.longest_row()
    if not last:
        return
    num_skipped = last - first + 1
    if num_skipped < max_steps:
        return
    grad_norm = float(window.grad_norm)
    raise TooManyNonFiniteError(
        f"the updates {first} to {last} had a loss or gradient that is not finite (none was "
        f"applied; lr {window.lr:g}, last gradient norm {grad_norm:g}), and "
        f"train.max_nonfinite_steps is {max_steps}: lower optim.base_lr, "
        "lengthen schedule.warmup_epochs, or set train.clip_grad_norm",
        first,
        last,
    )
