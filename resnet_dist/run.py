"""The composition root: from the config to the objects to a trained network. The only place that
sees all of it.
"""

import functools
import json
import shlex
import os
import shlex
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from resnet_dist import engine
from resnet_dist.checkpoint import Saver, TrainState
from resnet_dist.config import Config, to_dict
from resnet_dist.data.build import build_loaders
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.data.types import TrainLoader, ValLoader
from resnet_dist.distributed import Runtime, StopSignal
from resnet_dist.ema import Ema
from resnet_dist.log import Log, build_log
from resnet_dist.models import weights
from resnet_dist.models.build import build_model
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.models.zoo import check_image_size
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import resolve_settings
from resnet_dist.process import report_failure, resume_command
from resnet_dist.remarks import far_from_recipe, remarks
from resnet_dist.restore import checkpoint_folder, find_start, restore
from resnet_dist.rng import derive_seed
from resnet_dist.schedule import Schedule, build_schedule, epochs_to_steps, peak_lr
from resnet_dist.text import printable


def check_layout(
    global_batch_size: int, world_size: int, grad_accum_steps: int, pairs: bool = False
) -> int:
    """The local batch size; ValueError with the nearest layouts when the global batch does not
    divide.

    `pairs`: whether mixup or CutMix mixes pairs of images, neither of them with an image of another
    rank.
    """
    share = world_size * grad_accum_steps
    if global_batch_size % share == 0:
        if pairs and global_batch_size // share % 2:
            raise ValueError(
                f"augment.mixup_alpha and augment.cutmix_alpha mix pairs of images, but the batch of a "
                f"rank is {global_batch_size} / {share} = {global_batch_size // share}: make it even"
            )
        return global_batch_size // share
    batches = sorted(
        {max(1, global_batch_size // share) * share, (global_batch_size // share + 1) * share}
    )
    ranks = [
        n
        for n in range(1, global_batch_size + 1)
        if global_batch_size % (n * grad_accum_steps) == 0
    ]
    nearest = sorted(sorted(ranks, key=lambda n: abs(n - world_size))[:2])
    ways = [f"--train.global_batch_size {' or '.join(map(str, batches))}"]
    if nearest:
        ways.append(f"{' or '.join(map(str, nearest))} ranks")
    raise ValueError(
        f"train.global_batch_size is {global_batch_size}: it does not divide by {world_size} ranks * "
        f"{grad_accum_steps} train.grad_accum_steps = {share}; nearest layouts: {', or '.join(ways)}"
    )


def build_plan(config: Config, steps_per_epoch: int) -> engine.Plan:
    """Durations of the config in steps."""

    def interval(epochs: float) -> int:
        return max(1, epochs_to_steps(epochs, steps_per_epoch)) if epochs else 0

    train = config.train
    return engine.Plan(
        total_steps=max(1, epochs_to_steps(train.epochs, steps_per_epoch)),
        steps_per_epoch=steps_per_epoch,
        grad_accum_steps=train.grad_accum_steps,
        global_batch_size=train.global_batch_size,
        precision=train.precision,
        label_smoothing=train.label_smoothing,
        loss=train.loss,
        bce_target_threshold=train.bce_target_threshold,
        mixup_alpha=config.augment.mixup_alpha,
        cutmix_alpha=config.augment.cutmix_alpha,
        eval_interval_steps=interval(train.eval_interval_epochs),
        clip_grad_norm=train.clip_grad_norm,
        checkpoint_interval_steps=(
            interval(config.checkpoint.interval_epochs),
            config.checkpoint.interval_steps,
        ),
        log_interval_steps=config.log.interval_steps,
        max_nonfinite_steps=train.max_nonfinite_steps,
        seed=config.seed,
    )


def build_state(config: Config, num_classes: int, device: torch.device) -> TrainState:
    """Model with initial weights (equal on every rank and device), optimizer, scaler and average."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    model = build_model(config.model, num_classes)
    if config.model.sync_batch_norm:
        model = convert_sync_batch_norm(model, device_type=device.type)
    weights.freeze(model, config.optim.unfreeze_from)
    model = model.to(device=device, memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    ema = Ema(model, config.train.ema_decay) if config.train.ema_decay else None
    return TrainState(model, build_optimizer(config.optim, model), scaler, ema)


def load_network(
    saved: dict, config: Config, device: torch.device, raw: bool = False
) -> tuple[nn.Module, str]:
    """The network of a checkpoint in eval mode, and which weights it has: "ema" where there are
    averaged ones and not `raw`, else "model". Raises ValueError in one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("this is the work of one process: start it without torchrun")
    model = build_state(config, len(saved["class_names"]), device).model
    kind = "ema" if saved["ema"] and not raw else "model"
    model.load_state_dict(saved[kind])
    return model.eval(), kind


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.parallel.DistributedDataParallel:
    """DistributedDataParallel whose buffers stay with their rank: SyncBatchNorm keeps them equal by
    itself.
    """
    with warnings.catch_warnings():  # newer torch wants another name, which older torch lacks
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def facts(config: Config, train_loader: TrainLoader) -> dict:
    """What a checkpoint says of its run: enough to build it again, and to refuse another."""
    return {
        "config": to_dict(config),
        "num_samples": train_loader.num_samples,
        "fingerprint": train_loader.fingerprint,
        "class_names": list(train_loader.class_names),
    }


def greeting(
    config: Config, state: TrainState, train_loader: TrainLoader, val_loader: ValLoader
) -> str:
    """What is trained, and on what."""
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    return (
        f"{config.model.name}, {parameters / 1e6:.2f} M parameters, {config.model.num_classes} classes, "
        f"{train_loader.num_samples} training and {val_loader.num_samples} validation images"
    )


def farewell(
    config: Config, state: TrainState, plan: engine.Plan, runtime: Runtime, log: Log
) -> str:
    """The last words of a run: how it ended, where its files are, and the commands that come next.

    A finished run offers evaluate, predict and report. A stopped run offers the command that
    resumes it.
    """
    folder = Path(config.output_dir)
    finished = state.step >= plan.total_steps
    headline = "finished" if finished else f"stopped at step {state.step} of {plan.total_steps}"
    if state.best_step >= 0:
        headline += f"; best val top-1 {state.best_top1:.2f} % at step {state.best_step}"
    links = [checkpoint_folder(config) / name for name in ("last.pt", "best.pt")]
    checkpoints = [str(link) for link in links if link.exists()]
    rows = {
        "checkpoints": printable(", ".join(checkpoints) or "none"),
        "config": printable(folder / "config.yaml"),
        "metrics": printable(folder / "metrics.jsonl"),
        "W&B": log.wandb_location(),
    }
    if not finished:
        rows["resume"] = resume_command(runtime)
    elif checkpoints:
        best = printable(shlex.quote(checkpoints[-1]))
        rows["evaluate"] = f"resnet-dist evaluate --checkpoint {best}"
        rows["predict"] = f"resnet-dist predict --checkpoint {best} IMAGE_OR_FOLDER"
        rows["report"] = f"resnet-dist report {printable(shlex.quote(str(folder)))}"
    return "\n".join([headline, *(f"  {name:<11}  {value}" for name, value in rows.items())])


def write_config(config: Config) -> None:
    """The resolved config as `config.yaml` in the run's folder, for `--config` to read."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "config.yaml.tmp"
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    os.replace(temporary, folder / "config.yaml")


def save_replay(
    folder: Path,
    updates: tuple[int, int],
    loader: TrainLoader,
    schedule: Schedule,
    plan: engine.Plan,
    runtime: Runtime,
) -> None:
    """Write nonfinite.json: the steps (from 0), their lr, and for each rank its micro-batches, as
    rows and files.
    """
    steps, shares, index = (
        range(updates[0] - 1, updates[1]),
        [[]] * runtime.world_size,
        getattr(loader, "index", None),
    )
    own = [batch.indices.tolist() for batch in loader.batches(steps.start, steps.stop)]
    torch.distributed.all_gather_object(shares, own, group=runtime.cpu_group)
    files = (
        {row: index.path(row) for share in shares for batch in share for row in batch}
        if index
        else {}
    )
    text = json.dumps(
        {
            "plan": asdict(plan),
            "steps": list(steps),
            "lr": [schedule.lr(step) for step in steps],
            "rows_of_ranks": shares,
            "files": files,
        }
    )
    runtime.on_main(lambda: (folder / "nonfinite.json").write_text(text))


def train(
    config: Config, runtime: Runtime, should_continue: Callable[[int], bool] = lambda signal: False
) -> int:
    """Train, and tell the log how it ended. Returns 0, 128 + signal after a checkpoint, or as
    `report_failure`.

    After a signal and its checkpoint, `should_continue(signal)` is asked in the main process whether all
    train on instead.
    """
    log = build_log(config.log, config.output_dir, runtime.is_main, to_dict(config))
    try:
        code = compose(config, runtime, log, should_continue)
    except Exception as problem:
        code = report_failure(problem, runtime)  # before the log is closed, which may take its time
    log.close(code)
    return code


def compose(
    config: Config, runtime: Runtime, log: Log, should_continue: Callable[[int], bool]
) -> int:
    """Put the run together from its parts, and run it; returns as `train`."""
    # 1. settings that depend on the machine and on the checkpoint
    start = find_start(config, runtime, log)
    config = resolve_settings(config, runtime.device, start.saved_config)
    for remark in remarks(config, runtime.device.type):
        log.warn(remark)
    for remark in far_from_recipe(config, runtime.world_size):
        log.warn(remark)

    # 2. layout and data
    check_image_size(config.model.name, config.data)
    local_batch_size = check_layout(
        config.train.global_batch_size,
        runtime.world_size,
        config.train.grad_accum_steps,
        pairs=config.augment.mixup_alpha + config.augment.cutmix_alpha > 0,
    )
    train_loader, val_loader = build_loaders(config, runtime)
    num_classes = check_num_classes(config.model.num_classes, len(train_loader.class_names))
    config = replace(config, model=replace(config.model, num_classes=num_classes))

    # 3. plan
    plan = build_plan(config, train_loader.steps_per_epoch)
    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, plan.global_batch_size)
    schedule = build_schedule(config.schedule, peak, plan.steps_per_epoch, plan.total_steps)

    # 4. model and state
    state = build_state(config, num_classes, runtime.device)
    saver = Saver(
        checkpoint_folder(config),
        config.checkpoint.keep,
        facts(config, train_loader),
        log.warn,
        runtime.is_main,
    )
    origin = restore(state, start, config, saver, runtime, log)
    runtime.on_main(
        lambda: write_config(config) or saver.claim()
    )  # a start that was refused has changed nothing
    model = wrap_ddp(state.model, runtime.device)
    engine.settle_buckets(
        model, config.data.train_crop_size, config.train.precision, runtime.device
    )

    # 5. train
    log.start(state.step, plan.total_steps, evaluated=state.evaluated_step == state.step)
    log.say(
        f"{greeting(config, state, train_loader, val_loader)}\n"
        f"batch {plan.global_batch_size} = {runtime.world_size} {runtime.device.type} ranks * "
        f"{plan.grad_accum_steps} micro-steps * {local_batch_size}, {plan.precision}, peak lr {peak:g}, "
        f"{plan.total_steps} steps of {plan.steps_per_epoch} per epoch; step {state.step}, {origin}"
    )
    stop_signal = StopSignal(runtime.cpu_group, runtime.watchdog)
    try:
        parts = (
            model,
            state,
            train_loader,
            val_loader,
            schedule,
            plan,
            runtime,
            saver,
            log,
            stop_signal,
        )
        while (ended_by := engine.train(*parts)) and runtime.on_main(
            functools.partial(should_continue, ended_by)
        ):
            stop_signal.forget()
        stop_signal.finish()
        runtime.watchdog.ended.set()  # from here on nobody waits for another
        saver.wait()  # a further signal must not end the last write
        train_loader.close()
        val_loader.close()
        log.say(farewell(config, state, plan, runtime, log))
    except FloatingPointError as problem:
        save_replay(Path(config.output_dir), problem.args[1], train_loader, schedule, plan, runtime)
        raise FloatingPointError(
            f"{problem.args[0]}; nonfinite.json in output_dir has their images"
        ) from problem
    finally:
        stop_signal.close()
    if saver.failure:
        raise ValueError(saver.failure)
    return 128 + ended_by if ended_by else 0
