"""What torch.compile has compiled, kept in output_dir, so that a restart does not pay again.

Inductor's own cache is a folder of the machine. A run that is requeued comes to another machine, or
finds the folder empty. The file of a rank holds what this rank has compiled. It is executable code:
it is read from the run's own output_dir alone, and only if this user has written it.
"""

import hashlib
import os
from pathlib import Path

import torch

from resnet_dist.distributed.runtime import Runtime
from resnet_dist.files import write_file
from resnet_dist.logs.log import Log
from resnet_dist.text import printable

FOLDER = "compile_cache"
"""folder in output_dir"""

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_path(output_dir: str, local_rank: int) -> Path:
    """The file of a rank. The graphs of a rank name its GPU, hence a file for each local rank."""
    return Path(output_dir) / FOLDER / f"local_rank_{local_rank}.bin"


def load_compile_cache(output_dir: str, runtime: Runtime, log: Log) -> None:
    """Fill inductor's cache from the file of this rank, if there is one that can be used."""
    path = cache_path(output_dir, runtime.local_rank)
    try:
        content = read_own(path)
    except (OSError, ValueError) as problem:
        log.warn(f"{printable(path)} is ignored, and the network compiled anew: {problem}")
        return
    if content:
        # Torch itself passes over what another version has written.
        torch.compiler.load_cache_artifacts(content)


def read_own(path: Path) -> bytes:
    """Read a file of this user and check its digest; empty if there is no file.

    Raises:
        ValueError: It belongs to another user, or it is damaged.
        OSError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            owner = os.fstat(file.fileno()).st_uid
            data = file.read()
    except FileNotFoundError:
        return b""
    if owner != os.getuid():
        raise ValueError("it is executable and belongs to another user")
    digest = data[:_DIGEST_BYTES]
    content = data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("it is damaged")
    return content


def save_compile_cache(output_dir: str, runtime: Runtime, log: Log) -> None:
    """Write what this rank has compiled; the ranks of the first machine do it."""
    if runtime.rank != runtime.local_rank:
        return
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return
    content = saved[0]
    digest = hashlib.sha256(content).digest()
    path = cache_path(output_dir, runtime.local_rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, digest + content)
    except OSError as problem:
        log.warn(f"{printable(path)} cannot be written: {problem}")
