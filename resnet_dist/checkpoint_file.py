"""One file of weights: write a checkpoint of ours, and read a checkpoint, .pth or .safetensors.

A checkpoint is a `torch.save` file of plain types. It carries its own SHA-256 in the comment at the
end of the zip archive, because the CRC sums of a zip file cover neither its headers nor its
padding, and torch does not check them. `sha256sum -c` can check the file beside it, `*.sha256`.
"""

import argparse
import contextlib
import hashlib
import io
import os
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_dist.config import Config, to_dict
from resnet_dist.files import replace_file, write_file
from resnet_dist.text import printable

FORMAT = 1
"""Version of the content of our checkpoints."""

Content = dict[str, Any]
"""What a checkpoint holds, by name of the part."""

# The comment of the zip file: "resnet_dist step 00000012 sha256 " and the digest. The digest is
# that of all bytes of the file before it, so it covers the zip file, its end record and the step.
_MARK = b"resnet_dist step "
_COMMENT = re.compile(rb"resnet_dist step (\d{8,}) sha256 ([0-9a-f]{64})\Z")
_DIGITS = 64
_TAIL = 256
_END_RECORD = b"PK\x05\x06"
_END_RECORD_SIZE = 22
_MAX_COMMENT = 65535

# The part of the content that says that the file must have the comment, so that a damaged comment
# is not taken for an older file without one.
_SEALED = "sha256_in_zip_comment"


class DamagedError(ValueError):
    """A file is not what was once written to it."""


def write_checkpoint(
    path: Path, content: Content, before_publishing: Callable[[], None] | None = None
) -> None:
    """Write `content` so that at every moment `path` is absent, the old file or the new one.

    Args:
        path: The file. The file `<name>.sha256` is written beside it, for sha256sum.
        content: Plain types and tensors. The part "step" (0 if absent) is readable from the end
            of the file, see `read_step`.
        before_publishing: Called when the bytes are on the disk; it may raise to leave all as it
            was.

    Raises:
        OSError: The file cannot be written. `path` is then as it was before.
    """
    # Into memory first: torch.save hides why a disk refuses a write.
    buffer = io.BytesIO()
    torch.save({**content, _SEALED: True}, buffer)
    _announce_comment(buffer, int(content.get("step", 0)))
    digest = hashlib.sha256(buffer.getbuffer())
    inside = digest.hexdigest().encode()
    digest.update(inside)
    with replace_file(path, before_publishing) as file:
        file.write(buffer.getbuffer())
        file.write(inside)
    # The digest inside is the one that counts: the checkpoint is good, whatever happens from here.
    with contextlib.suppress(OSError):
        write_digest(path, digest.hexdigest())


def _announce_comment(buffer: io.BytesIO, step: int) -> None:
    """Append all but the digest of the comment to a zip file, and set its length there."""
    comment = b"%s%08d sha256 " % (_MARK, step)
    record = bytes(buffer.getbuffer()[-_END_RECORD_SIZE:])
    assert record.startswith(_END_RECORD), "torch.save has not written a zip file"
    buffer.seek(-2, io.SEEK_END)
    buffer.write((len(comment) + _DIGITS).to_bytes(2, "little"))
    buffer.write(comment)


def write_digest(path: Path, digest: str) -> None:
    """Write the file that `sha256sum -c` reads, beside the checkpoint `path`. Raises OSError."""
    write_file(digest_path(path), f"{digest}  {path.name}\n")


def digest_path(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256 in the format of sha256sum."""
    return path.with_name(path.name + ".sha256")


@dataclass(frozen=True)
class Verdict:
    """What the digests inside and beside a file say about it."""

    checked: bool
    """whether there is any digest"""
    sha256: str = ""
    """digest of the whole file, as sha256sum prints it, where the file carries a digest inside"""


def read_checkpoint(path: Path, say: Callable[[str], None] | None = None) -> bytes:
    """The bytes of a file of weights, checked against the digest inside or beside it.

    Args:
        path: The file, or a link to it.
        say: Called with one line if the file has neither digest, so that nothing was checked.

    Raises:
        ValueError: The file is missing, cannot be read, or is damaged.
    """
    payload = read_bytes(path)
    if not verify(payload, path).checked and say is not None:
        say(f"{printable(path)} has no SHA-256 inside or beside it: it is loaded unchecked")
    return payload


def read_bytes(path: Path) -> bytes:
    """The bytes of a file of weights. Raises ValueError if it cannot be read or is empty."""
    try:
        payload = Path(path).read_bytes()
    except (OSError, ValueError) as problem:
        raise ValueError(f"the checkpoint {printable(path)} cannot be read: {problem}") from problem
    if not payload:
        raise DamagedError(f"the checkpoint {printable(path)} is empty")
    return payload


def verify(payload: bytes, path: Path) -> Verdict:
    """Compare the bytes of the file `path` with the digest inside, or else with the one beside it.

    The digest inside decides where there is one: the file beside may be of an earlier save, if a
    process was killed between the two writes.

    Raises:
        DamagedError: The bytes do not match, or the file is cut off.
        ValueError: The file with the digest cannot be read.
    """
    comment = _COMMENT.search(payload[-_TAIL:])
    if comment is not None:
        digest = hashlib.sha256(memoryview(payload)[:-_DIGITS])
        if digest.hexdigest().encode() != comment[2]:
            raise DamagedError(
                f"the checkpoint {printable(path)} is damaged: its SHA-256 is not the one at its "
                "end"
            )
        digest.update(comment[2])
        return Verdict(True, digest.hexdigest())
    expected = _read_digests(path)
    if expected and hashlib.sha256(payload).hexdigest() not in expected:
        raise DamagedError(
            f"the checkpoint {printable(path)} is damaged: its SHA-256 is not the one in "
            f"{printable(digest_path(path).name)}"
        )
    if payload.startswith(b"PK") and not _ends_as_announced(payload):
        raise DamagedError(f"the checkpoint {printable(path)} is damaged: it is cut off")
    return Verdict(bool(expected))


def _ends_as_announced(payload: bytes) -> bool:
    """Whether a zip file ends behind a comment of the length that its end record announces."""
    start = payload.rfind(_END_RECORD, max(0, len(payload) - _END_RECORD_SIZE - _MAX_COMMENT))
    if start < 0:
        return False
    comment = start + _END_RECORD_SIZE
    announced = int.from_bytes(payload[comment - 2 : comment], "little")
    return len(payload) == comment + announced


def _read_digests(path: Path) -> list[str]:
    """The digests in the file beside `path`; older versions wrote two while they saved."""
    # last.pt and best.pt are links, and the digest is beside the file.
    beside = digest_path(Path(os.path.realpath(path)))
    try:
        lines = beside.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{printable(beside)} cannot be read: {problem}") from problem
    return [line.split()[0] for line in lines if line.strip()]


def read_step(path: Path) -> int | None:
    """The step that the end of a checkpoint names; None for an older or unreadable file.

    It is read without a check of the whole file: it may only decide which file is tried first.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
    except OSError:
        return None
    match = _COMMENT.search(tail)
    return int(match[1]) if match else None


def unpack_weights(payload: bytes, name: str) -> Content:
    """The content of a file of weights from its bytes; no code in it is run.

    Reads files of torch.save and safetensors. `argparse.Namespace`, in which torchvision and timm
    save their settings, is let through: it only holds values.

    Raises:
        ValueError: The file is damaged, needs other Python objects, or safetensors is not
            installed.
    """
    if name.endswith(".safetensors"):
        return _unpack_safetensors(payload, name)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises a dozen types for a file that is none of its own
        raise ValueError(_why_not_loaded(problem, name)) from problem
    if not isinstance(content, dict):
        return {}
    if content.get(_SEALED) and not _COMMENT.search(payload[-_TAIL:]):
        raise DamagedError(
            f"the checkpoint {printable(name)} is damaged: the SHA-256 at its end is gone"
        )
    return content


def _unpack_safetensors(payload: bytes, name: str) -> Content:
    try:
        from safetensors.torch import load
    except ImportError as problem:
        raise ValueError(
            f"{printable(name)} needs safetensors: pip install 'resnet-dist[export]' ({problem})"
        ) from problem
    try:
        content: Content = load(payload)
    except Exception as problem:
        raise ValueError(_why_not_loaded(problem, name)) from problem
    return content


def _why_not_loaded(problem: Exception, name: str) -> str:
    """A sentence for an error of torch.load or safetensors."""
    objects = re.search(r"GLOBAL (\S+)", str(problem))
    if objects is None:
        # torch goes on with the advice to run the code in the file.
        reason = printable(str(problem).split(". ")[0])
        return f"{printable(name)} is damaged, or no file of torch.save or safetensors: {reason}"
    return (
        f"{printable(name)} needs Python objects ({printable(objects[1])}), which may run any "
        "code: it is not loaded. Let the program that made it save the tensors alone: torch.save("
        "{'state_dict': model.state_dict()}, 'weights.pth')"
    )


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= -1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_weights(value: object) -> bool:
    if not isinstance(value, dict) or not _is_dict(value):
        return False
    return all(isinstance(item, torch.Tensor) for item in value.values())


def _is_weights_or_none(value: object) -> bool:
    return value is None or _is_weights(value)


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    states = value["state"].values()
    return isinstance(value.get("param_groups"), list) and all(map(_is_dict, states))


def _is_config(value: object) -> bool:
    """Whether every section of our config that is there holds settings."""
    if not isinstance(value, dict) or not _is_dict(value):
        return False
    sections = [key for key, default in to_dict(Config()).items() if isinstance(default, dict)]
    return all(_is_dict(value.get(section, {})) for section in sections)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))


# What each part of a checkpoint must be, and how an error says it.
_PARTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "step": (_is_step, "a number of steps"),
    "evaluated_step": (_is_step, "a number of steps"),
    "best_step": (_is_step, "a number of steps"),
    "best_top1": (_is_number, "a number"),
    "model": (_is_weights, "tensors by name"),
    "ema": (_is_weights_or_none, "tensors by name, or None"),
    "optimizer": (_is_optimizer, "the state dict of an optimizer"),
    "scaler": (_is_dict, "the state dict of a GradScaler"),
    "config": (_is_config, "settings by section"),
    "class_names": (_is_names, "a list of names"),
    "num_samples": (_is_step, "a number of images"),
    "fingerprint": (_is_text, "a text"),
}
NEEDED_TO_RESUME = tuple(_PARTS)
NEEDED_TO_EVALUATE = ("step", "model", "ema", "config", "class_names")


def unpack_checkpoint(payload: bytes, name: str, needed: tuple[str, ...] = ()) -> Content:
    """The content of a checkpoint of ours from its bytes.

    Args:
        payload: The bytes of the file, as `read_checkpoint` returns them.
        name: How messages call the file.
        needed: Parts that must be there, `NEEDED_TO_RESUME` or `NEEDED_TO_EVALUATE`.

    Raises:
        ValueError: It is not a checkpoint of ours, of a newer format, lacks a needed part, or a
            part is not of the right kind.
    """
    content = unpack_weights(payload, name)
    if "format" not in content or "model" not in content:
        raise ValueError(
            f"{printable(name)} is not a checkpoint of resnet_dist: it has no 'format' and 'model'"
        )
    refuse_newer(content, name)
    for part, (is_right, words) in _PARTS.items():
        if part in content and not is_right(content[part]):
            raise ValueError(
                f"the checkpoint {printable(name)} cannot be used: its part {part!r} is not {words}"
            )
        if part in needed and part not in content:
            raise ValueError(
                f"the checkpoint {printable(name)} cannot be used: it has no part {part!r}"
            )
    return content


def refuse_newer(content: Content, name: str) -> None:
    """Raise ValueError for a checkpoint of a newer format than this version can read."""
    number = content.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{printable(name)} has format {number}, this version reads up to {FORMAT}: update it"
        )


def download_weights(name: str) -> bytes:
    """The file of torchvision's weights `torchvision:<model>:<weights>`.

    It comes from the cache of torch.hub, or from the network and is then kept there.

    Raises:
        ValueError: The name is unknown, the file cannot be had, or its SHA-256 does not begin with
            the digits in its name.
    """
    weights = _torchvision_weights(name)
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    timeout = socket.getdefaulttimeout()
    # Without a time-out a server that has fallen silent would be waited for.
    socket.setdefaulttimeout(60.0)
    try:
        weights.get_state_dict(
            model_dir=str(path.parent),
            progress=sys.stderr.isatty(),
            check_hash=True,
            weights_only=True,
            map_location="cpu",
        )
        payload = path.read_bytes()
    except Exception as problem:  # of the network, the disk, the file: dozens of types
        raise ValueError(
            f"checkpoint.init_from is {name!r}: {weights.url} could not be had ({problem}). Where "
            f"there is no network, fetch it elsewhere, and put it to {path} or give its path as "
            "checkpoint.init_from"
        ) from problem
    finally:
        socket.setdefaulttimeout(timeout)
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if digest and not hashlib.sha256(payload).hexdigest().startswith(digest[1]):
        raise ValueError(
            f"{path} is damaged: its SHA-256 does not begin with {digest[1]}; delete it"
        )
    return payload


def _torchvision_weights(name: str) -> Any:  # noqa: ANN401  torchvision has no types
    """The entry of torchvision's catalogue for `torchvision:<model>:<weights>`."""
    from torchvision.models import get_model_weights, list_models

    model, _, kind = name.removeprefix("torchvision:").partition(":")
    kinds = get_model_weights(model).__members__ if model in list_models() else {}
    if kind not in kinds:
        known = ", ".join(f"torchvision:{model}:{kind}" for kind in kinds)
        raise ValueError(
            f"checkpoint.init_from is {name!r}: torchvision has no such weights, only "
            f"{known or 'those of its own models'}"
        )
    return kinds[kind]
