"""What needs a GPU, one test for each check of `checks.py`."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from checks import CHECKS, run_check
from places import Place

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and this machine has none"
)


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    result = run_check(name, Place(torch.device("cuda", 0), is_full=True))
    if result["outcome"] == "skipped":
        pytest.skip(result["text"])
    assert result["outcome"] == "passed", result["text"]
