"""The Python interface: train, load, predict and evaluate do what the commands do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dist_utils import run_app
from PIL import Image

import resnet_dist
from resnet_dist import cli
from resnet_dist.distributed import runtime as distributed

SIDE = 8
CHANGES = {
    "data.train_crop_size": SIDE,
    "data.val_resize_size": SIDE + 2,
    "data.val_crop_size": SIDE,
    "train.epochs": 1,
    "train.precision": "fp32",
    "train.ema_decay": 0.9,
    "schedule.warmup_epochs": 0,
    "log.wandb": "disabled",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A short training."""
    place = tmp_path_factory.mktemp("api")
    changes = {"data.data_dir": str(place / "digits"), "output_dir": str(place / "run")}
    config = resnet_dist.Config.from_yaml("quickstart", changes={**CHANGES, **changes})
    assert resnet_dist.train(config) == place / "run"
    return place / "run"


@pytest.fixture(scope="module")
def network(folder):
    return resnet_dist.load(folder)


def images_of(folder, number=12):
    return sorted((folder.parent / "digits/val").glob("*/*.jpg"))[::37][:number]


def test_the_import_is_cheap_and_complete():
    """Nothing heavy is imported before it is used, and every name is there and documented."""
    words = "import sys, resnet_dist; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert dir(resnet_dist) == sorted(resnet_dist.__all__)
    for name in set(resnet_dist.__all__) - {"__version__"}:
        assert len(getattr(resnet_dist, name).__doc__) > 30, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        resnet_dist.nothing  # noqa: B018  an access is the test


@pytest.mark.slow
def test_load_and_transform(folder, network):
    """The transform gives torchvision's values, and the network is in eval mode."""
    from torchvision import transforms

    assert network.class_names == tuple("0123456789")
    assert not network.model.training
    data = network.config.data
    theirs = transforms.Compose(
        [
            transforms.Resize(data.val_resize_size),
            transforms.CenterCrop(data.val_crop_size),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    for path in images_of(folder):
        with Image.open(path) as image:
            wide = image.resize((41, 32))
            for shown in (image, wide):
                ours = network.transform(shown)
                assert ours.shape == (3, SIDE, SIDE)
                assert ours.dtype == torch.float32
                assert (ours - theirs(shown.convert("RGB"))).abs().max() < 1e-6


@pytest.mark.slow
def test_predict_is_the_command_and_the_network(folder, network, tmp_path, capsys):
    """Named classes, with the probabilities of the command line and of the network itself."""
    paths = images_of(folder)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    predictions = resnet_dist.predict(network, [*paths, broken], top=3)
    assert [prediction.path for prediction in predictions] == [str(p) for p in [*paths, broken]]
    assert predictions[-1].problem
    assert predictions[-1].best == ()
    capsys.readouterr()
    words = ["predict", "--checkpoint", str(folder), "--json", "--top", "3", *map(str, paths)]
    assert cli.main(words) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = torch.stack([network.transform(Image.open(path)) for path in paths])
    with torch.inference_mode():
        probabilities = network.model(shown).softmax(1)
    for prediction, command, row in zip(predictions[:-1], said, probabilities, strict=True):
        assert prediction.best == tuple(
            (one["class"], one["probability"]) for one in command["predictions"]
        )
        best = {network.class_names[number]: float(row[number]) for number in range(10)}
        for name, share in prediction.best:
            assert share == pytest.approx(best[name], abs=1e-5)


@pytest.mark.slow
def test_evaluate_is_the_command(folder, network, capsys):
    counts = resnet_dist.evaluate(network)
    again = resnet_dist.evaluate(network, folder.parent / "digits")
    capsys.readouterr()
    assert cli.main(["evaluate", "--checkpoint", str(folder), "--json"]) == 0
    assert counts == again == json.loads(capsys.readouterr().out)["ema"]
    assert counts["num"] == 355


@pytest.mark.slow
def test_calls_follow_each_other_on_two_ranks(folder, tmp_path):
    """Rank 0 serves the store of all calls, however late a rank comes to the next one."""
    config = resnet_dist.Config.from_yaml(
        "quickstart",
        changes={
            **CHANGES,
            "data.data_dir": str(folder.parent / "digits"),
            "output_dir": str(tmp_path / "run"),
            "distributed.timeout_s": 20,
        },
    )

    def calls(arguments):
        rank = int(os.environ["RANK"])
        leave = distributed.leave_ranks
        late = iter([0, 1, 0])

        def leave_late(watchdog):
            leave(watchdog)
            if rank == next(late):
                time.sleep(1)

        distributed.leave_ranks = leave_late
        network = resnet_dist.load(resnet_dist.train(config))
        counts = [resnet_dist.evaluate(network), resnet_dist.evaluate(network)]
        (tmp_path / f"{rank}.json").write_text(json.dumps([network.saved.step, *counts]))
        return 0

    log = tmp_path / "log"
    assert run_app(2, [], str(log), calls, timeout=60) == [0, 0], log.read_text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[1] == first[2]
    assert first[1]["num"] == 355


def test_train_says_how_it_failed(tmp_path):
    """And it leaves no process group, so that the next call can start one."""
    changes = {**CHANGES, "data.kind": "folder", "data.data_dir": str(tmp_path / "none")}
    config = resnet_dist.Config.from_yaml(
        "quickstart", changes={**changes, "output_dir": str(tmp_path / "run")}
    )
    with pytest.raises(RuntimeError, match="exit code 2"):
        resnet_dist.train(config)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_create_model(folder, network):
    """Weights of a run; the classifier stays random if the classes differ in number."""
    path = network.saved.path
    same = resnet_dist.create_model("resnet20", num_classes=10, weights=path)
    other = resnet_dist.create_model("resnet20", num_classes=3, weights=path)
    trained = network.model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(same.state_dict()[name], trained[name]), name
        assert name.startswith("fc.") or torch.equal(tensor, trained[name]), name
    assert same.training
    assert other(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    last = resnet_dist.create_model("resnet18", 7, zero_init_residual=True).layer1[0].bn2
    assert (last.weight == 0).all()
    for wrong in ({"name": "resnet21"}, {"name": "resnet20", "zero_residual": True}):
        with pytest.raises(ValueError, match=r"resnet21|zero_residual"):
            resnet_dist.create_model(**wrong)


def test_config_from_yaml(tmp_path):
    """Later files win over earlier ones, and changes over files; what is wrong is named."""
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 3, global_batch_size: 32}\n")
    config = resnet_dist.Config.from_yaml("quickstart", path, changes={"train.epochs": 5})
    assert config.train.epochs == 5.0
    assert config.train.global_batch_size == 32
    assert config.model.name == "resnet20"
    for changes, words in (
        ({"train.epoch": 5}, "train.epoch"),
        ({"train.epochs": -5}, "train.epochs"),
        ({"train.epochs": "five"}, "train.epochs"),
    ):
        with pytest.raises(ValueError, match=words):
            resnet_dist.Config.from_yaml("quickstart", changes=changes)
    with pytest.raises(ValueError, match="nosuch"):
        resnet_dist.Config.from_yaml("nosuch")


def test_the_package_is_typed():
    assert (Path(resnet_dist.__file__).parent / "py.typed").exists()
