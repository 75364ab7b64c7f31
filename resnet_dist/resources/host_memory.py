"""The memory of this machine that a process may still use."""

import contextlib
from pathlib import Path

# Where control groups of version 2, and the memory controller of version 1, are mounted.
_GROUP_V2 = Path("/sys/fs/cgroup")
_GROUP_V1 = Path("/sys/fs/cgroup/memory")
_OWN_GROUPS = Path("/proc/self/cgroup")


def free_host_memory() -> int:
    """The memory that the processes of a job may still use on this machine, in bytes.

    This is the free memory of the machine, or of the control group (of a container or a SLURM job)
    if that is less.
    """
    return min([_free_on_machine(), *_free_in_control_groups()])


def _free_on_machine() -> int:
    """The free memory of the machine, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            kibibytes = value.split()[0]
            return int(kibibytes) * 1024
    raise OSError("/proc/meminfo does not say MemAvailable")


def _free_in_control_groups() -> list[int]:
    """The free memory of the control group and of those above it; empty if none has a limit."""
    free = []
    for folder in _folders_of_groups(_GROUP_V2, ""):
        free += _free_in_group(folder, "memory.max", "memory.current", "inactive_file")
    for folder in _folders_of_groups(_GROUP_V1, "memory"):
        free += _free_in_group(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        )
    return free


def _folders_of_groups(mount: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of the groups above it.

    Args:
        mount: Where the hierarchy is mounted.
        controller: The controller of version 1; "" for version 2.
    """
    own = ""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = path.strip("/")
    folder = mount / own
    return [folder, *[above for above in folder.parents if above.is_relative_to(mount)]]


def _free_in_group(folder: Path, limit: str, use: str, reclaimable: str) -> list[int]:
    """The free memory of one control group, in bytes; empty if it has no limit.

    Args:
        folder: The folder of the group.
        limit: The name of the file with the limit.
        use: The name of the file with the memory in use, which includes cached files.
        reclaimable: The name in memory.stat of the cached files that the kernel may drop.
    """
    try:
        free = int((folder / limit).read_text()) - int((folder / use).read_text())
    except (OSError, ValueError):
        # There is no group of this version, or its limit is "max".
        return []
    statistics = ""
    with contextlib.suppress(OSError):
        statistics = (folder / "memory.stat").read_text()
    for line in statistics.splitlines():
        name, _, value = line.partition(" ")
        if name == reclaimable:
            free += int(value)
    return [free]
