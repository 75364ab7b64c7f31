"""The preflight: it finds what is wrong before a run does, on all ranks, in text and in JSON."""

import json
import math
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from dist_utils import run_command

from resnet_dist import cli
from resnet_dist.commands import doctor, doctor_bench
from resnet_dist.config import Config, TrainConfig
from resnet_dist.resources import host_memory, memory

ARGUMENTS = (
    *("doctor", "--config", "configs/quickstart.yaml"),
    *("--log.wandb", "disabled", "--data.threads", "1"),
)


def examine(tmp_path, *more, world_size=1, entry=None):
    """The exit code, and what is printed."""
    words = [*ARGUMENTS, "--output_dir", tmp_path / "run", *more]
    return run_command(tmp_path, words, world_size, entry)


def levels(printed):
    """{check: (level, text)} of what is printed with --json."""
    checks = json.loads(printed.splitlines()[-1])
    return {check["check"]: (check["level"], check["text"]) for check in checks}


@pytest.mark.slow
def test_a_good_run_on_two_ranks(digits, tmp_path):
    code, printed = examine(tmp_path, "--data.data_dir", digits, world_size=2)
    assert code == 0, printed
    said = {
        "layout": "64 = 2 ranks (gloo at 127.0.0.1:",
        "folder": "can be written",
        "precision": "hardware for bf16",
        "memory": "a step of 32 images takes about 0.0",
        "cpus": "CPUs for 2 ranks of this machine",
        "decoder": "JPEG: CPU decoder",
        "data": "1442 + 355 images, 10 classes",
        "caches": "the validation images fit into memory (data.val_cache)",
        "software": "torch ",
    }
    checks = set()
    for line in printed.splitlines():
        level, check, *_ = line.split()
        # A machine with one CPU gets a warning on both ranks.
        if level == "ok" or check == "cpus":
            checks.add(check)
            assert said[check] in line
    assert checks == set(said)
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


@pytest.mark.slow
def test_warnings_and_errors(digits, tmp_path):
    code, printed = examine(tmp_path, "--data.data_dir", digits, "--optim.base_lr", "3", "--json")
    level, text = levels(printed)["layout"]
    assert code == 1
    assert level == "warning"
    assert "is 3 for 256" in text
    data = shutil.copytree(digits, tmp_path / "data")
    next((data / "val" / "0").glob("*.jpg")).write_bytes(b"")
    more = ("--data.kind", "folder", "--data.data_dir", str(data), "--json")
    code, printed = examine(tmp_path, *more)
    assert code == 1
    assert "of 192 that were read 1 are broken" in levels(printed)["data"][1]
    shutil.rmtree(data / "val" / "7")
    for setting, value, check, words in (
        ("--train.grad_accum_steps", "3", "layout", "63 or 66"),
        ("--output_dir", "/proc/nowhere", "folder", "/proc"),
        ("--log.wandb", "disabled", "data", "only in train/ (7)"),
    ):
        code, printed = examine(tmp_path, *more, setting, value)
        level, text = levels(printed)[check]
        assert code == 2, printed
        assert level == "error", printed
        assert words in text, printed


def let_disk_be_full(free):
    total = 10**9
    usage = shutil._ntuple_diskusage(total, total - free, free)
    shutil.disk_usage = lambda path: usage


@pytest.mark.slow
def test_a_disk_that_is_too_small(digits, tmp_path):
    def entry(arguments):
        let_disk_be_full(free=10**6)
        return cli.main(arguments)

    code, printed = examine(tmp_path, "--data.data_dir", digits, "--json", entry=entry)
    level, text = levels(printed)["folder"]
    assert code == 2
    assert level == "error"
    assert "0.0 GB are free" in text


@pytest.mark.slow
def test_caches_that_do_not_fit(digits, tmp_path):
    """The training set takes 12 x 12 x 3 x 1,442 bytes or so: more than half of a megabyte."""

    def no_memory(arguments):
        host_memory._free_in_control_groups = lambda: [2**20]
        return cli.main(arguments)

    def no_disk(arguments):
        let_disk_be_full(free=10**5)
        return cli.main(arguments)

    cases = (
        ("auto", None, "ok", "(TMPDIR)"),
        ("auto", no_memory, "warning", "it will be off"),
        ("host", no_disk, "error", "take --data.train_cache off"),
    )
    for mode, entry, expected, words in cases:
        more = ("--data.data_dir", digits, "--data.train_cache", mode, "--json")
        _, printed = examine(tmp_path, *more, entry=entry)
        level, text = levels(printed)["caches"]
        assert level == expected, text
        assert words in text, text
        assert f"data.train_cache {mode}: the training images take about" in text


@pytest.mark.slow
def test_a_step_that_does_not_fit_memory(digits, tmp_path):
    arguments = ("--data.data_dir", digits, "--json")

    def entry(arguments):
        host_memory._free_in_control_groups = lambda: [2**20]
        return cli.main(arguments)

    code, printed = examine(tmp_path, *arguments, entry=entry)
    level, text = levels(printed)["memory"]
    assert code == 2
    assert level == "error"
    assert "raise train.grad_accum_steps" in text


def test_memory_of_a_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "_GROUP_V2", tmp_path)
    monkeypatch.setattr(host_memory, "_GROUP_V1", tmp_path / "none")
    assert host_memory._free_in_control_groups() == []
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("600\n")
    assert host_memory._free_in_control_groups() == []
    (tmp_path / "memory.max").write_text("1000\n")
    assert host_memory._free_in_control_groups() == [400]
    assert memory.available_memory(torch.device("cpu"), 2) == 200
    # A group inside of it has less, though the kernel may drop some of its cached files.
    own = tmp_path / "job"
    own.mkdir()
    (own / "memory.max").write_text("500\n")
    (own / "memory.current").write_text("450\n")
    (own / "memory.stat").write_text("anon 100\ninactive_file 30\n")
    (tmp_path / "groups").write_text("4:memory:/other\n0::/job\n")
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", tmp_path / "groups")
    assert host_memory._free_in_control_groups() == [80, 400]


def test_bf16_without_hardware_for_it_is_a_warning(monkeypatch):
    runtime = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(doctor, "has_fast_bf16", lambda device: False)
    level, text = doctor._precision(Config(train=TrainConfig(precision="bf16")), runtime)
    assert level == "warning"
    assert "no hardware for bf16: set train.precision auto" in text
    assert doctor._precision(Config(train=TrainConfig(precision="fp32")), runtime)[0] == "ok"
    monkeypatch.setattr(doctor, "has_fast_bf16", lambda device: True)
    assert doctor._precision(Config(train=TrainConfig(precision="bf16")), runtime)[0] == "ok"


def test_ranks_that_share_too_few_cpus_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(6)))
    for kind, ranks, level in (("cpu", 6, "ok"), ("cpu", 8, "warning"), ("cuda", 2, "warning")):
        runtime = SimpleNamespace(device=torch.device(kind), local_world_size=ranks)
        assert doctor._cpus(Config(), runtime)[0] == level


@pytest.mark.slow
def test_bench_names_the_slow_rank(digits, tmp_path):
    def entry(arguments):
        is_slow = os.environ["RANK"] == "1"
        doctor_bench.matrix_rate = lambda device, dtype: 4e12 if is_slow else 8e12
        doctor_bench.memory_rate = lambda device: math.nan if is_slow else 1e9

        def read(loader, runtime):
            if is_slow:
                raise OSError("the disk is on fire")
            return 100.0

        doctor_bench._read_some = read
        return cli.main(arguments)

    more = ("--data.data_dir", digits, "--bench", "--json")
    code, printed = examine(tmp_path, *more, world_size=2, entry=entry)
    assert code == 2, printed
    of_ranks = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    # The first rank says more.
    second, first = sorted(of_ranks, key=len)
    found = {check["check"]: (check["level"], check["text"]) for check in first}
    host = socket.gethostname()
    level, text = found["matrix"]
    assert level == "warning"
    assert text.endswith(f"lowest 4); slow: rank 1 on {host} with 50% of the median")
    assert found["bandwidth"] == ("error", f"rank 1 on {host} failed")
    assert found["allreduce"][0] in ("ok", "warning")
    assert "GB/s" in found["allreduce"][1]
    assert found["reading"] == ("error", f"rank 1 on {host} failed")
    said_by_second = [(check["check"], check["text"]) for check in second]
    assert ("reading", "OSError: the disk is on fire") in said_by_second


@pytest.mark.slow
def test_bench_of_one_rank_measures(digits, tmp_path):
    code, printed = examine(tmp_path, "--data.data_dir", digits, "--bench", "--json")
    found = levels(printed)
    assert code in (0, 1), printed
    for check, unit in (("matrix", "TFLOP/s"), ("bandwidth", "GB/s"), ("reading", "MB/s")):
        figure, rest = found[check][1].split(" ", 1)
        assert float(figure) > 0
        assert rest.startswith(unit)
    assert found["allreduce"] == ("ok", "one rank: nothing to reduce")


def test_outliers_are_slower_than_the_median():
    assert doctor_bench.find_outliers([10, 9, 10, 8, 10]) == [3]
    assert doctor_bench.find_outliers([10, 5]) == [1]
    assert doctor_bench.find_outliers([10]) == []
