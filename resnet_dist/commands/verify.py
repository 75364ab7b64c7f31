"""`resnet-dist data verify`: what is unusual about each image, before a run finds out."""

import argparse
import contextlib
import hashlib
import io
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from resnet_dist.console import Progress
from resnet_dist.data.pixels.dali import Decoder, LoadedJob, Portion, windows_to_torch
from resnet_dist.data.pixels.read import Encoded, examine, read_image_bytes
from resnet_dist.data.sampling.crops import Geometry, whole_windows
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.sources.index import Index
from resnet_dist.data.sources.pack import open_splits
from resnet_dist.files import write_file
from resnet_dist.text import printable

KINDS = ("broken", "disagreement", "not_jpeg", "cmyk", "grayscale", "rotated", "tiny", "duplicate")
"""broken: of no use to training; disagreement: only one of DALI and Pillow decodes it, or their
pixels differ by more than 2"""

_EXIF_ORIENTATION = 0x0112
_IMAGES_OF_A_JOB = 64
_PRINTED_LINES = 50
_LARGEST_DIFFERENCE = 2

Finding = tuple[str, str]
"""(kind, detail)"""


@dataclass(frozen=True)
class _Job:
    """Some images of a split, for one thread."""

    split: str
    index: Index
    rows: range


class _Theirs(NamedTuple):
    """What Pillow makes of a file."""

    pixels: np.ndarray | None
    findings: list[Finding]
    problem: str


class _Examination:
    """The threads' results."""

    def __init__(self, tiny: int) -> None:
        self.tiny = tiny
        self.found: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
        """for each kind, (name of the image, detail)"""
        self.same: dict[bytes, list[str]] = {}
        """names of the images, by the digest of their bytes"""
        self.local = threading.local()

    def examine(self, job: _Job) -> int:
        """Examine the images of a job in this thread; returns their number."""
        for row in job.rows:
            self._examine_image(job.split, job.index, row)
        return len(job.rows)

    def _examine_image(self, split: str, index: Index, row: int) -> None:
        name = f"{split}/{index.name(row)}"
        try:
            data = read_image_bytes(index, row)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            self.found["broken"].append((name, reason))
            return
        image = examine(row, data)
        for kind, detail in _findings(data, image, self._decoder(), self.tiny):
            self.found[kind].append((name, detail))
        if data:
            digest = hashlib.blake2b(data, digest_size=32).digest()
            self.same.setdefault(digest, []).append(name)

    def _decoder(self) -> Decoder:
        """The decoder of this thread."""
        if not hasattr(self.local, "decoder"):
            device = torch.device("cpu")
            self.local.decoder = Decoder(local_batch_size=1, threads=1, device=device)
        decoder: Decoder = self.local.decoder
        return decoder

    def finish(self) -> dict[str, list[Finding]]:
        """All findings, sorted, with the duplicates among them."""
        for names in self.same.values():
            # The first is kept: an image of val/ if there is one, since its twin in train/ would
            # tell the answer.
            names.sort(key=_val_first)
            for name in names[1:]:
                self.found["duplicate"].append((name, f"as {names[0]}"))
        return {kind: sorted(findings) for kind, findings in self.found.items()}


def _val_first(name: str) -> tuple[bool, str]:
    return name.startswith("train/"), name


def run(args: argparse.Namespace) -> int:
    """Examine every image of args.data_dir, on the CPU.

    Returns 1 if one is broken, else 0. Raises ValueError if there are no images.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splits = open_splits(args.data_dir)
    remarks = [str(warning.message) for warning in caught]
    for remark in remarks:
        print(remark)
    found = _examine_all(splits, args)
    total = sum(map(len, splits.values()))
    text = [f"{total} images in {args.data_dir}", *remarks]
    for kind, findings in found.items():
        text.append(f"{len(findings)} {kind}")
        text += [f"  {name}: {detail}" for name, detail in findings]
    report = {"data_dir": args.data_dir, "images": total, "remarks": remarks, **found}
    _write_lines(args.report, [json.dumps(report, indent=1)])
    _write_lines(str(Path(args.report).with_suffix(".txt")), text)
    if args.write_exclude:
        _write_lines(args.write_exclude, _excluded(found, args.exclude_duplicates))
    printed = [line for line in text if line not in remarks][:_PRINTED_LINES]
    for line in (*printed, f"report: {args.report}"):
        print(printable(line))
    return 1 if found["broken"] else 0


def _examine_all(splits: dict[str, Index], args: argparse.Namespace) -> dict[str, list[Finding]]:
    """The findings of every image, by kind."""
    jobs = []
    for split, index in splits.items():
        for start in range(0, len(index), _IMAGES_OF_A_JOB):
            stop = min(start + _IMAGES_OF_A_JOB, len(index))
            jobs.append(_Job(split, index, range(start, stop)))
    examination = _Examination(args.tiny)
    total = sum(map(len, splits.values()))
    with (
        Progress(total, "verify") as bar,
        ThreadPoolExecutor(args.workers) as pool,
        warnings.catch_warnings(),
    ):
        # Pillow warns about odd metadata.
        warnings.simplefilter("ignore")
        for number in pool.map(examination.examine, jobs):
            bar.update(number)
    return examination.finish()


def _excluded(found: dict[str, list[Finding]], with_duplicates: bool) -> list[str]:
    """Sorted names of the training images that data.exclude should leave out."""
    names = {name for name, _ in found["broken"]}
    if with_duplicates:
        names |= {name for name, _ in found["duplicate"]}
    return sorted(name for name in names if name.startswith("train/"))


def _write_lines(path: str, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    write_file(Path(path), text.encode("utf-8", "surrogateescape"))


def _findings(data: bytes, image: Encoded, decoder: Decoder, tiny: int) -> list[Finding]:
    """What applies to one image: `data` is its file, `image` what the reader makes of it."""
    ours = None if image.reason else _decode(image, decoder)
    theirs = _decode_with_pillow(data, tiny)
    found = []
    if ours is None:
        found.append(("broken", image.reason or "the decoder refuses it"))
    found += theirs.findings
    disagreement = _disagreement(ours, theirs)
    if disagreement:
        found.append(("disagreement", disagreement))
    return found


def _disagreement(ours: np.ndarray | None, theirs: _Theirs) -> str | None:
    """How the training decoder and Pillow differ; None if they agree."""
    if (ours is None) != (theirs.pixels is None):
        return theirs.problem or "Pillow alone decodes it"
    if ours is None or theirs.pixels is None:
        return None
    if ours.shape == theirs.pixels.shape:
        difference = np.abs(ours.astype(np.int16) - theirs.pixels).max()
        if difference <= _LARGEST_DIFFERENCE:
            return None
    return "Pillow decodes it to other pixels"


def _decode_with_pillow(data: bytes, tiny: int) -> _Theirs:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            return _Theirs(pixels, _properties(picture, tiny), "")
    # Pillow's plugins raise many types.
    except Exception as error:
        return _Theirs(None, [], f"{type(error).__name__}: {error}")


def _properties(picture: Image.Image, tiny: int) -> list[Finding]:
    """What is unusual about an image that Pillow has opened."""
    found = []
    width, height = picture.size
    orientation = 1
    # Damaged metadata is no damaged image.
    with contextlib.suppress(Exception):
        orientation = picture.getexif().get(_EXIF_ORIENTATION, 1)
    if picture.format not in ("JPEG", "MPO"):
        found.append(("not_jpeg", str(picture.format)))
    if picture.mode == "CMYK":
        found.append(("cmyk", picture.mode))
    if picture.mode[0] in "1LI":
        found.append(("grayscale", picture.mode))
    if orientation not in (0, 1):
        found.append(("rotated", f"EXIF orientation {orientation}, which training ignores"))
    if min(width, height) < tiny:
        found.append(("tiny", f"{width} x {height}"))
    return found


def _decode(image: Encoded, decoder: Decoder) -> np.ndarray | None:
    """The whole image as training decodes it, uint8 [h, w, 3]; None if the decoder refuses it."""
    window = whole_windows(np.array([image.height]), np.array([image.width]))
    geometry = Geometry(window, (), np.zeros(1, np.int64))
    job = val_job(np.array([image.row]))
    try:
        decoder.submit(Portion(LoadedJob(job, [image], geometry), 0, 1))
        _, decoded = decoder.collect()
        pixels: np.ndarray = windows_to_torch(decoded[0])[0].numpy()
        return pixels
    except RuntimeError:
        decoder.pending.clear()
        decoder.restart()
        return None
