"""The short form of chaos.py: each kind of fault once at one run, and one run whose number of ranks
changes.
"""

import shutil

import pytest
from chaos import FAULTS, RANKS, SPOILS, Round, arguments, differences, draw, other_ranks
from dist_utils import run_app

from resnet_dist.checkpoint_file import read_checkpoint, unpack_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_app(RANKS, arguments(digits, folder), str(folder / "log")) == [0] * RANKS, (
        folder / "log"
    ).read_text()
    return folder


def test_each_fault_leaves_no_trace(digits, undisturbed, tmp_path):
    one = Round(digits, tmp_path / "run", 1, print)
    one.play(draw(len(FAULTS), 1))
    assert sorted(fault.partition(" SIG")[0] for fault in one.thrown) == sorted(FAULTS)
    assert len(one.lost) == len(FAULTS) - len(SPOILS) and max(one.lost) > 0
    assert differences(one.folder, undisturbed) == []


def test_the_comparison_sees_one_bit(undisturbed, tmp_path):
    other = shutil.copytree(undisturbed, tmp_path / "other")
    path = (other / "checkpoints" / "last.pt").resolve()
    content = unpack_checkpoint(read_checkpoint(path), "")
    content["ema"]["fc.bias"][3] *= 1 + 2**-23
    write_checkpoint(path, content)
    assert differences(other, undisturbed) == ["ema"]


def test_another_number_of_ranks(digits, tmp_path):
    """Samples, crops and learning rate of each step are the same, and the weights up to rounding."""
    difference = other_ranks(digits, tmp_path, 1)
    print(f"relative difference of the weights: {difference:.2e}")
    assert difference < 1e-8
