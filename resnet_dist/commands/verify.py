"""`resnet-dist data verify`: what is unusual about each image of a data set, before a run finds
out.
"""

import argparse
import contextlib
import hashlib
import io
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnet_dist.console import Progress
from resnet_dist.data.pixels.dali import Decoder, LoadedJob, Portion, windows_to_torch
from resnet_dist.data.pixels.read import Encoded, load
from resnet_dist.data.sampling.crops import Geometry, whole_windows
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.sources.index import Index, write_whole
from resnet_dist.data.sources.pack import open_splits

KINDS = ("broken", "disagreement", "not_jpeg", "cmyk", "grayscale", "rotated", "tiny", "duplicate")
"""broken: of no use to training; disagreement: DALI or Pillow alone decodes it, or their pixels are
over 2 apart
"""


def run(args: argparse.Namespace) -> int:
    """Examine every image of args.data_dir, on the CPU. Returns 1 if one is broken; ValueError
    without images.
    """
    found, same, local = {kind: [] for kind in KINDS}, {}, threading.local()

    def examine(split: str, index: Index, rows: range) -> None:
        if not hasattr(local, "decoder"):
            local.decoder = Decoder(local_batch_size=1, threads=1, device=torch.device("cpu"))
        for image in (load(index, row) for row in rows):
            name = f"{split}/{index.name(image.row)}"
            for kind, detail in _findings(image, local.decoder, args.tiny):
                found[kind].append((name, detail))
            if image.data:
                same.setdefault(hashlib.blake2b(image.data, digest_size=32).digest(), []).append(
                    name
                )
            bar.update()

    splits = open_splits(args.data_dir)
    jobs = [
        (split, index, range(start, min(start + 64, len(index))))
        for split, index in splits.items()
        for start in range(0, len(index), 64)
    ]
    total = sum(map(len, splits.values()))
    with (
        Progress(total, "verify") as bar,
        ThreadPoolExecutor(args.workers) as pool,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        list(pool.map(examine, *zip(*jobs, strict=True)))
    # The first is kept: one of val/ where there is one, since its twin in train/ would tell the
    # answer.
    groups = [
        sorted(names, key=lambda name: (name.startswith("train/"), name)) for names in same.values()
    ]
    found["duplicate"] = [(name, f"as {names[0]}") for names in groups for name in names[1:]]
    found, text = (
        {kind: sorted(entries) for kind, entries in found.items()},
        [f"{total} images in {args.data_dir}"],
    )
    for kind, entries in found.items():
        text += [f"{len(entries)} {kind}", *(f"  {name}: {detail}" for name, detail in entries)]
    report = {"data_dir": args.data_dir, "images": total, **found}
    left_out = {
        name
        for kind in ("broken", "duplicate")[: 1 + args.exclude_duplicates]
        for name, _ in found[kind]
    }
    for path, lines in (
        (args.report, [json.dumps(report, indent=1)]),
        (Path(args.report).with_suffix(".txt"), text),
        (args.write_exclude, sorted(name for name in left_out if name.startswith("train/"))),
    ):
        if path:
            write_whole(
                path, "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
            )
    print("\n".join([*text[:50], f"report: {args.report}"]).encode("utf-8", "replace").decode())
    return 1 if found["broken"] else 0


def _findings(image: Encoded, decoder: Decoder, tiny: int) -> list[tuple[str, str]]:
    """The (kind, detail) that apply to one image."""
    found, theirs, problem = [], None, ""
    ours = None if image.reason else _decode(image, decoder)
    if ours is None:
        found.append(("broken", image.reason or "the decoder refuses it"))
    try:
        with Image.open(io.BytesIO(image.data)) as picture:
            theirs, orientation = np.asarray(picture.convert("RGB")), 1
            with contextlib.suppress(Exception):  # damaged metadata is no damaged image
                orientation = picture.getexif().get(0x0112, 1)
        found += [
            (kind, str(detail))
            for kind, detail, applies in (
                ("not_jpeg", picture.format, picture.format not in ("JPEG", "MPO")),
                ("cmyk", picture.mode, picture.mode == "CMYK"),
                ("grayscale", picture.mode, picture.mode[0] in "1LI"),
                (
                    "rotated",
                    f"EXIF orientation {orientation}, which training ignores",
                    orientation not in (0, 1),
                ),
                ("tiny", "{} x {}".format(*picture.size), min(picture.size) < tiny),
            )
            if applies
        ]
    except Exception as error:  # Pillow's plugins raise what they like
        problem = f"{type(error).__name__}: {error}"
    if (ours is None) != (theirs is None):
        found.append(("disagreement", problem or "Pillow alone decodes it"))
    elif ours is not None and (
        ours.shape != theirs.shape or np.abs(ours.astype(np.int16) - theirs).max() > 2
    ):
        found.append(("disagreement", "Pillow decodes it to other pixels"))
    return found


def _decode(image: Encoded, decoder: Decoder) -> np.ndarray | None:
    """The whole image as training decodes it, uint8 [h, w, 3]; None when it cannot."""
    window = whole_windows(np.array([image.height]), np.array([image.width]))
    geometry = Geometry(window, (), np.zeros(1, np.int64))
    job = val_job(np.array([image.row]))
    try:
        decoder.submit(Portion(LoadedJob(job, [image], geometry), 0, 1))
        return windows_to_torch(decoder.collect()[1][0])[0].numpy()
    except RuntimeError:
        decoder.pending.clear()
        decoder.restart()
        return None
