"""The commands of README.md and docs/: each one is run, or at least parsed by its program."""

import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from resnet_dist import Config, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

# The shell's own words, and commands that the tests of installation run.
NOT_OURS = {"source", "pip", "git", "cd"}
# What takes long, or needs a network or official archives, has its own tests.
PARSED_ONLY = ("data import", "data download", "benchmark", "models", "launch", "plan")


def commands(languages="bash"):
    """(page, command) of each fenced block of shell commands, with continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(
            rf"^```(?:{languages})\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.partition(" # ")[0].strip().removeprefix("$ ")
                if command and not command.startswith("#"):
                    found.append((page.relative_to(ROOT), command))
    return found


def arguments_of_train(words):
    """The arguments of train.py in a command, after checking those of torchrun before them."""
    script = words.index("train.py")
    if words[0] == "torchrun":
        get_args_parser().parse_args(words[1 : script + 1])
    if words[:2] == ["resnet-dist", "launch"]:
        get_args_parser().parse_args(words[2 : script + 1])
    return words[script + 1 :]


@pytest.fixture
def folder(digits, checkpoint, tmp_path, monkeypatch):
    """A folder with what the commands name: a run, recipes, photographs."""
    shutil.copytree(
        Path(checkpoint).resolve().parents[1], tmp_path / "runs" / "resnet50", symlinks=True
    )
    shutil.copytree(tmp_path / "runs" / "resnet50", tmp_path / "runs" / "photos", symlinks=True)
    os.symlink(ROOT / "configs", tmp_path / "configs")
    os.symlink(ROOT / "slurm", tmp_path / "slurm")
    os.symlink(digits, tmp_path / "photos")
    os.symlink(Path(digits) / "val" / "0", tmp_path / "folder")
    for name in ("photo.jpg", "new.jpg"):
        shutil.copy(next((Path(digits) / "val" / "1").iterdir()), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_recipes_and_options_of_training_commands_exist(folder):
    failures = []
    for page, command in commands():
        words = shlex.split(command)
        if "train.py" not in words or "--help" in words or "--print_config" in words:
            continue
        try:
            cli.parse_config(arguments_of_train(words) or ["--config", "configs/quickstart.yaml"])
        except SystemExit:
            failures.append(f"{page}: {command}")
    assert failures == []


@pytest.mark.slow
def test_commands_run(folder, digits):
    failures = []
    for page, command in commands():
        words = shlex.split(command.replace("/data/imagenet", digits))
        if words[0] != "resnet-dist" or " ".join(words[1:]).startswith(PARSED_ONLY):
            continue
        try:
            code = cli.main(words[1:])
        except SystemExit as end:
            code = end.code
        if code != 0:
            failures.append(f"{page}: {command}: exit code {code}")
    assert failures == []


@pytest.mark.slow
def test_what_is_not_run_is_parsed():
    """Also the commands that stand in a block of output, or in one without a language."""
    found = [
        (page, command)
        for page, command in commands("bash|console|")
        if command.startswith(tuple(f"resnet-dist {start}" for start in PARSED_ONLY))
        or command.endswith("--suite suite.yaml --output results")
    ]
    assert len(found) > 15
    failures = []
    for page, command in found:
        words = shlex.split(command)[1:]
        if words[0] == "launch":
            arguments_of_train(["resnet-dist", *words])
            continue
        try:
            line, _ = cli._prepare(words)
            if words[0] in ("benchmark", "plan"):
                line.settings()
            else:
                line.options()
        except SystemExit:
            failures.append(f"{page}: {command}")
    assert failures == []


def test_files_that_the_pages_name_exist():
    """In CONTRIBUTING.md also the names in capital letters, which are tables of those files."""
    folders = "resnet_dist|tests|configs|examples|benchmarks|slurm|docs"
    missing = []
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text):
            if not (ROOT / name).exists():
                missing.append(f"{page.name}: {name}")
    recipes = (ROOT / "CONTRIBUTING.md").read_text()
    sources = [path.read_text() for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for name in set(re.findall(r"`(_?[A-Z]+(?:_[A-Z]+)*)`", recipes)) - {"CI"}:
        if not any(re.search(rf"^{name}\b.* = ", source, re.MULTILINE) for source in sources):
            missing.append(f"CONTRIBUTING.md: {name}")
    assert missing == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_programs_are_known():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = []
    for page, command in commands():
        words = shlex.split(command)
        known = words[0] in ("torchrun", "resnet-dist", "python", "find", *NOT_OURS)
        if words[0] == "make":
            asked = {word for word in words[1:] if "=" not in word}
            known = asked <= targets
        if not known:
            unknown.append(f"{page}: {command}")
    assert unknown == []


@pytest.mark.slow
def test_the_python_example_of_the_readme(folder, digits, monkeypatch, capsys):
    """The block runs as it stands, with the quickstart shortened to a few steps."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(
        1
    )
    quickstart = Config.from_yaml("quickstart")
    short = replace(
        quickstart,
        output_dir=str(folder / "runs" / "short"),
        data=replace(quickstart.data, data_dir=digits),
        train=replace(quickstart.train, epochs=0.2),
        schedule=replace(quickstart.schedule, warmup_epochs=0.0),
        log=replace(quickstart.log, wandb="disabled"),
    )
    monkeypatch.setattr(Config, "from_yaml", lambda name: short)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    images = [line for line in printed if line.startswith("photos/val")]
    assert len(images) == 355
