"""Import what is slow once, so that forked ranks have it, and keep the parent free of threads that
forks would lose.
"""

import gc
import os

# Processes that tests start share the cores: a thread that waits for another must not spin. In the
# test of the notebook that took 45 of 62 s of CPU time. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import nvidia.dali.fn
import nvidia.dali.types  # noqa: F401
import pytest
import torch
import torch._dynamo
from dist_utils import small_run

import resnet_dist.run  # noqa: F401
from resnet_dist.cli import parse_config

# Reads the meanings of all settings, which every command line needs.
parse_config([])
# Forked ranks would copy each page on which the garbage collector marks an object.
gc.freeze()
torch.set_num_threads(1)
# Autograd's engine counts the devices at the first backward pass, and starts a thread for each. A
# test of torch.compile would register one, and what this process forks could not use autograd.
torch.ones(1, requires_grad=True).sum().backward()
os.environ.setdefault("WANDB_MODE", "disabled")


def keep_one_thread(number):
    """In place of torch.set_num_threads, in this process and in those that it forks.

    Commands that a test runs in this process ask for more threads. OpenMP's threads do not survive
    a fork: a forked rank would wait for them for ever.
    """


torch.set_num_threads = keep_one_thread


# A minute or more each. With several workers, the last file decides when the suite ends.
LONGEST_FILES = ("test_zoo.py", "test_benchmark.py", "test_models.py", "test_stores.py")


def pytest_collection_modifyitems(items):
    """Files in folders begin first, then those that take longest."""

    def begins_late(item):
        return item.path.parent.name == "tests" and item.path.name not in LONGEST_FILES

    items.sort(key=begins_late)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The embedded digits as a folder of images, for tests to read."""
    from resnet_dist.data.sources.digits import write_digits

    folder = str(tmp_path_factory.mktemp("data") / "digits")
    write_digits(folder)
    return folder


@pytest.fixture(autouse=True)
def no_leftover_environment(monkeypatch):
    """Tests see neither a launcher's ranks nor a user's W&B key."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "WANDB_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    if torch.distributed.is_initialized():
        # A forked rank would find the group of this process in place of its own.
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def checkpoint(digits, tmp_path_factory):
    """The path of a checkpoint: two steps on the digits at 16 pixels, with averaged weights."""
    from dist_utils import run_app

    folder = tmp_path_factory.mktemp("checkpoint")
    assert run_app(
        1,
        [
            "train",
            *small_run(
                data__data_dir=digits,
                output_dir=folder,
                data__train_crop_size=16,
                data__val_resize_size=18,
                data__val_crop_size=16,
                train__epochs=0.1,
                train__global_batch_size=64,
                train__ema_decay=0.5,
                schedule__warmup_epochs=0,
                train__eval_interval_epochs=0,
            ),
        ],
        str(folder / "log"),
    ) == [0], (folder / "log").read_text()
    return str(folder / "checkpoints" / "last.pt")
