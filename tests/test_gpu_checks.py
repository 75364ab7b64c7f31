"""The checks of tests/gpu on the CPU, at a small size: a mistake in one shows before a GPU does.

The report is tested whole by a long test: a dry run on the CPU.
"""

import json
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from dist_utils import run_command

GPU_TESTS = Path(__file__).parent / "gpu"
sys.path.insert(0, str(GPU_TESTS))

import checks  # noqa: E402
import page  # noqa: E402
import report  # noqa: E402

# What only a GPU has.
SKIPPED = {"jpeg_decoder", "out_of_memory_is_explained"}


def run_checks(arguments):
    """Checks start processes of their own, which daemons must not."""
    multiprocessing.current_process()._config["daemon"] = False
    return checks.main(arguments)


@pytest.mark.slow
def test_cheap_checks_pass_on_the_cpu(tmp_path):
    """In a process of its own, where the checks may start process groups."""
    names = [name for name, check in checks.CHECKS.items() if check.cheap]
    arguments = ["--device", "cpu", "--small", *names]
    code, printed = run_command(tmp_path, arguments, entry=run_checks)
    outcomes = outcomes_of(printed)
    assert "failed" not in outcomes.values(), printed
    assert code == 0, printed
    assert set(outcomes) == set(names)
    skipped = {name for name, outcome in outcomes.items() if outcome == "skipped"}
    assert skipped == SKIPPED


def outcomes_of(printed):
    """The outcome of each check that has ended, by the lines of JSON."""
    outcomes = {}
    for line in printed.splitlines():
        if not line.startswith("{"):
            continue
        result = json.loads(line)
        if result["outcome"] != "started":
            outcomes[result["name"]] = result["outcome"]
    return outcomes


PROGRAM = """
import json, os, sys, time

for name in sys.argv[1:]:
    print(json.dumps({"name": name, "outcome": "started"}), flush=True)
    print("some library says something")
    if name == "dies":
        print("a last word", file=sys.stderr)
        os._exit(9)
    if name == "hangs":
        time.sleep(600)
    print(json.dumps({"name": name, "outcome": "passed", "seconds": 1.0, "text": ""}), flush=True)
"""


def test_a_part_that_dies_or_hangs_is_recorded_and_the_others_go_on(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    names = ["one", "dies", "two", "hangs", "three", "four"]
    limits = dict.fromkeys(names, 20.0) | {"hangs": 0.5}
    program = report.Program([sys.executable, str(script)], limits, tmp_path / "log")
    results = report.run_items(program, time.monotonic() + 60)
    outcomes = {result.name: result.outcome for result in results}
    assert outcomes == {
        "one": "passed",
        "dies": "died",
        "two": "passed",
        "hangs": "timed out",
        "three": "passed",
        "four": "passed",
    }
    assert list(outcomes) == names
    dead = results[names.index("dies")]
    assert dead.text == "exit code 9\na last word\n"

    one_item = replace(program, limits={"one": 1.0})
    (late,) = report.run_items(one_item, time.monotonic())
    assert late.outcome == "no time"


def test_what_is_missing_is_said_at_once(monkeypatch):
    missing = {"nvidia.dali", "jsonargparse"}
    monkeypatch.setattr(report, "has_module", lambda name: name not in missing)
    with pytest.raises(SystemExit, match=r"lacks nvidia.dali \(nvidia.dali: the data path\)"):
        report.check_environment()
    missing.remove("nvidia.dali")
    monkeypatch.setattr(report.metadata, "version", lambda name: "2.8.1+cu126")
    first, second = report.check_environment()
    assert "jsonargparse is missing" in first
    assert "2.8.1+cu126 is untried" in second
    monkeypatch.undo()
    assert not report.has_module("no_such_package.module")


def test_photographs_are_arranged_in_class_folders(tmp_path):
    flat = tmp_path / "flat"
    (flat / "deeper").mkdir(parents=True)
    for name in ("a.JPEG", "deeper/b.jpg", "notes.txt"):
        (flat / name).write_bytes(name.encode())
    folder = report.arrange_photographs(flat, tmp_path / "arranged", 10)
    links = sorted(folder.rglob("*.jpg"))
    assert len(links) == 10
    linked = {link.read_bytes() for link in links}
    assert linked == {b"a.JPEG", b"deeper/b.jpg"}

    (flat / "deeper" / "b.jpg").unlink()
    (flat / "a.JPEG").unlink()
    with pytest.raises(SystemExit, match="holds no"):
        report.arrange_photographs(flat, tmp_path / "none", 10)


def test_pages_of_a_report(tmp_path):
    checks_done = [
        report.Result("quickstart", "failed", 3.0, "AssertionError: no | luck\ntrace"),
        report.Result("memory_stays_flat", "passed", 9.0, "2000 batches"),
    ]
    rows = {
        "ours eager": {"images/s": 4005.4, "share": 0.5},
        "bare": {"images/s": 3000.0},
    }
    figures = [
        report.Result("synthetic", "passed", 9.0, "", {"rows": rows, "batch": 256}),
        report.Result("loaders", "skipped", 0.0, "needs real photographs"),
    ]
    content = page.Report(
        machine={"device": "H100"},
        remarks=["a remark"],
        checks=checks_done,
        figures=figures,
        seconds=12.0,
        is_dry_run=True,
    )
    page.write_report(content, tmp_path)
    as_json = json.loads((tmp_path / "gpu_report.json").read_text())
    assert as_json["seconds"] == 12.0
    text = (tmp_path / "gpu_report.md").read_text()
    expected_parts = (
        "A dry run at tiny sizes",
        "- device: H100\n- duration: 12 s\n- note: a remark\n\n## Checks\n\n| check |",
        "| quickstart | failed | 3.0 | AssertionError: no / luck |",
        "| ours eager | 4,005.4 | 50.0% |",
        "| bare | 3,000.0 |  |",
        "skipped: needs real photographs",
        "measurement on a GPU behind them:\n\n- memory_stays_flat: 150 MiB\n\n## Figures",
        "### Loaders\n\n(goal: at least 0.85 of DALI for the same work)\n\nskipped",
        "## quickstart: failed",
    )
    for part in expected_parts:
        assert part in text


@pytest.mark.long
def test_dry_run_of_the_report(tmp_path):
    """All checks and all figures at a tiny size, as processes of their own: four minutes."""
    assert report.main(["--dry-run", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "gpu_report.json").read_text())
    names_of_checks = {result["name"] for result in content["checks"]}
    assert names_of_checks == set(checks.CHECKS)

    assert len(content["figures"]) == 11
    without_figures = set()
    for result in content["figures"]:
        assert result["outcome"] == "passed", result
        if not result["figures"]:
            without_figures.add(result["name"])
    # Figures of JPEG files are those of real photographs, or there are none.
    assert without_figures == {"loaders", "decoders", "jpeg_loop"}
