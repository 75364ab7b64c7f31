"""Writing tar shards that this package, webdataset and DALI's readers.webdataset read.

A shard is a plain ustar file. A sample is `<class>/<stem>.<suffix>` and, behind it,
`<class>/<stem>.cls` with the class id in ASCII digits. The samples are shuffled, always in the same
way, for programs that read one after the other. The index has the order and the names of the
folders, so a run on shards sees the same samples as a run on the folders.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from resnet_dist.console import Progress
from resnet_dist.data.pixels.image_header import find_fault, image_size
from resnet_dist.data.sampling.order import rows_at
from resnet_dist.data.sources.index import PACK_PLAN, SHARD_INDEX, Index
from resnet_dist.data.sources.index_file import write_index
from resnet_dist.data.sources.scan import SingleProcess, build_index
from resnet_dist.files import write_file
from resnet_dist.text import printable

_DEFAULT_QUALITY = 90
# ustar has room for 155 bytes of folder and 100 of name, of which a suffix takes up to 5.
_MAX_FOLDER_BYTES = 155
_MAX_STEM_BYTES = 95


class ImageSource(NamedTuple):
    """One image: its name, and where its bytes are, in a file of their own or in an archive."""

    name: str
    """`<class>/<file>`, or `<class>/<folder>/<file>`"""
    path: str
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes. Raises ValueError if there are fewer than there should be."""
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
        """The folder that names the class."""
        return self.name.partition("/")[0]

    @property
    def inner_name(self) -> str:
        """The name inside the class folder."""
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class PackOptions:
    """How shards are written."""

    out: str
    """folder that gets a folder for each split"""
    shard_mb: int = 256
    """MiB of original bytes in a shard"""
    workers: int = 1
    """threads"""
    resize: int = 0
    """images whose shorter side is above this are resized to it (Pillow, Lanczos) and saved as
    JPEG, in RGB and without metadata; 0 = none"""
    quality: int = 0
    """JPEG quality, 1 to 95. All other images are encoded with it too, unless that would not make
    them smaller. 0 = only resized images are encoded, with 90"""


@dataclass
class WrittenShard:
    """What was written to a shard; also kept in a file beside it."""

    places: list[list[int]] = field(default_factory=list)
    """[offset, length] of each image"""
    kept: list[list[str]] = field(default_factory=list)
    """[name, why] of images that keep their bytes although they should be smaller"""


class _Sample(NamedTuple):
    """An image on its way into a shard."""

    key: str
    label: int
    source: ImageSource


def open_splits(data_dir: str) -> dict[str, Index]:
    """The index of each split that the folder has, in one process. Raises ValueError for none."""
    splits = [split for split in ("train", "val") if os.path.isdir(os.path.join(data_dir, split))]
    found = {}
    for split in splits or ["train"]:
        found[split] = build_index(data_dir, split, SingleProcess())
    return found


def pack(images: Iterable[ImageSource], split: str, options: PackOptions) -> str:
    """Pack images to out/`split`/`split`-000000.tar and so on, with an index.

    Images that cannot be decoded keep their bytes. Shards that are complete are left as they are,
    so a run that was killed goes on.

    Returns:
        A summary of several lines.

    Raises:
        ValueError: if the folder was begun with other settings or images, or a name is too long.
    """
    sources = sorted(images)
    folder = Path(options.out, split)
    folder.mkdir(parents=True, exist_ok=True)
    classes = sorted({source.class_name for source in sources})
    ids = {name: label for label, name in enumerate(classes)}
    keys = _keys(sources)
    samples = [
        _Sample(key, ids[source.class_name], source)
        for key, source in zip(keys, sources, strict=True)
    ]
    order = rows_at(0, 0, len(samples), np.arange(len(samples)))
    shuffled = [samples[row] for row in order]
    pieces = _split_into_shards(shuffled, max(1, options.shard_mb << 20))
    paths = [folder / f"{split}-{number:06d}.tar" for number in range(len(pieces))]
    _check_same_plan(folder / PACK_PLAN, _plan(sources, options, len(paths)))
    shards = _write_shards(paths, pieces, split, options)
    places = [
        (number, place[0], place[1])
        for number, shard in enumerate(shards)
        for place in shard.places
    ]
    write_index(
        str(folder / SHARD_INDEX),
        classes,
        [sample.label for sample in shuffled],
        [os.fsencode(sample.source.inner_name) for sample in shuffled],
        shards=[path.name for path in paths],
        places=places,
    )
    before = sum(source.length for source in sources)
    after = sum(length for _, _, length in places)
    lines = [
        f"{split}: {len(sources)} images of {len(classes)} classes in {len(paths)} shards, "
        f"{before / 1e6:.2f} MB before, {after / 1e6:.2f} MB after"
    ]
    for shard in shards:
        for name, why in shard.kept:
            lines.append(printable(f"  kept as it was: {split}/{name}: {why}"))
    return "\n".join(lines)


def _split_into_shards(samples: list[_Sample], shard_bytes: int) -> list[list[_Sample]]:
    """Consecutive samples of about `shard_bytes` original bytes each."""
    # A sample has two headers and the block of its label.
    sizes = [sample.source.length + 3 * tarfile.BLOCKSIZE for sample in samples]
    numbers = (np.cumsum(sizes) - 1) // shard_bytes
    pieces: list[list[_Sample]] = []
    previous = None
    for sample, number in zip(samples, numbers.tolist(), strict=True):
        if number != previous:
            pieces.append([])
        pieces[-1].append(sample)
        previous = number
    return pieces


def _write_shards(
    paths: list[Path], pieces: list[list[_Sample]], split: str, options: PackOptions
) -> list[WrittenShard]:
    """Write all shards. Threads do: files, decoder and encoder work outside Python's lock."""
    total = sum(map(len, pieces))
    with (
        Progress(total, f"pack {split}") as bar,
        ThreadPoolExecutor(options.workers) as pool,
    ):

        def write(path: Path, samples: list[_Sample]) -> WrittenShard:
            shard = _write_shard(path, samples, options)
            bar.update(len(samples))
            return shard

        return list(pool.map(write, paths, pieces))


def _plan(sources: list[ImageSource], options: PackOptions, shards: int) -> dict[str, Any]:
    """What determines the contents of the shards."""
    images = repr([(source.name, source.length) for source in sources])
    digest = hashlib.blake2b(images.encode("utf-8", "replace"), digest_size=8)
    return {
        "resize": options.resize,
        "quality": options.quality,
        "shard_mb": options.shard_mb,
        "images": digest.hexdigest(),
        "shards": shards,
    }


def _check_same_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write the plan to a file. Raises ValueError if the file has another one."""
    if path.exists():
        begun = json.loads(path.read_text())
        if begun != plan:
            raise ValueError(
                f"{path.parent} was begun with {begun}, and this is {plan}: repeat the arguments "
                f"and the images, or name another folder"
            )
    write_file(path, json.dumps(plan))


def _keys(sources: list[ImageSource]) -> list[str]:
    """The names of the samples in the tar, without suffix, each one different.

    Readers end a name at its first dot, so dots in a stem become _.
    """
    # A dictionary, for the order and for the test of membership.
    keys: dict[str, None] = {}
    for source in sources:
        folder, stem = os.path.split(os.path.splitext(source.name)[0])
        key = f"{folder}/{stem.replace('.', '_')}"
        # a.b.jpg and a_b.jpg, or a.jpg and a.png, would have the same one.
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


def _write_shard(path: Path, samples: list[_Sample], options: PackOptions) -> WrittenShard:
    """Write a shard, unless it is there."""
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
    # The sidecar comes first, so that every shard has one.
    write_file(sidecar, json.dumps({"places": written.places, "kept": written.kept}))
    os.replace(unfinished, path)
    return written


def _write_sample(
    tar: tarfile.TarFile, sample: _Sample, options: PackOptions, written: WrittenShard
) -> None:
    """Append an image and its label to a shard."""
    data, suffix, reason = _make_smaller(sample.source, options)
    if reason:
        written.kept.append([sample.source.name, reason])
    written.places.append([tar.offset + tarfile.BLOCKSIZE, len(data)])
    _add_member(tar, f"{sample.key}.{suffix}", data)
    _add_member(tar, f"{sample.key}.cls", str(sample.label).encode())


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _make_smaller(source: ImageSource, options: PackOptions) -> tuple[bytes, str, str | None]:
    """(bytes, suffix, why they are the original ones although they should be smaller)."""
    data = source.read()
    suffix = os.path.splitext(source.name)[1][1:].lower()
    if not options.resize and not options.quality:
        return data, suffix, None
    reason = find_fault(data)
    if reason:
        return data, suffix, reason
    resized = 0 < options.resize < min(image_size(data))
    if not options.quality and not resized:
        return data, suffix, None
    try:
        smaller = _encode_jpeg(data, options, resized)
    except ValueError as error:
        return data, suffix, str(error)
    # Pillow's plugins raise many types.
    except Exception as error:
        return data, suffix, f"{type(error).__name__}: {error}"
    if resized or len(smaller) < len(data):
        return smaller, "jpg", None
    return data, suffix, None


def _encode_jpeg(data: bytes, options: PackOptions, resized: bool) -> bytes:
    """The image as JPEG, its shorter side resized if it is to be."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            raise ValueError("it has 16 bits, which Pillow would clip")
        pixels = image.convert("RGB")
        if resized:
            width, height = image.size
            shorter = min(width, height)
            size = (width * options.resize // shorter, height * options.resize // shorter)
            pixels = pixels.resize(size, Image.Resampling.LANCZOS)
        pixels.save(buffer, "JPEG", quality=options.quality or _DEFAULT_QUALITY)
    return buffer.getvalue()
