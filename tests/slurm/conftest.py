"""A SLURM cluster of six nodes for the tests of this folder: the one that SLURM_CONF names, or one
of our own.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch")


@pytest.fixture(scope="session")
def cluster():
    """The cluster's folder (None for a cluster that is not ours), with SLURM_CONF set."""
    if os.environ.get("SLURM_CONF"):
        yield None
        return
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    reason = (
        f"SLURM is not installed: no {', '.join(missing)}"
        if missing
        else "only root can start a cluster"
    )
    if missing or os.geteuid() != 0:
        # A skip in CI would let the whole of it rot.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder = Path(
        tempfile.mkdtemp(prefix="slurm.", dir="/tmp")
    )  # pytest's own folders are closed to munge
    folder.chmod(0o755)
    port = 16800 + os.getpid() % 300 * 10
    try:
        subprocess.run(
            [str(HERE / "start.sh"), str(folder), "6", str(port)], check=True, timeout=300
        )
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([str(HERE / "stop.sh"), str(folder)], timeout=300)
        shutil.rmtree(folder, ignore_errors=True)
