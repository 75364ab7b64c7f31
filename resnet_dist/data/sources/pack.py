"""Writing tar shards, which this package, webdataset and DALI's readers.webdataset can read.

A shard is a ustar file. A sample has two members: `<class>/<stem>.<suffix>` is the image, and
`<class>/<stem>.cls`, which follows it, is the class id in ASCII digits. The samples are shuffled
with a fixed seed, for programs that read them sequentially. The index of the shards has the order
and the file names of the class folders, so a run on shards reads the same samples as a run on class
folders.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from resnet_dist.addresses import is_url
from resnet_dist.data.pixels.image_header import find_fault, image_size
from resnet_dist.data.sampling.order import rows_at
from resnet_dist.data.sources.index import PACK_PLAN, SHARD_INDEX, Index
from resnet_dist.data.sources.index_file import open_index, write_index
from resnet_dist.data.sources.scan import SingleProcess, build_index
from resnet_dist.data.stores.remote_index import remote_splits
from resnet_dist.data.stores.shard_index import write_shard_indexes
from resnet_dist.files import write_file
from resnet_dist.logs.console import Progress
from resnet_dist.text import printable

# JPEG quality of resized images if `quality` is 0.
_DEFAULT_QUALITY = 90

# A ustar header has room for 155 bytes of folder and 100 bytes of file name, of which the suffix
# needs up to 5.
_MAX_FOLDER_BYTES = 155
_MAX_STEM_BYTES = 95


class ImageSource(NamedTuple):
    """The name of an image, and where its bytes are: in their own file or in an archive."""

    name: str
    """`<class>/<file>`, or `<class>/<folder>/<file>`"""
    path: str
    """the file that contains the image"""
    offset: int
    """first byte of the image in the file"""
    length: int
    """number of bytes"""

    def read(self) -> bytes:
        """Read the bytes of the image.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the file ends before the image does.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.length)
        if len(data) < self.length:
            raise ValueError(
                f"{self.path} ends inside {self.name}: it is cut off, or was changed meanwhile"
            )
        return data

    @property
    def class_name(self) -> str:
        """The name of the class, which is the first folder of the name."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class PackOptions:
    """How shards are written."""

    out: str
    """folder in which each split gets a folder"""
    shard_mb: int = 256
    """size of the original images in a shard, in MiB"""
    workers: int = 1
    """number of threads"""
    resize: int = 0
    """if not 0, images whose shorter side is longer than this are resized to it (Pillow, Lanczos)
    and saved as JPEG, in RGB and without metadata"""
    quality: int = 0
    """JPEG quality, 1 to 95, of all images; an image that is not resized keeps its bytes if
    encoding does not make it smaller. If 0, only resized images are encoded, with quality 90"""
    check: bool = False
    """whether to report images whose header is damaged, also where nothing is encoded"""


@dataclass
class WrittenShard:
    """What a shard contains. This is also stored in a JSON file beside the shard."""

    places: list[list[int]] = field(default_factory=list)
    """[offset, length] of each image, in bytes"""
    kept: list[list[str]] = field(default_factory=list)
    """[name, reason] of each image that could not be encoded and keeps its original bytes"""

    @property
    def num_bytes(self) -> int:
        """Bytes of all its images together."""
        return sum(length for _, length in self.places)


def inner_name(name: str) -> str:
    """The name of an image inside of its class folder."""
    return name.partition("/")[2]


class Source(Protocol):
    """An image that can be read."""

    @property
    def name(self) -> str:
        """`<class>/<file>`, or `<class>/<folder>/<file>`."""

    def read(self) -> bytes:
        """Read the bytes of the image."""


class Sample(NamedTuple):
    """An image that is to be written to a shard."""

    key: str
    """name of the sample in the tar file, without suffix"""
    label: int
    """class id"""
    source: Source
    """the image"""


def open_splits(data_dir: str) -> dict[str, Index]:
    """Build or open the index of each split in a folder, in a single process.

    Args:
        data_dir: the folder that holds train/ or val/ or both, or its address in an object store.

    Returns:
        The indices by the name of the split.

    Raises:
        ValueError: if there is neither train/ nor val/, or a split is not valid.
    """
    splits = []
    if is_url(data_dir):
        splits = remote_splits(data_dir)
    for split in ("train", "val"):
        if os.path.isdir(os.path.join(data_dir, split)):
            splits.append(split)
    if not splits:
        # Building its index raises an error that says what is wrong.
        splits = ["train"]
    found = {}
    for split in splits:
        found[split] = build_index(data_dir, split, SingleProcess())
    return found


def pack(images: Iterable[ImageSource], split: str, options: PackOptions) -> str:
    """Write the images of a split to tar shards, with an index.

    The shards are out/`split`/`split`-000000.tar and so on. Images that cannot be decoded keep
    their bytes. Complete shards are not written again, so an interrupted call can be repeated.

    Args:
        images: the images, in any order.
        split: "train" or "val".
        options: how the shards are written.

    Returns:
        A summary of several lines.

    Raises:
        ValueError: if the folder contains shards of other settings or images, or if a name is too
            long for a tar file.
    """
    sources = sorted(images)
    folder = Path(options.out, split)
    folder.mkdir(parents=True, exist_ok=True)
    classes = sorted({source.class_name for source in sources})
    samples = _make_samples(sources, classes)

    order = rows_at(0, 0, len(samples), np.arange(len(samples)))
    shuffled = [samples[row] for row in order]
    shard_bytes = max(1, options.shard_mb << 20)
    lengths = [sources[row].length for row in order]
    pieces = _split_into_shards(shuffled, lengths, shard_bytes)
    paths = shard_paths(folder, split, len(pieces))
    names_and_lengths = [(source.name, source.length) for source in sources]
    begin_pack(folder, options, len(paths), repr(names_and_lengths))
    shards = _write_shards(paths, pieces, split, options)
    write_indexes(
        folder,
        classes,
        labels=[sample.label for sample in shuffled],
        names=[sample.source.name for sample in shuffled],
        paths=paths,
        shards=shards,
    )

    mb_before = sum(lengths) / 1e6
    mb_after = sum(shard.num_bytes for shard in shards) / 1e6
    summary = (
        f"{split}: {len(sources)} images of {len(classes)} classes in {len(paths)} shards, "
        f"{mb_before:.2f} MB before, {mb_after:.2f} MB after"
    )
    return "\n".join([summary, *describe_kept(shards, split)])


def shard_paths(folder: Path, split: str, count: int) -> list[Path]:
    """The files of the shards of a split, which are in `folder`."""
    return [folder / f"{split}-{number:06d}.tar" for number in range(count)]


def describe_kept(shards: list[WrittenShard], split: str) -> list[str]:
    """A line for each image that keeps its original bytes because it cannot be decoded."""
    lines = []
    for shard in shards:
        for name, reason in shard.kept:
            line = f"  kept as it was: {split}/{name}: {reason}"
            lines.append(printable(line))
    return lines


def write_indexes(
    folder: Path,
    classes: list[str],
    *,
    labels: list[int],
    names: list[str],
    paths: list[Path],
    shards: list[WrittenShard],
) -> None:
    """Write the index of a split, and one beside each shard, which an object store needs.

    Args:
        folder: the folder of the split.
        classes: the class names.
        labels: the class id of each image, in the order of the shards.
        names: `<class>/<file>` of each image, in the same order.
        paths: the files of the shards.
        shards: what they contain.
    """
    places = []
    for number, shard in enumerate(shards):
        for offset, length in shard.places:
            places.append((number, offset, length))
    index_path = str(folder / SHARD_INDEX)
    write_index(
        index_path,
        classes,
        labels=labels,
        names=[os.fsencode(inner_name(name)) for name in names],
        shards=[path.name for path in paths],
        places=places,
    )
    write_shard_indexes(open_index(index_path, str(folder)))


def _make_samples(sources: list[ImageSource], classes: list[str]) -> list[Sample]:
    """Give each image its name in the tar file and its class id.

    Args:
        sources: the images.
        classes: the class names; the position of a name is the class id.
    """
    class_ids = {name: number for number, name in enumerate(classes)}
    keys = sample_keys([source.name for source in sources])
    samples = []
    for key, source in zip(keys, sources, strict=True):
        label = class_ids[source.class_name]
        samples.append(Sample(key, label, source))
    return samples


def _split_into_shards(
    samples: list[Sample], lengths: list[int], shard_bytes: int
) -> list[list[Sample]]:
    """Divide the samples into consecutive pieces of about `shard_bytes` bytes.

    The sizes are those of the original images, so the pieces do not depend on `resize` or
    `quality`.

    Args:
        samples: the samples, in the order of the shards.
        lengths: the number of bytes of each.
        shard_bytes: size of a shard.
    """
    # A sample has two headers and one block for its label.
    overhead = 3 * tarfile.BLOCKSIZE
    sizes = [length + overhead for length in lengths]
    numbers = (np.cumsum(sizes) - 1) // shard_bytes
    pieces: list[list[Sample]] = []
    previous = None
    for sample, number in zip(samples, numbers.tolist(), strict=True):
        if number != previous:
            pieces.append([])
        pieces[-1].append(sample)
        previous = number
    return pieces


def _write_shards(
    paths: list[Path], pieces: list[list[Sample]], split: str, options: PackOptions
) -> list[WrittenShard]:
    """Write all shards, in threads.

    Reading, decoding, encoding and writing release the global interpreter lock.

    Args:
        paths: the files of the shards.
        pieces: the samples of each shard.
        split: the name that the progress bar shows.
        options: how the shards are written.

    Returns:
        The contents of each shard.
    """
    total = sum(map(len, pieces))
    with (
        Progress(total, f"pack {split}") as bar,
        ThreadPoolExecutor(options.workers) as pool,
    ):

        def write(path: Path, samples: list[Sample]) -> WrittenShard:
            shard = write_shard(path, samples, options)
            bar.update(len(samples))
            return shard

        return list(pool.map(write, paths, pieces))


def begin_pack(folder: Path, options: PackOptions, num_shards: int, images: str) -> None:
    """Write all that determines the contents of the shards to a file.

    Args:
        folder: the folder of the split.
        options: how the shards are written.
        num_shards: how many there will be.
        images: a text that identifies the images; its hash is written.

    Raises:
        ValueError: if the folder has such a file with other contents.
    """
    digest = hashlib.blake2b(images.encode("utf-8", "replace"), digest_size=8)
    plan = {
        "resize": options.resize,
        "quality": options.quality,
        "shard_mb": options.shard_mb,
        "images": digest.hexdigest(),
        "shards": num_shards,
    }
    path = folder / PACK_PLAN
    if path.exists():
        begun = json.loads(path.read_text())
        if begun != plan:
            raise ValueError(
                f"{folder} was begun with {begun}, and this is {plan}: repeat the arguments and "
                f"the images, or name another folder"
            )
    write_file(path, json.dumps(plan))


def sample_keys(names: Iterable[str]) -> list[str]:
    """The different names of the samples in the tar files, without suffix.

    For readers of webdataset, the name of a sample ends at its first dot. So dots in a file name,
    other than that of the suffix, are replaced by underscores.

    Raises:
        ValueError: if a name is too long for a tar file.
    """
    # A dictionary keeps the order, and finds a name quickly.
    keys: dict[str, None] = {}
    for name in names:
        name_without_suffix, _ = os.path.splitext(name)
        folder, stem = os.path.split(name_without_suffix)
        key_stem = stem.replace(".", "_")
        key = f"{folder}/{key_stem}"
        # Otherwise a.b.jpg and a_b.jpg, or a.jpg and a.png, would have the same name.
        while key in keys:
            key += "_"
        folder_bytes = len(os.fsencode(folder))
        stem_bytes = len(os.fsencode(key)) - folder_bytes - 1
        if folder_bytes > _MAX_FOLDER_BYTES or stem_bytes > _MAX_STEM_BYTES:
            raise ValueError(
                f"{folder}/{stem}: a tar has room for {_MAX_FOLDER_BYTES} bytes of folder and "
                f"{_MAX_STEM_BYTES} of name: shorten it"
            )
        keys[key] = None
    return list(keys)


def write_shard(path: Path, samples: Iterable[Sample], options: PackOptions) -> WrittenShard:
    """Write a shard, unless it exists.

    The shard is written under another name and renamed when it is complete.
    """
    sidecar = path.with_name(f".{path.name}.json")
    unfinished = path.with_name(f"{path.name}.tmp")
    if path.exists():
        return WrittenShard(**json.loads(sidecar.read_text()))
    written = WrittenShard()
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                _write_sample(tar, sample, options, written)
        file.flush()
        os.fsync(file.fileno())
    # The sidecar file is written first, so that each complete shard has one.
    contents = {"places": written.places, "kept": written.kept}
    write_file(sidecar, json.dumps(contents))
    os.replace(unfinished, path)
    return written


def _write_sample(
    tar: tarfile.TarFile, sample: Sample, options: PackOptions, written: WrittenShard
) -> None:
    """Append an image and its label to a shard, and add them to `written`."""
    image = _make_smaller(sample.source, options)
    if image.problem is not None:
        written.kept.append([sample.source.name, image.problem])
    # The header comes before the image.
    offset = tar.offset + tarfile.BLOCKSIZE
    written.places.append([offset, len(image.data)])
    label = str(sample.label).encode()
    _add_member(tar, f"{sample.key}.{image.suffix}", image.data)
    _add_member(tar, f"{sample.key}.cls", label)


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@dataclass(frozen=True)
class _PackedImage:
    """An image as it is written to a shard."""

    data: bytes
    suffix: str
    """of its file name, without the dot"""
    problem: str | None = None
    """why it has its original bytes, if it could not be encoded"""


def _make_smaller(source: Source, options: PackOptions) -> _PackedImage:
    """Resize and encode an image, as far as the options ask for it."""
    data = source.read()
    _, suffix = os.path.splitext(source.name)
    original = _PackedImage(data, suffix[1:].lower())
    is_encoded = options.resize > 0 or options.quality > 0
    if not is_encoded and not options.check:
        return original
    fault = find_fault(data)
    if fault is not None:
        return replace(original, problem=fault)
    if not is_encoded:
        return original
    resized = 0 < options.resize < min(image_size(data))
    if not options.quality and not resized:
        return original
    try:
        smaller = _encode_jpeg(data, options, resized)
    except ValueError as error:
        return replace(original, problem=str(error))
    # Pillow raises exceptions of many types.
    except Exception as error:
        return replace(original, problem=f"{type(error).__name__}: {error}")
    if resized or len(smaller) < len(data):
        return _PackedImage(smaller, "jpg")
    return original


def _encode_jpeg(data: bytes, options: PackOptions, resized: bool) -> bytes:
    """Encode an image as JPEG.

    Args:
        data: the bytes of an image file.
        options: `resize` and `quality`.
        resized: whether to resize the shorter side to `options.resize`.

    Raises:
        ValueError: if the image has 16 bits per channel.
    """
    quality = options.quality or _DEFAULT_QUALITY
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            raise ValueError("it has 16 bits, which Pillow would clip")
        pixels = image.convert("RGB")
        if resized:
            width, height = image.size
            shorter = min(width, height)
            new_width = width * options.resize // shorter
            new_height = height * options.resize // shorter
            pixels = pixels.resize((new_width, new_height), Image.Resampling.LANCZOS)
        pixels.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
