"""The embedded digits: what they are, and that they are written whole or not at all."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from resnet_dist.data.sources import digits
from resnet_dist.data.sources.digits import load_digits, write_digits


def listing(folder):
    """The files below a folder, sorted, as paths relative to it."""
    files = []
    for path in folder.rglob("*"):
        if path.is_file():
            relative = path.relative_to(folder)
            files.append(str(relative))
    return sorted(files)


def test_the_embedded_set():
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 16
    assert images.min() == 0
    images_per_digit = np.bincount(labels).tolist()
    assert images_per_digit == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    hashed = hashlib.sha256()
    hashed.update(images.tobytes())
    hashed.update(labels.tobytes())
    assert hashed.hexdigest().startswith("65e5b4619795efb4")


@pytest.mark.slow
def test_written_once_and_complete(tmp_path):
    folder = tmp_path / "data" / "digits"
    write_digits(str(folder))

    # The number of files, and the classes.
    train_files = list(folder.glob("train/**/*.jpg"))
    val_files = list(folder.glob("val/**/*.jpg"))
    assert len(train_files) == 1442
    assert len(val_files) == 355
    classes = sorted(os.listdir(folder / "val"))
    assert classes == [str(digit) for digit in range(10)]

    # One image: its format, and the pixels of the digit.
    path = folder / "train/3/0000.jpg"
    with Image.open(path) as image:
        assert image.size == (32, 32)
        assert image.mode == "RGB"
        assert image.format == "JPEG"
        gray = image.convert("L")
    shrunk = gray.resize((8, 8), Image.Resampling.BOX)
    found = np.asarray(shrunk, dtype=float) / 255 * 16
    images, labels = load_digits()
    first_three = images[labels == 3][0]
    assert np.abs(found - first_three).mean() < 1.0

    # What is there is not written again.
    before = path.stat().st_mtime_ns
    write_digits(str(folder))
    after = path.stat().st_mtime_ns
    assert after == before
    assert os.listdir(folder.parent) == ["digits"]


def test_the_same_files_every_time(tmp_path, monkeypatch):
    images, labels = load_digits()
    monkeypatch.setattr(digits, "load_digits", lambda: (images[:50], labels[:50]))
    first_folder = tmp_path / "one"
    second_folder = tmp_path / "two"

    write_digits(str(first_folder))
    write_digits(str(second_folder))

    files = listing(first_folder)
    assert listing(second_folder) == files
    for name in files:
        first_file = first_folder / name
        second_file = second_folder / name
        assert first_file.read_bytes() == second_file.read_bytes()


def test_half_a_set_is_not_left_and_other_data_not_touched(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match="No space"):
            write_digits(str(tmp_path / "digits"))
    assert os.listdir(tmp_path) == []

    other_data = tmp_path / "mine"
    (other_data / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data\.data_dir .*contents that are not the digits"):
        write_digits(str(other_data))
    with pytest.raises(ValueError, match=r"data\.data_dir is empty"):
        write_digits("")
    assert os.listdir(tmp_path) == ["mine"]
