"""The composition root of training: from the config to the objects to a trained network.

This is the only module that sees all parts of a run.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from resnet_dist import engine
from resnet_dist.checkpoints.checkpoint import Saver, TrainState
from resnet_dist.checkpoints.restore import (
    StartPoint,
    checkpoint_folder,
    find_start,
    refuse_outdated_start,
    restore,
)
from resnet_dist.checkpoints.state import build_state, wrap_ddp
from resnet_dist.compilation import (
    NetworkCompiler,
    describe_compilation,
    refusal,
    replays_cuda_graphs,
    start_compiler,
)
from resnet_dist.compile_cache import load_compile_cache, save_compile_cache
from resnet_dist.config import Config, to_dict
from resnet_dist.data.build import build_loaders
from resnet_dist.data.pixels.probe import describe_jpeg_decoder
from resnet_dist.data.sampling.crops import train_side
from resnet_dist.data.sampling.order import BatchLayout
from resnet_dist.data.sources.index import check_num_classes
from resnet_dist.data.stores.client import give_up_soon, keep_trying
from resnet_dist.data.types import TrainLoader
from resnet_dist.distributed.process import report_failure
from resnet_dist.distributed.runtime import Runtime, StopSignal
from resnet_dist.distributed.watchdog import COMPILE_PHASE
from resnet_dist.engine import Services, Training, UpdateRule
from resnet_dist.evaluation.exhibits import Exhibits
from resnet_dist.files import write_file
from resnet_dist.layout import check_layout
from resnet_dist.logs.log import Log, build_log
from resnet_dist.logs.summary import summary_at_end, summary_at_start
from resnet_dist.mix import build_mixing
from resnet_dist.models.zoo import check_image_size
from resnet_dist.nonfinite import TooManyNonFiniteError, write_replay
from resnet_dist.plan import TrainPlan, build_plan
from resnet_dist.precision import (
    build_precision,
    has_fast_bf16,
    resolve_settings,
    set_arithmetic,
)
from resnet_dist.resources.out_of_memory import explain_memory
from resnet_dist.schedule import Schedule, build_schedule, peak_lr
from resnet_dist.settings.remarks import recipe_mismatch, remarks
from resnet_dist.teacher import Teacher, build_loss_for, load_teacher

ShouldContinue = Callable[[int], bool]
"""from the signal that stopped training to whether it continues after the checkpoint"""


def always_stop(signal: int) -> bool:
    """Training ends at each signal."""
    return False


def train(config: Config, runtime: Runtime, should_continue: ShouldContinue = always_stop) -> int:
    """Train one run; every rank calls it.

    Args:
        config: The config of the run.
        runtime: The ranks and the device of this one.
        should_continue: Asked in the main process after a signal and its checkpoint.

    Returns:
        The exit code: 0, 128 + signal after a checkpoint, or that of `report_failure`.
    """
    log = build_log(config.log, config.output_dir, runtime.is_main, to_dict(config))
    try:
        code = build_and_train(config, runtime, log, should_continue)
    except Exception as problem:
        # Before the log is closed, which may take its time.
        code = report_failure(explain_memory(problem, config, runtime), runtime)
    log.close(code)
    return code


def build_and_train(
    config: Config, runtime: Runtime, log: Log, should_continue: ShouldContinue
) -> int:
    """Build the parts of a run and train.

    Returns:
        0, or 128 + signal after a checkpoint.

    Raises:
        ValueError: If the config does not fit the data, the ranks or the checkpoint.
        FloatingPointError: If too many updates in a row were not finite.
    """
    # 1. Settings that depend on the machine and on the checkpoint.
    start = find_start(config, runtime, log)
    may_fall_back = config.train.compile == "auto" and start.saved is None
    config = resolve_settings(config, runtime.device, start.saved_config)
    set_arithmetic(config.train, runtime.device)
    warn_about_settings(config, runtime, log)
    check_image_size(config.model.name, config.data)
    layout = check_and_describe_layout(config, runtime)

    # 2. Data.
    train_loader, val_loader = build_loaders(config, runtime, cached=True)
    num_classes = check_num_classes(config.model.num_classes, len(train_loader.class_names))
    config = replace(config, model=replace(config.model, num_classes=num_classes))

    # 3. Network and state. A start that is refused changes nothing on disk.
    state = build_state(config, num_classes, runtime.device)
    teacher = load_and_report_teacher(config, train_loader, runtime, log)
    saver = build_saver(config, train_loader, teacher, runtime, log)
    origin = restore(state, start, config, saver, runtime, log)
    plan = build_plan(config, train_loader.steps_per_epoch)
    shape = first_shape(config, state.step // plan.steps_per_epoch, runtime)
    compiler = compile_network(config, state, shape, may_fall_back, runtime, log, teacher)
    config = replace(config, train=replace(config.train, compile=compiler is not None))
    claim_folder(start, config, saver, runtime, log)

    # 4. The loop and what it needs.
    parts = Training(
        model=wrap_ddp(state.model, runtime.device),
        state=state,
        train_loader=train_loader,
        val_loader=val_loader,
        schedule=build_run_schedule(config, plan),
        rule=build_update_rule(config, runtime.device, runtime.rank, runtime.world_size, teacher),
        plan=plan,
        compiler=compiler,
    )
    warm_up(parts, shape)
    start_log(log, parts, saver)
    log.say(describe_start(config, parts, layout, origin))
    report_loaders(config, parts, runtime, log)

    # 5. Training.
    ended_by = train_and_summarize(config, parts, should_continue, log, saver, runtime)
    if saver.failure:
        raise ValueError(saver.failure)
    if ended_by:
        return 128 + ended_by
    return 0


def claim_folder(
    start: StartPoint, config: Config, saver: Saver, runtime: Runtime, log: Log
) -> None:
    """Make output_dir the folder of this run, and write what belongs to its start."""
    saver.facts["config"] = to_dict(config)
    runtime.on_main(lambda: write_config(config))
    runtime.on_main(saver.claim)
    refuse_outdated_start(start, config, runtime)
    if config.train.compile:
        save_compile_cache(config.output_dir, runtime, log)


def warm_up(parts: Training, shape: tuple[int, ...]) -> None:
    """Settle DDP's gradient buckets, with images of `shape` [B, 3, H, W] if that is compiled."""
    if parts.compiler is None:
        # Two images do it as well, and sooner.
        shape = (2, *shape[1:])
    rule = parts.rule
    engine.warm_up_ddp(parts.model, shape, rule.precision, rule.replays_graphs)


def first_shape(config: Config, epoch: int, runtime: Runtime) -> tuple[int, int, int, int]:
    """The shape of a micro-batch of one rank in an epoch, [B, 3, H, W]."""
    train = config.train
    local_batch_size = train.global_batch_size // (runtime.world_size * train.grad_accum_steps)
    side = train_side(epoch, config.data)
    return local_batch_size, 3, side, side


def compile_network(
    config: Config,
    state: TrainState,
    shape: tuple[int, ...],
    may_fall_back: bool,
    runtime: Runtime,
    log: Log,
    teacher: Teacher | None = None,
) -> NetworkCompiler | None:
    """Compile the network and its teacher on all ranks, or on none, as `train.compile` says.

    Args:
        config: The resolved config.
        state: Holds the network.
        shape: Of the images of the first update, [B, 3, H, W].
        may_fall_back: Whether the run may train without it if it fails.
        runtime: The ranks.
        log: Where the time and a failure go.
        teacher: Of a distillation; None for none.

    Returns:
        None if it is not asked for, or if it failed and the run may fall back.

    Raises:
        ValueError: It failed, and the run must not fall back.
    """
    if not config.train.compile:
        return None
    log.say("compiling the network with torch.compile, which may take minutes")
    assert runtime.watchdog is not None
    runtime.watchdog.beat(state.step, COMPILE_PHASE)
    start = time.monotonic()
    load_compile_cache(config.output_dir, runtime, log)
    teacher_network = None if teacher is None else teacher.network
    compiler, problem = start_compiler(state.model, config.train, shape, runtime, teacher_network)
    if compiler is not None:
        seconds = time.monotonic() - start
        log.say(describe_compilation(compiler.num_graphs, shape, seconds))
    elif may_fall_back:
        log.warn(f"training without torch.compile, which failed: {problem}")
    else:
        raise ValueError(refusal(problem))
    return compiler


def describe_start(config: Config, parts: Training, layout: str, origin: str) -> str:
    """What is printed before the first update.

    Args:
        config: The resolved config.
        parts: The parts of the run.
        layout: How the global batch is divided, in words.
        origin: Where the state comes from, in words.
    """
    plan = parts.plan
    return (
        f"{summary_at_start(config, parts)}\n"
        f"{layout}, {parts.rule.precision.name}, peak lr {parts.schedule.peak_lr:g}, "
        f"{plan.total_steps} steps of {plan.steps_per_epoch} per epoch; step {parts.state.step}, "
        f"{origin}"
    )


def train_and_summarize(
    config: Config,
    parts: Training,
    should_continue: ShouldContinue,
    log: Log,
    saver: Saver,
    runtime: Runtime,
) -> int:
    """Run the training loop, then log the summary.

    Returns:
        0, or the signal that ended training.

    Raises:
        FloatingPointError: If too many updates in a row were not finite.
    """
    # A store that does not answer must not keep a rank for the time of all attempts.
    stop_signal = StopSignal(runtime.cpu_group, runtime.watchdog, on_stop=give_up_soon)
    exhibits = Exhibits(config, parts.train_loader.class_names, log, runtime)

    def translate_error(problem: Exception) -> Exception:
        return explain_memory(problem, config, runtime)

    services = Services(runtime, saver, log, stop_signal, exhibits, translate_error)
    try:
        ended_by = run_loop(parts, services, should_continue)
        if not ended_by:
            best = checkpoint_folder(config) / "best.pt"
            exhibits.show_checkpoint(parts.state.best_step, parts.state.best_top1, best)
        log.summary(summary_at_end(config, parts, services))
    except TooManyNonFiniteError as problem:
        folder = Path(config.output_dir)
        write_replay(problem, folder, parts.train_loader, parts.schedule, runtime)
        raise FloatingPointError(
            f"{problem}; nonfinite.json in output_dir names their images"
        ) from problem
    finally:
        stop_signal.close()
    return ended_by


def start_log(log: Log, parts: Training, saver: Saver) -> None:
    """Let the log continue where the state is, as long as no other process claims the folder."""
    state = parts.state
    is_evaluated = state.evaluated_step == state.step
    log.start(
        state.step,
        parts.plan.total_steps,
        evaluated=is_evaluated,
        check_claim=saver.check_claim,
    )


def run_loop(parts: Training, services: Services, should_continue: ShouldContinue) -> int:
    """Train until the end, or until a signal after which training does not continue.

    Returns:
        0 or that signal, once the last checkpoint is written and the loaders are closed.
    """
    runtime = services.runtime
    while True:
        ended_by = engine.train_loop(parts, services)
        if not ended_by:
            break
        if not ask_main(should_continue, ended_by, runtime):
            break
        services.stop_signal.forget()
        keep_trying()
    services.stop_signal.finish()
    # From here on no rank waits for another.
    assert runtime.watchdog is not None
    runtime.watchdog.ended.set()
    # The signal handler is still ours: a further signal does not end the last write.
    services.saver.wait()
    parts.train_loader.close()
    parts.val_loader.close()
    return ended_by


def ask_main(should_continue: ShouldContinue, signal: int, runtime: Runtime) -> bool:
    """Ask the main process whether to continue after `signal`; every rank gets its answer."""
    answer = runtime.on_main(lambda: should_continue(signal))
    return bool(answer)


def warn_about_settings(config: Config, runtime: Runtime, log: Log) -> None:
    """Warn about settings that work, but probably not as the user expects."""
    device = runtime.device
    for remark in remarks(config, device.type, has_fast_bf16(device)):
        log.warn(remark)
    for remark in recipe_mismatch(config, runtime.world_size):
        log.warn(remark)


def check_and_describe_layout(config: Config, runtime: Runtime) -> str:
    """How the global batch is divided over ranks and micro-steps, in words.

    Raises:
        ValueError: If the global batch size cannot be divided evenly.
    """
    train = config.train
    world_size = runtime.world_size
    mixes_pairs = config.augment.mixup_alpha > 0 or config.augment.cutmix_alpha > 0
    local_batch_size = check_layout(
        train.global_batch_size,
        world_size,
        train.grad_accum_steps,
        pairs=mixes_pairs,
    )
    # SyncBatchNorm takes the batches of all ranks as equal, without asking again.
    total = runtime.sum_integer(local_batch_size)
    assert total == world_size * local_batch_size, "ranks differ in their local batch size"
    return (
        f"batch {train.global_batch_size} = {world_size} {runtime.device.type} ranks * "
        f"{train.grad_accum_steps} micro-steps * {local_batch_size}"
    )


def build_update_rule(
    config: Config,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    teacher: Teacher | None = None,
) -> UpdateRule:
    """Loss, mixing and precision of the run, and what else an update needs to know.

    Args:
        config: The config of the run.
        device: Of this rank.
        rank: This rank.
        world_size: Number of ranks.
        teacher: The teacher of a distillation; None for none.
    """
    train = config.train
    precision = build_precision(train, device)
    layout = BatchLayout(train.global_batch_size, train.grad_accum_steps, rank, world_size)
    return UpdateRule(
        loss_for=build_loss_for(train, precision, teacher),
        mixing=build_mixing(config.augment, config.seed, layout),
        precision=precision,
        global_batch_size=train.global_batch_size,
        grad_accum_steps=train.grad_accum_steps,
        clip_grad_norm=train.clip_grad_norm,
        seed=config.seed,
        replays_graphs=replays_cuda_graphs(train),
    )


def build_run_schedule(config: Config, plan: TrainPlan) -> Schedule:
    """The learning rate of each step, with the peak scaled to the global batch size."""
    optim = config.optim
    peak = peak_lr(
        optim.base_lr,
        optim.base_batch_size,
        config.train.global_batch_size,
    )
    return build_schedule(
        config.schedule,
        peak,
        plan.steps_per_epoch,
        plan.total_steps,
    )


def build_saver(
    config: Config, train_loader: TrainLoader, teacher: Teacher | None, runtime: Runtime, log: Log
) -> Saver:
    """Build the object that writes the checkpoints.

    The description in each checkpoint is enough to build the run again, and to refuse a checkpoint
    of a different one.
    """
    description: dict[str, Any] = {
        "config": to_dict(config),
        "num_samples": train_loader.num_samples,
        "fingerprint": train_loader.fingerprint,
        "class_names": list(train_loader.class_names),
        "teacher_sha256": teacher.sha256 if teacher else "",
    }
    return Saver(
        checkpoint_folder(config),
        config.checkpoint.keep,
        description,
        log.warn,
        runtime.is_main,
    )


def write_config(config: Config) -> None:
    """Write the resolved config as `config.yaml` in output_dir, for `--config` to read."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    write_file(folder / "config.yaml", text)


def report_loaders(config: Config, parts: Training, runtime: Runtime, log: Log) -> None:
    """Say how the images are decoded, and what the loaders remark."""
    report_jpeg_decoder(config, runtime, log)
    for remark in (*parts.train_loader.remarks(), *parts.val_loader.remarks()):
        log.say(remark)


def load_and_report_teacher(
    config: Config, train_loader: TrainLoader, runtime: Runtime, log: Log
) -> Teacher | None:
    """Load the teacher, if the run has one; say which it is, and warn about what does not fit."""
    teacher = load_teacher(config, train_loader.class_names, runtime)
    if teacher is None:
        return None
    log.say(f"teacher: {teacher.description}")
    for warning in teacher.warnings:
        log.warn(warning)
    return teacher


def report_jpeg_decoder(config: Config, runtime: Runtime, log: Log) -> None:
    """On a GPU, say which decoder serves JPEG files: a fallback to the CPU would go unnoticed."""
    if not runtime.is_main or runtime.device.type != "cuda":
        return
    if config.data.kind == "synthetic":
        return
    level, text = describe_jpeg_decoder(runtime.device, config.decoder)
    if level == "ok":
        log.say(text)
    else:
        log.warn(text)
