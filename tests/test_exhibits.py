"""What a training leaves behind beside its numbers: samples.png and evaluation.json."""

import json
from pathlib import Path

from PIL import Image

from resnet_dist.evaluation_file import read_evaluation


def test_a_run_leaves_a_contact_sheet_and_the_details_of_its_last_evaluation(checkpoint):
    folder = Path(checkpoint).resolve().parents[1]
    with Image.open(folder / "samples.png") as picture:
        # Two rows of eight images of 128 pixels.
        assert picture.width > 8 * 128 and picture.height > 2 * 128
        assert len(picture.convert("L").getcolors()) > 100
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [line for line in lines if "val_ema/top1" in line]
    details = read_evaluation(folder / "evaluation.json")
    assert details.network.weights == "averaged"
    assert details.network.step == evaluated["step"] == 2
    assert details.is_hit.sum() == evaluated["val_ema/correct1"]
    assert details.num_top5_hits == evaluated["val_ema/correct5"]
    assert len(details.is_hit) == evaluated["val_ema/num"] == 355
    assert abs(details.calibration.loss - evaluated["val_ema/loss"]) < 1e-5
    trained = [line for line in lines if "train/loss" in line]
    assert 0.05 < trained[-1]["train/memory_gib"] == max(trained[-1]["ranks/memory_gib"]) < 10
