"""Read and write files of weights: our checkpoints, .pth and .safetensors.

A checkpoint is a `torch.save` file of plain types. The comment at the end of its zip archive holds
its own SHA-256, because torch does not check the CRC sums of a zip file, and these do not cover
its headers and padding. The file `*.sha256` beside a checkpoint is for `sha256sum -c`.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
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
"""The parts of a checkpoint by name."""

# The comment of the zip file is "resnet_dist step 00000012 sha256 " and the digest. The digest is
# computed over all bytes of the file before it, so it covers the archive, its end record and the
# step.
_COMMENT_START = b"resnet_dist step "
_COMMENT = re.compile(rb"resnet_dist step (\d{8,}) sha256 ([0-9a-f]{64})\Z")
_DIGEST_LENGTH = 64

# The comment is within this number of bytes from the end of the file.
_TAIL_LENGTH = 256

# The end record of a zip file, which begins with these bytes and ends with the length of the
# comment in two bytes.
_END_RECORD_START = b"PK\x05\x06"
_END_RECORD_LENGTH = 22
_MAX_COMMENT_LENGTH = 65535

# This part of the content says that the file must have the comment. Without it, a checkpoint with a
# damaged comment would pass for one of an earlier version, which has no comment.
_SEALED = "sha256_in_zip_comment"


class DamagedError(ValueError):
    """The content of a file has changed since it was written."""


def write_checkpoint(
    path: Path,
    content: Content,
    before_publishing: Callable[[], None] | None = None,
) -> None:
    """Write a checkpoint. At every moment, `path` is absent, the old file or the new one.

    The file `<name>.sha256` is written beside it.

    Args:
        path: The file.
        content: Plain types and tensors. `read_step` finds the part "step" (0 if absent) at the end
            of the file.
        before_publishing: Called when the bytes are on the disk, and before the file gets its
            name. An exception leaves everything as it was.

    Raises:
        OSError: The file cannot be written. `path` is as it was before.
    """
    # Written to memory first, because torch.save hides the reason why a disk refuses a write.
    buffer = io.BytesIO()
    torch.save({**content, _SEALED: True}, buffer)
    step = int(content.get("step", 0))
    _append_comment(buffer, step)
    hasher = hashlib.sha256(buffer.getbuffer())
    inner_digest = hasher.hexdigest().encode()
    hasher.update(inner_digest)
    with replace_file(path, before_publishing) as file:
        file.write(buffer.getbuffer())
        file.write(inner_digest)
    # The checkpoint is valid without the file beside it, because its own digest has priority.
    with contextlib.suppress(OSError):
        write_digest(path, hasher.hexdigest())


def _append_comment(buffer: io.BytesIO, step: int) -> None:
    """Append the comment to a zip file, up to the digest, and set its length in the end record."""
    comment = b"%s%08d sha256 " % (_COMMENT_START, step)
    length = len(comment) + _DIGEST_LENGTH
    end_record = bytes(buffer.getbuffer()[-_END_RECORD_LENGTH:])
    assert end_record.startswith(_END_RECORD_START), "torch.save has not written a zip file"
    buffer.seek(-2, io.SEEK_END)
    buffer.write(length.to_bytes(2, "little"))
    buffer.write(comment)


def write_digest(path: Path, digest: str) -> None:
    """Write the file for `sha256sum -c` beside a checkpoint.

    Args:
        path: The checkpoint.
        digest: The SHA-256 of the whole checkpoint, in hexadecimal digits.

    Raises:
        OSError: The file cannot be written.
    """
    write_file(digest_path(path), f"{digest}  {path.name}\n")


def digest_path(path: Path) -> Path:
    """The file beside a checkpoint that holds its SHA-256 in the format of sha256sum."""
    return path.with_name(path.name + ".sha256")


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison of a file with its digests."""

    checked: bool
    """whether there is a digest, inside or beside the file"""
    sha256: str = ""
    """SHA-256 of the whole file, if it has a digest inside"""


def read_checkpoint(
    path: Path,
    say: Callable[[str], None] | None = None,
) -> bytes:
    """Read a file of weights, and compare it with the digest inside or beside it.

    Args:
        path: The file, or a link to it.
        say: Called with a warning if the file has no digest, so that it was not checked.

    Returns:
        The bytes of the file.

    Raises:
        ValueError: The file is missing, cannot be read, or is damaged.
    """
    payload = read_bytes(path)
    verdict = verify(payload, path)
    if not verdict.checked and say is not None:
        say(f"{printable(path)} has no SHA-256 inside or beside it: it is loaded unchecked")
    return payload


def read_bytes(path: Path) -> bytes:
    """Read a file of weights without a check of its digest.

    Raises:
        ValueError: The file is missing, cannot be read, or is empty.
    """
    try:
        payload = Path(path).read_bytes()
    except (OSError, ValueError) as problem:
        raise ValueError(f"the checkpoint {printable(path)} cannot be read: {problem}") from problem
    if not payload:
        raise DamagedError(f"the checkpoint {printable(path)} is empty")
    return payload


def verify(payload: bytes, path: Path) -> Verdict:
    """Compare a file with the digest inside it, or else with the one beside it.

    The digest inside has priority. If a process is killed between the two writes, the file beside
    the checkpoint is still that of an earlier save.

    Args:
        payload: The bytes of the file.
        path: The file.

    Raises:
        DamagedError: The bytes do not match the digest, or the file is truncated.
        ValueError: The file with the digest cannot be read.
    """
    comment = _COMMENT.search(payload[-_TAIL_LENGTH:])
    if comment is not None:
        inner_digest = comment[2]
        hasher = hashlib.sha256(memoryview(payload)[:-_DIGEST_LENGTH])
        if hasher.hexdigest().encode() != inner_digest:
            raise DamagedError(
                f"the checkpoint {printable(path)} is damaged: its SHA-256 is not the one at its "
                "end"
            )
        hasher.update(inner_digest)
        return Verdict(checked=True, sha256=hasher.hexdigest())
    expected = _read_digests(path)
    if expected and hashlib.sha256(payload).hexdigest() not in expected:
        raise DamagedError(
            f"the checkpoint {printable(path)} is damaged: its SHA-256 is not the one in "
            f"{printable(digest_path(path).name)}"
        )
    is_zip_file = payload.startswith(b"PK")
    if is_zip_file and not _ends_as_announced(payload):
        raise DamagedError(f"the checkpoint {printable(path)} is damaged: it is cut off")
    return Verdict(checked=bool(expected))


def _ends_as_announced(payload: bytes) -> bool:
    """Whether a zip file ends after a comment of the length that its end record contains."""
    max_length = _END_RECORD_LENGTH + _MAX_COMMENT_LENGTH
    search_from = max(0, len(payload) - max_length)
    start = payload.rfind(_END_RECORD_START, search_from)
    if start < 0:
        return False
    end = start + _END_RECORD_LENGTH
    comment_length = int.from_bytes(payload[end - 2 : end], "little")
    return len(payload) == end + comment_length


def _read_digests(path: Path) -> list[str]:
    """Read the digests in the file beside a checkpoint.

    Earlier versions wrote two digests while they were saving.

    Returns:
        The digests. Empty if there is no such file.

    Raises:
        ValueError: The file cannot be read.
    """
    # last.pt and best.pt are links, and the digest is beside the file that they point to.
    target = Path(os.path.realpath(path))
    beside = digest_path(target)
    try:
        lines = beside.read_text().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{printable(beside)} cannot be read: {problem}") from problem
    digests = []
    for line in lines:
        words = line.split()
        if words:
            digests.append(words[0])
    return digests


def read_step(path: Path) -> int | None:
    """Read the step at the end of a checkpoint.

    The file is not checked. Use the step only to decide which file to try first.

    Returns:
        The step, or None for a checkpoint of an earlier version or a file that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - _TAIL_LENGTH))
            tail = file.read()
    except OSError:
        return None
    comment = _COMMENT.search(tail)
    if comment is None:
        return None
    return int(comment[1])


def unpack_weights(payload: bytes, name: str) -> Content:
    """Decode a file of weights. No code in it is run.

    Args:
        payload: The bytes of the file.
        name: The file name. The suffix .safetensors selects that format; other files are those of
            `torch.save`.

    Returns:
        The content. Empty if it is not a dictionary.

    Raises:
        ValueError: The file is damaged, needs Python objects other than tensors and plain types, or
            safetensors is not installed.
    """
    if name.endswith(".safetensors"):
        return _unpack_safetensors(payload, name)
    # torchvision and timm save their settings as argparse.Namespace, which only holds values.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                io.BytesIO(payload),
                map_location="cpu",
                weights_only=True,
            )
    # torch raises many types for a file in another format.
    except Exception as problem:
        raise ValueError(_why_not_loaded(problem, name)) from problem
    if not isinstance(content, dict):
        return {}
    has_comment = _COMMENT.search(payload[-_TAIL_LENGTH:]) is not None
    if content.get(_SEALED) and not has_comment:
        raise DamagedError(
            f"the checkpoint {printable(name)} is damaged: the SHA-256 at its end is gone"
        )
    return content


def _unpack_safetensors(payload: bytes, name: str) -> Content:
    """Decode a .safetensors file.

    Raises:
        ValueError: The file is damaged, or safetensors is not installed.
    """
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


def read_metadata(payload: bytes, name: str) -> dict[str, str]:
    """The texts that a .safetensors file holds beside its tensors.

    Args:
        payload: The bytes of the file, which `unpack_weights` has accepted.
        name: The file name.

    Returns:
        The texts by name; empty for another kind of file, and for a file without texts.
    """
    if not name.endswith(".safetensors"):
        return {}
    # The file begins with the length of its header, which is JSON.
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    return metadata


def _why_not_loaded(problem: Exception, name: str) -> str:
    """The error message for an exception of torch.load or safetensors."""
    text = str(problem)
    unsafe = re.search(r"GLOBAL (\S+)", text)
    if unsafe is None:
        # Only the first sentence: torch continues with the advice to run the code in the file.
        reason = printable(text.split(". ")[0])
        return f"{printable(name)} is damaged, or no file of torch.save or safetensors: {reason}"
    return (
        f"{printable(name)} needs Python objects ({printable(unsafe[1])}), which may run any "
        "code: it is not loaded. Let the program that made it save the tensors alone: torch.save("
        "{'state_dict': model.state_dict()}, 'weights.pth')"
    )


# The checks of the parts of a checkpoint. In Python, True and False are integers too.


def _is_step(value: object) -> bool:
    """Whether a part is a number of steps; -1 stands for none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) and value >= -1


def _is_number(value: object) -> bool:
    """Whether a part is a number."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float))


def _is_text(value: object) -> bool:
    """Whether a part is a string."""
    return isinstance(value, str)


def _is_dict(value: object) -> bool:
    """Whether a part is a dictionary whose keys are strings."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(key, str) for key in value)


def _is_weights(value: object) -> bool:
    """Whether a part is a dictionary of tensors."""
    if not isinstance(value, dict) or not _is_dict(value):
        return False
    return all(isinstance(item, torch.Tensor) for item in value.values())


def _is_weights_or_none(value: object) -> bool:
    """Whether a part is a dictionary of tensors or None."""
    return value is None or _is_weights(value)


def _is_optimizer(value: object) -> bool:
    """Whether a part has the structure of the state dict of an optimizer."""
    if not isinstance(value, dict):
        return False
    states = value.get("state")
    if not isinstance(states, dict):
        return False
    if not isinstance(value.get("param_groups"), list):
        return False
    return all(_is_dict(state) for state in states.values())


def _is_config(value: object) -> bool:
    """Whether a part is a dictionary in which each known section is a dictionary of settings."""
    if not isinstance(value, dict) or not _is_dict(value):
        return False
    for name, default in to_dict(Config()).items():
        is_section = isinstance(default, dict)
        if is_section and not _is_dict(value.get(name, {})):
            return False
    return True


def _is_names(value: object) -> bool:
    """Whether a part is a list of at least one string."""
    if not isinstance(value, list) or not value:
        return False
    return all(_is_text(item) for item in value)


# For each part of a checkpoint, its check, and how the error message describes the part.
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
"""Parts of a checkpoint that a run needs to continue."""

NEEDED_TO_EVALUATE = (
    "step",
    "model",
    "ema",
    "config",
    "class_names",
)
"""Parts of a checkpoint that commands such as evaluate and predict need."""


def unpack_checkpoint(
    payload: bytes,
    name: str,
    needed: tuple[str, ...] = (),
) -> Content:
    """Decode one of our checkpoints, and check its parts.

    Args:
        payload: The bytes of the file, as `read_checkpoint` returns them.
        name: The file name, for error messages.
        needed: The required parts: `NEEDED_TO_RESUME` or `NEEDED_TO_EVALUATE`.

    Raises:
        ValueError: The file is not one of our checkpoints or has a newer format, a required part is
            missing, or a part is of the wrong type.
    """
    content = unpack_weights(payload, name)
    if "format" not in content or "model" not in content:
        raise ValueError(
            f"{printable(name)} is not a checkpoint of resnet_dist: it has no 'format' and 'model'"
        )
    refuse_newer(content, name)
    for part, (is_right, description) in _PARTS.items():
        if part in content and not is_right(content[part]):
            raise ValueError(
                f"the checkpoint {printable(name)} cannot be used: its part {part!r} is not "
                f"{description}"
            )
        if part in needed and part not in content:
            raise ValueError(
                f"the checkpoint {printable(name)} cannot be used: it has no part {part!r}"
            )
    return content


def refuse_newer(content: Content, name: str) -> None:
    """Refuse a checkpoint in a newer format.

    Args:
        content: The content of the checkpoint.
        name: The file name, for error messages.

    Raises:
        ValueError: The format is newer than `FORMAT`.
    """
    number = content.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(
            f"{printable(name)} has format {number}, this version reads up to {FORMAT}: update it"
        )
