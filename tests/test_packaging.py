"""The wheel: what is in it, and that it works outside the repository."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("resnet_dist", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# Building and installing a wheel takes seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, without isolation and so without a network."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist"), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The programs of an environment that has the wheel, and this one's libraries behind it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=300
    )
    python = folder / "bin/python"
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    # Folders in a .pth file come last, and their own .pth files (of an editable install) are not
    # read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-index", "--no-deps", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin"


def environment():
    """Without PYTHONPATH, which could name the repository."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run_outside(folder, *command):
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )


def test_the_wheel_holds_everything_that_it_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "resnet_dist").rglob("*.py")}
    recipes = {f"resnet_dist/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    data = {"resnet_dist/py.typed", "resnet_dist/data/sources/digits.npz"}
    assert len(recipes) > 50
    assert (modules | recipes | data) - names == set()
    assert {name for name in names if name.startswith(("tests/", "configs/", "slurm/"))} == set()


def test_every_package_is_listed():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "resnet_dist").rglob("__init__.py")
    }
    assert listed == found | {"resnet_dist.configs"}


def test_the_installed_package_is_not_the_repository(programs, tmp_path):
    words = "import resnet_dist, resnet_dist.cli; print(resnet_dist.__file__)"
    done = run_outside(tmp_path, str(programs / "python"), "-c", words)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(programs.parent)


def test_recipes_are_found_by_name(programs, tmp_path):
    command = [str(programs / "resnet-dist"), "train", "--config", "resnet50"]
    done = run_outside(tmp_path, *command, "--data.data_dir", "photos", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "name: resnet50\n" in done.stdout
    assert "data_dir: photos\n" in done.stdout


def test_the_quickstart_trains(programs, tmp_path):
    """Without arguments, in an empty folder, until it has logged a step; then it is interrupted."""
    log = tmp_path / "log"
    with log.open("w") as output:
        training = subprocess.Popen(
            [str(programs / "resnet-dist"), "train"],
            cwd=tmp_path,
            env={**environment(), "WANDB_MODE": "disabled"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 600
        while "train/loss" not in metrics(tmp_path) and training.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        training.send_signal(signal.SIGINT)
        code = training.wait(timeout=300)
    finally:
        training.kill()
        training.wait()
    assert code == 128 + signal.SIGINT, log.read_text()
    assert (tmp_path / "runs/quickstart/checkpoints/last.pt").exists()


def metrics(folder):
    path = folder / "runs/quickstart/metrics.jsonl"
    return path.read_text() if path.exists() else ""


def test_the_constraints_fit_the_requirements():
    """constraints.txt has a version of every direct requirement that setup.cfg allows."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    versions = dict(line.split("==") for line in lines)
    wrong = []
    for line in "\n".join(texts).split("\n"):
        if line.strip():
            requirement = Requirement(line)
            version = versions.get(requirement.name.lower())
            if version is None or version not in requirement.specifier:
                wrong.append((line, version))
    assert wrong == []
