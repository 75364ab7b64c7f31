"""What a training leaves behind beside its numbers: samples.png and evaluation.json."""

import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from dist_utils import logged_lines, run_command
from PIL import Image

from resnet_dist import cli
from resnet_dist.evaluation.evaluation_file import read_evaluation
from resnet_dist.evaluation.predictions_file import read_predictions

SETTINGS = ("--data.threads", "1", "--distributed.threads", "1")


@pytest.mark.slow
def test_a_run_leaves_a_contact_sheet_and_the_details_of_its_last_evaluation(checkpoint):
    folder = Path(checkpoint).resolve().parents[1]
    with Image.open(folder / "samples.png") as picture:
        # Two rows of eight images of 128 pixels.
        assert picture.width > 8 * 128
        assert picture.height > 2 * 128
        gray_levels = picture.convert("L").getcolors()
        assert len(gray_levels) > 100

    trained, evaluated = read_last_lines(folder)
    details = read_evaluation(folder / "evaluation.json")
    assert details.network.weights == "averaged"
    assert evaluated["step"] == 2
    assert details.network.step == 2
    assert details.is_hit.sum() == evaluated["val_ema/correct1"]
    assert details.num_top5_hits == evaluated["val_ema/correct5"]
    assert evaluated["val_ema/num"] == 355
    assert len(details.is_hit) == 355
    assert details.calibration.loss == pytest.approx(evaluated["val_ema/loss"], abs=1e-5)

    memory = trained["train/memory_gib"]
    assert memory == max(trained["ranks/memory_gib"])
    assert 0.05 < memory < 10


def read_last_lines(folder):
    """The last line of training, and the only one of an evaluation."""
    lines = logged_lines(folder)
    trained = [line for line in lines if "train/loss" in line]
    (evaluated,) = [line for line in lines if "val_ema/top1" in line]
    return trained[-1], evaluated


def report(*words):
    """The exit code of the command report."""
    return cli.main(["report", *map(str, words)])


@pytest.mark.slow
def test_evaluate_writes_what_report_reads(checkpoint, tmp_path, capsys):
    """Files of two ranks; the same weights are not called different; the page has all sections."""
    details = tmp_path / "details.json"
    predictions = tmp_path / "predictions.parquet"
    evaluate = ["evaluate", "--weights", checkpoint, *SETTINGS]
    evaluate += ["--details", details, "--predictions", predictions]
    code, printed = run_command(tmp_path, evaluate, world_size=2)
    assert code == 0, printed

    # The two files say what the training's own evaluation says.
    folder = Path(checkpoint).resolve().parents[1]
    by_the_run = read_evaluation(folder / "evaluation.json")
    by_the_command = read_evaluation(details)
    assert by_the_command.images == by_the_run.images
    assert read_predictions(predictions).images == by_the_run.images
    # Another number of ranks trained on the same last bits.
    assert np.array_equal(by_the_command.is_hit, by_the_run.is_hit)
    assert by_the_command.network == by_the_run.network

    # A report that compares the two files, which are of the same weights.
    page = tmp_path / "page.html"
    assert report(details, predictions, "--html", page) == 0
    printed = capsys.readouterr().out
    assert "no difference in top-1 beyond chance" in printed
    assert "(right where the other is wrong: 0 and 0" in printed

    # A report about the run.
    assert report(folder, "--html", page, "--out", tmp_path / "p.png") == 0
    html = page.read_text()
    body = re.search("<body>.*</body>", html, re.S)[0]
    xml.etree.ElementTree.fromstring(body)
    parts = (
        "Classes, the worst first",
        "accuracy against confidence",
        "Most confident mistakes",
        "Least confident hits",
        "best temperature",
        "data:image/png;base64,",
        "learning rate",
        "memory, the largest of a rank (GiB)",
        "all 1",
    )
    for part in parts:
        assert part in html, part
    assert "http" not in html
    assert "<script" not in html

    # A damaged file, and a file together with a run.
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert report(details, broken) == 2
    assert report(details, folder) == 2
    printed = capsys.readouterr().out
    assert printed.count("error:") == 2
    assert "cannot be mixed" in printed


@pytest.mark.slow
def test_files_that_cannot_be_written_are_refused_before_the_evaluation(checkpoint, tmp_path):
    evaluate = ["evaluate", "--weights", checkpoint]
    problems = (
        ("--predictions", f"{tmp_path}/none/p.parquet", "a folder that exists"),
        ("--predictions", f"{tmp_path}/p.csv", "must end in .parquet"),
        ("--details", f"{tmp_path}/d", "must end in .json"),
    )
    for option, path, sentence in problems:
        code, printed = run_command(tmp_path, [*evaluate, option, path, *SETTINGS])
        assert code == 2, printed
        assert sentence in printed, printed

    # A suite has no details: argparse ends the process.
    with pytest.raises(SystemExit):
        cli.main([*evaluate, "--suite", "s.yaml", "--details", "d.json"])
