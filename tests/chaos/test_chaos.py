"""The short form of chaos.py: each kind of fault once, and one run whose number of ranks
changes.
"""

import shutil

import pytest
from chaos import Round, differences, draw, other_ranks, run_undisturbed
from dist_utils import last_checkpoint
from faults import FAULTS, FILE_FAULTS

from resnet_dist.checkpoints.checkpoint_file import write_checkpoint


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos") / "undisturbed"
    run_undisturbed(digits, folder)
    return folder


def test_each_fault_leaves_no_trace(digits, undisturbed, tmp_path):
    """One run after the other, until each kind of fault has been thrown at one of them."""
    kinds = draw(len(FAULTS), 1)
    thrown: list[str] = []
    lost: list[int] = []
    while kinds:
        one = Round(
            digits,
            folder=tmp_path / str(len(thrown)),
            seed=len(kinds),
            say=print,
        )
        kinds = one.play(kinds)
        assert differences(one.folder, undisturbed) == []
        thrown += one.thrown
        lost += one.lost
    thrown_kinds = [title.partition(" SIG")[0] for title in thrown]
    assert sorted(thrown_kinds) == sorted(FAULTS)
    # Files are damaged between two attempts, which needs no new start.
    num_starts = len(FAULTS) - len(FILE_FAULTS)
    assert len(lost) == num_starts
    assert max(lost) > 0


def test_the_comparison_sees_one_bit(undisturbed, tmp_path):
    other = shutil.copytree(undisturbed, tmp_path / "other")
    content = last_checkpoint(other)
    one_bit_more = 1 + 2**-23
    content["ema"]["fc.bias"][3] *= one_bit_more
    last = other / "checkpoints" / "last.pt"
    write_checkpoint(last.resolve(), content)
    assert differences(other, undisturbed) == ["ema"]


@pytest.mark.long
def test_another_number_of_ranks(digits, tmp_path):
    """Each step has the same samples, crops and learning rate; the weights agree up to rounding."""
    difference = other_ranks(digits, tmp_path, 1)
    print(f"relative difference of the weights: {difference:.2e}")
    assert difference < 1e-8
