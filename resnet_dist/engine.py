"""The loop: one training step, one evaluation, and the run that is made of them.

`train` reads from top to bottom. There is one clock, `state.step`, the number of updates done; what
is due is derived from it, so a run that goes on at step s does what the uninterrupted one did
there.
"""

import contextlib
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.checkpoint import Saver, TrainState
from resnet_dist.data.types import IGNORED_LABEL, Batch, TrainLoader, ValLoader
from resnet_dist.distributed import Runtime, StopSignal
from resnet_dist.log import Log
from resnet_dist.metrics import Counts
from resnet_dist.mix import draw, losses, mix_images
from resnet_dist.precision import autocast
from resnet_dist.rng import derive_seed
from resnet_dist.schedule import Schedule
from resnet_dist.timing import Clock


@dataclass(frozen=True)
class Plan:
    """What the loop does and when, in steps."""

    total_steps: int
    steps_per_epoch: int
    grad_accum_steps: int
    global_batch_size: int
    precision: str
    label_smoothing: float
    loss: str
    bce_target_threshold: float
    mixup_alpha: float
    cutmix_alpha: float
    clip_grad_norm: float
    eval_interval_steps: int
    """0 = at the end only"""
    checkpoint_interval_steps: tuple[int, ...]
    log_interval_steps: int
    max_nonfinite_steps: int
    seed: int


class NonFinite:
    """What to do about updates whose gradient is not finite, without waiting for the device.

    The optimizer leaves them out (see train_step); this keeps the running statistics of the forward
    pass from them too, and counts.
    """

    def __init__(self, model: nn.Module, step: int) -> None:
        """`step`: the number of updates done before."""
        self.statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.before = [torch.empty_like(buffer) for buffer in self.statistics]
        device = next(model.parameters()).device
        self.step = torch.full((), step, dtype=torch.int64, device=device)
        self.in_row, self.longest, self.longest_end, self.total = torch.zeros(
            4, dtype=torch.int64, device=device
        ).unbind()

    def remember(self) -> None:
        """Note the running statistics as they are before the forward pass."""
        if self.statistics:
            torch._foreach_copy_(self.before, self.statistics)

    def settle(self, skipped: torch.Tensor) -> None:
        """Count an update, and if it was left out (`skipped`, a bool scalar) put the statistics
        back.
        """
        for before, now in zip(self.before, self.statistics, strict=True):
            torch.where(skipped, before, now, out=now)
        self.step.add_(1)
        self.total.add_(skipped)
        self.in_row.add_(1).mul_(skipped)
        longer = self.in_row > self.longest
        torch.where(longer, self.in_row, self.longest, out=self.longest)
        torch.where(longer, self.step, self.longest_end, out=self.longest_end)

    def longest_row(self) -> tuple[int, int]:
        """First and last of the most updates in a row that were left out, counted from 1; last is 0
        if there was none.

        Waits for the device.
        """
        length, end = torch.stack([self.longest, self.longest_end]).tolist()
        return end - length + 1, end


def train_mode(model: nn.Module) -> None:
    """Put a model in training mode, but for the norms of its frozen part: their statistics stay,
    and they say nothing.

    A norm without weights goes with the layer that is defined before it.
    """
    model.train()
    frozen = False
    for module in model.modules():
        if own := list(module.parameters(recurse=False)):
            frozen = not any(parameter.requires_grad for parameter in own)
        if frozen and isinstance(module, nn.modules.batchnorm._NormBase):
            module.eval()


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """The loss is computed in single precision, or in double where the model is."""
    return logits if logits.dtype == torch.float64 else logits.float()


def all_logits(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a network returned: the logits, then, from some in training mode, those of its auxiliary
    heads.
    """
    return outputs if isinstance(outputs, tuple) else (outputs,)


def train_step(
    model: nn.Module,
    state: TrainState,
    micro_batches: list[Batch],
    lr: float,
    plan: Plan,
    nonfinite: NonFinite,
) -> tuple[Counts, torch.Tensor]:
    """One update from `grad_accum_steps` micro-batches; nothing in it waits for the device.

    `model` is what computes (the DDP wrapper, or the plain module in a test), `state.model` what it
    wraps. Returns this rank's counts and the L2 norm of the gradient, averaged over all samples of
    the update, before clipping. An update whose gradient is not finite is left out on the device,
    by the optimizer's `found_inf`; in fp16 the scaler decides that, from the same gradient. The
    loss of an auxiliary head, with the same targets, adds to the gradient with the factor
    `state.model.auxiliary_weight`; the counts, and so train/loss, are of the logits alone.
    """
    optimizer, scaler = state.optimizer, state.scaler
    device = micro_batches[0].images.device
    drawn = draw(plan.seed, state.step, plan.mixup_alpha, plan.cutmix_alpha)

    # 1. gradient: summed over the micro-steps, averaged over the ranks in the last of them
    counts = Counts.zero(device)
    nonfinite.remember()
    for number, batch in enumerate(micro_batches, start=1):
        images, share = mix_images(batch.images, drawn)
        with contextlib.nullcontext() if number == len(micro_batches) else model.no_sync():
            with autocast(device, plan.precision):
                logits = all_logits(model(images))
            loss, *auxiliary = [
                losses(
                    at_least_fp32(each),
                    batch.labels,
                    share,
                    plan.label_smoothing,
                    plan.loss,
                    plan.bce_target_threshold,
                )
                for each in logits
            ]
            objective = sum((state.model.auxiliary_weight * each for each in auxiliary), start=loss)
            scaler.scale(objective.mean() / len(micro_batches)).backward()
        counts = counts + Counts.of(logits[0].detach(), batch.labels, loss.detach())

    # 2. its norm, equal on all ranks, decides for all of them whether the update is made
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.get_total_norm(
        [p.grad for p in parameters if p.grad is not None], foreach=None
    )
    if plan.clip_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, plan.clip_grad_norm, grad_norm, foreach=None)
    skipped = ~torch.isfinite(grad_norm)
    nonfinite.settle(skipped)

    # 3. update
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if state.ema:
        state.ema.update()
    state.step += 1
    return counts, grad_norm


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: ValLoader,
    runtime: Runtime,
    precision: str,
    poll: Callable[[], int] = lambda: 0,
) -> Counts | None:
    """Counts over the whole validation set, each image once, on any number of ranks; None if `poll`
    asked to stop.

    The loss is the plain cross-entropy, without label smoothing and whatever `train.loss` is. Every
    rank does the same number of rounds, with or without a batch, so that `poll` may be a
    collective.
    """
    was_training = model.training
    model.eval()
    runtime.broadcast_buffers(model)  # without SyncBatchNorm every rank has statistics of its own
    counts = Counts.zero(runtime.device)
    try:
        for batch in loader:
            if poll():
                return None
            if batch is None:
                continue
            logits = predict(model, batch, loader.mirrored, precision)
            loss = F.cross_entropy(
                logits, batch.labels, reduction="none", ignore_index=IGNORED_LABEL
            )
            counts = counts + Counts.of(logits, batch.labels, loss)
    finally:
        if was_training:
            train_mode(model)
    counts = counts.reduce(runtime)
    assert int(counts.num) == loader.num_samples, (
        f"evaluated {int(counts.num)} of {loader.num_samples} images"
    )
    return counts


@torch.inference_mode()
def predict(model: nn.Module, batch: Batch, mirrored: bool, precision: str) -> torch.Tensor:
    """Logits [B, C] of an evaluation batch by a model in eval mode; `mirrored` as in ValLoader. Of
    several views of an image the probabilities are averaged (Krizhevsky et al. 2012).
    """
    views = [
        images
        for view in (batch.images, *batch.other_views)
        for images in ((view, view.flip(3)) if mirrored else (view,))
    ]
    with autocast(batch.images.device, precision):
        logits = [at_least_fp32(model(images)) for images in views]
    if len(logits) == 1:
        return logits[0]
    return torch.logsumexp(torch.stack(logits).log_softmax(2), 0) - math.log(len(logits))


def settle_buckets(model: nn.Module, image_size: int, precision: str, device: torch.device) -> None:
    """Let DDP find its final gradient buckets before the first update, on zeros and without a trace
    in the weights.

    DDP lays its buckets out anew after the first backward pass. With more than two ranks the order
    of additions in an all-reduce depends on the place in the bucket, so that the first update after
    a resume would round differently from the same update of the uninterrupted run. In training
    mode, since auxiliary heads have a gradient only there; the running statistics that it changes
    are put back. What dropout draws is of no account: each step seeds anew.
    """
    train_mode(model)
    before = [buffer.clone() for buffer in model.buffers()]
    images = torch.zeros(2, 3, image_size, image_size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    for _ in range(2):  # the second forward pass is what moves the buckets
        with autocast(device, precision):
            logits = all_logits(model(images))
        sum(each.float().sum() * 0 for each in logits).backward()
    model.zero_grad(set_to_none=True)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)


def train(
    model: nn.Module,
    state: TrainState,
    train_loader: TrainLoader,
    val_loader: ValLoader,
    schedule: Schedule,
    plan: Plan,
    runtime: Runtime,
    saver: Saver,
    log: Log,
    stop_signal: StopSignal,
) -> int:
    """Train from `state.step` to `plan.total_steps`. Returns 0, or the signal that ended it after a
    checkpoint.

    Raises FloatingPointError(text, (first, last)) when `plan.max_nonfinite_steps` updates in a row
    were left out.
    """

    def poll(phase: str) -> int:
        runtime.watchdog.beat(state.step, phase)
        return stop_signal.poll()

    clock, nonfinite = Clock(), NonFinite(state.model, state.step)
    counts, grad_norm, lr, logged_step = Counts.zero(runtime.device), None, 0.0, state.step
    batches = train_loader.batches(state.step, plan.total_steps)
    train_mode(model)
    gc.collect()
    gc.freeze()  # what exists now stays: no collection walks it again
    gc.disable()  # ranks would pause at different steps, and all wait for each
    try:
        while True:
            # 1. log, where it is due and wherever the run is about to wait anyway: a window never
            # spans a checkpoint
            ends_by_signal = bool(poll("log"))
            due = [
                is_due(state.step, interval, plan.total_steps)
                for interval in (
                    plan.log_interval_steps,
                    plan.eval_interval_steps,
                    *plan.checkpoint_interval_steps,
                )
            ]
            if state.step > logged_step and (any(due) or ends_by_signal):
                saver.check_claim()
                report(
                    state, counts, grad_norm, lr, nonfinite, clock, train_loader, plan, runtime, log
                )
                counts, logged_step = Counts.zero(runtime.device), state.step
                gc.collect(1)

            # 2. evaluate, once per due step; a signal ends it
            if due[1] and not ends_by_signal and state.evaluated_step != state.step:
                with clock.excluded():
                    ends_by_signal = not evaluate_state(
                        state, val_loader, plan, runtime, log, lambda: poll("val")
                    )

            # 3. checkpoint (what is already saved is not saved again)
            if any(due[2:]) or ends_by_signal or state.best_step == state.step:
                with clock.excluded():
                    saver.save(state)

            # 4. leave at the end, or when any rank was asked to
            if ends_by_signal or state.step >= plan.total_steps:
                return stop_signal.agreed

            # 5. data
            runtime.watchdog.beat(state.step, "data")
            with clock.data_wait():
                micro_batches = [next(batches) for _ in range(plan.grad_accum_steps)]

            # 6. update
            runtime.watchdog.beat(state.step, "update")
            torch.manual_seed(
                derive_seed(plan.seed, "step", state.step, runtime.rank)
            )  # for dropout and its like
            lr = schedule.lr(state.step)
            step_counts, grad_norm = train_step(model, state, micro_batches, lr, plan, nonfinite)
            counts = counts + step_counts
            clock.step(plan.global_batch_size)
            log.progress(state.step)
    finally:
        gc.enable()
        gc.unfreeze()
        batches.close()


def is_due(step: int, interval: int, total_steps: int) -> bool:
    """Whether something that happens every `interval` steps (0 = never) and at the end happens
    after `step` updates.
    """
    return step == total_steps or (step > 0 and interval > 0 and step % interval == 0)


def evaluate_state(
    state: TrainState,
    loader: ValLoader,
    plan: Plan,
    runtime: Runtime,
    log: Log,
    poll: Callable[[], int],
) -> bool:
    """Evaluate the raw and the averaged weights, log both, keep the best; False if `poll` asked to
    stop.

    The best is that of the averaged weights where there are any.
    """
    results = {}
    for key, model in (("val", state.model), ("val_ema", state.ema.model if state.ema else None)):
        if model is not None:
            counts = evaluate(model, loader, runtime, plan.precision, poll)
            if counts is None:
                return False
            result = counts.result(len(loader.class_names))
            results |= {f"{key}/{name}": value for name, value in result.items()}
    bad_images = runtime.sum_integer(loader.num_bad)
    if bad_images:
        log.warn(
            f"{bad_images} of {loader.num_samples} validation images cannot be decoded and count as misses; "
            "quarantine.jsonl names them"
        )
    if bad_images and bad_images == loader.num_samples:
        raise ValueError(
            f"none of the {bad_images} validation images can be decoded: see quarantine.jsonl"
        )
    top1 = results.get("val_ema/top1", results["val/top1"])
    if top1 > state.best_top1:
        state.best_top1, state.best_step = top1, state.step
    state.evaluated_step = state.step
    results |= {
        "train/epoch": state.step / plan.steps_per_epoch,
        "val/best_top1": state.best_top1,
        "val/bad_images": bad_images,
    }
    log.metrics(state.step, results)
    return True


def report(
    state: TrainState,
    counts: Counts,
    grad_norm: torch.Tensor,
    lr: float,
    nonfinite: NonFinite,
    clock: Clock,
    loader: TrainLoader,
    plan: Plan,
    runtime: Runtime,
    log: Log,
) -> None:
    """One log line about the steps since the last one; every rank calls it, and the ranks wait for
    the device.

    Raises FloatingPointError when too many updates in a row were left out.
    """
    result = counts.reduce(runtime).result(len(loader.class_names))
    shown = ("loss", "top1", "top5")
    log.metrics(
        state.step,
        {
            "train/epoch": state.step / plan.steps_per_epoch,
            **{f"train/{name}": result[name] for name in shown if name in result},
            "train/lr": lr,
            "train/grad_norm": float(grad_norm),
            "train/skipped_updates": int(nonfinite.total),
            "train/bad_images": runtime.sum_integer(loader.num_bad),
            **{f"train/{key}": value for key, value in clock.take().items()},
        },
    )
    first, last = nonfinite.longest_row()
    if last and last - first + 1 >= plan.max_nonfinite_steps:
        raise FloatingPointError(
            f"the updates {first} to {last} had a loss or gradient that is not finite (none was applied; lr {lr:g}, "
            f"last gradient norm {float(grad_norm):g}), and train.max_nonfinite_steps is {plan.max_nonfinite_steps}: "
            "lower optim.base_lr, lengthen schedule.warmup_epochs, or set train.clip_grad_norm",
            (first, last),
        )
