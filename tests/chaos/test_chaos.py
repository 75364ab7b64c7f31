"""The short form of chaos.py: each kind of fault once, and one run whose number of ranks
changes.
"""

import shutil

import pytest
from chaos import Round, differences, draw, final_state, other_ranks, run_undisturbed
from faults import FAULTS, FILE_FAULTS

from resnet_dist.checkpoints.checkpoint_file import write_checkpoint


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos") / "undisturbed"
    run_undisturbed(digits, folder)
    return folder


def test_each_fault_leaves_no_trace(digits, undisturbed, tmp_path):
    kinds = draw(len(FAULTS), 1)
    thrown: list[str] = []
    lost: list[int] = []
    while kinds:
        one = Round(digits, tmp_path / str(len(thrown)), len(kinds), print)
        kinds = one.play(kinds)
        assert differences(one.folder, undisturbed) == []
        thrown += one.thrown
        lost += one.lost
    assert sorted(title.partition(" SIG")[0] for title in thrown) == sorted(FAULTS)
    assert len(lost) == len(FAULTS) - len(FILE_FAULTS)
    assert max(lost) > 0


def test_the_comparison_sees_one_bit(undisturbed, tmp_path):
    other = shutil.copytree(undisturbed, tmp_path / "other")
    content = final_state(other)
    content["ema"]["fc.bias"][3] *= 1 + 2**-23
    write_checkpoint((other / "checkpoints" / "last.pt").resolve(), content)
    assert differences(other, undisturbed) == ["ema"]


@pytest.mark.long
def test_another_number_of_ranks(digits, tmp_path):
    """Each step has the same samples, crops and learning rate; the weights agree up to rounding."""
    difference = other_ranks(digits, tmp_path, 1)
    print(f"relative difference of the weights: {difference:.2e}")
    assert difference < 1e-8
