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
from dist_utils import whole_lines
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("resnet_dist", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# Building and installing a wheel takes seconds.
pytestmark = pytest.mark.slow


def run_pip(command, *options, **more):
    """Run a command of pip, which must succeed."""
    words = [sys.executable, "-m", "pip", *command, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*words, *options],
        capture_output=True,
        text=True,
        timeout=600,
        **more,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, without isolation and so without a network."""
    source = tmp_path_factory.mktemp("source")
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=without_caches)
        else:
            shutil.copy2(path, source / name)
    output = source / "dist"
    run_pip(
        ["wheel"],
        "--no-deps",
        "--no-build-isolation",
        *("--wheel-dir", str(output)),
        ".",
        cwd=source,
    )
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory):
    """The programs of an environment that has the wheel, and this one's libraries behind it."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder)],
        check=True,
        timeout=300,
    )
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    libraries = sysconfig.get_path("purelib")
    # Folders in a .pth file come last, and their own .pth files (of an editable install) are not
    # read.
    (site / "libraries.pth").write_text(f"{libraries}\n")
    run_pip(
        ["--python", str(folder / "bin/python"), "install"],
        "--no-index",
        "--no-deps",
        str(wheel),
    )
    return folder / "bin"


@pytest.fixture(autouse=True)
def without_pythonpath(monkeypatch):
    """PYTHONPATH could name the repository."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


def run_outside(folder, program, *arguments):
    """Run a program of the environment in a folder outside the repository."""
    return subprocess.run(
        [str(program), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_wheel_holds_everything_that_it_needs(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    needed = {
        "resnet_dist/py.typed",
        "resnet_dist/data/sources/digits.npz",
    }
    for path in (ROOT / "resnet_dist").rglob("*.py"):
        needed.add(str(path.relative_to(ROOT)))
    recipes = list((ROOT / "configs").glob("*.yaml"))
    assert len(recipes) > 50
    for path in recipes:
        needed.add(f"resnet_dist/configs/{path.name}")
    assert needed - packed == set()

    outside = ("tests/", "configs/", "slurm/")
    assert [name for name in packed if name.startswith(outside)] == []


def read_setup():
    """The content of setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_every_package_is_listed():
    listed = read_setup()["options"]["packages"].split()
    expected = {"resnet_dist.configs"}
    for path in (ROOT / "resnet_dist").rglob("__init__.py"):
        folder = path.parent.relative_to(ROOT)
        expected.add(".".join(folder.parts))
    assert set(listed) == expected


def test_the_installed_package_is_not_the_repository(programs, tmp_path):
    program = "import resnet_dist, resnet_dist.cli; print(resnet_dist.__file__)"
    done = run_outside(tmp_path, programs / "python", "-c", program)
    assert done.returncode == 0, done.stderr
    imported = Path(done.stdout.strip())
    assert imported.is_relative_to(programs.parent)


def test_recipes_are_found_by_name(programs, tmp_path):
    done = run_outside(
        tmp_path,
        programs / "resnet-dist",
        "train",
        *("--config", "resnet50"),
        *("--data.data_dir", "photos"),
        "--print_config",
    )
    assert done.returncode == 0, done.stderr
    assert "name: resnet50\n" in done.stdout
    assert "data_dir: photos\n" in done.stdout


def test_the_quickstart_trains(programs, tmp_path):
    """Without arguments, in an empty folder, until it has logged a step; then it is interrupted."""
    log = tmp_path / "log"
    run_folder = tmp_path / "runs/quickstart"
    with log.open("w") as output:
        training = subprocess.Popen(
            [str(programs / "resnet-dist"), "train"],
            cwd=tmp_path,
            env={**os.environ, "WANDB_MODE": "disabled"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 600
        while not has_trained(run_folder) and training.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        training.send_signal(signal.SIGINT)
        code = training.wait(timeout=300)
    finally:
        training.kill()
        training.wait()
    assert code == 128 + signal.SIGINT, log.read_text()
    assert (run_folder / "checkpoints/last.pt").exists()


def has_trained(run_folder):
    """Whether a run has logged the loss of a step."""
    return any("train/loss" in line for line in whole_lines(run_folder))


def read_constraints():
    """{package: version} of constraints.txt."""
    versions = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            package, version = line.split("==")
            versions[package] = version
    return versions


def test_the_constraints_fit_the_requirements():
    """constraints.txt has a version of every direct requirement that setup.cfg allows."""
    setup = read_setup()
    lines = setup["options"]["install_requires"].splitlines()
    for extra in setup["options.extras_require"].values():
        lines += extra.splitlines()
    requirements = [Requirement(line) for line in lines if line.strip()]

    versions = read_constraints()
    wrong = []
    for requirement in requirements:
        version = versions.get(requirement.name.lower())
        if version is None or version not in requirement.specifier:
            wrong.append((str(requirement), version))
    assert wrong == []
