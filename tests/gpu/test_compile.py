"""torch.compile on a GPU, and the promise of train.deterministic. None of these has run yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dist_utils import equal_trees
from engine_utils import NoSync, make_batch, rule_of

from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.checkpoints.state import build_state
from resnet_dist.compilation import start_compiler
from resnet_dist.config import Config, ModelConfig, TrainConfig
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.engine import train_step
from resnet_dist.nonfinite import NonFinite

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and this machine has none"
)

# Command line's main that gets SIGTERM before the update of a step, if there is one.
ENTRY = """
import os, signal, sys
from resnet_dist import cli, engine
real, stop_at = engine.train_step, int(sys.argv[1])
def train_step(model, state, *rest):
    if state.step == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(model, state, *rest)
engine.train_step = train_step
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_updates_are_close_to_eager_and_do_not_wait(mode, precision):
    """Losses of 20 updates to 5 %; no update waits for the device."""
    device = torch.device("cuda", 0)
    train = TrainConfig(precision=precision, compile=True, compile_mode=mode)
    config = Config(model=ModelConfig(name="resnet20"), train=train)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    batch = make_batch(128, 32, device=device, dtype=dtype)
    losses = {}
    for compiles in (True, False):
        state = build_state(config, 10, device)
        if compiles:
            runtime = Runtime(0, 0, 1, 1, device, None)
            compiler, problem = start_compiler(state.model, train, (128, 3, 32, 32), runtime)
            assert problem == ""
        nonfinite, rule, all_counts = NonFinite(state.model, 0), rule_of(config, device), []
        for number in range(20):
            torch.cuda.set_sync_debug_mode("error" if number >= 5 else "default")
            counts, _ = train_step(NoSync(state.model), state, [batch], 0.05, rule, nonfinite)
            torch.cuda.set_sync_debug_mode("default")
            all_counts.append(counts.result()["loss"])
        losses[compiles] = all_counts
    assert compiler.num_graphs == len(compiler.parts)
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


def run(folder, stop_at, compiles):
    words = ["train", "--config", "configs/quickstart.yaml", "--data.data_dir"]
    words += [str(folder.parent / "digits"), "--output_dir", str(folder), "--log.wandb", "disabled"]
    words += ["--train.epochs", "1", "--train.deterministic", "true", "--distributed.device"]
    words += ["cuda", "--train.compile", compiles]
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, str(stop_at), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == (0 if stop_at < 0 else 143), done.stdout + done.stderr


def weights(folder):
    path = folder / "checkpoints" / "last.pt"
    return unpack_checkpoint(read_checkpoint(path), str(path))["model"]


@pytest.mark.parametrize("compiles", ["true", "false"])
def test_deterministic_runs_are_equal_also_after_a_resume(tmp_path, compiles):
    """Two processes, and one that is stopped at step 7 and resumed: the same weights."""
    run(tmp_path / "first", -1, compiles)
    run(tmp_path / "second", -1, compiles)
    run(tmp_path / "resumed", 7, compiles)
    run(tmp_path / "resumed", -1, compiles)
    expected = weights(tmp_path / "first")
    for name in ("second", "resumed"):
        assert equal_trees(weights(tmp_path / name), expected), name
