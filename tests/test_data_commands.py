"""`resnet-dist data`: import, download, verify and show, each for real on a small set."""

import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from dist_utils import free_port, run_app
from image_files import OneProcess, encode, picture, train_loader, write_split
from PIL import Image
from scipy.io import savemat
from test_pack import killed
from torchvision.datasets import imagenet

from resnet_dist.cli import main
from resnet_dist.data.sources.scan import build_index

WNIDS = {
    7: "n00000002",
    3: "n00000001",
    12: "n00000003",
}  # by ILSVRC2012_ID, which is in another order
TRAIN = {
    f"{wnid}/{wnid}_{i}.JPEG": encode(picture(40, 50, i))
    for wnid in WNIDS.values()
    for i in range(4)
}
TRUTH = [12, 3, 3, 7, 12]
VAL = {
    f"{WNIDS[key]}/ILSVRC2012_val_{i:08d}.JPEG": encode(picture(50, 40, i))
    for i, key in enumerate(TRUTH, 1)
}


def tar_bytes(files, mode="w"):
    """A tar of {name: bytes or a TarInfo without content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is not member:
                member.size = len(content)
            tar.addfile(member, None if content is member else io.BytesIO(content))
    return buffer.getvalue()


def synsets():
    """meta.mat as the devkit has it: a struct array with the classes and the groups that they are
    in.
    """
    fields = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    rows = [
        (key, wnid, "a word, another", "a gloss", 0, np.empty(0), 0, 4)
        for key, wnid in WNIDS.items()
    ]
    rows.append((1001, "n00009999", "group", "a group", 3, np.array([7, 3, 12]), 1, 0))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=fields)[:, None]})
    return buffer.getvalue()


def publish(monkeypatch, folder):
    """Let the sums of the archives in `folder` be the published ones."""
    published = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, (name, _) in imagenet.ARCHIVE_META.items()
    }
    monkeypatch.setattr(imagenet, "ARCHIVE_META", published)


@pytest.fixture
def archives(tmp_path, monkeypatch):
    folder = tmp_path / "archives"
    folder.mkdir()
    inner = {
        f"{wnid}.tar": tar_bytes(
            {os.path.basename(name): data for name, data in TRAIN.items() if wnid in name}
        )
        for wnid in WNIDS.values()
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    shuffled = sorted(VAL, key=lambda name: hashlib.md5(name.encode()).digest())
    (folder / "ILSVRC2012_img_val.tar").write_bytes(
        tar_bytes({os.path.basename(name): VAL[name] for name in shuffled})
    )
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(
        tar_bytes(
            {
                "ILSVRC2012_devkit_t12/data/meta.mat": synsets(),
                "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(
                    map(str, TRUTH)
                ).encode(),
            },
            "w:gz",
        )
    )
    publish(monkeypatch, folder)
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def run_import(archives, out, *options):
    return main(["data", "import-imagenet", str(archives), str(out), *options])


def test_import_to_folders_goes_on_after_a_kill(archives, tmp_path):
    expected = {
        f"{split}/{name}": data
        for split, files in (("train", TRAIN), ("val", VAL))
        for name, data in files.items()
    }
    lines = [f"{wnid}\ta word, another\n" for wnid in WNIDS.values()]
    expected["class_words.tsv"] = "".join(lines).encode()
    # The record of the checked archives is written three times, with three calls each.
    killed(run_import, 9 + 6, archives, tmp_path / "out")
    half = contents(tmp_path / "out")
    assert len(half) == 5
    assert half.items() <= expected.items()
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in half}
    assert run_import(archives, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == expected
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_import_to_shards_is_the_import_packed(archives, tmp_path):
    assert run_import(archives, tmp_path / "folders") == 0
    assert main(["data", "pack", str(tmp_path / "folders"), str(tmp_path / "packed")]) == 0
    assert run_import(archives, tmp_path / "shards", "--shards", "--workers", "1") == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "packed")
    assert set(contents(tmp_path / "shards")) == {
        f"{split}/{file}"
        for split in ("train", "val")
        for file in (
            "index.bin",
            "shards.json",
            f"{split}-000000.tar",
            f"{split}-000000.tar.idx",
        )
    } | {"class_words.tsv"}


def test_archives_of_another_content_are_refused(archives, tmp_path, capsys):
    """By their MD5 sums, which are computed once for each file."""
    val = archives / "ILSVRC2012_img_val.tar"
    good = val.read_bytes()
    place = good.index(VAL[f"{WNIDS[12]}/ILSVRC2012_val_00000001.JPEG"][-40:])
    val.write_bytes(good[:place] + b"x" + good[place + 1 :])
    assert run_import(archives, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "val.tar is not the published file: its MD5 sum is not" in said
    assert "--skip_checksums" in said
    assert not contents(tmp_path / "out")
    checked = json.loads((tmp_path / "out/.archives.json").read_text())
    assert [name for name, *_ in checked] == ["ILSVRC2012_img_train.tar"]
    assert run_import(archives, tmp_path / "other", "--skip_checksums") == 0
    val.write_bytes(good)
    assert run_import(archives, tmp_path / "out") == 0
    assert len(json.loads((tmp_path / "out/.archives.json").read_text())) == 3


def test_no_bar_is_drawn_into_a_pipe(archives, tmp_path, capsys):
    assert run_import(archives, tmp_path / "out") == 0
    assert capsys.readouterr().err == ""


def test_home_and_variables_in_paths(archives, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert run_import("~/archives", "$PLACE/out") == 0
    assert main(["data", "pack", "~/out", "~/packed"]) == 0
    assert (tmp_path / "packed/train/index.bin").exists()
    capsys.readouterr()
    assert main(["data", "pack", "/no/such/folder", "~/x"]) == 2
    said = capsys.readouterr().err
    assert said.count("/no/such/folder") == 1
    assert "data.data_dir '/no/such/folder' does not exist here: name" in said


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


@pytest.mark.parametrize(
    "evil",
    [
        {"../n1_0.JPEG": b"x"},
        {"/tmp/n1_0.JPEG": b"x"},
        {"a/n1_0.JPEG": b"x"},
        {"..": b"x"},
        {".hidden.JPEG": b"x"},
        {"link.JPEG": special("link.JPEG", tarfile.SYMTYPE, "/etc/passwd")},
        {"hard.JPEG": special("hard.JPEG", tarfile.LNKTYPE, "n1_0.JPEG")},
        {"device.JPEG": special("device.JPEG", tarfile.CHRTYPE)},
        {"folder": special("folder", tarfile.DIRTYPE)},
    ],
    ids=lambda evil: next(iter(evil)),
)
@pytest.mark.parametrize("where", ["train", "inner", "val"])
def test_no_member_leaves_the_target(archives, tmp_path, capsys, evil, where):
    inner = {f"{wnid}.tar": tar_bytes(evil if where == "inner" else {}) for wnid in WNIDS.values()}
    if where != "val":
        (archives / "ILSVRC2012_img_train.tar").write_bytes(
            tar_bytes(evil if where == "train" else inner)
        )
    else:
        (archives / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(evil))
    assert run_import(archives, tmp_path / "out") == 2
    assert f"{next(iter(evil))!r} is refused" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_archives_that_are_not_whole_are_refused(archives, tmp_path, capsys, monkeypatch):
    train = archives / "ILSVRC2012_img_train.tar"
    devkit = archives / "ILSVRC2012_devkit_t12.tar.gz"
    whole = train.read_bytes()
    damaged = bytearray(whole)
    second = whole.index(b"n00000002_1.JPEG")
    damaged[second : second + 8] = b"\xff" * 8
    for bad, said in (
        (whole[: len(whole) // 2], "cut off"),
        (bytes(damaged), "lacks its end marker"),
        (tar_bytes({}), "lacks n0000000"),
        (b"<html>", "damaged"),
    ):
        train.write_bytes(bad)
        assert run_import(archives, tmp_path / "out") == 2
        assert said in capsys.readouterr().err
    good = devkit.read_bytes()
    devkit.write_bytes(good[: len(good) // 2])
    assert run_import(archives, tmp_path / "out") == 2
    assert "is damaged, or not the devkit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert run_import(archives, tmp_path / "out") == 2
    assert "pip install scipy" in capsys.readouterr().err
    devkit.unlink()
    assert run_import(archives, tmp_path / "out") == 2
    assert "ILSVRC2012_devkit_t12.tar.gz: get them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def web(tmp_path):
    """A server of tmp_path/web on loopback: its address."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "web"))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def md5(data):
    return hashlib.md5(data).hexdigest()


def mat(**arrays):
    buffer = io.BytesIO()
    savemat(buffer, arrays)
    return buffer.getvalue()


def test_download_cifar10(tmp_path, web, monkeypatch, capsys):
    from torchvision.datasets import CIFAR10

    pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), np.uint8)
    names = {
        "a": pickle.dumps({"data": pixels[:4], "labels": [1, 0, 1, 1]}),
        "meta": pickle.dumps({"label_names": ["airplane", "bird"]}),
        "t": pickle.dumps({"data": pixels[4:], "labels": [0, 1]}),
    }
    archive = tar_bytes(
        {f"cifar-10-batches-py/{name}": data for name, data in names.items()}, "w:gz"
    )
    (tmp_path / "web/cifar-10-python.tar.gz").write_bytes(archive)
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{free_port()}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(CIFAR10, "train_list", [["a", md5(names["a"])]])
    monkeypatch.setattr(CIFAR10, "test_list", [["t", md5(names["t"])]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": md5(names["meta"])}
    )
    assert main(["data", "download", "cifar10", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [
        line for line in errors if line.startswith("error: cifar10 cannot be downloaded: ")
    ] == errors[-1:]
    monkeypatch.setattr(CIFAR10, "url", f"{web}cifar-10-python.tar.gz")
    assert main(["data", "download", "cifar10", str(tmp_path / "out")]) == 0
    found = contents(tmp_path / "out")
    assert set(found) == {
        "train/bird/00000.png",
        "train/airplane/00001.png",
        "train/bird/00002.png",
        "train/bird/00003.png",
        "val/airplane/00000.png",
        "val/bird/00001.png",
    }
    image = np.asarray(Image.open(tmp_path / "out/train/bird/00002.png"))
    assert np.array_equal(image, pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert not (tmp_path / "out/.download").exists()
    assert main(["data", "download", "cifar10", str(tmp_path / "out")]) == 2
    assert "has a train/ already" in capsys.readouterr().err
    assert main(["data", "download", "mnist", str(tmp_path / "other")]) == 2


def test_download_imagenette_and_flowers(tmp_path, web, monkeypatch):
    from torchvision.datasets import Flowers102, Imagenette

    files = {
        f"{split}/n01440764/{i}.JPEG": encode(picture(20, 20, i))
        for i, split in enumerate(("train", "val"))
    }
    archive = tar_bytes({f"imagenette2-160/{name}": data for name, data in files.items()}, "w:gz")
    (tmp_path / "web/imagenette2-160.tgz").write_bytes(archive)
    monkeypatch.setattr(
        Imagenette, "_ARCHIVES", {"160px": (f"{web}imagenette2-160.tgz", md5(archive))}
    )
    (tmp_path / "nette/.download/imagenette2-160/train/n01440764").mkdir(
        parents=True
    )  # of a run that was killed
    assert main(["data", "download", "imagenette", str(tmp_path / "nette"), "--size", "160px"]) == 0
    assert contents(tmp_path / "nette") == files

    images = {f"jpg/image_{i:05d}.jpg": encode(picture(20, 20, i)) for i in range(1, 7)}
    served = {
        "102flowers.tgz": tar_bytes(images, "w:gz"),
        "imagelabels.mat": mat(labels=[2, 1, 100, 2, 1, 3]),
        "setid.mat": mat(trnid=[3, 1], valid=[2, 6], tstid=[4, 5]),
    }
    for name, data in served.items():
        (tmp_path / "web" / name).write_bytes(data)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", web)
    monkeypatch.setattr(
        Flowers102,
        "_file_dict",
        {
            key: (name, md5(data))
            for key, (name, data) in zip(("image", "label", "setid"), served.items(), strict=True)
        },
    )
    assert main(["data", "download", "flowers102", str(tmp_path / "flowers")]) == 0
    folders = {
        3: "train/100_blanket_flower",
        1: "train/002_hard_leaved_pocket_orchid",
        2: "train/001_pink_primrose",
        6: "train/003_canterbury_bells",
        4: "val/002_hard_leaved_pocket_orchid",
        5: "val/001_pink_primrose",
    }
    assert contents(tmp_path / "flowers") == {
        f"{folder}/image_{i:05d}.jpg": images[f"jpg/image_{i:05d}.jpg"]
        for i, folder in folders.items()
    }


BAD = {
    "cut.jpg": encode(picture(60, 60, 1))[:900],
    "empty.jpg": b"",
    "text.jpg": b"not an image at all",
}
ODD = {
    "cmyk.jpg": ("cmyk", encode(picture(60, 60, 2).convert("CMYK"))),
    "grey.jpg": ("grayscale", encode(picture(60, 60, 3).convert("L"))),
    "turned.jpg": ("rotated", None),
    "tiny.jpg": ("tiny", encode(picture(20, 60, 5))),
    "png.jpg": ("not_jpeg", encode(picture(60, 60, 6), "PNG")),
    "deep.png": ("disagreement", None),
    "twin.jpg": ("duplicate", encode(picture(60, 60, 100))),
}


@pytest.fixture
def odd_set(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((np.arange(3600, dtype=np.uint16) * 18).reshape(60, 60))
    files = (
        {name: data for name, (_, data) in ODD.items()}
        | BAD
        | {
            "turned.jpg": encode(picture(60, 60, 4), exif=exif),
            "deep.png": encode(deep, "PNG"),
            **{f"good{i}.jpg": encode(picture(60, 60, 100 + i)) for i in range(4)},
        }
    )
    for name, data in files.items():
        path = tmp_path / "set/train/a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "set/val/a").mkdir(parents=True)
    (tmp_path / "set/val/a/v.jpg").write_bytes(encode(picture(60, 60, 101)))
    return tmp_path / "set"


def verify(folder, report, *options):
    code = main(["data", "verify", str(folder), "--report", str(report), *options])
    return code, json.loads(report.read_text())


@pytest.mark.parametrize("form", ["folders", "shards"])
def test_verify(odd_set, tmp_path, form, capsys):
    folder = odd_set
    if form == "shards":
        folder = tmp_path / "shards"
        assert main(["data", "pack", str(odd_set), str(folder)]) == 0
    exclude = tmp_path / "exclude.txt"
    code, report = verify(
        folder, tmp_path / "report.json", "--write_exclude", str(exclude), "--workers", "2"
    )
    assert code == 1
    assert report["images"] == 15
    assert [name for name, _ in report["broken"]] == [f"train/a/{name}" for name in sorted(BAD)]
    for name, (kind, _) in ODD.items():
        assert f"train/a/{name}" in [found for found, _ in report[kind]], kind
    assert report["duplicate"] == [
        ["train/a/good1.jpg", "as val/a/v.jpg"],
        ["train/a/twin.jpg", "as train/a/good0.jpg"],
    ]
    assert [name for name, _ in report["disagreement"]] == ["train/a/deep.png"]
    assert "3 broken\n  train/a/cut.jpg: " in capsys.readouterr().out
    assert "  train/a/tiny.jpg: 60 x 20\n" in (tmp_path / "report.txt").read_text()
    assert exclude.read_text().splitlines() == [f"train/a/{name}" for name in sorted(BAD)]
    assert len(build_index(str(folder), "train", OneProcess(), str(exclude))) == 11
    verify(
        folder, tmp_path / "report.json", "--write_exclude", str(exclude), "--exclude_duplicates"
    )
    left_out = sorted([*BAD, "good1.jpg", "twin.jpg"])
    assert exclude.read_text().splitlines() == [f"train/a/{name}" for name in left_out]


def test_verify_survives_what_kills_a_batch(tmp_path):
    """A file with whole markers and a body that DALI refuses; what comes after it is examined all
    the same.
    """
    good = encode(picture(64, 64, 1), "PNG")
    body = good.index(b"IDAT") + 4
    write_split(
        tmp_path,
        [
            encode(picture(50, 50, 0)),
            good[: body + 20] + b"\xff" * 40 + good[body + 60 :],
            encode(picture(50, 50, 2)),
            encode(picture(50, 50, 3).convert("L")),
        ],
        classes=1,
    )
    code, report = verify(tmp_path, tmp_path / "report.json", "--workers", "1")
    assert code == 1
    assert [entry[0] for entry in report["broken"]] == ["train/class0/0001.jpg"]
    assert [entry[0] for entry in report["grayscale"]] == ["train/class0/0003.jpg"]


def test_verify_names_the_images_that_the_decoder_warns_about(tmp_path, capfd):
    files = [encode(picture(60, 60, number)) for number in range(140)]
    for row in (3, 70, 139):
        files[row] = files[row][:-400] + files[row][-2:]
    write_split(tmp_path, files, classes=1)
    _, report = verify(tmp_path, tmp_path / "report.json", "--workers", "2")
    assert [name for name, _ in report["warned"]] == [
        f"train/class0/{row:04d}.jpg" for row in (3, 70, 139)
    ]
    assert all("Corrupt JPEG data" in text for _, text in report["warned"])
    said = capfd.readouterr()
    assert "Corrupt JPEG" not in said.err
    assert said.out.count("Corrupt JPEG") == 3


def test_verify_of_a_clean_set_and_of_none(tmp_path, capsys):
    write_split(tmp_path, [encode(picture(50, 50, i)) for i in range(3)], classes=1)
    code, report = verify(tmp_path, tmp_path / "report.json")
    assert code == 0
    assert not any(report[kind] for kind in ("broken", "disagreement", "duplicate"))
    assert main(["data", "verify", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_show_has_the_pixels_of_training(tmp_path):
    index = write_split(tmp_path, [encode(picture(60, 90, i)) for i in range(5)])
    write_split(tmp_path, [encode(picture(60, 90, i)) for i in range(3)], split="val")
    out = tmp_path / "sheet.png"
    log = tmp_path / "log"
    codes = run_app(
        1,
        [
            "data",
            "show",
            "--seed",
            "5",
            "--data.data_dir",
            str(tmp_path),
            "--data.train_crop_size",
            "32",
            "--data.val_resize_size",
            "64",
            "--data.val_crop_size",
            "48",
            "--distributed.device",
            "cpu",
            "--augment.repeats",
            "2",
            "--images",
            "2",
            "--epochs",
            "3",
            "--out",
            str(out),
        ],
        str(log),
    )
    assert codes == [0], log.read_text()
    # the largest tile three times, so that it has 128 pixels
    sheet = np.asarray(Image.open(out))
    side = 3 * 48
    assert sheet.shape == (2 * (side + 42) + 6, 4 * (side + 6) + 6, 3)
    loader = train_loader(index, tmp_path, global_batch_size=1)
    mean = torch.tensor(loader.config.mean)
    std = torch.tensor(loader.config.std)
    for step, batch in enumerate(loader.batches(0, 3 * 5)):  # three epochs, image by image
        row = {0: 0, 4: 1}.get(int(batch.indices[0]))
        column = step // 5
        if row is not None:
            top = 6 + row * (side + 42) + 18
            left = 6 + column * (side + 6)
            tile = sheet[top : top + 96 : 3, left : left + 96 : 3]
            pixels = (batch.images[0].permute(1, 2, 0) * std + mean) * 255
            assert np.array_equal(tile, pixels.round().byte().numpy())
    loader.close()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from resnet_dist.cli import main\n"
        "try: main(['data', 'pack', '--help'])\nexcept SystemExit: "
        "print(sorted({'torch', 'numpy', 'PIL', 'scipy', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--shard_mb" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "a", "b", "--resize", "-1"],
        ["pack", "nowhere", "b"],
        ["verify", "nowhere", "--workers", "0"],
        ["import-imagenet", "nowhere", "b"],
    ],
)
def test_mistakes_are_a_sentence(arguments, capsys):
    assert main(["data", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
