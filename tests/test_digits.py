"""The embedded digits: what they are, and that they are written whole or not at all."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from resnet_dist.data.sources import digits
from resnet_dist.data.sources.digits import load_digits, write_digits


def listing(folder):
    return sorted(
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder)
        for name in names
    )


def test_the_embedded_set():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 16
    assert images.min() == 0
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (
        hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == "65e5b4619795efb4"
    )


@pytest.mark.slow
def test_written_once_and_complete(tmp_path):
    folder = tmp_path / "data" / "digits"
    write_digits(str(folder))
    files = [name for name in listing(folder) if name.endswith(".jpg")]
    assert len([name for name in files if name.startswith("train/")]) == 1442
    assert len([name for name in files if name.startswith("val/")]) == 355
    assert sorted(os.listdir(folder / "val")) == [str(digit) for digit in range(10)]
    with Image.open(folder / "train/3/0000.jpg") as image:
        assert image.size == (32, 32)
        assert image.mode == "RGB"
        assert image.format == "JPEG"
        shrunk = (
            np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=float)
            / 255
            * 16
        )
    images, labels = load_digits()
    assert np.abs(shrunk - images[np.flatnonzero(labels == 3)[0]]).mean() < 1.0
    before = os.stat(folder / "train/3/0000.jpg").st_mtime_ns
    write_digits(str(folder))
    assert os.stat(folder / "train/3/0000.jpg").st_mtime_ns == before
    assert os.listdir(folder.parent) == ["digits"]


def test_the_same_files_every_time(tmp_path, monkeypatch):
    images, labels = load_digits()
    monkeypatch.setattr(digits, "load_digits", lambda: (images[:50], labels[:50]))
    for name in ("one", "two"):
        write_digits(str(tmp_path / name))
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    for name in listing(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_half_a_set_is_not_left_and_other_data_not_touched(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="No space"):
            write_digits(str(tmp_path / "digits"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data\.data_dir .*contents that are not the digits"):
        write_digits(str(tmp_path / "mine"))
    with pytest.raises(ValueError, match=r"data\.data_dir is empty"):
        write_digits("")
    assert os.listdir(tmp_path) == ["mine"]
