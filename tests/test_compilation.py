"""torch.compile of the network: what is compiled, how often, and that ranks agree on it.

The backend is not inductor but one that runs the traced graph, except in the long tests: tracing,
guards, agreement and DDP's hooks are the same.
"""

import copy
import itertools
import os
import re
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from dist_utils import cpu_runtime, equal_trees, last_checkpoint, options, run_app, run_ranks
from engine_utils import CPU, FP32, NoSync, make_batch, rule_of, state_of
from torch import nn

from resnet_dist import compilation, engine
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
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TRAIN = TrainConfig(precision="fp32", compile=True)
PARTS = ["stem", "layer1", "layer2", "head"]
SHAPE = (4, 3, 16, 16)
"""Of the images of a step, if a test says nothing else."""


@pytest.fixture(autouse=True)
def quick_backend(monkeypatch):
    """Trace the parts, but run their graphs as they are."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def runtime_of(rank=0, world_size=1, device=CPU):
    group = None
    if world_size > 1:
        group = dist.group.WORLD
    return replace(cpu_runtime(rank, world_size, group), device=device)


def tiny_state(train=TRAIN, **optim):
    """The config and the state of a run with a network of two stages."""
    config = Config(
        model=ModelConfig(name="tiny"),
        train=train,
        optim=OptimConfig(**optim),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resnet_dist.models.build.MODELS", {"tiny": tiny_network})
        state = build_state(config, 10, CPU)
    return config, state


def tiny_network(num_classes=10, depths=(1, 1)):
    return ResNet(
        BasicBlock,
        depths,
        num_classes,
        stem="cifar",
        stem_channels=8,
        shortcut="A",
    )


def steps(state, config, batches, teacher=None, model=None):
    """Train on each batch (a list of micro-batches); returns the loss of each. `model` is the
    network in DDP, if there are several ranks.
    """
    if model is None:
        model = NoSync(state.model)
    losses = []
    nonfinite = NonFinite(state.model, 0)
    rule = build_update_rule(config, CPU, teacher=teacher)
    train_mode(state.model)
    for micro_batches in batches:
        counts, _ = train_step(model, state, micro_batches, 0.1, rule, nonfinite)
        result = counts.result()
        losses.append(result["loss"])
    return losses


def names_of_modules(model):
    return [name for name, _ in model.named_modules()]


@pytest.mark.slow
def test_a_compiled_network_does_what_it_does_uncompiled():
    """Parts, state-dict keys, weights after three updates with an average; nothing is compiled
    again, neither by an update nor by an evaluation.
    """
    train = replace(
        TRAIN,
        ema_decay=0.5,
        grad_accum_steps=2,
        clip_grad_norm=1.0,
    )
    config, state = tiny_state(train)
    _, plain = tiny_state(train)
    before = copy.deepcopy(state.model.state_dict())

    compiler = compiled(state, train)

    assert list(compiler.parts) == PARTS
    assert compiler.num_graphs == 4
    assert equal_trees(state.model.state_dict(), before)
    assert names_of_modules(state.model) == names_of_modules(plain.model)

    # Three updates.
    engine.warm_up_ddp(NoSync(state.model), SHAPE, FP32)
    batches = []
    for i in range(3):
        first = make_batch(4, 16, seed=2 * i)
        second = make_batch(4, 16, seed=2 * i + 1)
        batches.append([first, second])
    losses = steps(state, config, batches)
    expected_losses = steps(plain, config, batches)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    pairs = (
        (state.model, plain.model),
        (state.ema.model, plain.ema.model),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(
            ours.state_dict(),
            theirs.state_dict(),
            rtol=1e-5,
            atol=1e-6,
        )
    assert compiler.num_graphs == 4

    # A copy has parts of its own, which are not compiled.
    copied = copy.deepcopy(state.model)
    assert is_compiled(state.model)
    assert not is_compiled(copied)
    stem = copied.parts()["stem"]
    assert stem.method.__self__ is copied


class Small(nn.Module):
    """A network in two parts that is traced in no time; with `two_heads` it is one part."""

    auxiliary_weight = 0.3

    def __init__(self, two_heads=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.1),
        )
        self.top = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 10),
        )
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
    model = Small(two_heads)
    model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(OptimConfig(), model)
    return state_of(model, optimizer, train.precision)


def turn_dropout_off(model):
    model.body[3].p = 0.0


def small_teacher():
    """A network whose weights stay as they are."""
    network = small_state().model
    network.eval()
    network.requires_grad_(False)
    return network


def compiled(state, train=TRAIN, shape=SHAPE, runtime=None):
    """Compile the network of a state, which must work."""
    if runtime is None:
        runtime = runtime_of()
    compiler, problem = start_compiler(state.model, train, shape, runtime)
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

    # Pairs of the side and the number of graphs after it.
    sides = (
        (16, 2),
        (24, 4),
        (16, 4),
        (32, 6),
    )
    for side, num_graphs in sides:
        shape = (4, 3, side, side)
        if shape not in compiler.shapes:
            seconds = compilation.compile_for(compiler, shape)
            assert seconds > 0
        assert compiler.num_graphs == num_graphs
        steps(state, config, [[make_batch(4, side)]])
        assert compiler.num_graphs == num_graphs, side

    state.model.eval()
    plain = copy.deepcopy(state.model)
    for num_images in (7, 3, 1):
        batch = make_batch(num_images, 20)
        with compilation.run_eagerly(state.model):
            logits = predict_logits(state.model, batch, False, FP32)
        expected = predict_logits(plain, batch, False, FP32)
        assert torch.equal(logits, expected)
    assert compiler.num_graphs == 6


@pytest.mark.slow
def test_other_precisions_heads_and_frozen_parts():
    """Nothing is compiled again by the updates, and the losses fall as they do uncompiled."""
    dtypes = {
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
    }
    for name, dtype in dtypes.items():
        train = replace(TRAIN, precision=name)
        state = small_state(train)
        compiler = compiled(state, train)
        batch = make_batch(4, 16, dtype=dtype)
        first_loss, *_, last_loss = steps(state, Config(train=train), [[batch]] * 4)
        assert last_loss < first_loss, name
        assert compiler.num_graphs == 2, name

    # A network with two heads.
    config = Config(train=TRAIN)
    two_updates = [[make_batch(4, 16)]] * 2
    state = small_state(two_heads=True)
    plain = small_state(two_heads=True)
    assert list(compiled_parts(state.model)) == ["network"]
    compiler = compiled(state)
    turn_dropout_off(state.model)
    turn_dropout_off(plain.model)
    losses = steps(state, config, two_updates)
    expected_losses = steps(plain, config, two_updates)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    # One before the rate of dropout changed, and one after it.
    assert compiler.num_graphs == 2

    # A frozen part.
    config, state = tiny_state(unfreeze_from="layer2")
    frozen = state.model.layer1
    before = copy.deepcopy(frozen.state_dict())
    compiler = compiled(state)
    steps(state, config, two_updates)
    assert compiler.num_graphs == 4
    assert equal_trees(frozen.state_dict(), before)


@pytest.mark.slow
def test_the_compiled_step_runs_on_meta():
    """Nothing in it reads a value from the device."""
    meta = torch.device("meta")
    with meta:
        model = Small()
    turn_dropout_off(model)
    state = state_of(model, build_optimizer(OptimConfig(), model))
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
    state = small_state()
    turn_dropout_off(state.model)
    teacher = small_teacher()
    compiler, problem = start_compiler(state.model, TRAIN, SHAPE, runtime_of(), teacher)
    assert problem == ""
    assert compiler.num_graphs == 4
    seconds = compilation.compile_for(compiler, (4, 3, 24, 24))
    assert seconds > 0
    assert compiler.num_graphs == 8
    losses = losses_with_teacher(state, teacher)
    assert compiler.num_graphs == 8
    assert is_compiled(teacher)

    plain = small_state()
    turn_dropout_off(plain.model)
    plain_teacher = small_teacher()
    expected_losses = losses_with_teacher(plain, plain_teacher)
    assert not is_compiled(plain_teacher)
    assert losses == pytest.approx(expected_losses, rel=1e-5)

    # The network has two parts, so that the third call is for the first part of the teacher.
    lower = lower_that_fails_at(3, compilation.lower)
    monkeypatch.setattr(compilation, "lower", lower)
    torch._dynamo.reset()
    state = small_state()
    teacher = small_teacher()
    compiler, problem = start_compiler(state.model, TRAIN, SHAPE, runtime_of(), teacher)
    assert compiler is None
    assert problem == f"the teacher's body: {FAILURE}"
    assert not is_compiled(state.model)
    assert not is_compiled(teacher)


def losses_with_teacher(state, network):
    """The losses of three updates with images of two sizes; `network` is the teacher's."""
    config = Config(train=replace(TRAIN, distillation_weight=0.7))
    teacher = Teacher(network, "", "", ())
    batches = [[make_batch(4, side)] for side in (16, 24, 16)]
    losses = steps(state, config, batches, teacher)
    assert not network.training
    return losses


def lower_that_fails_at(number, real):
    """In place of compilation.lower: this call fails, counted from 1."""
    calls = []

    def lower(graph, inputs, train):
        calls.append(graph)
        if len(calls) == number:
            return failing_backend(graph, inputs, train)
        return real(graph, inputs, train)

    return lower


def failing_backend(graph, inputs, train):
    """What inductor raises for an operator that it cannot compile."""
    from torch._inductor.exc import InductorError, LoweringException

    cause = ValueError("no such kernel")
    raise InductorError(LoweringException(cause, "aten.a.b", [], {}), None)


FAILURE = "LoweringException: ValueError: no such kernel (operator aten.a.b)"


@pytest.mark.slow
def test_one_rank_that_cannot_compile_stops_or_turns_back_all():
    """SyncBatchNorm's collective is in the first part: the other rank must not be left in it."""
    first, second = run_ranks(compile_where_rank_1_fails, 2)
    assert first == second
    problem, was_compiled, losses = first
    assert problem == f"rank 1: top: {FAILURE}"
    assert not was_compiled
    assert len(losses) == 2


def compile_where_rank_1_fails(rank, world_size):
    state = small_state()
    convert_sync_batch_norm(state.model)
    if rank == 1:
        # In the second part.
        compilation.lower = lower_that_fails_at(2, compilation.lower)
    runtime = runtime_of(rank, world_size)
    compiler, problem = start_compiler(state.model, TRAIN, SHAPE, runtime)
    assert compiler is None

    # The ranks go on without a compiler.
    model = wrap_ddp(state.model, CPU)
    engine.warm_up_ddp(model, (2, 3, 16, 16), FP32)
    batches = [[make_batch(4, 16)]] * 2
    losses = steps(state, Config(train=TRAIN), batches, model=model)
    return problem, is_compiled(state.model), losses


@pytest.mark.slow
def test_ranks_wait_for_a_slow_compiler_longer_than_a_collective_may_take():
    results = run_ranks(compile_slowly_on_rank_1, 2)
    assert results == ["done", "done"]


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
    of_first_rank, _ = run_ranks(order_of_hooks, 2)
    by_part, whole = of_first_rank

    assert by_part.count("graph") == 2
    assert by_part[0] == "graph"
    assert by_part[-1] == "reduce"
    for event, following in itertools.pairwise(by_part):
        is_graph_after_graph = event == "graph" and following == "graph"
        assert not is_graph_after_graph, by_part

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
            state.model,
            broadcast_buffers=False,
            bucket_cap_mb=1e-6,
            gradient_as_bucket_view=True,
        )
        model.register_comm_hook(None, hook)
        images = make_batch(4, 16).images
        for _ in range(2):
            events.clear()
            loss = model(images).sum()
            loss.backward()
        return list(events)

    backend = aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward)

    def lower(graph, inputs, train):
        return backend(graph, inputs)

    def one_part(model):
        return {"network": model}

    compilation.lower = lower
    by_part = order_of_a_step()
    compilation.compiled_parts = one_part
    whole = order_of_a_step()
    return by_part, whole


class StoredCase(NamedTuple):
    """A value of train.compile, what a checkpoint has, and what the run gets."""

    device: torch.device
    setting: bool | str
    stored: dict | None
    expected: bool


CUDA = torch.device("cuda")
STORED_TRUE = {"precision": "fp32", "compile": True}
STORED_FALSE = {"precision": "fp32", "compile": False}
STORED_BEFORE_THE_SETTING = {"precision": "fp32"}
STORED_CASES = (
    StoredCase(CPU, "auto", None, False),
    StoredCase(CUDA, "auto", None, True),
    StoredCase(CUDA, "auto", STORED_FALSE, False),
    StoredCase(CPU, "auto", STORED_TRUE, True),
    StoredCase(CUDA, "auto", STORED_BEFORE_THE_SETTING, False),
    StoredCase(CUDA, True, STORED_FALSE, True),
    StoredCase(CUDA, False, None, False),
)


def test_a_stored_value_wins_over_auto():
    """A run that is requeued to another kind of node goes on as it began; one that began before
    there was the setting was not compiled.
    """
    for case in STORED_CASES:
        train = TrainConfig(precision="fp32", compile=case.setting)
        saved = None
        if case.stored is not None:
            saved = {"train": case.stored}
        config = resolve_settings(Config(train=train), case.device, saved)
        assert config.train.compile is case.expected, case

    config = to_dict(Config(train=TRAIN))
    config["train"]["compile"] = False
    facts = {
        "num_samples": 1,
        "fingerprint": "",
        "config": config,
    }
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
    runtime = replace(runtime_of(), watchdog=watched)
    config = Config(train=TRAIN, output_dir=str(tmp_path))

    def compile_state(state, may_fall_back):
        return compile_network(config, state, SHAPE, may_fall_back, runtime, watched)

    compiler = compile_state(small_state(), may_fall_back=True)
    assert compiler.num_graphs == 2
    assert watched.beats == [(0, "compile")]
    last_line = watched.said[-1]
    assert re.search(r"compiled 2 parts .* 4 images of 16 x 16 .* in \d+\.\d s", last_line)
    assert watched.warned == []

    # A backend that fails.
    monkeypatch.setattr(compilation, "lower", failing_backend)
    torch._dynamo.reset()
    reason = f"body: {FAILURE}"
    state = small_state()
    compiler = compile_state(state, may_fall_back=True)
    assert compiler is None
    assert watched.warned == [f"training without torch.compile, which failed: {reason}"]
    steps(state, config, [[make_batch(4, 16)]])

    message = r"train\.compile is true.*failed: " + re.escape(reason)
    with pytest.raises(ValueError, match=message):
        compile_state(small_state(), may_fall_back=False)

    # A user who has turned it off.
    with torch._dynamo.config.patch(disable=True):
        _, problem = start_compiler(small_state().model, TRAIN, SHAPE, runtime)
    assert "TORCH_COMPILE_DISABLE" in problem


def test_a_rank_that_is_silent_while_it_compiles_is_not_lost(monkeypatch):
    """A compiler may keep the threads of its process from running: for 30 s in that phase."""
    monkeypatch.setattr(Watchdog, "_start_threads", lambda self: None)
    peers = (Peer("here", 1), Peer("there", 2))
    meeting = Meeting(Launcher(rank=0, world_size=2), dist.HashStore(), peers)
    watchdog = Watchdog(meeting, world_size=2, timeout_s=10)

    def verdict_after(seconds, phase):
        """What the watchdog does if the other rank has been silent for so long."""
        watchdog.beat(3, phase)
        last_beat = Beat(
            ticks=9,
            count=watchdog.count,
            step=3,
            phase=phase,
            stack="somewhere",
        )
        heard_at = time.monotonic() - seconds
        watchdog.heard[1] = Heard(heard_at, last_beat)
        return watchdog.on_long_wait()

    assert verdict_after(20, "compile") is None
    assert verdict_after(40, "compile") is not None
    assert verdict_after(2, "update") is None
    verdict = verdict_after(20, "update")
    assert "waited 8.5 s at step 3 (update) for rank 1 (host there" in verdict.headline


def test_what_determinism_and_mode_set_for_inductor():
    assert inductor_options(TRAIN) == {}

    fast = replace(TRAIN, compile_mode="reduce-overhead")
    assert inductor_options(fast) == {"triton.cudagraphs": True}

    deterministic = replace(fast, deterministic=True)
    options = inductor_options(deterministic)
    assert options["triton.cudagraphs"] is True
    assert options["deterministic"] is True
    assert options["max_autotune"] is False

    with_micro_steps = replace(fast, grad_accum_steps=2)
    with pytest.raises(ValueError, match=r"train\.compile_mode.*grad_accum_steps 1, not 2"):
        check_config(Config(train=with_micro_steps))


def test_with_cuda_graphs_each_step_is_announced(monkeypatch):
    """Before the teacher looks at the images, and for no other mode. The outputs of a graph are
    overwritten otherwise.
    """
    events = []

    def record_begin():
        events.append("begin")

    class RecordingNetwork(nn.Module):
        def forward(self, images):
            events.append("teacher")
            return torch.zeros(len(images), 10)

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", record_begin)
    teacher = Teacher(RecordingNetwork(), "", "", ())
    events_of_a_step = {
        "reduce-overhead": ["begin", "teacher"],
        "default": ["teacher"],
    }
    events_of_the_warm_up = {
        "reduce-overhead": ["begin", "begin"],
        "default": [],
    }
    for mode in ("reduce-overhead", "default"):
        config = Config(train=replace(TRAIN, compile_mode=mode))
        rule = build_update_rule(config, CPU, teacher=teacher)
        state = small_state()

        events.clear()
        steps(state, config, [[make_batch(4, 8)]] * 2, teacher)
        assert events == events_of_a_step[mode] * 2

        events.clear()
        engine.warm_up_ddp(NoSync(state.model), (2, 3, 8, 8), FP32, rule.replays_graphs)
        assert events == events_of_the_warm_up[mode]


def test_the_compile_cache_is_read_only_if_it_is_whole_and_of_this_user(tmp_path, monkeypatch):
    """It is executable code."""
    folder = str(tmp_path)
    watched = Watched()
    loaded = []
    content = b"\x00compiled"
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (content, None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", loaded.append)

    def load():
        load_compile_cache(folder, runtime_of(), watched)

    # There is none.
    load()
    assert loaded == []

    # One for each rank of the first of two machines.
    for rank in range(4):
        runtime = cpu_runtime(rank, world_size=4, local_world_size=2)
        save_compile_cache(folder, runtime, watched)
    names = [path.name for path in sorted(tmp_path.rglob("*.bin"))]
    assert names == ["local_rank_0.bin", "local_rank_1.bin"]
    load()
    assert loaded == [content]
    assert watched.warned == []

    # Another user.
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    load()
    assert "belongs to another user" in watched.warned[-1]
    monkeypatch.undo()

    # A file that lacks its last byte.
    path = cache_path(folder, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    load()
    assert "it is damaged" in watched.warned[-1]
    assert loaded == [content]


def compiled_run(**settings):
    """The command line of the quickstart with compilation, on images of 16 pixels."""
    words = options(
        config=QUICKSTART,
        train__compile="true",
        schedule__warmup_epochs=0,
        log__wandb="disabled",
        **settings,
    )
    return ["train", *words]


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
        log = tmp_path / f"{name}_{place}.txt"
        words = compiled_run(
            output_dir=tmp_path / name,
            data__data_dir=digits,
            train__epochs=0.4,
            train__ema_decay=0.9,
            distributed__threads=1,
        )
        codes = run_app(2, words, str(log), entry, timeout=900)
        printed = log.read_text()
        print(printed)
        return codes, printed

    codes, _ = run("whole", "first", tiny_app())
    assert codes == [0, 0]
    codes, _ = run("halves", "first", tiny_app(stop_at=4))
    assert codes == [143, 143]
    codes, printed = run("halves", "second", tiny_app())
    assert codes == [0, 0]
    # On each rank, three parts, forward and backward.
    hits_and_misses = re.findall(r"CACHE (\d+) (\d+)", printed)
    assert hits_and_misses == [("6", "0")] * 2

    whole = last_checkpoint(tmp_path / "whole")
    halves = last_checkpoint(tmp_path / "halves")
    assert whole["step"] == halves["step"]
    assert whole["step"] > 4
    assert whole["config"]["train"]["compile"] is True
    for key in ("model", "ema", "optimizer"):
        assert equal_trees(whole[key], halves[key]), key


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
        words = compiled_run(
            output_dir=tmp_path / name,
            data__kind="synthetic",
            data__synthetic_classes=10,
            data__synthetic_images=256,
            train__epochs=0.5,
            distributed__timeout_s=8,
        )
        codes = run_app(2, words, str(log), app_where_rank_1(prepares))
        return codes, log.read_text()

    def sleep_nine_seconds(graph, inputs, train):
        time.sleep(9)

    codes, printed = run("slow", sleep_nine_seconds)
    assert codes == [0, 0], printed
    match = re.search(r"compiled 3 parts .* in (\d+\.\d) s", printed)
    seconds = float(match[1])
    assert seconds > 27

    codes, printed = run("failing", failing_backend)
    assert codes == [2, 2], printed
    assert printed.count(f"torch.compile failed: rank 1: stem: {FAILURE}") == 1
    assert not (tmp_path / "failing").exists()


SIDES = {
    "seresnet50": 32,
    "resnet50d": 32,
    "preresnet110": 32,
    "lenet5": 32,
    "vgg11_bn": 64,
    "googlenet": 32,
    "inception_v3": 299,
    "densenet121": 64,
    "efficientnet_b0": 32,
    "inception_v4": 299,
}
"""One network of each kind, with a side of its images."""


@pytest.mark.slow
@pytest.mark.long
def test_every_kind_of_network_is_traced_without_a_break():
    """Each has a single graph for each part; networks outside of the ResNet family are one part."""
    meta = torch.device("meta")
    runtime = runtime_of(device=meta)
    failed = []
    for name, side in SIDES.items():
        with meta:
            model = build_model(ModelConfig(name=name), 10)
        shape = (4, 3, side, side)
        compiler, problem = start_compiler(model, TRAIN, shape, runtime)
        if problem or compiler.num_graphs != len(compiler.parts):
            failed.append(f"{name}: {problem}")
        torch._dynamo.reset()
    assert failed == []
