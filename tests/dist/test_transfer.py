"""Weights that two ranks download once and train the head of; an interrupted run ends as the
uninterrupted one.
"""

import functools
import hashlib
import http.server
import os
import signal
import threading
from typing import NamedTuple

import pytest
import torch
import torchvision
from dist_utils import (
    equal_trees,
    free_port,
    last_checkpoint,
    logged_lines,
    run_app,
    small_run,
    start_app,
    wait_app,
    wait_for_step,
)

from resnet_dist import cli
from resnet_dist.models.build import MODELS

NAME = "torchvision:resnet18:IMAGENET1K_V1"


class Served(NamedTuple):
    """A weights file that can be downloaded."""

    url: str
    weights: dict[str, torch.Tensor]
    requests: list[str]


def save_with_hash(weights, folder):
    """Save weights under a name that ends with their hash, as torchvision's do."""
    path = folder / "weights"
    torch.save(weights, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"resnet18-{digest[:8]}.pth")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of a weights file, which notes the paths that it is asked for."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    weights = MODELS["resnet20"](num_classes=1000).state_dict()
    path = save_with_hash(weights, folder)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Served(f"http://127.0.0.1:{server.server_port}/{path.name}", weights, requests)
    server.shutdown()
    server.server_close()


def train(digits, folder, url, *more, start=run_app):
    """As the command line, with torchvision's weights at `url` and a cache of downloads in
    `folder`.
    """

    def entry(arguments):
        torch.hub.set_dir(str(folder / "hub"))
        torchvision.models._api.WeightsEnum.url = property(lambda weights: url)
        return cli.main(arguments)

    return start(
        2,
        [
            "train",
            *small_run(
                data__data_dir=digits,
                output_dir=folder / "run",
                data__train_crop_size=16,
                data__val_resize_size=16,
                data__val_crop_size=16,
                train__epochs=1,
                schedule__warmup_epochs=0.5,
                train__ema_decay=0.9,
                checkpoint__interval_steps=5,
                checkpoint__init_from=NAME,
            ),
            *more,
        ],
        str(folder / "printed"),
        entry,
    )


def test_without_a_network_every_rank_ends(digits, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/resnet18-00000000.pth"
    codes = train(digits, tmp_path, url)
    printed = (tmp_path / "printed").read_text()
    assert codes == [2, 2]
    assert printed.count("error (rank") == 1, printed
    assert "Traceback" not in printed, printed
    for words in (NAME, "could not be had", "no network", "give its path"):
        assert words in printed, printed
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_frozen_backbone_on_two_ranks(digits, tmp_path, served):
    """Only the classifier is trained, also by a run that is interrupted and resumed."""
    frozen = (
        *("--optim.unfreeze_from", "head"),
        *("--optim.base_lr", "0.002"),
    )
    whole_folder = tmp_path / "whole"
    parts_folder = tmp_path / "parts"
    whole_folder.mkdir()
    parts_folder.mkdir()

    served.requests.clear()
    codes = train(digits, whole_folder, served.url, *frozen)
    assert codes == [0, 0], (whole_folder / "printed").read_text()
    # By the main process alone.
    assert len(served.requests) == 1

    processes = train(digits, parts_folder, served.url, *frozen, start=start_app)
    wait_for_step(parts_folder / "run", 6, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert wait_app(processes) == [128 + signal.SIGTERM] * 2
    codes = train(digits, parts_folder, served.url, *frozen)
    assert codes == [0, 0]

    whole = last_checkpoint(whole_folder / "run")
    parts = last_checkpoint(parts_folder / "run")
    assert whole["step"] == 12
    for key in ("model", "ema", "optimizer", "best_top1", "step"):
        assert equal_trees(whole[key], parts[key]), key
    for name, value in served.weights.items():
        if not name.startswith("fc."):
            assert torch.equal(whole["model"][name], value), name
            assert torch.equal(whole["ema"][name], value), name
    assert len(whole["optimizer"]["state"]) == 2

    # What was taken of the file is printed at the first start, and whole in a table.
    printed = (parts_folder / "printed").read_text()
    assert printed.count(f"weights of {NAME}, top level of the file") == 1
    assert "loaded     114  conv1.weight, bn1.weight, bn1.bias and 111 more" in printed
    assert (
        "missing      2  fc.weight (head, freshly initialised), fc.bias (head, freshly initialised)"
        in printed
    )
    assert "warning: weights" not in printed
    table = (parts_folder / "run/init_from.txt").read_text()
    for name in served.weights:
        assert name in table

    lines = logged_lines(whole_folder / "run")
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < losses[0]
