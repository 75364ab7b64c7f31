"""`resnet-dist data verify`: find unusual or broken images before training does.

Every image is decoded twice: with the decoder of training, and with Pillow.
"""

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

from resnet_dist.commands.verify_warnings import GroupsWithWarnings, find_warnings
from resnet_dist.data.pixels.dali import Decoder, LoadedJob, Portion, windows_to_torch
from resnet_dist.data.pixels.read import Encoded, examine, read_image_bytes
from resnet_dist.data.sampling.crops import Geometry, whole_windows
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.sources.index import Index
from resnet_dist.data.sources.pack import open_splits
from resnet_dist.files import write_file
from resnet_dist.logs import decoder_warnings
from resnet_dist.logs.console import Progress
from resnet_dist.logs.decoder_warnings import DecoderWarnings
from resnet_dist.text import printable

KINDS = (
    "broken",
    "disagreement",
    "warned",
    "not_jpeg",
    "cmyk",
    "grayscale",
    "rotated",
    "tiny",
    "duplicate",
)
"""Kinds of findings.

"broken": training cannot use the image. "disagreement": only one of DALI and Pillow decodes it, or
their pixels differ by more than 2 levels. "warned": the decoder of training prints a warning, and
decodes the image as far as it can. The others describe images that training can use.
"""

_EXIF_ORIENTATION = 0x0112
_IMAGES_PER_JOB = 64
_MAX_PRINTED_LINES = 50
_MAX_PIXEL_DIFFERENCE = 2

Finding = tuple[str, str]
"""(kind, detail) of one image; in `FindingsByKind`, (name of the image, detail)."""

FindingsByKind = dict[str, list[Finding]]
"""For each of `KINDS`, the images it applies to."""

Splits = dict[str, Index]
"""train and val."""


@dataclass(frozen=True, eq=False)
class _Job:
    """Some images of a split, which one thread examines."""

    split: str
    """train or val"""
    index: Index
    """the images of the split"""
    rows: range
    """rows of the index"""

    def name(self, row: int) -> str:
        """The name of an image in the report."""
        return f"{self.split}/{self.index.name(row)}"


class _PillowResult(NamedTuple):
    """How Pillow reads a file."""

    pixels: np.ndarray | None
    """uint8 [h, w, 3]; None if it cannot decode the file"""
    findings: list[Finding]
    """unusual properties of the image"""
    problem: str
    """why it cannot decode the file; empty if it can"""


class _Examination:
    """Collects the findings of all threads."""

    def __init__(self, tiny: int, source: DecoderWarnings | None) -> None:
        self.tiny = tiny
        self.source = source
        self.warned: GroupsWithWarnings[_Job] = GroupsWithWarnings(source)
        self.findings: FindingsByKind = {}
        """for each kind, (name of the image, detail)"""
        for kind in KINDS:
            self.findings[kind] = []
        self.names_by_digest: dict[bytes, list[str]] = {}
        """names of the images whose files have the same bytes"""
        self.local = threading.local()

    def examine(self, job: _Job) -> int:
        """Examine the images of a job in the current thread.

        Returns:
            The number of images.
        """
        with self.warned.watch(job):
            for row in job.rows:
                self._examine_image(job, row)
        return len(job.rows)

    def _examine_image(self, job: _Job, row: int) -> None:
        """Examine one image of a job, and add its findings."""
        name = job.name(row)
        try:
            data = read_image_bytes(job.index, row)
        except OSError as error:
            reason = error.strerror or error
            self.findings["broken"].append((name, f"cannot be read: {reason}"))
            return
        image = examine(row, data)
        decoder = self._decoder()
        for kind, detail in _find_unusual(data, image, decoder, self.tiny):
            self.findings[kind].append((name, detail))
        if data:
            digest = hashlib.blake2b(data, digest_size=32).digest()
            names = self.names_by_digest.setdefault(digest, [])
            names.append(name)

    def _decoder(self) -> Decoder:
        """The decoder of the current thread, which is created at the first call."""
        if not hasattr(self.local, "decoder"):
            device = torch.device("cpu")
            self.local.decoder = Decoder(
                local_batch_size=1,
                threads=1,
                device=device,
            )
        decoder: Decoder = self.local.decoder
        return decoder

    def _decode_again(self, image: tuple[_Job, int]) -> None:
        """Decode an image with the decoder of training."""
        job, row = image
        with contextlib.suppress(OSError):
            encoded = examine(row, read_image_bytes(job.index, row))
            if not encoded.reason:
                _decode(encoded, self._decoder())

    def _add_warned(self) -> None:
        """Find out which images the decoder has warned about."""
        if self.source is None:
            return
        images = []
        for job in self.warned.found:
            images += [(job, row) for row in job.rows]
        for (job, row), text in find_warnings(images, self._decode_again, self.source):
            self.findings["warned"].append((job.name(row), text))

    def finish(self) -> FindingsByKind:
        """Add the warnings and duplicates, and return all findings in sorted order."""
        self._add_warned()
        for names in self.names_by_digest.values():
            # The first name is kept. It is a validation image if there is one, because a copy of it
            # in train/ would leak the answer.
            names.sort(key=_val_first)
            original = names[0]
            for name in names[1:]:
                self.findings["duplicate"].append((name, f"as {original}"))
        for findings in self.findings.values():
            findings.sort()
        return self.findings


def _val_first(name: str) -> tuple[bool, str]:
    """Sort key that puts the images of val/ before those of train/."""
    is_training_image = name.startswith("train/")
    return is_training_image, name


def run(args: argparse.Namespace) -> int:
    """Examine every image of `args.data_dir` on the CPU, and write the reports.

    Args:
        args: The options of the command: `data_dir`, `report`, `write_exclude`,
            `exclude_duplicates`, `tiny` and `workers`.

    Returns:
        The exit code: 1 if an image is broken, else 0.

    Raises:
        ValueError: There are no images.
    """
    splits, remarks = _open_with_remarks(args.data_dir)
    for remark in remarks:
        print(remark)
    num_images = _count_images(splits)
    findings = _examine_all(splits, args)

    summary = [f"{num_images} images in {args.data_dir}"]
    details = _describe_findings(findings)
    report = {
        "data_dir": args.data_dir,
        "images": num_images,
        "remarks": remarks,
        **findings,
    }
    text_path = str(Path(args.report).with_suffix(".txt"))
    _write_lines(args.report, [json.dumps(report, indent=1)])
    _write_lines(text_path, [*summary, *remarks, *details])
    if args.write_exclude:
        excluded = _excluded_names(findings, args.exclude_duplicates)
        _write_lines(args.write_exclude, excluded)

    printed = [*summary, *details][:_MAX_PRINTED_LINES]
    for line in printed:
        print(printable(line))
    print(printable(f"report: {args.report}"))
    if findings["broken"]:
        return 1
    return 0


def _open_with_remarks(data_dir: str) -> tuple[Splits, list[str]]:
    """Index a data set, and collect the warnings that this raises.

    Returns:
        The splits, and the messages of the warnings.

    Raises:
        ValueError: There are no images.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splits = open_splits(data_dir)
    remarks = [str(warning.message) for warning in caught]
    return splits, remarks


def _count_images(splits: Splits) -> int:
    """Number of images in all splits."""
    return sum(len(index) for index in splits.values())


def _describe_findings(findings: FindingsByKind) -> list[str]:
    """Format the findings.

    Returns:
        For each kind a line with the number of images, and then a line for each image.
    """
    lines = []
    for kind, found in findings.items():
        lines.append(f"{len(found)} {kind}")
        for name, detail in found:
            lines.append(f"  {name}: {detail}")
    return lines


def _examine_all(splits: Splits, args: argparse.Namespace) -> FindingsByKind:
    """Examine all images in threads.

    Args:
        splits: The images.
        args: The options of the command, of which `workers` is the number of threads.
    """
    jobs = []
    for split, index in splits.items():
        for start in range(0, len(index), _IMAGES_PER_JOB):
            stop = min(start + _IMAGES_PER_JOB, len(index))
            job = _Job(split, index, range(start, stop))
            jobs.append(job)
    num_images = _count_images(splits)
    with (
        decoder_warnings.collected(),
        Progress(num_images, "verify") as bar,
        ThreadPoolExecutor(args.workers) as pool,
        warnings.catch_warnings(),
    ):
        # Pillow warns about unusual metadata, which is of no importance here.
        warnings.simplefilter("ignore")
        examination = _Examination(args.tiny, decoder_warnings.current_warnings())
        for num_examined in pool.map(examination.examine, jobs):
            bar.update(num_examined)
        return examination.finish()


def _excluded_names(findings: FindingsByKind, with_duplicates: bool) -> list[str]:
    """Sorted names of the training images that `data.exclude` should leave out."""
    kinds = ["broken"]
    if with_duplicates:
        kinds.append("duplicate")
    names = set()
    for kind in kinds:
        for name, _ in findings[kind]:
            if name.startswith("train/"):
                names.add(name)
    return sorted(names)


def _write_lines(path: str, lines: list[str]) -> None:
    """Write a text file. File names that are not valid UTF-8 keep their bytes.

    Raises:
        OSError: The file cannot be written.
    """
    text = "\n".join([*lines, ""])
    content = text.encode("utf-8", "surrogateescape")
    write_file(Path(path), content)


def _find_unusual(
    data: bytes,
    image: Encoded,
    decoder: Decoder,
    tiny: int,
) -> list[Finding]:
    """Examine one image.

    Args:
        data: The bytes of its file.
        image: The result of the reader of training for these bytes.
        decoder: The decoder of training.
        tiny: Shorter side in pixels below which an image counts as tiny.
    """
    training_pixels = None
    if not image.reason:
        training_pixels = _decode(image, decoder)
    pillow = _decode_with_pillow(data, tiny)
    found = []
    if training_pixels is None:
        reason = image.reason or "the decoder refuses it"
        found.append(("broken", reason))
    found.extend(pillow.findings)
    disagreement = _disagreement(training_pixels, pillow)
    if disagreement:
        found.append(("disagreement", disagreement))
    return found


def _disagreement(training_pixels: np.ndarray | None, pillow: _PillowResult) -> str | None:
    """Compare the pixels of the decoder of training with those of Pillow.

    Args:
        training_pixels: uint8 [h, w, 3]; None if the decoder refuses the image.
        pillow: What Pillow makes of the same file.

    Returns:
        How they differ, in a few words. None if they agree.
    """
    if training_pixels is None and pillow.pixels is None:
        return None
    if training_pixels is None or pillow.pixels is None:
        return pillow.problem or "Pillow alone decodes it"
    if training_pixels.shape == pillow.pixels.shape:
        # Differences of uint8 would wrap around.
        signed = training_pixels.astype(np.int16)
        difference = np.abs(signed - pillow.pixels).max()
        if difference <= _MAX_PIXEL_DIFFERENCE:
            return None
    return "Pillow decodes it to other pixels"


def _decode_with_pillow(data: bytes, tiny: int) -> _PillowResult:
    """Decode a file with Pillow, and list the unusual properties of the image.

    Args:
        data: The bytes of the file.
        tiny: Shorter side in pixels below which an image counts as tiny.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            findings = _properties(picture, tiny)
    # Pillow's plugins raise many types.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        return _PillowResult(None, [], problem)
    return _PillowResult(pixels, findings, "")


def _properties(picture: Image.Image, tiny: int) -> list[Finding]:
    """Unusual properties of an image that Pillow has opened.

    Args:
        picture: The image.
        tiny: Shorter side in pixels below which an image counts as tiny.

    Returns:
        The findings, in the order of `KINDS`.
    """
    found = []
    if picture.format not in ("JPEG", "MPO"):
        found.append(("not_jpeg", str(picture.format)))
    if picture.mode == "CMYK":
        found.append(("cmyk", picture.mode))
    # Pillow's modes of one channel are 1, L, LA, La, I, I;16 and their variants.
    first_letter = picture.mode[0]
    if first_letter in "1LI":
        found.append(("grayscale", picture.mode))
    orientation = _exif_orientation(picture)
    if orientation not in (0, 1):
        detail = f"EXIF orientation {orientation}, which training ignores"
        found.append(("rotated", detail))
    width, height = picture.size
    shorter_side = min(width, height)
    if shorter_side < tiny:
        found.append(("tiny", f"{width} x {height}"))
    return found


def _exif_orientation(picture: Image.Image) -> int:
    """Read the EXIF orientation of an image.

    Returns:
        1 for an upright image and for one without orientation.
    """
    # An image with damaged metadata is not a damaged image.
    with contextlib.suppress(Exception):
        orientation: int = picture.getexif().get(_EXIF_ORIENTATION, 1)
        return orientation
    return 1


def _decode(image: Encoded, decoder: Decoder) -> np.ndarray | None:
    """Decode the whole image as training does.

    Returns:
        uint8 [h, w, 3], or None if the decoder refuses the image.
    """
    heights = np.array([image.height])
    widths = np.array([image.width])
    window = whole_windows(heights, widths)
    not_mirrored = np.zeros(1, np.int64)
    filters = np.full(1, "bilinear")
    geometry = Geometry(window, (), not_mirrored, filters)
    job = val_job(np.array([image.row]))
    portion = Portion(LoadedJob(job, [image], geometry), 0, 1)
    try:
        decoder.submit(portion)
        _, decoded = decoder.collect()
        pixels: np.ndarray = windows_to_torch(decoded[0])[0].numpy()
    except RuntimeError:
        decoder.pending.clear()
        decoder.restart()
        return None
    return pixels
