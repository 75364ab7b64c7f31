"""The report: the numbers of the table, and a picture where matplotlib is there."""

import argparse
import json
import re
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from resnet_dist.commands import report
from resnet_dist.commands.report_input import Evaluated, read_reported_run
from resnet_dist.commands.report_page import render_evaluations
from resnet_dist.commands.report_text import (
    describe_differences,
    describe_evaluated,
    describe_pair,
    describe_slow_ranks,
)
from resnet_dist.evaluation.confusion import ClassResult
from resnet_dist.evaluation.evaluation_file import EvaluatedNetwork, EvaluationDetails
from resnet_dist.logs.history import RunHistory


@pytest.fixture
def folder(tmp_path):
    """A run of two sessions of five epochs, the second 100 s after the end of the first."""
    records = []
    for step in range(10, 101, 10):
        if step <= 50:
            elapsed = float(step)
            time = 1000 + elapsed
        else:
            elapsed = float(step - 50)
            time = 1150 + elapsed
        loss = 3.0 / step
        if step == 30:
            loss = None
        common = {"step": step, "time": time, "elapsed": elapsed, "train/epoch": step / 10}
        training = {
            "train/loss": loss,
            "train/top1": step,
            "train/lr": 0.1,
            "train/images_per_second": 500.0 + step,
            "train/data_wait_fraction": 0.015,
            "train/bad_images": step // 50,
        }
        evaluation = {
            "val/loss": 1.0,
            "val/top1": 90.0 - abs(step - 80),
            "val/top5": 95.0,
            "val_ema/loss": 1.0,
            "val_ema/top1": 91.0,
            "val_ema/top5": 96.0,
        }
        records += [common | training, common | evaluation]
    torn_line = '{"step": 110'
    write_metrics(tmp_path, records, torn_line)
    return tmp_path


def write_metrics(folder, records, end=""):
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines) + end)


def call(*arguments):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.slow
def test_table_and_picture(folder, capsys):
    assert call(folder) == 0
    out = capsys.readouterr().out
    for part in (
        "100 steps, 10.00 epochs, 0:01:40 h in 2 sessions",
        "555 images/s",
        "1.5 %",
        "bad images",
    ):
        assert part in " ".join(out.split()) or part in out
    rows = {line[:16].strip(): line for line in out.splitlines()}
    assert "70.00 %" in rows["val final"]
    assert "90.00 %" in rows["val best"]
    assert "epoch 8.00" in rows["val best"]
    assert "91.00 %" in rows["val, EMA final"]
    assert (folder / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert call(folder, "--out", folder / "other.png") == 0
    assert (folder / "other.png").exists()
    assert call(folder, "--out", folder / "none" / "other.png") == 2


def test_without_matplotlib(folder, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call(folder) == 0
    assert "pip install resnet-dist[report]" in capsys.readouterr().out


def test_only_training_lines(folder, capsys):
    (folder / "metrics.jsonl").write_text('{"step": 5, "train/epoch": 0.5, "train/loss": 1.0}\n')
    assert call(folder) == 0
    assert "5 steps" in capsys.readouterr().out


def test_nothing_to_report(tmp_path, capsys):
    assert call(tmp_path) == 2
    (tmp_path / "metrics.jsonl").write_text("")
    assert call(tmp_path) == 2
    assert capsys.readouterr().out.count("error:") == 2


def test_several_runs_are_compared(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    line = {"step": 5, "time": 3.0, "elapsed": 2.0, "train/epoch": 0.5, "train/loss": 1.5}
    (other / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert call(folder, other) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        name, *cells = line.split()
        rows[name] = cells
    assert rows[folder.name] == ["10.00", "0:01:40", "0.0300", "70.00", "95.00", "90.00"]
    assert rows["other"] == ["0.50", "0:00:02", "1.5000", "nan", "nan", "nan"]
    assert (folder / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    assert call(folder, tmp_path / "none") == 2


def run_folder(folder, name, correct, num=10000):
    place = folder / name
    place.mkdir()
    line = {
        "step": 5,
        "train/epoch": 0.5,
        "val/loss": 1.0,
        "val/top1": 100 * correct / num,
        "val/correct1": correct,
        "val/num": num,
    }
    (place / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return place


@pytest.mark.slow
def test_a_difference_inside_its_interval_is_not_called_one(tmp_path, capsys):
    base = run_folder(tmp_path, "base", 9000)
    near = run_folder(tmp_path, "near", 9080)
    far = run_folder(tmp_path, "far", 9110)
    assert call(base, near, far) == 0
    out = capsys.readouterr().out
    assert "near and base: no difference in final val top-1 beyond chance" in out
    assert "far has +1.10 points of final val top-1 against base (95 % interval +0.29 to" in out
    assert call(base) == 0
    assert "top-1  90.00 % (95 %: 89.40 to 90.57)" in capsys.readouterr().out


@pytest.mark.slow
def test_few_classes_have_no_top5(tmp_path, capsys):
    """Neither in the table of one run or of several, nor on the page."""
    few = run_folder(tmp_path, "few", 90, 100)
    fewer = run_folder(tmp_path, "fewer", 80, 100)
    page = tmp_path / "page.html"
    assert call(few, "--out", tmp_path / "p.png") == 0
    assert call(few, fewer, "--html", page, "--out", tmp_path / "p.png") == 0
    out = capsys.readouterr().out
    assert "best top-1" in out
    assert "top-5" not in out
    html = page.read_text()
    assert "top-1 (%)" in html
    assert "top-5" not in html


def network_of(num_classes, num_competing=None):
    names = [f"class {number}" for number in range(num_classes)]
    return EvaluatedNetwork("tiny", "raw", 1, names, num_competing)


NETWORKS = {
    "five classes": (network_of(5), False),
    "six classes": (network_of(6), True),
    "six of ten classes compete": (network_of(10, 6), True),
    "five of ten classes compete": (network_of(10, 5), False),
}
"""what was evaluated -> whether it has a top-5 accuracy: among five classes every image is a hit"""


def test_few_classes_have_no_top5_in_a_report_of_evaluations():
    for case, (network, has_top5) in NETWORKS.items():
        is_hit = np.array([True, False])
        classes = [ClassResult(0, 2, 1, 2, 0.25, 1)]
        details = EvaluationDetails(network, "x", is_hit, 2, 0, classes, [], None, [], [])
        evaluated = Evaluated("tiny", network, "x", is_hit, 2, details)
        page = render_evaluations([evaluated])
        shown = 0
        top5 = []
        if has_top5:
            # On a card, and above a column of the table of classes.
            shown = 2
            top5 = ["100.0"]
        assert page.count("top-5") == shown, case
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
        assert cells == ["class 0", "2", "50.0", *top5, "25.0"], case
        assert ("top-5" in describe_evaluated([evaluated])) == has_top5, case


def test_a_folder_name_cannot_forge_lines(tmp_path, capsys):
    assert call(tmp_path / "a\nerror: \x1b[31m") == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "\x1b" not in out


def records_of_ranks(key, lines):
    """Log lines with these figures of the ranks; a step takes 0.5 s."""
    records = []
    for step, figures in enumerate(lines, start=1):
        record = {
            "step": step,
            "train/epoch": step / 10,
            "train/step_seconds": 0.5,
            key: figures,
        }
        records.append(record)
    return records


@pytest.mark.slow
def test_slow_ranks_are_named(tmp_path, capsys):
    """In the text and on the page, which has a chart of each figure."""
    # The first line is of an attempt with two ranks.
    waits = [[0.01, 0.01]] + 4 * [[0.01, 0.01, 0.2, 0.011]]
    probes = [[0.002, 0.002]] + 4 * [[0.002, 0.003, 0.002, 0.002]]
    records = records_of_ranks("ranks/data_seconds", waits)
    for record, figures in zip(records, probes, strict=True):
        record["ranks/probe_seconds"] = figures
    write_metrics(tmp_path, records)
    page = tmp_path / "page.html"
    assert call(tmp_path, "--html", page) == 0
    for printed in (capsys.readouterr().out, page.read_text()):
        assert "rank 2 waits for data for 200 ms per step, the others 10 ms (medians)" in printed
        assert "rank 1 computes slowly: 3.00 ms for a fixed matrix product, the others" in printed
    for title in ("waiting for data (ms per step)", "a fixed matrix product (ms)"):
        assert title in page.read_text()


def test_a_rank_that_hardly_waits_longer_is_not_named(tmp_path):
    records = records_of_ranks("ranks/data_seconds", 4 * [[0.01, 0.012]])
    assert not describe_slow_ranks(RunHistory(tmp_path, records))


PROBES = {
    "three slow lines of four": ([0.002, 0.003, 0.003, 0.003], True),
    "two slow lines of four": ([0.002, 0.002, 0.003, 0.003], False),
    "one line of noise": ([0.002, 0.002, 0.002, 0.9], False),
    "too few lines": ([0.003, 0.003, 0.003], False),
    "hardly slower": ([0.0023, 0.0023, 0.0023, 0.0023], False),
}
"""the probe of rank 1 in each line, that of the other ranks is 2 ms -> whether it is named"""


def test_noise_of_the_probe_names_nobody(tmp_path):
    for case, (probes, expected) in PROBES.items():
        lines = [[0.002, seconds, 0.002] for seconds in probes]
        run = RunHistory(tmp_path, records_of_ranks("ranks/probe_seconds", lines))
        sentences = describe_slow_ranks(run)
        assert bool(sentences) == expected, case


@pytest.mark.slow
def test_html_page(tmp_path, capsys):
    """One file without references to others; foreign text is escaped; settings that differ."""
    base = run_folder(tmp_path, "base <b>", 9000)
    far = run_folder(tmp_path, "far", 9110)
    for folder, lr in ((base, 0.1), (far, 0.2)):
        (folder / "config.yaml").write_text(f"seed: 0\noptim:\n  base_lr: {lr}\n")
    page = tmp_path / "page.html"
    assert call(base, far, "--html", page) == 0
    html = page.read_text()
    body = re.search("<body>.*</body>", html, re.S)[0]
    xml.etree.ElementTree.fromstring(body.replace("&nbsp;", " "))
    assert "base &lt;b&gt;" in html
    assert "<b>" not in html
    assert html.count("<td>optim.base_lr<") == 2
    assert html.count("<td>seed<") == 1
    assert "89.40 to 90.57" in html
    assert "+1.10 points" in html
    assert "http" not in html
    assert "<script" not in html
    assert call(base, "--html", tmp_path / "none" / "page.html") == 2
    (base / "config.yaml").write_text("[")
    assert call(base, "--html", page) == 0


def with_settings(folder, seed, lr, data_dir="a"):
    text = f"seed: {seed}\noptim:\n  base_lr: {lr}\ndata:\n  kind: folder\n  data_dir: {data_dir}\n"
    (folder / "config.yaml").write_text(text)
    return folder


def seeds_of_a_recipe(folder, name, lr, correct):
    """A run folder for each number of correct images, with seeds from 0."""
    runs = []
    for seed, num_correct in enumerate(correct):
        run = run_folder(folder, f"{name}{seed}", num_correct)
        with_settings(run, seed, lr)
        runs.append(run)
    return runs


@pytest.mark.slow
def test_seeds_of_a_recipe_are_one_group(tmp_path, capsys):
    low = seeds_of_a_recipe(tmp_path, "low", 0.1, [9000, 9010, 9020])
    high = seeds_of_a_recipe(tmp_path, "high", 0.2, [9300, 9309, 9318])
    near = seeds_of_a_recipe(tmp_path, "near", 0.3, [9009, 9018])
    assert call(*low, *high, *near, "--out", tmp_path / "p.png") == 0
    out = capsys.readouterr().out
    assert "low0, low1, low2: 3 seeds of one recipe, final val top-1 90.10 %" in out
    assert "standard deviation 0.10, 95 % interval of the mean 89.85 to 90.35 %" in out
    assert "high0, high1, high2 has +2.99 points of mean final val top-1" in out
    assert "near0, near1 and low0, low1, low2: no difference in mean final val top-1" in out
    assert call(low[0], high[0], high[1], "--out", tmp_path / "p.png") == 0
    assert "no statement, since one of them has a single seed" in capsys.readouterr().out
    repeated = [read_reported_run(low[0]), read_reported_run(low[0])]
    assert "2 runs of one recipe" in describe_differences(repeated)[0]


def test_runs_on_different_images_are_not_compared(tmp_path, capsys):
    base = with_settings(run_folder(tmp_path, "base", 900, 1000), 0, 0.1)
    fewer = with_settings(run_folder(tmp_path, "fewer", 100, 500), 0, 0.2)
    elsewhere = with_settings(run_folder(tmp_path, "elsewhere", 100, 1000), 0, 0.2, "b")
    assert call(base, fewer, elsewhere, "--out", tmp_path / "p.png") == 0
    out = capsys.readouterr().out
    assert "fewer and base cannot be compared: they were evaluated on 500 and 1000 images" in out
    assert 'elsewhere and base cannot be compared: data.data_dir is "b" and "a"' in out
    assert "points" not in out


def test_the_same_images_are_compared_in_pairs():
    """With 10 points of difference the images decide: here every discordant one is a win."""
    network = EvaluatedNetwork("resnet20", "raw", 1, ["cat", "dog"])
    hits_of_first = np.arange(100) < 80
    hits_of_second = np.arange(100) < 90
    first = Evaluated("first", network, "x", hits_of_first, 100, None)
    second = Evaluated("second", network, "x", hits_of_second, 100, None)
    other = Evaluated("other", network, "y", hits_of_second, 100, None)
    sentence = describe_pair(first, second)
    assert "second has +10.00 points of top-1 against first" in sentence
    assert "0 of 100 images, McNemar p = 0.002" in sentence
    assert "cannot be compared" in describe_pair(first, other)


@pytest.mark.slow
def test_a_link_to_wandb(tmp_path):
    folder = run_folder(tmp_path, "run", 900, 1000)
    page = tmp_path / "page.html"
    picture = tmp_path / "p.png"
    for address, is_link in (("https://wandb.ai/a/b", True), ("javascript:alert(1)", False)):
        (folder / "wandb_url").write_text(address + "\n")
        assert call(folder, "--html", page, "--out", picture) == 0
        link = f'<a href="{address}">'
        assert (link in page.read_text()) == is_link
