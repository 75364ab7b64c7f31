"""Folders and archives of files for the tests of the data commands, and a process to be killed."""

import io
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

from dist_utils import TIMEOUT_SECONDS, begin_forked_process


def write_tree(folder, files):
    """Write {name: bytes} below `folder`; returns `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder):
    """{name: bytes} of all files below `folder` that are not hidden."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def modification_times(folder, names):
    """{name: time in nanoseconds} of files below `folder`."""
    return {name: (folder / name).stat().st_mtime_ns for name in names}


def tar_bytes(files, mode="w"):
    """A tar of {name: bytes or a TarInfo without content}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def members_of_shards(folder):
    """{name: bytes} of all tar files in `folder`, in order."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    return found


def run_and_kill(function, count, *arguments):
    """Run `function` in a process that gets SIGKILL at its `count`-th flush to the disk or
    rename.
    """
    num_calls = 0

    def counted(original):
        def call(*args):
            nonlocal num_calls
            num_calls += 1
            if num_calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    def body():
        begin_forked_process()
        os.fsync = counted(os.fsync)
        os.replace = counted(os.replace)
        function(*arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(TIMEOUT_SECONDS)
    is_hanging = process.is_alive()
    process.kill()
    process.join()
    assert not is_hanging, f"{function.__name__} was still running after {TIMEOUT_SECONDS} s"
    assert process.exitcode == -signal.SIGKILL
