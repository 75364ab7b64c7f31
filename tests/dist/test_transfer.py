"""Weights that two ranks download once and train the head of; an interrupted run ends as the
uninterrupted one.
"""

import functools
import hashlib
import http.server
import json
import os
import signal
import threading

import pytest
import torch
import torchvision
from dist_utils import (
    equal_trees,
    free_port,
    run_app,
    small_run,
    start_app,
    wait_app,
    wait_for_step,
)

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint
from resnet_dist.models.build import MODELS

NAME = "torchvision:resnet18:IMAGENET1K_V1"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An address of a weights file, its state dict, and the paths that were asked for."""
    folder, asked = tmp_path_factory.mktemp("served"), []
    torch.manual_seed(1)
    source = MODELS["resnet20"](num_classes=1000).state_dict()
    torch.save(source, folder / "x")
    name = f"resnet18-{hashlib.sha256((folder / 'x').read_bytes()).hexdigest()[:8]}.pth"
    os.rename(folder / "x", folder / name)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{name}", source, asked
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
    assert train(digits, tmp_path, f"http://127.0.0.1:{free_port()}/resnet18-00000000.pth") == [
        2,
        2,
    ]
    printed = (tmp_path / "printed").read_text()
    assert printed.count("error (rank") == 1 and "Traceback" not in printed, printed
    assert all(
        word in printed for word in (NAME, "could not be had", "no network", "give its path")
    ), printed
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_frozen_backbone_on_two_ranks(digits, tmp_path, served):
    url, source, asked = served
    frozen = ("--optim.unfreeze_from", "head", "--optim.base_lr", "0.002")
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    asked.clear()
    assert train(digits, folders[0], url, *frozen) == [0, 0], (folders[0] / "printed").read_text()
    assert len(asked) == 1  # by the main process alone
    processes = train(digits, folders[1], url, *frozen, start=start_app)
    wait_for_step(folders[1] / "run", 6, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert wait_app(processes) == [143, 143]
    assert train(digits, folders[1], url, *frozen) == [0, 0]
    whole, parts = (
        unpack_checkpoint(read_checkpoint(folder / "run/checkpoints/last.pt"), "")
        for folder in folders
    )
    assert whole["step"] == 12
    for key in ("model", "ema", "optimizer", "best_top1", "step"):
        assert equal_trees(whole[key], parts[key]), key
    for key, value in source.items():
        if not key.startswith("fc."):
            assert torch.equal(whole["model"][key], value) and torch.equal(
                whole["ema"][key], value
            ), key
    assert len(whole["optimizer"]["state"]) == 2

    printed = (folders[1] / "printed").read_text()
    assert printed.count(f"weights of {NAME}, top level of the file") == 1
    assert "loaded     114  conv1.weight, bn1.weight, bn1.bias and 111 more" in printed
    assert (
        "missing      2  fc.weight (head, freshly initialised), fc.bias (head, freshly initialised)"
        in printed
    )
    table = (folders[1] / "run/init_from.txt").read_text()
    assert all(key in table for key in source) and "warning: weights" not in printed
    losses = [
        json.loads(line)["train/loss"]
        for line in (folders[0] / "run/metrics.jsonl").read_text().splitlines()
        if "train/loss" in line
    ]
    assert losses[-1] < losses[0]
