"""What `train.precision: auto` becomes, on this hardware, on other hardware, and on a resume."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dist_utils import last_checkpoint, run_command, small_run

from resnet_dist import precision
from resnet_dist.config import Config, TrainConfig, to_dict
from resnet_dist.distributed import process, runtime
from resnet_dist.distributed.rendezvous import Launcher
from resnet_dist.precision import Precision, resolve_precision, resolve_settings, set_arithmetic

CPU = torch.device("cpu")
GPU = torch.device("cuda")
AUTO = Config()


@pytest.fixture
def cpu_with(monkeypatch):
    """A function that replaces the flags of this machine's CPU."""

    def set_flags(*flags):
        monkeypatch.setattr(precision, "cpu_flags", lambda: set(flags))

    return set_flags


@pytest.fixture
def gpu_with(monkeypatch):
    """A function that sets the compute capability of a GPU that is not there."""

    def set_capability(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set_capability


def with_precision(setting):
    train = TrainConfig(precision=setting)
    return replace(AUTO, train=train)


def test_auto_is_what_the_hardware_computes_natively(cpu_with, gpu_with):
    precision_of_cpus = {
        "avx2": "fp32",
        "amx_bf16": "bf16",
        "avx512_bf16": "bf16",
    }
    for flag, expected in precision_of_cpus.items():
        cpu_with(flag)
        assert resolve_precision("auto", CPU) == expected

    precision_of_gpus = {
        (7, 5): "fp16",
        (8, 0): "bf16",
        (9, 0): "bf16",
    }
    for capability, expected in precision_of_gpus.items():
        gpu_with(capability)
        assert resolve_precision("auto", GPU) == expected


def test_a_stored_precision_wins_over_auto_alone(cpu_with):
    cpu_with("avx2")
    fp32 = with_precision("fp32")
    resumed_as = {
        "bf16": "bf16",
        "fp16": "fp16",
        "auto": "fp32",
    }
    for stored, expected in resumed_as.items():
        saved = to_dict(with_precision(stored))
        with_auto = resolve_settings(AUTO, CPU, saved)
        with_fp32 = resolve_settings(fp32, CPU, saved)
        assert with_auto.train.precision == expected
        assert with_fp32.train.precision == "fp32"


def test_precision_is_that_of_autocast_and_scaler():
    dtypes = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    ones = torch.ones(2, 2)
    for name, dtype in dtypes.items():
        own = Precision(name, CPU)
        with own.autocast():
            product = ones @ ones
        assert own.dtype == dtype
        assert product.dtype == dtype
        scaler = own.gradient_scaler()
        needs_scaler = name == "fp16"
        assert scaler.is_enabled() == needs_scaler


@pytest.fixture
def switches():
    """PyTorch's switches, as they were, after the test."""
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    deterministic = torch.utils.deterministic
    tf32_of_matmul = matmul.allow_tf32
    tf32_of_cudnn = cudnn.allow_tf32
    benchmark = cudnn.benchmark
    fill = deterministic.fill_uninitialized_memory
    yield
    matmul.allow_tf32 = tf32_of_matmul
    cudnn.allow_tf32 = tf32_of_cudnn
    cudnn.benchmark = benchmark
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = fill


def delete_variable(monkeypatch, name):
    """Delete an environment variable; after the test it is as before, also if the test sets it."""
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)


def test_switches_of_a_gpu(switches, monkeypatch):
    """TF32 and deterministic algorithms follow the config on a GPU, and nothing changes on a
    CPU.
    """
    delete_variable(monkeypatch, "CUBLAS_WORKSPACE_CONFIG")
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    cudnn.benchmark = True
    for wanted in (True, False):
        set_arithmetic(TrainConfig(tf32=wanted), GPU)
        assert matmul.allow_tf32 == wanted
        assert cudnn.allow_tf32 == wanted
        assert cudnn.benchmark

    set_arithmetic(TrainConfig(tf32=True, deterministic=True), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not matmul.allow_tf32

    set_arithmetic(TrainConfig(deterministic=True), GPU)
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
    delete_variable(monkeypatch, "TORCH_NCCL_DUMP_ON_TIMEOUT")

    device = runtime._use_gpu("cuda", Launcher())
    assert device == torch.device("cuda", 0)
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"

    second_of_two = Launcher(local_rank=1, local_world_size=2)
    with pytest.raises(ValueError, match="shows 1 GPUs for 2 ranks"):
        runtime._use_gpu("cuda", second_of_two)


def test_a_failed_rank_with_a_gpu_leaves_without_clean_up(monkeypatch):
    """Destructors of NCCL may wait for a lost rank."""
    exit_codes = []
    watchdog = SimpleNamespace(
        lost_server="",
        world_size=2,
        is_watching=True,
        exit_now=exit_codes.append,
    )

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert process._leave(75, watchdog) == 75
    assert exit_codes == []

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert process._leave(75, watchdog) == 75
    assert exit_codes == [75]


@pytest.mark.slow
def test_a_run_keeps_its_precision_on_another_kind_of_node(digits, tmp_path):
    """Started in bf16, resumed with `auto` on a CPU for which `auto` is fp32, then with another
    one.
    """
    folder = tmp_path / "run"

    def train(epochs, setting):
        settings = small_run(
            data__data_dir=digits,
            output_dir=folder,
            train__global_batch_size=512,
            schedule__warmup_epochs=0,
            train__epochs=epochs,
            train__precision=setting,
        )
        code, printed = run_command(tmp_path, ["train", *settings], entry=on_avx2)
        assert code == 0, printed
        content = last_checkpoint(folder)
        return content["config"]["train"]["precision"], printed

    saved, _ = train(1, "bf16")
    assert saved == "bf16"

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
