"""`data import-tiny-imagenet` and `data import-cifar10`: to the folders that training reads."""

import hashlib
import io
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from image_files import encode, picture
from PIL import Image
from test_data_commands import contents, tar_bytes
from test_pack import killed

from resnet_dist.cli import main
from resnet_dist.models.class_names import words_of

WNIDS = ("n01443537", "n01629819")
TINY = {
    **{
        f"train/{wnid}/images/{wnid}_{i}.JPEG": encode(picture(64, 64, i))
        for wnid in WNIDS
        for i in range(3)
    },
    **{
        f"train/{wnid}/{wnid}_boxes.txt": "".join(
            f"{wnid}_{i}.JPEG\t0\t10\t63\t58\n" for i in range(3)
        ).encode()
        for wnid in WNIDS
    },
    **{f"val/images/val_{i}.JPEG": encode(picture(64, 64, 10 + i)) for i in range(4)},
    "val/val_annotations.txt": "".join(
        f"val_{i}.JPEG\t{WNIDS[i % 2]}\t0\t32\t44\t62\n" for i in range(4)
    ).encode(),
    "test/images/test_0.JPEG": encode(picture(64, 64, 20)),
    "wnids.txt": "\n".join(reversed(WNIDS)).encode(),
    "words.txt": (
        b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\n"
        b"n01629819\tEuropean fire salamander, Salamandra salamandra\n"
    ),
}
EXPECTED = {
    **{
        f"train/{wnid}/{wnid}_{i}.JPEG": TINY[f"train/{wnid}/images/{wnid}_{i}.JPEG"]
        for wnid in WNIDS
        for i in range(3)
    },
    **{f"val/{WNIDS[i % 2]}/val_{i}.JPEG": TINY[f"val/images/val_{i}.JPEG"] for i in range(4)},
    "class_words.tsv": TINY["words.txt"].partition(b"\n")[2],
}


def write_tree(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", data)
    return path


def import_tiny(source, out):
    return main(["data", "import-tiny-imagenet", str(source), str(out)])


def test_tiny_imagenet_from_a_folder_and_from_the_zip_file(tmp_path):
    folder = write_tree(tmp_path / "unpacked" / "tiny-imagenet-200", TINY)
    archive = write_zip(tmp_path / "tiny.zip", TINY)
    for number, source in enumerate((folder, folder.parent, archive)):
        out = tmp_path / str(number)
        assert import_tiny(source, out) == 0
        assert contents(out) == EXPECTED
    assert words_of(WNIDS, str(out))[0] == "goldfish, Carassius auratus"


def test_an_interrupted_import_goes_on(tmp_path):
    archive = write_zip(tmp_path / "tiny.zip", TINY)
    out = tmp_path / "out"
    killed(import_tiny, 7, archive, out)
    half = contents(out)
    assert 0 < len(half) < len(EXPECTED)
    assert half.items() <= EXPECTED.items()
    times = {name: (out / name).stat().st_mtime_ns for name in half}
    # What a crash of the machine may leave.
    (out / "val" / WNIDS[0]).mkdir(parents=True, exist_ok=True)
    (out / "val" / WNIDS[0] / "val_0.JPEG").touch()
    for _ in range(2):
        assert import_tiny(archive, out) == 0
        assert contents(out) == EXPECTED
    assert {name: (out / name).stat().st_mtime_ns for name in half} == times


def without(*names):
    return {name: data for name, data in TINY.items() if not name.startswith(names)}


LINES = TINY["val/val_annotations.txt"]
BROKEN_SETS = {
    "has no val/val_annotations.txt": without("val/val_annotations.txt"),
    "no training images in train/<wnid>/images/": without("train"),
    "the class train/n01443537 has no images": without("train/n01443537/images"),
    "train/n01629819/images/n01629819_1.JPEG is missing, which": without(
        "train/n01629819/images/n01629819_1"
    ),
    "line 3: val/images/ has no image 'val_2.JPEG'": without("val/images/val_2"),
    "line 1: 'n1' is no class": TINY | {"val/val_annotations.txt": b"val_0.JPEG\tn1\t0\n" + LINES},
    "line 2: '' is no class": TINY | {"val/val_annotations.txt": LINES[:32] + b"val_1.JPEG\n"},
    "line 5: val/images/ has no image 'val_0": TINY | {"val/val_annotations.txt": LINES + LINES},
    "has no line for val/images/extra.JPEG": TINY | {"val/images/extra.JPEG": b"x"},
    "is not text": TINY | {"words.txt": b"\xff\xfe"},
}


def test_what_is_wrong_with_tiny_imagenet_is_one_sentence(tmp_path, capsys):
    """And nothing is written."""
    failures = []
    out = tmp_path / "out"
    for number, (said, files) in enumerate(BROKEN_SETS.items()):
        folder = write_tree(tmp_path / f"set{number}", files)
        code = import_tiny(folder, out)
        lines = capsys.readouterr().err.splitlines()
        if code != 2 or len(lines) != 1 or said not in lines[0] or out.exists():
            failures.append((said, code, lines))
    assert failures == []


def test_other_folders_and_damaged_zip_files(tmp_path, capsys):
    folder = write_tree(tmp_path / "set", TINY)
    archive = write_zip(tmp_path / "tiny.zip", TINY)
    whole = archive.read_bytes()
    cut = tmp_path / "cut.zip"
    cut.write_bytes(whole[: len(whole) // 2])
    spoiled = tmp_path / "spoiled.zip"
    place = whole.index(b"n01629819_2.JPEG") + 40
    spoiled.write_bytes(whole[:place] + bytes(50) + whole[place + 50 :])
    other = tmp_path / "other"
    (other / "train" / "cat").mkdir(parents=True)
    plain = write_zip(tmp_path / "plain.zip", {"readme.txt": b"x"})
    cases = {
        "is not Tiny-ImageNet": (tmp_path, tmp_path / "out"),
        "nowhere does not exist": (tmp_path / "nowhere", tmp_path / "out"),
        "is damaged, or no zip file": (cut, tmp_path / "out"),
        "train/n01629819/images/n01629819_2.JPEG": (spoiled, tmp_path / "out"),
        "plain.zip is not Tiny-ImageNet": (plain, tmp_path / "out"),
        "is the folder to read": (folder, folder),
        "a folder cat, which is no class": (folder, other),
    }
    for said, (source, out) in cases.items():
        assert import_tiny(source, out) == 2, said
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0], lines


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3072), np.uint8)
LABELS = [3, 8, 8, 3, 8, 3, 8, 3, 3, 8, 8, 3]
BATCHES = {f"data_batch_{i + 1}": slice(2 * i, 2 * i + 2) for i in range(5)} | {
    "test_batch": slice(10, 12)
}


def cifar_python():
    return {
        f"cifar-10-batches-py/{name}": pickle.dumps(
            {b"data": PIXELS[rows], b"labels": LABELS[rows]}
        )
        for name, rows in BATCHES.items()
    }


def cifar_binary():
    records = np.concatenate([np.array(LABELS, np.uint8)[:, None], PIXELS], axis=1)
    return {
        f"cifar-10-batches-bin/{name}.bin": records[rows].tobytes()
        for name, rows in BATCHES.items()
    }


def import_cifar(source, out, *options):
    return main(["data", "import-cifar10", str(source), str(out), *options])


@pytest.fixture
def published(monkeypatch):
    """Let our small files be the published ones."""
    from torchvision.datasets import CIFAR10

    sums = [
        [os.path.basename(name), hashlib.md5(data).hexdigest()]
        for name, data in cifar_python().items()
    ]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])


def test_cifar10_from_both_versions_packed_or_not(tmp_path, published, capsys):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(tar_bytes(cifar_python(), "w:gz"))
    other = tmp_path / "b.tar.gz"
    other.write_bytes(tar_bytes(cifar_binary(), "w:gz"))
    write_tree(tmp_path / "py", cifar_python())
    write_tree(tmp_path / "bin", cifar_binary())
    unpacked = tmp_path / "bin" / "cifar-10-batches-bin"
    expected = None
    for number, source in enumerate((archive, tmp_path, other, tmp_path / "py", unpacked)):
        out = tmp_path / str(number)
        assert import_cifar(source, out) == 0, capsys.readouterr().err
        expected = expected or contents(out)
        assert contents(out) == expected
    assert len(expected) == 12
    assert sorted(expected)[-1] == "val/ship/00000.png"
    found = np.asarray(Image.open(io.BytesIO(expected["train/cat/00003.png"])))
    assert np.array_equal(found, PIXELS[3].reshape(3, 32, 32).transpose(1, 2, 0))
    # Repeated, after a kill.
    last = tmp_path / "again"
    killed(import_cifar, 5, archive, last)
    assert contents(last).items() < expected.items()
    assert import_cifar(archive, last) == 0
    assert contents(last) == expected


def test_cifar10_that_is_not_the_published_one(tmp_path, published, capsys):
    files = cifar_python()
    name = "cifar-10-batches-py/data_batch_2"
    changed = files[name][:-1] + b"\x00"
    good = tar_bytes(files, "w:gz")
    archives = {
        "data_batch_2 is not the published file": tar_bytes(files | {name: changed}),
        "has neither data_batch_2 nor data_batch_2.bin": tar_bytes(
            {key: data for key, data in files.items() if key != name}
        ),
        "is damaged, or no tar file": good[: len(good) // 2],
        "its size is no multiple of 3073": tar_bytes(
            cifar_binary() | {"cifar-10-batches-bin/test_batch.bin": b"12"}
        ),
    }
    for said, content in archives.items():
        (tmp_path / "archive").write_bytes(content)
        assert import_cifar(tmp_path / "archive", tmp_path / "out") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0], lines
        assert not (tmp_path / "out").exists()
    assert import_cifar(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    evil = pickle.dumps({b"data": shutil.rmtree, b"labels": []})
    (tmp_path / "archive").write_bytes(tar_bytes(files | {name: evil}))
    assert import_cifar(tmp_path / "archive", tmp_path / "out", "--skip_checksums") == 2
    assert "it needs shutil.rmtree" in capsys.readouterr().err
