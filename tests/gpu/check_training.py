"""Checks of the training step: synchronisation, precision, optimizers, compile, memory, resume."""

import contextlib
import copy
import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from places import (
    ROOT,
    Place,
    SkippedCheckError,
    single_rank,
    synchronize,
    training_config,
    with_compile,
)

# isort: split
import torch
from dist_utils import logged_lines
from image_files import encode, picture, write_split
from torch import nn

from resnet_dist import compilation, engine
from resnet_dist.commands.benchmark_parts import build_training, step_on_one_batch
from resnet_dist.config import AugmentConfig, Config, DataConfig, OptimConfig, to_dict
from resnet_dist.data.types import Batch
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.engine import Training
from resnet_dist.metrics import Counts
from resnet_dist.models import sync_batch_norm
from resnet_dist.models.build import build_model
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import set_arithmetic
from resnet_dist.resources.compute_probe import ComputeProbe
from resnet_dist.resources.out_of_memory import out_of_memory_error


@contextlib.contextmanager
def collective_in_group_of_one() -> Iterator[None]:
    """Let SyncBatchNorm reduce over its single rank."""
    sync_batch_norm.SYNC_IN_GROUP_OF_ONE = True
    try:
        yield
    finally:
        sync_batch_norm.SYNC_IN_GROUP_OF_ONE = False


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Count SyncBatchNorm's collectives: the list grows with each. Not for a compiled network."""
    calls: list[int] = []
    reduce = sync_batch_norm._all_reduce_sum

    def counted(numbers, group):
        calls.append(numbers.numel())
        return reduce(numbers, group)

    sync_batch_norm._all_reduce_sum = counted
    try:
        yield calls
    finally:
        sync_batch_norm._all_reduce_sum = reduce


@contextlib.contextmanager
def no_synchronization(place: Place) -> Iterator[None]:
    """Make every wait of the host for the GPU an error. On a CPU nothing waits."""
    if not place.is_cuda:
        yield
        return
    torch.cuda.synchronize(place.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses_of(parts: Training, num_steps: int, lr: float) -> list[float]:
    """Train on the first batch; returns the loss of each update. Waits only at the end."""
    micro_batches = list(parts.train_loader.batches(0, 1))
    return [loss(counts) for counts in train(parts, micro_batches, num_steps, lr)]


def train(parts: Training, micro_batches: list[Batch], num_steps: int, lr: float) -> list[Counts]:
    """Train on the micro-batches again and again; returns the counts of each update."""
    nonfinite = NonFinite(parts.state.model, parts.state.step)
    all_counts = []
    for _ in range(num_steps):
        counts, _ = engine.train_step(
            parts.model, parts.state, micro_batches, lr, parts.rule, nonfinite
        )
        all_counts.append(counts)
    return all_counts


def loss(counts: Counts) -> float:
    """The mean loss of an update. Waits for the device."""
    return float(counts.result()["loss"])


def no_host_sync(place: Place, folder: Path) -> str:
    """`train_step` never waits for the device, with DDP, SyncBatchNorm's collective, EMA, mixup,
    fp16 and a teacher. The compute probe of a log line does not wait either.

    Eager, and on a GPU compiled.
    """
    config = training_config(place, folder)
    train = replace(config.train, ema_decay=0.999, label_smoothing=0.1, clip_grad_norm=1.0)
    config = replace(config, train=train, augment=AugmentConfig(mixup_alpha=0.2))
    taught_in_fp16 = replace(
        train,
        precision="fp16",
        teacher=weights_of_a_teacher(config, folder),
        teacher_model=config.model.name,
    )
    with_teacher = replace(config, train=taught_in_fp16)
    variants = {
        "eager": with_compile(config, False),
        "eager fp16 with a teacher": with_compile(with_teacher, False),
    }
    if place.is_cuda:
        # Sooner compiled than ResNet-50.
        small = replace(config, model=replace(config.model, name="resnet18"))
        variants["compiled"] = with_compile(small, True)
    for variant in variants.values():
        with single_rank(place) as runtime, collective_in_group_of_one():
            run_without_sync(place, variant, runtime)
    return ", ".join(variants)


def weights_of_a_teacher(config: Config, folder: Path) -> str:
    """A file with fresh weights of the network itself."""
    path = folder / "teacher.pth"
    network = build_model(config.model, config.data.synthetic_classes)
    torch.save(network.state_dict(), path)
    return str(path)


def run_without_sync(place: Place, config: Config, runtime: Runtime) -> None:
    """Train some steps in which the host must not wait, and count the collectives."""
    set_arithmetic(config.train, place.device)
    parts = build_training(config, runtime, 10)
    step = step_on_one_batch(parts)
    for _ in range(3):
        step()
    num_steps = place.size(5, 1)
    probe = ComputeProbe(place.device)
    with no_synchronization(place):
        # The probe's first measurement has ended: `no_synchronization` begins with a wait.
        assert probe.take() > 0
        for _ in range(num_steps):
            step()
    if not config.train.compile:
        modules = list(parts.state.model.modules())
        norms = sum(isinstance(module, sync_batch_norm.SyncBatchNorm) for module in modules)
        with counted_collectives() as calls:
            step()
        assert len(calls) == 2 * norms > 0
    parts.train_loader.close()


def fp16_with_scaler(place: Place, folder: Path) -> str:
    """100 updates in fp16: few are skipped, the scale stays usable, and the loss falls."""
    config = with_compile(training_config(place, folder, "fp16"), False)
    with single_rank(place) as runtime:
        set_arithmetic(config.train, place.device)
        parts = build_training(config, runtime, 10)
        losses = losses_of(parts, place.size(100, 2), lr=0.01)
        scale = float(parts.state.scaler.get_scale())
        parts.train_loader.close()
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert len(finite) >= 0.8 * len(losses), losses
    assert scale >= 1, f"the scale fell to {scale}"
    if place.is_full:
        assert finite[-1] < 0.9 * finite[0], losses
    for name, tensor in parts.state.model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    return f"loss {finite[0]:.3f} to {finite[-1]:.3f}, scale {scale:g}"


def optimizers_equal_the_cpu(place: Place, folder: Path) -> str:
    """Five updates of each optimizer with the same gradients, here and on the CPU, to 1e-5."""
    torch.manual_seed(0)
    on_cpu = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))
    gradients = []
    for _ in range(5):
        gradients.append([torch.randn_like(parameter) for parameter in on_cpu.parameters()])
    kinds = ("sgd", "lars", "lamb", "rmsprop", "adamw")
    for kind in kinds:
        expected = weights_after_updates(on_cpu, kind, gradients, torch.device("cpu"))
        found = weights_after_updates(on_cpu, kind, gradients, place.device)
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6, msg=kind)
    return ", ".join(kinds)


def weights_after_updates(
    network: nn.Module,
    kind: str,
    gradients: list[list[torch.Tensor]],
    device: torch.device,
) -> list[torch.Tensor]:
    """The parameters of a copy of a network after an update with each of the lists of gradients."""
    network = copy.deepcopy(network).to(device)
    optimizer = build_optimizer(OptimConfig(kind=kind), network)
    for gradients_of_update in gradients:
        for parameter, gradient in zip(network.parameters(), gradients_of_update, strict=True):
            parameter.grad = gradient.to(device)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.grad_scale = None
        optimizer.found_inf = torch.zeros((), device=device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in network.parameters()]


def compile_equals_eager(place: Place, folder: Path) -> str:
    """The loss of three updates in fp32, compiled and eager."""
    config = training_config(place, folder, "fp32")
    network = "resnet18" if place.is_full else "resnet20"
    config = replace(config, model=replace(config.model, name=network))
    with quick_compilation(place):
        eager = three_losses(place, with_compile(config, False))
        compiled = three_losses(place, with_compile(config, True))
    text = f"losses {eager} and {compiled}"
    for eager_loss, compiled_loss in zip(eager, compiled, strict=True):
        assert math.isclose(eager_loss, compiled_loss, rel_tol=2e-3), text
    return text


def three_losses(place: Place, config: Config) -> list[float]:
    """The loss of the first three updates, with SyncBatchNorm's collective."""
    with single_rank(place) as runtime, collective_in_group_of_one():
        set_arithmetic(config.train, place.device)
        parts = build_training(config, runtime, 10)
        losses = losses_of(parts, 3, lr=0.01)
        parts.train_loader.close()
    return losses


@dataclass(frozen=True)
class Mode:
    """A mode of torch.compile, and what runs in it."""

    name: str
    """train.compile_mode"""
    precision: str
    has_more: bool
    """whether the graphs hold SyncBatchNorm's collective, and a teacher has graphs too"""


# With reduce-overhead, a CUDA graph holds NCCL's kernels or none, and what a teacher predicts must
# last until the loss.
MODES = (
    Mode("default", "fp16", False),
    Mode("reduce-overhead", "bf16", False),
    Mode("reduce-overhead", "bf16", True),
)

# The largest relative difference of two losses: a guess, which has not run on a GPU. Weights and
# images that are rounded to bf16 change the losses of these updates by 0.3 % on a CPU.
MODES_TOLERANCE = 0.05


def compile_modes(place: Place, folder: Path) -> str:
    """20 updates of ResNet-20 in each mode of torch.compile have the losses of eager ones, and do
    not wait for the device.
    """
    config = training_config(place, folder)
    batch_size = place.size(128, 4)
    config = replace(
        config,
        model=replace(config.model, name="resnet20"),
        data=replace(
            config.data,
            train_crop_size=place.size(32, 8),
            synthetic_images=batch_size,
            synthetic_classes=10,
        ),
    )
    found = []
    teacher = weights_of_a_teacher(config, folder)
    with quick_compilation(place):
        for mode in MODES:
            train_config = replace(
                config.train,
                precision=mode.precision,
                compile_mode=mode.name,
                global_batch_size=batch_size,
                teacher=teacher if mode.has_more else "",
                teacher_model=config.model.name if mode.has_more else "",
                distillation_weight=0.5,
            )
            of_mode = replace(config, train=train_config)
            eager = losses_in_mode(place, with_compile(of_mode, False), mode)
            compiled = losses_in_mode(place, with_compile(of_mode, True), mode)
            difference = torch.tensor(compiled) / torch.tensor(eager) - 1
            # The largest element of a tensor is NaN if one of them is.
            worst = float(difference.abs().max())
            text = f"{mode.name} {mode.precision}"
            if mode.has_more:
                text += " with the collective and a teacher"
            assert worst <= MODES_TOLERANCE, f"{text}: {compiled}, eager {eager}"
            found.append(f"{text}: at most {worst:.2%} from eager")
    return "; ".join(found)


def losses_in_mode(place: Place, config: Config, mode: Mode) -> list[float]:
    """The losses of 20 updates; the host must not wait in the last 15."""
    switch = contextlib.nullcontext()
    if mode.has_more:
        switch = collective_in_group_of_one()
    with single_rank(place) as runtime, switch:
        set_arithmetic(config.train, place.device)
        parts = build_training(config, runtime, 10)
        micro_batches = list(parts.train_loader.batches(0, 1))
        # They find kernels by timing, and record CUDA graphs.
        all_counts = train(parts, micro_batches, place.size(5, 1), 0.05)
        with no_synchronization(place):
            all_counts += train(parts, micro_batches, place.size(15, 1), 0.05)
        parts.train_loader.close()
        return [loss(counts) for counts in all_counts]


@contextlib.contextmanager
def quick_compilation(place: Place) -> Iterator[None]:
    """Compile with inductor on a GPU. On a small CPU it takes minutes: only trace there."""
    backend = compilation.BACKEND
    if not place.is_cuda:
        compilation.BACKEND = "aot_eager"
    try:
        yield
    finally:
        compilation.BACKEND = backend
        torch._dynamo.reset()


def out_of_memory_is_explained(place: Place, folder: Path) -> str:
    """A batch that does not fit 6 GiB: the sentence, and the batch that it names does fit."""
    if not place.is_cuda:
        raise SkippedCheckError("needs a GPU: CPUs have no error of CUDA out of memory")
    total = torch.cuda.get_device_properties(place.device).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(place.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, 6 * 2**30 / total), place.device)
    config = with_compile(training_config(place, folder), False)
    config = _with_batch(config, 512)
    try:
        with single_rank(place) as runtime:
            try:
                parts = build_training(config, runtime, 10)
                step_on_one_batch(parts)()
                synchronize(place)
            except torch.OutOfMemoryError:
                text = str(out_of_memory_error(config, runtime))
            else:
                raise AssertionError("512 images fit into 6 GiB")
        fits = int(text.split("about ")[1].split(" ")[0])
        assert 16 <= fits < 512, text
        parts = None
        gc.collect()
        torch.cuda.empty_cache()
        with single_rank(place) as runtime:
            parts = build_training(_with_batch(config, fits), runtime, 10)
            step_on_one_batch(parts)()
            synchronize(place)
        return text
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, place.device)


def _with_batch(config: Config, global_batch_size: int) -> Config:
    """The config with another batch size and enough random pixels for it."""
    return replace(
        config,
        train=replace(config.train, global_batch_size=global_batch_size),
        data=replace(config.data, synthetic_images=global_batch_size),
    )


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from resnet_dist import engine, run
from resnet_dist.distributed import process
from resnet_dist.config import Config

config = Config.from_yaml(sys.argv[2])
stop_at = int(sys.argv[3])
real = engine.train_step

def train_step(model, state, *rest):
    if state.step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(model, state, *rest)

engine.train_step = train_step
sys.exit(process.run_process(config, run.train, resolve_auto=False))
"""


def deterministic_and_resumed(place: Place, folder: Path) -> str:
    """With `train.deterministic` two processes, and one that is stopped and resumed, end equal.

    JPEG files, augmentation, SyncBatchNorm, bf16 or fp16 on a GPU, there compiled and eager.
    """
    data = folder / "data"
    pictures = [picture(60 + i % 9, 80 - i % 7, seed=i) for i in range(48)]
    files = [encode(image) for image in pictures]
    for split in ("train", "val"):
        write_split(str(data), files, split=split)
    kinds = {"eager": False}
    if place.is_cuda:
        kinds["compiled"] = True
    runs = {}
    for kind, compiles in kinds.items():
        for name in ("one", "two", "stopped"):
            run = f"{kind}_{name}"
            runs[run] = _deterministic_config(place, data, folder / run, compiles)

    # All at the same time: most of it is imports and compilation.
    children = {}
    expected = {}
    for run, config in runs.items():
        is_stopped = run.endswith("stopped")
        children[run] = _start_child(config, stop_at=4 if is_stopped else -1)
        expected[run] = 143 if is_stopped else 0
    codes = {run: _end_child(child) for run, child in children.items()}
    assert codes == expected, codes

    resumed = [_start_child(runs[f"{kind}_stopped"], stop_at=-1) for kind in kinds]
    codes_of_resumed = [_end_child(child) for child in resumed]
    assert set(codes_of_resumed) == {0}
    for kind in kinds:
        _compare_weights(runs, kind)

    logged = logged_lines(folder / "eager_one")
    has_memory = any("gpu/peak_memory_gib" in line for line in logged)
    assert has_memory == place.is_cuda
    return f"{', '.join(kinds)}: 3 runs each, equal weights"


def _compare_weights(runs: dict[str, Config], kind: str) -> None:
    """Fail unless the three runs of a kind ended with the same weights."""
    first = _last_weights(runs[f"{kind}_one"])
    for name in ("two", "stopped"):
        other = _last_weights(runs[f"{kind}_{name}"])
        different = []
        for key, tensor in first.items():
            if not torch.equal(tensor, other[key]):
                different.append(key)
        text = f"{kind}, run {name}: {len(different)} tensors differ: {different[:3]}"
        assert not different, text


def _deterministic_config(place: Place, data: Path, folder: Path, compiles: bool) -> Config:
    """A short run of ResNet-20 on JPEG files."""
    config = Config()
    train = replace(
        config.train,
        epochs=8.0,
        global_batch_size=32,
        deterministic=True,
        compile=compiles,
        max_nonfinite_steps=99,
    )
    return replace(
        config,
        output_dir=str(folder),
        model=replace(config.model, name="resnet20"),
        data=DataConfig(
            data_dir=str(data),
            train_crop_size=32,
            val_crop_size=32,
            val_resize_size=36,
            threads=2,
        ),
        augment=AugmentConfig(policy="randaugment", random_erasing=0.2),
        schedule=replace(config.schedule, warmup_epochs=1.0),
        train=train,
        log=replace(config.log, sinks=(), progress_bar=False, interval_steps=2),
        distributed=replace(config.distributed, device=place.device.type, threads=1),
    )


def _start_child(config: Config, stop_at: int) -> subprocess.Popen:
    """Start a training in a process of its own; a negative `stop_at` lets it end by itself."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "child.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(to_dict(config)))
    # Several of them compile at the same time.
    environment = {**os.environ, "WANDB_MODE": "disabled", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT), str(path), str(stop_at)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )


def _end_child(child: subprocess.Popen) -> int:
    """Wait for a training; shows what it printed if it fails."""
    try:
        code = child.wait(timeout=150)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    if code not in (0, 143):
        log = Path(child.args[4]).with_name("log")
        raise AssertionError(f"exit code {code}: {log.read_text()[-2000:]}")
    return code


def _last_weights(config: Config) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint of a run."""
    path = Path(config.output_dir, "checkpoints", "last.pt")
    content = torch.load(path, map_location="cpu", weights_only=True)
    assert content["step"] == 8
    return content["model"]
