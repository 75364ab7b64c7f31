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


def quickstart(output_dir, data_dir, **more):
    """The quickstart's config, shortened by `CHANGES`; `more` are further changes."""
    changes = {
        **CHANGES,
        "data.data_dir": str(data_dir),
        "output_dir": str(output_dir),
    }
    for name, value in more.items():
        changes[name.replace("__", ".")] = value
    return resnet_dist.Config.from_yaml("quickstart", changes=changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a short training, which has written its data beside it."""
    place = tmp_path_factory.mktemp("api")
    output_dir = place / "run"
    config = quickstart(output_dir, place / "digits")
    assert resnet_dist.train(config) == output_dir
    return output_dir


@pytest.fixture(scope="module")
def network(folder):
    """The network of that training."""
    return resnet_dist.load(folder)


def images_of(folder, number=12):
    """Paths of a few validation images, of all classes."""
    paths = sorted((folder.parent / "digits/val").glob("*/*.jpg"))
    return paths[::37][:number]


def test_the_import_is_cheap_and_complete():
    """Nothing heavy is imported before it is used, and every name is there and documented."""
    program = (
        "import sys, resnet_dist; print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"

    assert dir(resnet_dist) == sorted(resnet_dist.__all__)
    for name in set(resnet_dist.__all__) - {"__version__"}:
        documentation = getattr(resnet_dist, name).__doc__
        assert len(documentation) > 30, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        resnet_dist.nothing  # noqa: B018  an access is the test


@pytest.mark.slow
def test_load_and_transform(folder, network):
    """The transform gives torchvision's values, and the network is in eval mode."""
    from torchvision import transforms

    assert network.class_names == tuple("0123456789")
    assert not network.model.training
    data = network.config.data
    torchvision_transform = transforms.Compose(
        [
            transforms.Resize(data.val_resize_size),
            transforms.CenterCrop(data.val_crop_size),
            transforms.ToTensor(),
            transforms.Normalize(data.mean, data.std),
        ]
    )
    for path in images_of(folder):
        with Image.open(path) as square:
            wide = square.resize((41, 32))
            for image in (square, wide):
                ours = network.transform(image)
                expected = torchvision_transform(image.convert("RGB"))
                assert ours.shape == (3, SIDE, SIDE)
                assert ours.dtype == torch.float32
                difference = (ours - expected).abs().max()
                assert difference < 1e-6


@pytest.mark.slow
def test_predict_is_the_command_and_the_network(folder, network, tmp_path, capsys):
    """Named classes, with the probabilities of the command line and of the network itself."""
    paths = [str(path) for path in images_of(folder)]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    *good, bad = resnet_dist.predict(network, [*paths, broken], top=3)
    assert [prediction.path for prediction in good] == paths
    assert bad.path == str(broken)
    assert bad.problem
    assert bad.best == ()

    capsys.readouterr()
    words = [
        "predict",
        *("--checkpoint", str(folder)),
        "--json",
        *("--top", "3"),
        *paths,
    ]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    images = [network.transform(Image.open(path)) for path in paths]
    with torch.inference_mode():
        logits = network.model(torch.stack(images))
    rows = logits.softmax(1).tolist()

    for prediction, line, row in zip(good, printed, rows, strict=True):
        of_command = []
        for entry in json.loads(line)["predictions"]:
            of_command.append((entry["class"], entry["probability"]))
        assert prediction.best == tuple(of_command)

        of_network = dict(zip(network.class_names, row, strict=True))
        for name, probability in prediction.best:
            assert probability == pytest.approx(of_network[name], abs=1e-5)


@pytest.mark.slow
def test_evaluate_is_the_command(folder, network, capsys):
    """The data of the checkpoint's config, the same data named, and the command."""
    of_config = resnet_dist.evaluate(network)
    of_folder = resnet_dist.evaluate(network, folder.parent / "digits")
    capsys.readouterr()
    assert cli.main(["evaluate", "--checkpoint", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert of_config == of_folder
    assert of_config == printed["ema"]
    assert of_config["num"] == 355


@pytest.mark.slow
def test_calls_follow_each_other_on_two_ranks(folder, tmp_path):
    """Rank 0 serves the store of all calls, however late a rank comes to the next one."""
    config = quickstart(
        output_dir=tmp_path / "run",
        data_dir=folder.parent / "digits",
        distributed__timeout_s=20,
    )

    def train_and_evaluate_twice(arguments):
        rank = int(os.environ["RANK"])
        real_leave_ranks = distributed.leave_ranks
        late_ranks = iter([0, 1, 0])

        def leave_late(watchdog):
            real_leave_ranks(watchdog)
            if rank == next(late_ranks):
                time.sleep(1)

        distributed.leave_ranks = leave_late
        run_folder = resnet_dist.train(config)
        network = resnet_dist.load(run_folder)
        result = {
            "step": network.saved.step,
            "once": resnet_dist.evaluate(network),
            "again": resnet_dist.evaluate(network),
        }
        (tmp_path / f"{rank}.json").write_text(json.dumps(result))
        return 0

    log = tmp_path / "log"
    codes = run_app(2, [], str(log), train_and_evaluate_twice, timeout=60)
    assert codes == [0, 0], log.read_text()
    first = json.loads((tmp_path / "0.json").read_text())
    second = json.loads((tmp_path / "1.json").read_text())
    assert first == second
    assert first["once"] == first["again"]
    assert first["once"]["num"] == 355


def test_train_says_how_it_failed(tmp_path):
    """And it leaves no process group, so that the next call can start one."""
    config = quickstart(
        output_dir=tmp_path / "run",
        data_dir=tmp_path / "none",
        data__kind="folder",
    )
    with pytest.raises(RuntimeError, match="exit code 2"):
        resnet_dist.train(config)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_create_model(folder, network):
    """Weights of a run; the classifier stays random if the classes differ in number."""
    path = network.saved.path
    trained = network.model.state_dict()
    same = resnet_dist.create_model("resnet20", num_classes=10, weights=path)
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert same.training

    fewer_classes = resnet_dist.create_model("resnet20", num_classes=3, weights=path)
    for name, tensor in fewer_classes.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, trained[name]), name
    images = torch.zeros(2, 3, 32, 32)
    assert fewer_classes(images).shape == (2, 3)

    # Settings of the model section are keyword arguments.
    zero_init = resnet_dist.create_model("resnet18", 7, zero_init_residual=True)
    last_scale = zero_init.layer1[0].bn2.weight
    assert (last_scale == 0).all()
    for wrong in (
        {"name": "resnet21"},
        {"name": "resnet20", "zero_residual": True},
    ):
        with pytest.raises(ValueError, match=r"resnet21|zero_residual"):
            resnet_dist.create_model(**wrong)


def test_config_from_yaml(tmp_path):
    """Later files win over earlier ones, and changes over files; what is wrong is named."""
    from_yaml = resnet_dist.Config.from_yaml
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 3, global_batch_size: 32}\n")
    config = from_yaml("quickstart", path, changes={"train.epochs": 5})
    assert config.train.epochs == 5.0
    assert config.train.global_batch_size == 32
    assert config.model.name == "resnet20"

    for changes, words in (
        ({"train.epoch": 5}, "train.epoch"),
        ({"train.epochs": -5}, "train.epochs"),
        ({"train.epochs": "five"}, "train.epochs"),
    ):
        with pytest.raises(ValueError, match=words):
            from_yaml("quickstart", changes=changes)
    with pytest.raises(ValueError, match="nosuch"):
        from_yaml("nosuch")


def test_the_package_is_typed():
    package = Path(resnet_dist.__file__).parent
    assert (package / "py.typed").exists()
