"""The preflight: it finds what is wrong before a run does, on all ranks, in text and in JSON."""

import json
import math
import os
import shutil
import socket
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from dist_utils import run_command

from resnet_dist import cli
from resnet_dist.commands import doctor, doctor_bench
from resnet_dist.config import Config, TrainConfig
from resnet_dist.resources import host_memory, memory

ARGUMENTS = (
    "doctor",
    *("--config", "configs/quickstart.yaml"),
    *("--log.wandb", "disabled"),
    *("--data.threads", "1"),
)


class Finding(NamedTuple):
    """What the doctor says of one subject."""

    level: str
    text: str


def examine(tmp_path, *more, world_size=1, entry=None):
    """The exit code, and what is printed."""
    words = [*ARGUMENTS, "--output_dir", tmp_path / "run", *more]
    return run_command(tmp_path, words, world_size, entry)


def parse_findings(line):
    """{subject: Finding} of a line that --json prints."""
    findings = {}
    for check in json.loads(line):
        findings[check["check"]] = Finding(check["level"], check["text"])
    return findings


def last_findings(printed):
    """{subject: Finding} of what one rank prints with --json."""
    last_line = printed.splitlines()[-1]
    return parse_findings(last_line)


def let_disk_be_full(free):
    """Let this process believe that `free` bytes of a gigabyte are left on each disk."""
    total = 10**9
    usage = shutil._ntuple_diskusage(total, total - free, free)
    shutil.disk_usage = lambda path: usage


def let_memory_be_full():
    """Let this process believe that a megabyte of memory is left."""
    host_memory._free_in_control_groups = lambda: [2**20]


@pytest.mark.slow
def test_a_good_run_on_two_ranks(digits, tmp_path):
    """All is well on both ranks, and nothing is left behind."""
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
    output_dir = tmp_path / "run"
    assert not output_dir.exists()


@pytest.mark.slow
def test_warnings_and_errors(digits, tmp_path):
    """A warning ends with exit code 1, an error with exit code 2."""
    code, printed = examine(
        tmp_path,
        *("--data.data_dir", digits),
        *("--optim.base_lr", "3"),
        "--json",
    )
    layout = last_findings(printed)["layout"]
    assert code == 1
    assert layout.level == "warning"
    assert "is 3 for 256" in layout.text

    # One image is empty.
    data = shutil.copytree(digits, tmp_path / "data")
    zeros = data / "val" / "0"
    first_image = next(zeros.glob("*.jpg"))
    first_image.write_bytes(b"")
    damaged_data = (
        *("--data.kind", "folder"),
        *("--data.data_dir", str(data)),
        "--json",
    )
    code, printed = examine(tmp_path, *damaged_data)
    assert code == 1
    assert "of 192 that were read 1 are broken" in last_findings(printed)["data"].text

    # One class has no validation images, and other settings are wrong.
    shutil.rmtree(data / "val" / "7")
    for setting, value, check, words in (
        ("--train.grad_accum_steps", "3", "layout", "63 or 66"),
        ("--output_dir", "/proc/nowhere", "folder", "/proc"),
        ("--log.wandb", "disabled", "data", "only in train/ (7)"),
    ):
        code, printed = examine(tmp_path, *damaged_data, setting, value)
        finding = last_findings(printed)[check]
        assert code == 2, printed
        assert finding.level == "error", printed
        assert words in finding.text, printed


@pytest.mark.slow
def test_a_disk_that_is_too_small(digits, tmp_path):
    def entry(arguments):
        let_disk_be_full(free=10**6)
        return cli.main(arguments)

    more = ("--data.data_dir", digits, "--json")
    code, printed = examine(tmp_path, *more, entry=entry)
    folder = last_findings(printed)["folder"]
    assert code == 2
    assert folder.level == "error"
    assert "0.0 GB are free" in folder.text


@pytest.mark.slow
def test_caches_that_do_not_fit(digits, tmp_path):
    """The training set takes 12 x 12 x 3 x 1,442 bytes or so: more than half of a megabyte."""

    def no_memory(arguments):
        let_memory_be_full()
        return cli.main(arguments)

    def no_disk(arguments):
        let_disk_be_full(free=10**5)
        return cli.main(arguments)

    for mode, entry, level, words in (
        ("auto", None, "ok", "(TMPDIR)"),
        ("auto", no_memory, "warning", "it will be off"),
        ("host", no_disk, "error", "take --data.train_cache off"),
    ):
        more = (
            *("--data.data_dir", digits),
            *("--data.train_cache", mode),
            "--json",
        )
        _, printed = examine(tmp_path, *more, entry=entry)
        caches = last_findings(printed)["caches"]
        assert caches.level == level, caches.text
        assert words in caches.text, caches.text
        assert f"data.train_cache {mode}: the training images take about" in caches.text


@pytest.mark.slow
def test_a_step_that_does_not_fit_memory(digits, tmp_path):
    def entry(arguments):
        let_memory_be_full()
        return cli.main(arguments)

    more = ("--data.data_dir", digits, "--json")
    code, printed = examine(tmp_path, *more, entry=entry)
    finding = last_findings(printed)["memory"]
    assert code == 2
    assert finding.level == "error"
    assert "raise train.grad_accum_steps" in finding.text


def test_memory_of_a_control_group(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    used = tmp_path / "memory.current"
    monkeypatch.setattr(host_memory, "_GROUP_V2", tmp_path)
    monkeypatch.setattr(host_memory, "_GROUP_V1", tmp_path / "none")
    assert host_memory._free_in_control_groups() == []
    limit.write_text("max\n")
    used.write_text("600\n")
    assert host_memory._free_in_control_groups() == []
    limit.write_text("1000\n")
    assert host_memory._free_in_control_groups() == [400]
    per_rank = memory.available_memory(torch.device("cpu"), 2)
    assert per_rank == 200

    # A group inside of it has less, though the kernel may drop some of its cached files.
    own = tmp_path / "job"
    own.mkdir()
    (own / "memory.max").write_text("500\n")
    (own / "memory.current").write_text("450\n")
    (own / "memory.stat").write_text("anon 100\ninactive_file 30\n")
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/other\n0::/job\n")
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", groups)
    assert host_memory._free_in_control_groups() == [80, 400]


def test_bf16_without_hardware_for_it_is_a_warning(monkeypatch):
    runtime = SimpleNamespace(device=torch.device("cpu"))
    bf16 = Config(train=TrainConfig(precision="bf16"))
    fp32 = Config(train=TrainConfig(precision="fp32"))

    monkeypatch.setattr(doctor, "has_fast_bf16", lambda device: False)
    level, text = doctor._precision(bf16, runtime)
    assert level == "warning"
    assert "no hardware for bf16: set train.precision auto" in text
    level, _ = doctor._precision(fp32, runtime)
    assert level == "ok"

    monkeypatch.setattr(doctor, "has_fast_bf16", lambda device: True)
    level, _ = doctor._precision(bf16, runtime)
    assert level == "ok"


def test_ranks_that_share_too_few_cpus_are_a_warning(monkeypatch):
    six_cpus = set(range(6))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: six_cpus)
    for kind, num_ranks, expected in (
        ("cpu", 6, "ok"),
        ("cpu", 8, "warning"),
        ("cuda", 2, "warning"),
    ):
        runtime = SimpleNamespace(
            device=torch.device(kind),
            local_world_size=num_ranks,
        )
        level, _ = doctor._cpus(Config(), runtime)
        assert level == expected


@pytest.mark.slow
def test_bench_names_the_slow_rank(digits, tmp_path):
    """Rank 1 computes slowly, and can measure neither its memory nor its disk."""

    def entry(arguments):
        is_slow = os.environ["RANK"] == "1"
        matrix_rate = 4e12 if is_slow else 8e12
        memory_rate = math.nan if is_slow else 1e9

        def read(loader, runtime):
            if is_slow:
                raise OSError("the disk is on fire")
            return 100.0

        doctor_bench.matrix_rate = lambda device, dtype: matrix_rate
        doctor_bench.memory_rate = lambda device: memory_rate
        doctor_bench._read_some = read
        return cli.main(arguments)

    more = ("--data.data_dir", digits, "--bench", "--json")
    code, printed = examine(tmp_path, *more, world_size=2, entry=entry)
    assert code == 2, printed
    of_ranks = [line for line in printed.splitlines() if line.startswith("[")]
    findings = [parse_findings(line) for line in of_ranks]
    # The first rank says more.
    second, first = sorted(findings, key=len)

    host = socket.gethostname()
    assert first["matrix"].level == "warning"
    assert first["matrix"].text.endswith(
        f"lowest 4); slow: rank 1 on {host} with 50% of the median"
    )
    assert first["bandwidth"] == Finding("error", f"rank 1 on {host} failed")
    assert first["allreduce"].level in ("ok", "warning")
    assert "GB/s" in first["allreduce"].text
    assert first["reading"] == Finding("error", f"rank 1 on {host} failed")
    assert second["reading"].text == "OSError: the disk is on fire"


@pytest.mark.slow
def test_bench_of_one_rank_measures(digits, tmp_path):
    code, printed = examine(tmp_path, "--data.data_dir", digits, "--bench", "--json")
    findings = last_findings(printed)
    assert code in (0, 1), printed
    for check, unit in (
        ("matrix", "TFLOP/s"),
        ("bandwidth", "GB/s"),
        ("reading", "MB/s"),
    ):
        figure, rest = findings[check].text.split(" ", 1)
        assert float(figure) > 0
        assert rest.startswith(unit)
    assert findings["allreduce"] == Finding("ok", "one rank: nothing to reduce")


def test_outliers_are_slower_than_the_median():
    find_outliers = doctor_bench.find_outliers
    assert find_outliers([10, 9, 10, 8, 10]) == [3]
    assert find_outliers([10, 5]) == [1]
    assert find_outliers([10]) == []
