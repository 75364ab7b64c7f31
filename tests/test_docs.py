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
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [
    README,
    CONTRIBUTING,
    *sorted(DOCS.glob("*.md")),
]

# The shell's own words, and commands that the tests of installation run.
NOT_OURS = {"source", "pip", "git", "cd"}
# What takes long, or needs a network or official archives, has its own tests.
PARSED_ONLY = ("data import", "data download", "benchmark", "models", "launch", "plan")


def shell_blocks(page, languages):
    """The fenced blocks of a page in one of the languages, which `|` separates."""
    fence = rf"^```(?:{languages})\n(.*?)^```"
    return re.findall(fence, page.read_text(), re.DOTALL | re.MULTILINE)


def commands(languages="bash"):
    """(page, command) of each fenced block of shell commands, with continued lines joined."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT)
        for block in shell_blocks(page, languages):
            joined = block.replace("\\\n", " ")
            for line in joined.splitlines():
                without_comment = line.partition(" # ")[0]
                command = without_comment.strip().removeprefix("$ ")
                if command and not command.startswith("#"):
                    found.append((name, command))
    return found


def arguments_of_train(words):
    """The arguments of train.py in a command, after checking those of torchrun before them."""
    first_argument = words.index("train.py") + 1
    parser = get_args_parser()
    if words[0] == "torchrun":
        parser.parse_args(words[1:first_argument])
    if words[:2] == ["resnet-dist", "launch"]:
        parser.parse_args(words[2:first_argument])
    return words[first_argument:]


@pytest.fixture
def folder(digits, checkpoint, tmp_path, monkeypatch):
    """A folder with what the commands name: a run, recipes, photographs."""
    run_folder = Path(checkpoint).resolve().parents[1]
    for name in ("resnet50", "photos"):
        shutil.copytree(run_folder, tmp_path / "runs" / name, symlinks=True)
    images = Path(digits) / "val"
    for name, target in (
        ("configs", ROOT / "configs"),
        ("slurm", ROOT / "slurm"),
        ("photos", digits),
        ("folder", images / "0"),
    ):
        os.symlink(target, tmp_path / name)
    photograph = next((images / "1").iterdir())
    for name in ("photo.jpg", "new.jpg"):
        shutil.copy(photograph, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_refused(words, parse):
    """Whether a parser ends the process instead of returning."""
    try:
        parse(words)
    except SystemExit:
        return True
    return False


@pytest.mark.slow
def test_recipes_and_options_of_training_commands_exist(folder):
    """A command that trains is parsed, but not run."""
    failures = []
    for page, command in commands():
        words = shlex.split(command)
        is_training = "train.py" in words
        if not is_training or "--help" in words or "--print_config" in words:
            continue
        arguments = arguments_of_train(words)
        if not arguments:
            arguments = ["--config", "configs/quickstart.yaml"]
        if is_refused(arguments, cli.parse_config):
            failures.append(f"{page}: {command}")
    assert failures == []


@pytest.mark.slow
def test_commands_run(folder, digits):
    """With the digits in place of ImageNet."""
    failures = []
    for page, command in commands():
        program, *arguments = shlex.split(command.replace("/data/imagenet", digits))
        if program != "resnet-dist" or " ".join(arguments).startswith(PARSED_ONLY):
            continue
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
        if code != 0:
            failures.append(f"{page}: {command}: exit code {code}")
    assert failures == []


@pytest.mark.slow
def test_what_is_not_run_is_parsed():
    """Also the commands that stand in a block of output, or in one without a language."""
    starts = tuple(f"resnet-dist {start}" for start in PARSED_ONLY)
    found = []
    for page, command in commands("bash|console|"):
        is_suite = command.endswith("--suite suite.yaml --output results")
        if command.startswith(starts) or is_suite:
            found.append((page, command))
    assert len(found) > 15

    failures = []
    for page, command in found:
        words = shlex.split(command)
        if is_refused(words, parse):
            failures.append(f"{page}: {command}")
    assert failures == []


def parse(words):
    """Parse the words of a `resnet-dist` command."""
    arguments = words[1:]
    if arguments[0] == "launch":
        arguments_of_train(words)
        return
    line, _ = cli._prepare(arguments)
    if arguments[0] in ("benchmark", "plan"):
        line.settings()
    else:
        line.options()


def test_files_that_the_pages_name_exist():
    folders = "resnet_dist|tests|configs|examples|benchmarks|slurm|docs"
    missing = []
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text()):
            path = ROOT / name
            if not path.exists():
                missing.append(f"{page.name}: {name}")

    # In CONTRIBUTING.md also the names in capital letters, which are tables of those files.
    names = re.findall(r"`(_?[A-Z]+(?:_[A-Z]+)*)`", CONTRIBUTING.read_text())
    sources = all_sources()
    for name in set(names) - {"CI"}:
        if not re.search(rf"^{name}\b.* = ", sources, re.MULTILINE):
            missing.append(f"CONTRIBUTING.md: {name}")
    assert missing == []


def all_sources():
    """The text of all Python files of the repository."""
    texts = []
    for path in ROOT.rglob("*.py"):
        if ".venv" not in path.parts:
            texts.append(path.read_text())
    return "\n".join(texts)


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120


def test_programs_are_known():
    """Programs that the project installs or needs, and targets of the Makefile."""
    known_programs = {"torchrun", "resnet-dist", "python", "find", *NOT_OURS}
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE)
    unknown = []
    for page, command in commands():
        program, *arguments = shlex.split(command)
        is_known = program in known_programs
        if program == "make":
            asked = [word for word in arguments if "=" not in word]
            is_known = set(asked) <= set(targets)
        if not is_known:
            unknown.append(f"{page}: {command}")
    assert unknown == []


@pytest.mark.slow
def test_the_python_example_of_the_readme(folder, digits, monkeypatch, capsys):
    """The block runs as it stands, with the quickstart shortened to a few steps."""
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    example = block.group(1)
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
    program = compile(example, "README.md", "exec")
    exec(program, {})
    printed = capsys.readouterr().out.splitlines()
    images = [line for line in printed if line.startswith("photos/val")]
    assert len(images) == 355
