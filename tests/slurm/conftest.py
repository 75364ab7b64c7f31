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
    if missing:
        refuse(f"SLURM is not installed: no {', '.join(missing)}")
    if os.geteuid() != 0:
        refuse("only root can start a cluster")
    # Pytest's own folders are closed to munge.
    folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))
    folder.chmod(0o755)
    num_nodes = "6"
    port = 16800 + os.getpid() % 300 * 10
    try:
        command = [str(HERE / "start.sh"), str(folder), num_nodes, str(port)]
        subprocess.run(command, check=True, timeout=300)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield folder
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([str(HERE / "stop.sh"), str(folder)], timeout=300)
        shutil.rmtree(folder, ignore_errors=True)


def refuse(reason):
    """Skip the tests. In CI they fail: a skip there would let the whole of it rot."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
