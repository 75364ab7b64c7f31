"""The benchmark runs and reports what it measured."""

import json
import multiprocessing
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from dist_utils import run_app, run_command
from image_files import OneProcess, encode, pack_shards, picture, write_split

from resnet_dist import cli
from resnet_dist.commands.benchmark_places import open_places
from resnet_dist.commands.rival_file import build_rivals
from resnet_dist.config import Config, DataConfig, TrainConfig
from resnet_dist.data.pixels.read import READ_THREADS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RIVALS = str(BENCHMARKS / "rivals.py")
PLACES = str(BENCHMARKS / "places.py")


def jpegs(count):
    """Files of different pictures."""
    return [encode(picture(60, 80, seed)) for seed in range(count)]


def run_one(arguments, output, entry=None):
    """What a command on one rank prints, which must succeed."""
    codes = run_app(1, arguments, str(output), entry)
    printed = output.read_text()
    assert codes == [0], printed
    return printed


@pytest.mark.slow
def test_benchmark_of_the_loop(tmp_path):
    output = tmp_path / "printed"
    arguments = [
        "benchmark",
        "--json",
        "--windows",
        "1",
        "--steps",
        "4",
        "--model.name",
        "resnet20",
        "--data.kind",
        "synthetic",
        "--data.train_crop_size",
        "16",
        "--train.global_batch_size",
        "8",
        "--train.precision",
        "fp32",
        "--output_dir",
        str(tmp_path),
        "--distributed.threads",
        "1",
    ]
    codes = run_app(2, arguments, str(output))
    assert codes == [0, 0], output.read_text()
    last_line = output.read_text().splitlines()[-1]
    result = json.loads(last_line)
    assert result["ranks"] == 2
    assert result["local_batch_size"] == 4
    assert result["whole_images_per_second"] > 0
    assert result["bare_images_per_second"] > 0
    assert result["cpu_ratio"] > 0
    assert 0 < result["mfu"] < 1
    assert result["memory_share"] > 0
    assert result["joules_per_image"] is None
    assert result["host_ms_per_step"] is None
    ratio = result["whole_images_per_second"] / result["bare_images_per_second"]
    assert result["ratio"] == ratio


RIVAL_FILE = """
def theirs(folder, config, local_batch_size, threads):
    return lambda start, stop: iter([sum(range(10**5))] * (stop - start))

def other(*_):
    raise ImportError("it is not there")

RIVALS = {"theirs": theirs, "other": other}
"""


@pytest.mark.slow
def test_benchmark_of_the_loader(tmp_path):
    """Every contender makes the same number of images; the workers' processor time is counted."""
    write_split(tmp_path / "data", jpegs(12))
    output = tmp_path / "printed"
    arguments = [
        "benchmark",
        "loader",
        "--json",
        "--windows",
        "2",
        "--images",
        "30",
        "--read_delay_ms",
        "20",
        "--data.data_dir",
        str(tmp_path / "data"),
        "--originals",
        str(tmp_path / "data"),
        "--data.train_crop_size",
        "32",
        "--data.threads",
        "1",
        "--train.global_batch_size",
        "8",
        "--output_dir",
        str(tmp_path),
        "--distributed.threads",
        "1",
    ]

    def entry(arguments):
        # It has workers of its own.
        process = multiprocessing.current_process()
        process._config["daemon"] = False
        return cli.main(arguments)

    printed = run_one(arguments, output, entry)
    result = json.loads(printed.splitlines()[-1])
    assert result["images"] == 24
    assert result["threads"] == 1
    assert result["device"] == "cpu"
    loaders = result["loaders"]
    assert set(loaders) == {
        "resnet_dist",
        "slow storage",
        "plain DALI",
        "torchvision",
        "plan and reading",
        "memory cache",
    }
    for name, figures in loaders.items():
        assert len(result["turns"][name]) == 2
        assert min(figures.values()) > 0
    assert loaders["resnet_dist"]["cpu_ratio"] == loaders["resnet_dist"]["ratio"] == 1
    # Each thread waits 20 ms for a file.
    most_files_per_second = READ_THREADS / 0.02
    assert loaders["slow storage"]["images_per_second"] < most_files_per_second
    host_work = result["host_work_us_per_image"]
    assert set(host_work) == {"plan", "lookup", "header", "geometry", "feeding"}
    assert min(host_work.values()) > 0
    arguments.remove("--json")
    rivals = tmp_path / "rivals.py"
    rivals.write_text(RIVAL_FILE)
    arguments += ["--rivals", str(rivals)]
    printed = run_one(arguments, output, entry)
    *_, rival, last_loader, work, remark = printed.splitlines()
    assert re.match(r"theirs +\d", rival)
    assert re.match(r"Python work for a GPU: \d+\.\d us an image \(plan \d", work)
    assert last_loader.startswith("memory cache")
    assert "without other: it is not there" in printed.splitlines()
    assert re.match(r"training cache: 12 images, \d+\.\d MiB, decoded in ", remark)


@pytest.mark.long
def test_loaders_with_a_format_of_their_own(tmp_path):
    """Each gives all images of an epoch with their labels, and begins anew for more."""
    write_split(tmp_path, jpegs(12))
    labels_of_an_epoch = [0] * 4 + [1] * 4 + [2] * 4
    text = f"{RIVALS}:webdataset,litdata"
    config = DataConfig(train_crop_size=32)
    rivals = build_rivals(text, str(tmp_path / "train"), config, 4, 1)
    assert list(rivals.makers) == ["webdataset", "litdata"]
    for name, batches in rivals.makers.items():
        labels = []
        for images, classes in batches(0, 6):
            assert tuple(images.shape) == (4, 3, 32, 32), name
            labels += [int(label) for label in classes]
        first_epoch = sorted(labels[:12])
        second_epoch = sorted(labels[12:])
        assert first_epoch == labels_of_an_epoch, name
        assert second_epoch == labels_of_an_epoch, name


def test_rivals_that_cannot_be_used(tmp_path, monkeypatch):
    """Those that are not installed are left out; what was asked for by name is an error."""
    write_split(tmp_path, jpegs(3))
    folder = str(tmp_path / "train")
    empty = tmp_path / "empty.py"
    empty.write_text("")
    text_file = tmp_path / "notes.txt"
    text_file.write_text("webdataset, of course")
    for name in ("ffcv", "webdataset", "litdata", "streaming"):
        monkeypatch.setitem(sys.modules, name, None)
    rivals = build_rivals(RIVALS, folder, DataConfig(), 4, 1)
    assert rivals.makers == {}
    assert set(rivals.left_out) == {"ffcv", "webdataset", "litdata", "mosaicml"}
    cases = (
        (f"{RIVALS}:other", "has ffcv, webdataset, litdata, mosaicml"),
        (f"{RIVALS}:mosaicml", "mosaicml cannot be imported"),
        (str(empty), "does not define RIVALS"),
        (str(text_file), "is not valid Python"),
        (str(tmp_path), "is no file"),
    )
    for text, words in cases:
        with pytest.raises(ValueError, match=words):
            build_rivals(text, folder, DataConfig(), 4, 1)


def write_parquet(folder, files, labels):
    """Images of three classes in one file of a training set, in row groups of five rows."""
    folder.mkdir()
    images = [{"bytes": data, "path": None} for data in files]
    class_label = {"_type": "ClassLabel", "names": ["class0", "class1", "class2"]}
    info = {"info": {"features": {"label": class_label}}}
    table = pyarrow.table({"image": images, "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path = folder / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=5)


def test_our_loader_on_other_roots(tmp_path):
    """Shards are read as in training, with the samples of the folder; parquet files in order."""
    files = jpegs(12)
    index = write_split(tmp_path / "folder", files)
    shards = tmp_path / "shards"
    pack_shards(index, shards / "train", range(12), shards=2)
    parquet = tmp_path / "parquet"
    labels_in_order = index.labels_of(np.arange(12))
    write_parquet(parquet, files, labels_in_order.tolist())
    data = DataConfig(
        data_dir=str(tmp_path / "folder"),
        train_crop_size=32,
        val_resize_size=36,
        val_crop_size=32,
    )
    train = TrainConfig(global_batch_size=8, precision="fp32")
    config = Config(data=data, train=train, output_dir=str(tmp_path))

    of_parquet = f"evaluation, {parquet}"
    with ExitStack() as opened:
        makers = open_places(config, OneProcess(), f"{shards}, {parquet}", opened)
        assert list(makers) == [str(shards), "evaluation", of_parquet]
        for name, make in makers.items():
            batches = list(make(1, 3))
            rows = np.concatenate([batch.indices for batch in batches])
            labels = np.concatenate([batch.labels.numpy() for batch in batches])
            assert np.array_equal(labels, labels_in_order[rows]), name
            if name != str(shards):
                # After the last of the twelve images comes the first one again.
                last_rows = [8, 9, 10, 11]
                assert rows.tolist() == [*last_rows, *range(12)], name


def test_a_root_that_cannot_be_measured(tmp_path):
    """The error names the option and the root."""
    config = Config(output_dir=str(tmp_path))
    missing = tmp_path / "missing"
    with ExitStack() as opened, pytest.raises(ValueError, match=f"^--also {missing}: .*missing"):
        open_places(config, OneProcess(), str(missing), opened)


@pytest.mark.long
def test_loader_by_the_place_of_the_data(tmp_path):
    """One command measures folder, shards, a store that is late, parquet and the cache."""
    write_split(tmp_path / "data", jpegs(12))
    command = [sys.executable, PLACES, str(tmp_path / "data")]
    command += ["--json", "--windows", "1", "--images", "16", "--output_dir", str(tmp_path)]
    command += ["--data.train_crop_size", "32", "--train.global_batch_size", "8"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    own, shards, store, evaluation, parquet, *others = result["loaders"]
    assert (own, store, evaluation) == (
        "resnet_dist",
        "s3://photographs/shards",
        "evaluation",
    )
    assert shards.endswith("/shards")
    assert parquet.endswith("/parquet")
    assert others == ["plain DALI", "plan and reading", "torchvision", "memory cache"]


@pytest.mark.slow
def test_benchmark_of_the_loader_needs_files_and_one_process(tmp_path):
    write_split(tmp_path, jpegs(12))
    write_parquet(tmp_path / "parquet", [], [])
    folder = ["--data.data_dir", str(tmp_path), "--train.global_batch_size", "6"]
    parquet = ["--data.data_dir", str(tmp_path / "parquet")]
    store = ["--data.data_dir", "s3://bucket/set"]
    cases = (
        (1, ["--data.kind", "synthetic"], "--data.kind folder"),
        (2, folder, "without torchrun"),
        (1, [*folder, "--images", "11"], "Give it --images 12 or more"),
        (1, [*folder, "--originals", str(tmp_path / "class0")], "class0 has no class folders"),
        (1, parquet, "cannot be read in random order"),
        (1, store, "s3://bucket/set has no class folders in train/, which the other loaders read"),
    )
    command = ["benchmark", "loader", "--output_dir", tmp_path]
    for world_size, more, message in cases:
        code, printed = run_command(tmp_path, [*command, *more], world_size)
        assert code == 2, printed
        assert message in printed


SMALL = [
    "--windows",
    "1",
    "--steps",
    "2",
    "--data.kind",
    "synthetic",
    "--data.train_crop_size",
    "8",
    "--train.global_batch_size",
    "8",
    "--model.name",
    "resnet20",
    "--train.precision",
    "fp32",
]


@pytest.mark.slow
def test_profile_of_a_step(tmp_path):
    folder = tmp_path / "profile"
    arguments = ["benchmark", "--profile", str(folder)]
    arguments += [*SMALL, "--output_dir", str(tmp_path)]
    printed = run_one(arguments, tmp_path / "printed")
    names = {path.name for path in folder.iterdir()}
    assert names == {"trace.json", "kernels.txt", "kernels.json", "kernels.png"}
    kernels = json.loads((folder / "kernels.json").read_text())
    rows = {row["name"]: row for row in kernels["kinds"]}
    # 19 convolutions forward and as many backward, of which each has up to two operators.
    assert 38 <= rows["convolution"]["count"] <= 5 * 38
    assert rows["communication"]["count"] > 0
    assert (folder / "kernels.txt").read_text() in printed


@pytest.mark.slow
def test_price_of_determinism(tmp_path):
    """On the CPU both modes are the same, and trainings repeat bit for bit."""
    arguments = ["benchmark", "--determinism", "--json"]
    arguments += [*SMALL, "--output_dir", str(tmp_path)]
    printed = run_one(arguments, tmp_path / "printed")
    result = json.loads(printed.splitlines()[-1])
    assert result["equal_weights"] == {"default": True, "deterministic": True}
    speeds = result["images_per_second"]
    share = speeds["deterministic"] / speeds["default"]
    assert result["price"] == 1 - share


@pytest.mark.slow
def test_table_of_networks(tmp_path):
    """A network that cannot be trained is a row with its error."""
    stem = tmp_path / "table"
    arguments = ["benchmark", "--models", "resnet20, lenet5", "--precisions", "fp32"]
    arguments += ["--out", str(stem), *SMALL, "--output_dir", str(tmp_path)]
    printed = run_one(arguments, tmp_path / "printed")
    rows = json.loads(stem.with_suffix(".json").read_text())["rows"]
    good, bad = rows
    assert good["variant"]["network"] == "resnet20"
    assert bad["variant"]["network"] == "lenet5"
    assert good["variant"]["precision"] == "fp32"
    assert bad["variant"]["precision"] == "fp32"
    assert good["images_per_second"] > 0
    assert good["mfu"] > 0
    assert not good["error"]
    # LeNet's second convolution has no pixels left of images of 8.
    assert "Kernel size" in bad["error"]
    table = stem.with_suffix(".md").read_text()
    assert table in printed
    assert len(table.splitlines()) == 4


@pytest.mark.slow
def test_one_benchmark_at_a_time(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["benchmark", "loader", "--determinism"])
    assert end.value.code == 2
    assert "determinism and loader are separate benchmarks" in capsys.readouterr().err
    output = tmp_path / "printed"
    arguments = ["benchmark", "--models", "resnet20", "--precisions", "fp8", *SMALL]
    arguments += ["--output_dir", str(tmp_path)]
    assert run_app(1, arguments, str(output)) == [2]
    assert "--precisions has fp8: take fp32, bf16, fp16" in output.read_text()
