"""What `train.precision: auto` becomes, on this hardware, on other hardware, and on a resume."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dist_utils import run_command

from resnet_dist import precision
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.checkpoints.run_folder import newest_valid
from resnet_dist.config import Config, TrainConfig, to_dict
from resnet_dist.distributed import process, runtime
from resnet_dist.distributed.rendezvous import Launcher
from resnet_dist.precision import Precision, resolve_precision, resolve_settings, set_arithmetic

CPU = torch.device("cpu")
AUTO = Config()


@pytest.fixture
def cpu_with(monkeypatch):
    """A function that replaces the flags of this machine's CPU."""
    return lambda *flags: monkeypatch.setattr(precision, "cpu_flags", lambda: set(flags))


def with_precision(setting):
    return replace(AUTO, train=TrainConfig(precision=setting))


def test_auto_is_what_the_hardware_computes_natively(cpu_with, monkeypatch):
    for flags, expected in ((["avx2"], "fp32"), (["amx_bf16"], "bf16"), (["avx512_bf16"], "bf16")):
        cpu_with(*flags)
        assert resolve_precision("auto", CPU) == expected
    for capability, expected in (((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_precision("auto", torch.device("cuda")) == expected


def test_a_stored_precision_wins_over_auto_alone(cpu_with):
    cpu_with("avx2")
    for stored, expected in (("bf16", "bf16"), ("fp16", "fp16"), ("auto", "fp32")):
        saved = to_dict(with_precision(stored))
        assert resolve_settings(AUTO, CPU, saved).train.precision == expected
        assert resolve_settings(with_precision("fp32"), CPU, saved).train.precision == "fp32"


def test_precision_is_that_of_autocast_and_scaler():
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        own = Precision(name, CPU)
        with own.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == own.dtype == dtype
        assert own.gradient_scaler().is_enabled() == (name == "fp16")


@pytest.fixture
def switches():
    """PyTorch's switches, as they were, after the test."""
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_switches_of_a_gpu(switches, monkeypatch):
    """TF32 and deterministic algorithms follow the config on a GPU, and nothing changes on a
    CPU.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    for wanted in (True, False):
        set_arithmetic(TrainConfig(tf32=wanted), torch.device("cuda"))
        assert matmul.allow_tf32 == wanted
        assert cudnn.allow_tf32 == wanted
        assert cudnn.benchmark
    set_arithmetic(TrainConfig(tf32=True, deterministic=True), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not matmul.allow_tf32
    set_arithmetic(TrainConfig(deterministic=True), torch.device("cuda"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_nccl_leaves_the_decision_to_the_watchdog(switches, monkeypatch):
    """Its own monitor and dumps are off before the process group starts, unless the user has set
    them.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "1")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "")
    monkeypatch.delenv("TORCH_NCCL_DUMP_ON_TIMEOUT")
    assert runtime._use_gpu("cuda", Launcher()) == torch.device("cuda", 0)
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    with pytest.raises(ValueError, match="shows 1 GPUs for 2 ranks"):
        runtime._use_gpu("cuda", Launcher(local_rank=1, local_world_size=2))


def test_a_failed_rank_with_a_gpu_leaves_without_clean_up(monkeypatch):
    """Destructors of NCCL may wait for a lost rank."""
    left = []
    watchdog = SimpleNamespace(lost_server="", world_size=2, is_watching=True, exit_now=left.append)
    for has_gpu, expected in ((False, []), (True, [75])):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda has_gpu=has_gpu: has_gpu)
        assert process._leave(75, watchdog) == 75
        assert left == expected


@pytest.mark.slow
def test_a_run_keeps_its_precision_on_another_kind_of_node(digits, tmp_path):
    """Started in bf16, resumed with `auto` on a CPU for which `auto` is fp32, then with another
    one.
    """

    def train(epochs, setting):
        arguments = [
            "train", "--config", "configs/quickstart.yaml", "--data.data_dir", digits,
            "--output_dir", str(tmp_path / "run"), "--data.train_crop_size", "8",
            "--data.val_resize_size", "8", "--data.val_crop_size", "8", "--data.threads", "1",
            "--train.global_batch_size", "512", "--schedule.warmup_epochs", "0",
            "--train.epochs", str(epochs), "--train.precision", setting,
            "--log.wandb", "disabled", "--distributed.threads", "1",
        ]  # fmt: skip
        code, printed = run_command(tmp_path, arguments, entry=on_avx2)
        assert code == 0, printed
        newest = newest_valid(tmp_path / "run" / "checkpoints", print)
        payload = read_checkpoint(newest)
        saved = unpack_checkpoint(payload, "newest")["config"]["train"]["precision"]
        return saved, printed

    assert train(1, "bf16")[0] == "bf16"
    saved, printed = train(2, "auto")
    assert saved == "bf16"
    assert "bf16" in printed
    assert "train.precision was" not in printed
    saved, printed = train(3, "fp32")
    assert saved == "fp32"
    assert "train.precision was 'bf16', now 'fp32'" in printed


def on_avx2(arguments):
    """The command line on a CPU without bf16."""
    from resnet_dist import cli

    precision.cpu_flags = lambda: {"avx2"}
    return cli.main(arguments)
