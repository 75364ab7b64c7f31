"""`resnet-dist models`: every network's size and cost against a golden file, and against what
torchvision publishes.

After a change that is meant: `python tests/test_models.py --write` writes tests/golden/models.json
anew.
"""

import json
import sys
from pathlib import Path

import pytest
import torchvision

from resnet_dist import cli
from resnet_dist.commands.models import measure_network
from resnet_dist.models.build import MODELS
from resnet_dist.models.resnet import FAMILY

GOLDEN = Path(__file__).resolve().parent / "golden" / "models.json"


def line(name):
    return {key: value for key, value in measure_network(name).items() if key != "name"}


@pytest.mark.parametrize("name", MODELS)
def test_size_and_cost(name):
    """Parameters and multiply-adds as torchvision's weights say them (five significant digits), and
    the golden ones.
    """
    row = line(name)
    assert row == json.loads(GOLDEN.read_text())[name]
    if name in torchvision.models.list_models(torchvision.models):
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].meta
        assert row["multiply_adds"] / 1e9 == pytest.approx(weights["_ops"], abs=6e-4)
        if name in FAMILY:  # test_zoo.py has the others' parameters and figures
            assert row["parameters"] == weights["num_params"]
            assert row["top1"] == weights["_metrics"]["ImageNet-1K"]["acc@1"]


def test_golden_file_has_no_other_names():
    assert list(json.loads(GOLDEN.read_text())) == list(MODELS)


def test_a_missing_optional_library_costs_only_its_rows(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["models", "inception"]) == 0
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()}
    assert "27.16" in rows["inception_v3"] and "resnet-dist[timm]" in rows["inception_v4"]
    assert cli.main(["models", "inception_v4", "--json"]) == 0
    assert "resnet-dist[timm]" in json.loads(capsys.readouterr().out)["error"]


def test_table(capsys):
    assert cli.main(["models", "lenet"]) == 0
    out = capsys.readouterr().out
    assert "lenet5" in out and "resnet50" not in out
    assert cli.main(["models", "plain20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 269_722
    assert cli.main(["models", "nonsense"]) == 2
    assert "no network" in capsys.readouterr().err


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    rows = ",\n".join(f'"{name}": {json.dumps(line(name))}' for name in MODELS)
    GOLDEN.write_text("{\n" + rows + "\n}\n")
