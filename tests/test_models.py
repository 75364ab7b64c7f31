"""`resnet-dist models`: the figures it prints against a measurement of every network, and against
what torchvision publishes.

After an intended change, `python -m resnet_dist.models.figures` writes the figures again.
"""

import json
import subprocess
import sys

import pytest
import torchvision

from resnet_dist import cli
from resnet_dist.commands.models import read_figures
from resnet_dist.models.build import MODELS
from resnet_dist.models.figures import measure_network
from resnet_dist.models.resnet import FAMILY


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_size_and_cost(name):
    """The printed figures are the measured ones, and those of torchvision's weights (five
    significant digits).
    """
    row = measure_network(name)
    printed = read_figures()[name]
    assert row == printed

    names_in_torchvision = torchvision.models.list_models(torchvision.models)
    if name not in names_in_torchvision:
        return
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    billions = row["multiply_adds"] / 1e9
    assert billions == pytest.approx(weights.meta["_ops"], abs=6e-4)
    # test_zoo.py has the parameters and figures of the others.
    if name in FAMILY:
        accuracy = weights.meta["_metrics"]["ImageNet-1K"]
        assert row["parameters"] == weights.meta["num_params"]
        assert row["top1"] == accuracy["acc@1"]


def test_figures_have_no_other_names():
    assert list(read_figures()) == list(MODELS)


def test_parameters_of_resnet_rs_are_those_of_timm():
    """Of timm 1.0's networks of the same names."""
    expected = {
        "resnetrs50": 35_691_912,
        "resnetrs101": 63_618_696,
        "resnetrs152": 86_621_576,
    }
    figures = read_figures()
    for name, parameters in expected.items():
        assert figures[name]["parameters"] == parameters


def test_the_command_does_not_import_torch():
    code = (
        "import sys\n"
        "from resnet_dist import cli\n"
        "assert cli.main(['models']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, *rows = done.stdout.splitlines()
    assert len(rows) == len(MODELS)


def test_a_missing_optional_library_costs_only_its_rows(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    assert cli.main(["models", "inception"]) == 0
    row_of = {}
    for row in capsys.readouterr().out.splitlines():
        name, *_ = row.split()
        row_of[name] = row
    assert "27.16" in row_of["inception_v3"]
    assert "resnet-dist[timm]" in row_of["inception_v4"]

    assert cli.main(["models", "inception_v4", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "resnet-dist[timm]" in figures["error"]


def test_table(capsys):
    assert cli.main(["models", "lenet"]) == 0
    printed = capsys.readouterr().out
    assert "lenet5" in printed
    assert "resnet50" not in printed

    assert cli.main(["models", "plain20", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == 269_722

    assert cli.main(["models", "nonsense"]) == 2
    error = capsys.readouterr().err
    assert "no network" in error
