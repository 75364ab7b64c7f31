"""torch.compile of the network: what is compiled, how often, and that ranks agree on it.

The backend is not inductor but one that runs the traced graph, except in the long tests: tracing,
guards, agreement and DDP's hooks are the same.
"""

import copy
import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dist_utils import equal_trees, run_app, run_ranks
from engine_utils import FP32, NoSync, make_batch, rule_of
from torch import nn

from resnet_dist import compilation, engine
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.checkpoints.resume_rules import check_resumable
from resnet_dist.checkpoints.state import build_state, wrap_ddp
from resnet_dist.compilation import (
    compiled_parts,
    inductor_options,
    is_compiled,
    run_together,
    start_compiler,
)
from resnet_dist.compile_cache import cache_path, load_compile_cache, save_compile_cache
from resnet_dist.config import (
    Config,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    check_config,
    to_dict,
)
from resnet_dist.distributed.rendezvous import Launcher, Meeting, Peer
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.distributed.watchdog import Beat, Heard, Watchdog
from resnet_dist.engine import train_step
from resnet_dist.evaluation.loop import predict_logits
from resnet_dist.forward import train_mode
from resnet_dist.models.build import build_model
from resnet_dist.models.resnet import BasicBlock, ResNet
from resnet_dist.models.sync_batch_norm import convert_sync_batch_norm
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import resolve_settings
from resnet_dist.run import build_update_rule, compile_network
from resnet_dist.teacher import Teacher

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TRAIN = TrainConfig(precision="fp32", compile=True)
PARTS = ["stem", "layer1", "layer2", "head"]


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """Trace the parts, but run their graphs as they are."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def runtime_of(rank=0, world_size=1, device=CPU):
    group = dist.group.WORLD if world_size > 1 else None
    return Runtime(rank, rank, world_size, world_size, device, group)


def tiny_state(train=TRAIN, **optim):
    """The state of a run with a network of two stages."""
    config = Config(model=ModelConfig(name="tiny"), train=train, optim=OptimConfig(**optim))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resnet_dist.models.build.MODELS", {"tiny": tiny_network})
        return config, build_state(config, 10, CPU)


def tiny_network(num_classes=10, depths=(1, 1)):
    return ResNet(BasicBlock, depths, num_classes, stem="cifar", stem_channels=8, shortcut="A")


def steps(state, config, batches, lr=0.1):
    """Train on each batch (a list of micro-batches); returns the loss of each."""
    model = NoSync(state.model)
    losses = []
    nonfinite = NonFinite(state.model, 0)
    rule = rule_of(config)
    train_mode(state.model)
    for micro_batches in batches:
        counts, _ = train_step(model, state, micro_batches, lr, rule, nonfinite)
        losses.append(counts.result()["loss"])
    return losses


@pytest.mark.slow
def test_a_compiled_network_does_what_it_does_uncompiled():
    """Parts, state-dict keys, weights after three updates with an average; nothing is compiled
    again, neither by an update nor by an evaluation.
    """
    train = replace(TRAIN, ema_decay=0.5, grad_accum_steps=2, clip_grad_norm=1.0)
    config, state = tiny_state(train)
    _, plain = tiny_state(train)
    before = copy.deepcopy(state.model.state_dict())
    compiler, problem = start_compiler(state.model, config.train, (4, 3, 16, 16), runtime_of())
    assert problem == ""
    assert list(compiler.parts) == PARTS
    assert compiler.num_graphs == 4
    assert equal_trees(dict(state.model.state_dict()), dict(before))
    assert [name for name, _ in state.model.named_modules()] == [
        name for name, _ in plain.model.named_modules()
    ]
    engine.warm_up_ddp(NoSync(state.model), (4, 3, 16, 16), FP32)
    batches = [[make_batch(4, 16, seed=2 * i), make_batch(4, 16, seed=2 * i + 1)] for i in range(3)]
    assert steps(state, config, batches) == pytest.approx(steps(plain, config, batches), rel=1e-5)
    for ours, theirs in ((state.model, plain.model), (state.ema.model, plain.ema.model)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert compiler.num_graphs == 4
    copied = copy.deepcopy(state.model)
    assert is_compiled(state.model)
    assert not is_compiled(copied)
    assert copied.parts()["stem"].method.__self__ is copied


class Small(nn.Module):
    """A network in two parts that is traced in no time; with `two_heads` it is one part."""

    auxiliary_weight = 0.3

    def __init__(self, two_heads=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1)
        )
        self.top = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        self.second_top = copy.deepcopy(self.top)
        self.two_heads = two_heads
        if not two_heads:
            del self.second_top
            self.parts = lambda: {"body": self.body, "top": self.top}

    def forward(self, images):
        x = self.body(images)
        if self.two_heads and self.training:
            return self.top(x), self.second_top(x)
        return self.top(x)


def small_state(train=TRAIN, two_heads=False):
    torch.manual_seed(0)
    model = Small(two_heads).to(memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler("cpu", enabled=train.precision == "fp16")
    return engine.TrainState(model, build_optimizer(OptimConfig(), model), scaler)


def compiled(state, train=TRAIN, shape=(4, 3, 16, 16), runtime=None):
    compiler, problem = start_compiler(state.model, train, shape, runtime or runtime_of())
    assert problem == ""
    return compiler


@pytest.mark.slow
def test_new_sizes_are_compiled_and_evaluation_is_not():
    """One graph for each part and size. Evaluation, of any batch size, gives what it would give
    without compilation.
    """
    state = small_state()
    compiler = compiled(state)
    config = Config(train=TRAIN)
    for side, expected in ((16, 2), (24, 4), (16, 4), (32, 6)):
        shape = (4, 3, side, side)
        if shape not in compiler.shapes:
            assert compilation.compile_for(compiler, shape) > 0
        assert compiler.num_graphs == expected
        steps(state, config, [[make_batch(4, side)]])
        assert compiler.num_graphs == expected, side
    state.model.eval()
    plain = copy.deepcopy(state.model)
    for size in (7, 3, 1):
        batch = make_batch(size, 20)
        with compilation.run_eagerly(state.model):
            ours = predict_logits(state.model, batch, False, FP32)
        assert torch.equal(ours, predict_logits(plain, batch, False, FP32))
    assert compiler.num_graphs == 6


@pytest.mark.slow
def test_other_precisions_heads_and_frozen_parts():
    """Nothing is compiled again by the updates, and the losses fall as they do uncompiled."""
    for name in ("fp16", "bf16"):
        train = replace(TRAIN, precision=name)
        state = small_state(train)
        compiler = compiled(state, train)
        batch = make_batch(
            4, 16, dtype=getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[name])
        )
        losses = steps(state, Config(train=train), [[batch]] * 4)
        assert losses[-1] < losses[0], name
        assert compiler.num_graphs == 2, name

    state, plain = (small_state(two_heads=True) for _ in range(2))
    assert list(compiled_parts(state.model)) == ["network"]
    compiler = compiled(state)
    for each in (state, plain):
        each.model.body[3].p = 0.0
        each.losses = steps(each, Config(train=TRAIN), [[make_batch(4, 16)]] * 2)
    assert state.losses == pytest.approx(plain.losses, rel=1e-5)
    assert compiler.num_graphs == 2  # the rate of dropout has changed

    config, state = tiny_state(unfreeze_from="layer2")
    frozen = copy.deepcopy(state.model.layer1.state_dict())
    compiler = compiled(state)
    steps(state, config, [[make_batch(4, 16)]] * 2)
    assert compiler.num_graphs == 4
    assert equal_trees(dict(state.model.layer1.state_dict()), dict(frozen))


@pytest.mark.slow
def test_the_compiled_step_runs_on_meta():
    """Nothing in it reads a value from the device."""
    meta = torch.device("meta")
    with meta:
        model = Small()
    state = engine.TrainState(
        model, build_optimizer(OptimConfig(), model), torch.amp.GradScaler("cpu", enabled=False)
    )
    model.body[3].p = 0.0
    compiler = compiled(state, runtime=runtime_of(device=meta))
    batch = make_batch(4, 16, device="meta")
    rule = rule_of(Config(train=TRAIN), meta)
    nonfinite = NonFinite(model, 0)
    _, norm = train_step(NoSync(model), state, [batch], 0.1, rule, nonfinite)
    assert norm.device == meta
    assert compiler.num_graphs == 2


@pytest.mark.slow
def test_a_teacher_is_compiled_with_the_network(monkeypatch):
    """Its forward pass alone, for each size. The losses are those without compilation; a part of it
    that cannot be compiled is named.
    """
    config = Config(train=replace(TRAIN, distillation_weight=0.7))
    losses = []
    for compiles in (True, False):
        state = small_state()
        state.model.body[3].p = 0.0
        teacher = small_state().model.eval().requires_grad_(False)
        rule = build_update_rule(config, CPU, teacher=Teacher(teacher, "", "", ()))
        if compiles:
            compiler, problem = start_compiler(
                state.model, TRAIN, (4, 3, 16, 16), runtime_of(), teacher
            )
            assert problem == ""
            assert compiler.num_graphs == 4
            assert compilation.compile_for(compiler, (4, 3, 24, 24)) > 0
            assert compiler.num_graphs == 8
        train_mode(state.model)
        nonfinite = NonFinite(state.model, 0)
        for side in (16, 24, 16):
            batch = make_batch(4, side)
            counts, _ = train_step(NoSync(state.model), state, [batch], 0.1, rule, nonfinite)
            losses.append(counts.result()["loss"])
        assert not teacher.training
        assert is_compiled(teacher) is compiles
    assert compiler.num_graphs == 8
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)

    calls = []
    real = compilation.lower

    def lower(graph, inputs, train):
        calls.append(graph)
        return (failing_backend if len(calls) == 3 else real)(graph, inputs, train)

    monkeypatch.setattr(compilation, "lower", lower)
    torch._dynamo.reset()
    state = small_state()
    teacher = small_state().model.eval().requires_grad_(False)
    compiler, problem = start_compiler(state.model, TRAIN, (4, 3, 16, 16), runtime_of(), teacher)
    assert compiler is None
    assert problem == f"the teacher's body: {FAILURE}"
    assert not is_compiled(state.model)
    assert not is_compiled(teacher)


def failing_backend(graph, inputs, train):
    """What inductor raises for an operator that it cannot compile."""
    from torch._inductor.exc import InductorError, LoweringException

    cause = ValueError("no such kernel")
    raise InductorError(LoweringException(cause, "aten.a.b", [], {}), None)


FAILURE = "LoweringException: ValueError: no such kernel (operator aten.a.b)"


@pytest.mark.slow
def test_one_rank_that_cannot_compile_stops_or_turns_back_all():
    """SyncBatchNorm's collective is in the first part: the other rank must not be left in it."""
    results = run_ranks(compile_where_rank_1_fails, 2)
    assert results[0] == results[1]
    problem, was_compiled, losses = results[0]
    assert problem == f"rank 1: top: {FAILURE}"
    assert not was_compiled
    assert len(losses) == 2


def compile_where_rank_1_fails(rank, world_size):
    config = Config(train=TRAIN)
    state = small_state()
    convert_sync_batch_norm(state.model)
    calls = []
    real = compilation.lower

    def lower(graph, inputs, train):
        calls.append(graph)
        is_bad = rank == 1 and len(calls) == 2
        return (failing_backend if is_bad else real)(graph, inputs, train)

    compilation.lower = lower
    compiler, problem = start_compiler(
        state.model, config.train, (4, 3, 16, 16), runtime_of(rank, world_size)
    )
    assert compiler is None
    model = wrap_ddp(state.model, CPU)
    engine.warm_up_ddp(model, (2, 3, 16, 16), FP32)
    nonfinite = NonFinite(state.model, 0)
    losses = []
    for _ in range(2):
        counts, _ = train_step(model, state, [make_batch(4, 16)], 0.1, rule_of(config), nonfinite)
        losses.append(counts.result()["loss"])
    return problem, is_compiled(state.model), losses


@pytest.mark.slow
def test_ranks_wait_for_a_slow_compiler_longer_than_a_collective_may_take():
    assert run_ranks(compile_slowly_on_rank_1, 2) == ["done", "done"]


def compile_slowly_on_rank_1(rank, world_size):
    from datetime import timedelta

    limit = timedelta(seconds=2.5)
    group = dist.new_group(backend="gloo", timeout=limit)
    runtime = replace(runtime_of(rank, world_size), cpu_group=group)

    def work():
        time.sleep(5 * rank)
        return "done"

    return run_together(work, runtime)


@pytest.mark.slow
def test_ddp_reduces_a_stage_while_the_one_before_it_computes():
    """With a graph for each part, gradients are reduced after each backward graph. With one graph
    for the network all are reduced after it, where no communication can hide.
    """
    by_part, whole = run_ranks(order_of_hooks, 2)[0]
    assert by_part.count("graph") == 2
    assert by_part[0] == "graph"
    assert by_part[-1] == "reduce"
    for event, following in zip(by_part, by_part[1:], strict=False):
        assert {event, following} != {"graph"}, by_part
    assert whole.count("graph") == 1
    assert whole[0] == "graph"
    assert whole.count("reduce") == by_part.count("reduce")


def order_of_hooks(rank, world_size):
    """The backward graphs and the reductions of a step, in their order: compiled by part, and as a
    whole.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    events = []

    def compile_forward(graph, inputs):
        return make_boxed_func(graph.forward)

    def compile_backward(graph, inputs):
        def run(*arguments):
            events.append("graph")
            return graph(*arguments)

        return make_boxed_func(run)

    def hook(state, bucket):
        events.append("reduce")
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def order_of_a_step():
        state = small_state()
        compiled(state, runtime=runtime_of(rank, world_size))
        # A bucket for each parameter.
        model = nn.parallel.DistributedDataParallel(
            state.model, broadcast_buffers=False, bucket_cap_mb=1e-6, gradient_as_bucket_view=True
        )
        model.register_comm_hook(None, hook)
        images = make_batch(4, 16).images
        for _ in range(2):
            events.clear()
            model(images).sum().backward()
        return list(events)

    backend = aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward)
    compilation.lower = lambda graph, inputs, train: backend(graph, inputs)
    by_part = order_of_a_step()
    compilation.compiled_parts = lambda model: {"network": model}
    return by_part, order_of_a_step()


def test_a_stored_value_wins_over_auto():
    """A run that is requeued to another kind of node goes on as it began; one that began before
    there was the setting was not compiled.
    """
    cuda = torch.device("cuda")
    precise = TrainConfig(precision="fp32")
    for device, setting, stored, expected in (
        (CPU, "auto", None, False),
        (cuda, "auto", None, True),
        (cuda, "auto", {"precision": "fp32", "compile": False}, False),
        (CPU, "auto", {"precision": "fp32", "compile": True}, True),
        (cuda, "auto", {"precision": "fp32"}, False),
        (cuda, True, {"precision": "fp32", "compile": False}, True),
        (cuda, False, None, False),
    ):
        config = Config(train=replace(precise, compile=setting))
        saved = None if stored is None else {"train": stored}
        assert resolve_settings(config, device, saved).train.compile is expected
    facts = {"num_samples": 1, "fingerprint": "", "config": to_dict(Config(train=TRAIN))}
    facts["config"]["train"]["compile"] = False
    old = copy.deepcopy({**facts, "step": 1})
    del old["config"]["train"]["compile"]
    assert check_resumable(old, facts) == []
    old["config"]["train"]["compile"] = True
    assert check_resumable(old, facts) == ["train.compile was True, now False"]


class Watched:
    """What `run.compile_network` needs of log and watchdog."""

    def __init__(self):
        self.said = []
        self.warned = []
        self.beats = []
        self.say = self.said.append
        self.warn = self.warned.append

    def beat(self, step, phase):
        self.beats.append((step, phase))


@pytest.mark.slow
def test_auto_falls_back_with_a_warning_and_true_is_an_error(monkeypatch, tmp_path):
    """Both name the part, the error and the operator in one line. The phase and its seconds are
    said.
    """
    watched = Watched()
    shape = (4, 3, 16, 16)
    runtime = replace(runtime_of(), watchdog=watched)
    config = Config(train=TRAIN, output_dir=str(tmp_path))
    arguments = (config, small_state(), shape)
    assert compile_network(*arguments, True, runtime, watched).num_graphs == 2
    assert watched.beats == [(0, "compile")]
    assert re.search(r"compiled 2 parts .* 4 images of 16 x 16 .* in \d+\.\d s", watched.said[-1])
    assert watched.warned == []

    monkeypatch.setattr(compilation, "lower", failing_backend)
    torch._dynamo.reset()
    reason = f"body: {FAILURE}"
    state = small_state()
    assert compile_network(config, state, shape, True, runtime, watched) is None
    assert watched.warned == [f"training without torch.compile, which failed: {reason}"]
    steps(state, config, [[make_batch(4, 16)]])
    with pytest.raises(ValueError, match=r"train\.compile is true.*failed: " + re.escape(reason)):
        compile_network(config, small_state(), shape, False, runtime, watched)

    with torch._dynamo.config.patch(disable=True):
        _, problem = start_compiler(small_state().model, TRAIN, shape, runtime)
    assert "TORCH_COMPILE_DISABLE" in problem


def test_a_rank_that_is_silent_while_it_compiles_is_not_lost(monkeypatch):
    """A compiler may keep the threads of its process from running: for 30 s in that phase."""
    monkeypatch.setattr(Watchdog, "_start_threads", lambda self: None)
    peers = (Peer("here", 1), Peer("there", 2))
    meeting = Meeting(Launcher(rank=0, world_size=2), dist.HashStore(), peers)
    watchdog = Watchdog(meeting, world_size=2, timeout_s=10)
    for phase, seconds, is_lost in (
        ("compile", 20, False),
        ("compile", 40, True),
        ("update", 2, False),
        ("update", 20, True),
    ):
        watchdog.beat(3, phase)
        last = Beat(ticks=9, count=watchdog.count, step=3, phase=phase, stack="somewhere")
        watchdog.heard[1] = Heard(time.monotonic() - seconds, last)
        verdict = watchdog.on_long_wait()
        assert (verdict is not None) is is_lost, (phase, seconds)
    assert "waited 8.5 s at step 3 (update) for rank 1 (host there" in verdict.headline


def test_what_determinism_and_mode_set_for_inductor():
    assert inductor_options(TRAIN) == {}
    fast = replace(TRAIN, compile_mode="reduce-overhead")
    assert inductor_options(fast) == {"triton.cudagraphs": True}
    options = inductor_options(replace(fast, deterministic=True))
    assert options["triton.cudagraphs"] is True
    assert options["deterministic"] is True
    assert options["max_autotune"] is False
    with pytest.raises(ValueError, match=r"train\.compile_mode.*grad_accum_steps 1, not 2"):
        check_config(Config(train=replace(fast, grad_accum_steps=2)))


def test_with_cuda_graphs_each_step_is_announced(monkeypatch):
    """Before the teacher looks at the images, and for no other mode. The outputs of a graph are
    overwritten otherwise.
    """
    events = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: events.append("begin"))

    class Seen(nn.Module):
        def forward(self, images):
            events.append("teacher")
            return torch.zeros(len(images), 10)

    for mode, expected in (("reduce-overhead", ["begin", "teacher"]), ("default", ["teacher"])):
        config = Config(train=replace(TRAIN, compile_mode=mode))
        rule = build_update_rule(config, CPU, teacher=Teacher(Seen(), "", "", ()))
        state = small_state()
        nonfinite = NonFinite(state.model, 0)
        for _ in range(2):
            batch = make_batch(4, 8)
            train_step(NoSync(state.model), state, [batch], 0.1, rule, nonfinite)
        assert events == expected * 2
        events.clear()
        engine.warm_up_ddp(NoSync(state.model), (2, 3, 8, 8), FP32, rule.replays_graphs)
        assert len(events) == (2 if rule.replays_graphs else 0)
        events.clear()


def test_the_compile_cache_is_read_only_if_it_is_whole_and_of_this_user(tmp_path, monkeypatch):
    """It is executable code."""
    watched = Watched()
    loaded = []
    runtime = runtime_of()
    content = b"\x00compiled"
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (content, None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", loaded.append)
    load_compile_cache(str(tmp_path), runtime, watched)
    assert loaded == []
    for rank in (0, 1):
        own = replace(runtime, rank=rank, local_rank=rank, world_size=4, local_world_size=2)
        save_compile_cache(str(tmp_path), own, watched)
        save_compile_cache(str(tmp_path), replace(own, rank=rank + 2), watched)
    names = [path.name for path in sorted(tmp_path.rglob("*.bin"))]
    assert names == ["local_rank_0.bin", "local_rank_1.bin"]
    load_compile_cache(str(tmp_path), runtime, watched)
    assert loaded == [content]
    assert watched.warned == []

    monkeypatch.setattr(os, "getuid", lambda: 12345)
    load_compile_cache(str(tmp_path), runtime, watched)
    assert "belongs to another user" in watched.warned[-1]
    monkeypatch.undo()
    path = cache_path(str(tmp_path), 0)
    path.write_bytes(path.read_bytes()[:-1])
    load_compile_cache(str(tmp_path), runtime, watched)
    assert "it is damaged" in watched.warned[-1]
    assert loaded == [content]


def tiny_app(stop_at=None):
    """The command line's main with the tiny network under the name of resnet20, compiled by
    inductor; it stops by SIGTERM at a step, and prints what the compile cache had.
    """

    def entry(arguments):
        from torch._dynamo.utils import counters

        from resnet_dist import cli
        from resnet_dist.models.build import MODELS

        compilation.BACKEND = "inductor"
        MODELS["resnet20"] = partial(tiny_network, depths=(1,))
        real = engine.train_step

        def train_step(model, state, *rest):
            if state.step == stop_at and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            return real(model, state, *rest)

        engine.train_step = train_step
        code = cli.main(arguments)
        cache = counters["inductor"]
        print("CACHE", cache["fxgraph_cache_hit"], cache["fxgraph_cache_miss"])
        return code

    return entry


@pytest.mark.slow
@pytest.mark.long
def test_inductor_resumes_bit_identically_and_from_the_cache_of_the_run(
    digits, tmp_path, monkeypatch
):
    """Two ranks with SyncBatchNorm and an average. The start that resumes has an empty cache on its
    machine, and finds every graph in output_dir.
    """

    def run(name, place, entry):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / place))
        folder = tmp_path / name
        log = tmp_path / f"{name}_{place}.txt"
        sizes = {"train_crop_size": 16, "val_resize_size": 16, "val_crop_size": 16}
        words = ["train", "--config", "configs/quickstart.yaml", "--data.data_dir", digits]
        words += ["--output_dir", str(folder), "--train.compile", "true", "--train.epochs", "0.4"]
        words += ["--train.ema_decay", "0.9", "--schedule.warmup_epochs", "0"]
        words += ["--log.wandb", "disabled", "--distributed.threads", "1"]
        for key, value in sizes.items():
            words += [f"--data.{key}", str(value)]
        codes = run_app(2, words, str(log), entry, timeout=900)
        print(log.read_text())
        return codes, log.read_text()

    assert run("whole", "first", tiny_app())[0] == [0, 0]
    codes, _ = run("halves", "first", tiny_app(stop_at=4))
    assert codes == [143, 143]
    codes, output = run("halves", "second", tiny_app())
    assert codes == [0, 0]
    # Three parts, forward and backward.
    assert re.findall(r"CACHE (\d+) (\d+)", output) == [("6", "0")] * 2
    ends = []
    for name in ("whole", "halves"):
        path = tmp_path / name / "checkpoints" / "last.pt"
        ends.append(unpack_checkpoint(read_checkpoint(path), str(path)))
    assert ends[0]["step"] == ends[1]["step"] > 4
    assert ends[0]["config"]["train"]["compile"] is True
    for key in ("model", "ema", "optimizer"):
        assert equal_trees(ends[0][key], ends[1][key]), key


def app_where_rank_1(prepares):
    """The command line's main with a tiny network, and what rank 1 does before it compiles a
    part.
    """

    def entry(arguments):
        from resnet_dist import cli
        from resnet_dist.models.build import MODELS

        MODELS["resnet20"] = partial(tiny_network, depths=(1,))
        real = compilation.lower

        def lower(graph, inputs, train):
            if os.environ["RANK"] == "1":
                prepares(graph, inputs, train)
            return real(graph, inputs, train)

        compilation.lower = lower
        return cli.main(arguments)

    return entry


@pytest.mark.slow
@pytest.mark.long
def test_a_run_waits_for_a_slow_compiler_and_stops_for_a_failing_one(tmp_path):
    """One rank compiles longer than distributed.timeout_s. If it fails, no rank writes anything."""

    def run(name, prepares):
        log = tmp_path / f"{name}.txt"
        words = ["train", "--config", "configs/quickstart.yaml", "--data.kind", "synthetic"]
        words += ["--data.synthetic_classes", "10", "--data.synthetic_images", "256"]
        words += ["--data.train_crop_size", "16", "--data.val_crop_size", "16"]
        words += ["--train.epochs", "0.5", "--schedule.warmup_epochs", "0", "--log.wandb"]
        words += ["disabled", "--train.compile", "true", "--distributed.timeout_s", "8"]
        words += ["--output_dir", str(tmp_path / name)]
        codes = run_app(2, words, str(log), app_where_rank_1(prepares))
        return codes, log.read_text()

    codes, output = run("slow", lambda *_: time.sleep(9))
    assert codes == [0, 0], output
    assert float(re.search(r"compiled 3 parts .* in (\d+\.\d) s", output)[1]) > 27
    codes, output = run("failing", failing_backend)
    assert codes == [2, 2], output
    assert output.count(f"torch.compile failed: rank 1: stem: {FAILURE}") == 1
    assert not (tmp_path / "failing").exists()


KINDS = ["seresnet50", "resnet50d", "preresnet110", "lenet5", "vgg11_bn", "googlenet"]
KINDS += ["inception_v3", "densenet121", "efficientnet_b0", "inception_v4"]


@pytest.mark.slow
@pytest.mark.long
def test_every_kind_of_network_is_traced_without_a_break():
    """Each has a single graph for each part; networks outside of the ResNet family are one part."""
    failed = []
    for name in KINDS:
        side = 299 if name.startswith("inception") else 32
        if name in ("vgg11_bn", "densenet121"):
            side = 64
        with torch.device("meta"):
            model = build_model(ModelConfig(name=name), 10)
        compiler, problem = start_compiler(
            model, TRAIN, (4, 3, side, side), runtime_of(device=torch.device("meta"))
        )
        if problem or compiler.num_graphs != len(compiler.parts):
            failed.append(f"{name}: {problem}")
        torch._dynamo.reset()
    assert failed == []
