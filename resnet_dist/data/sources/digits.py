"""The embedded quickstart set: 1,797 real handwritten digits, written out once as image files.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, DOI 10.24432/C50P49, CC BY 4.0 (see digits.LICENSE.txt). Images of 8x8 pixels with
values from 0 to 16 are packed in digits.npz.
"""

import tempfile
from pathlib import Path

import numpy as np

SIZE = 32
"""Height and width of the written images: what the CIFAR family of networks is made for."""

_COMPLETE = ".resnet_dist_digits"
_LARGEST_VALUE = 16


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The set as it is embedded: images uint8 [1797, 8, 8] of 0 to 16, labels int64 [1797]."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        packed = stored["pixels"]
        labels = stored["labels"]
    return packed.reshape(-1, 8, 8), labels.astype(np.int64)


def write_digits(data_dir: str) -> None:
    """Write the digits to data_dir/train/<digit>/ and data_dir/val/<digit>/ as JPEG files, once.

    Every fifth image of each class goes to val: there are 1,442 for training and 355 for
    validation. They are written to a folder beside `data_dir` which is renamed when it is complete,
    so that a killed process leaves no half of a data set. Call it in one process only.

    Raises:
        ValueError: if `data_dir` is empty, or the folder holds something else.
    """
    if not data_dir:
        raise ValueError(
            "data.data_dir is empty: name a folder that the digits can be written to, for instance "
            "--data.data_dir data/digits"
        )
    target = Path(data_dir).absolute()
    if (target / _COMPLETE).is_file():
        return
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(
            f"data.data_dir {data_dir!r} has contents that are not the digits: with data.kind "
            f"digits name a folder that is empty or does not exist yet; for your own data use "
            f"--data.kind folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        # The temporary folder itself is closed to other users, so that a folder in it is used.
        folder = Path(temporary, target.name)
        _write_files(folder)
        try:
            # This works over an empty folder or none.
            folder.replace(target)
        except OSError:
            # Another run may have been faster.
            if not (target / _COMPLETE).is_file():
                raise


def _write_files(folder: Path) -> None:
    """All image files, and last the mark that they are complete."""
    images, labels = load_digits()
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)
        for number, row in enumerate(rows):
            split = "val" if number % 5 == 4 else "train"
            path = folder / split / str(digit) / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_image(path, images[row])
    (folder / _COMPLETE).write_text(
        "written by resnet_dist.data.sources.digits; the images are complete\n"
    )


def _write_image(path: Path, values: np.ndarray) -> None:
    """Enlarge one digit (uint8 [8, 8]) to SIZE pixels and save it."""
    from PIL import Image

    # 255 / 16 keeps the 17 levels apart after rounding. Bicubic, since 4x4 blocks are no strokes.
    pixels = np.round(values * (255 / _LARGEST_VALUE)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    image.convert("RGB").save(path, quality=95, subsampling=0)
