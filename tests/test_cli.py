"""The command line: which source of a setting wins, what errors say, and which files are found."""

import os
import subprocess
import sys
from typing import Literal, NamedTuple, get_args

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from resnet_dist import __version__, cli
from resnet_dist.config import CheckpointConfig, Config, to_dict
from resnet_dist.settings import reading as settings
from resnet_dist.settings import recipes
from resnet_dist.settings.options import as_yaml, field_meanings
from resnet_dist.settings.reading import build_config, config_from_dict, read_yaml, setting_hints
from resnet_dist.settings.rules import describe_type, split_hint, type_origin

# What each command with settings needs besides them to be parsed.
COMMANDS = {
    "train": [],
    "submit": [],
    "evaluate": ["--checkpoint", "run.pt"],
    "predict": ["--checkpoint", "run.pt", "picture.jpg"],
    "export": ["--checkpoint", "run.pt", "--to", "onnx", "--output", "net.onnx"],
    "benchmark": ["loader", "--images", "5"],
    "doctor": ["--json"],
    "plan": ["--gpus", "2"],
    "data show": ["--images", "1"],
}


def settings_of(command, *arguments):
    """The config that a command gets, without running it."""
    words = [*command.split(), *COMMANDS[command], *arguments]
    line, _ = cli._prepare(words)
    config, _ = line.settings()
    return config


def error_of(capsys, *arguments):
    """What the command line prints before it ends with exit code 2."""
    with pytest.raises(SystemExit) as ending:
        code = cli.main(list(arguments))
        sys.exit(code)
    printed = capsys.readouterr().err
    assert ending.value.code == 2, printed
    assert "Traceback" not in printed
    return printed


@pytest.fixture
def files(tmp_path):
    """Two YAML files of which the second overrides a setting of the first."""
    first = tmp_path / "first.yaml"
    second = tmp_path / "second.yaml"
    first.write_text("output_dir: first\ntrain: {epochs: 14, precision: fp32}\nseed: 3\n")
    second.write_text("train: {epochs: 20}\n")
    return ["--config", str(first), "--config", str(second)]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_options_override_files_wherever_they_stand(command, files):
    epochs = ["--train.epochs", "7"]
    others = ["--output_dir", "typed", "--checkpoint.keep", "9"]
    first_file = files[:2]
    second_file = files[2:]
    for arguments in (
        [*epochs, *others, *files],
        [*files, *epochs, *others],
        [*epochs, *first_file, *others, *second_file],
    ):
        config = settings_of(command, *arguments)
        assert config.train.epochs == 7, arguments
        assert config.output_dir == "typed", arguments
        assert config.checkpoint == CheckpointConfig(keep=9), arguments
        assert config.train.precision == "fp32", arguments
        assert config.seed == 3, arguments

    config = settings_of(command, *first_file, *second_file)
    assert config.train.epochs == 20
    assert config.output_dir == "first"
    config = settings_of(command, *second_file, *first_file)
    assert config.train.epochs == 14


def test_a_typed_default_overrides_a_file(files):
    """An option that was typed counts even if its value is the default."""
    config = settings_of("train", "--train.epochs", "90", "--seed", "0", *files)
    assert config.train.epochs == 90
    assert config.seed == 0


@pytest.mark.slow
def test_cluster_settings_of_files_and_options_are_merged(tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text("cluster: {nodes: 2, setup: [a], extra: {hold: true, exclude: n1}}\n")
    in_file = ["--config", str(profile)]
    typed = [
        "--cluster.setup+=b",
        *("--cluster.extra.exclude", "n3"),
        "--cluster.dry_run",
    ]
    for arguments in ([*typed, *in_file], [*in_file, *typed]):
        line, _ = cli._prepare(["submit", *arguments])
        _, values = line.settings()
        cluster = line.cluster(values)
        assert cluster.nodes == 2
        assert cluster.dry_run
        assert not cluster.wait
        assert cluster.setup == ["a", "b"]
        assert cluster.extra == {"hold": True, "exclude": "n3"}


@pytest.mark.slow
def test_a_switch_needs_no_value():
    config = settings_of("train", "--optim.nesterov")
    assert config.optim.nesterov is True
    config = settings_of("train", "--optim.nesterov", "false")
    assert config.optim.nesterov is False
    config = settings_of("train", "--optim.nesterov", "--seed", "4")
    assert config.seed == 4


class WrongLine(NamedTuple):
    """A wrong command line, and what its error says."""

    line: str
    words: tuple[str, ...]


WRONG_LINES = (
    # Commands and options that do not exist.
    WrongLine("tran", ("no command tran", "did you mean train?")),
    WrongLine("data pck", ("no command pck", "did you mean pack?")),
    WrongLine("train --train.epoch 3", ("--train.epoch", "did you mean --train.epochs?")),
    WrongLine("train --optim.epochs 3", ("optim.epochs",)),
    WrongLine("data pack --reize 3", ("--reize", "did you mean --resize?")),
    WrongLine("predict --topp 3", ("--topp", "did you mean --top?")),
    WrongLine("train --cluster.nodes 2", ("cluster.nodes", "resnet-dist submit")),
    WrongLine("train stray", ("unexpected argument stray",)),
    # Values of a wrong type, or that a rule forbids.
    WrongLine("train --train.epochs", ("--train.epochs needs a value",)),
    WrongLine("train --train.epochs many", ("train.epochs is many", "a number")),
    WrongLine("train --seed 1.5", ("seed is 1.5", "a whole number")),
    WrongLine("train --model.num_classes x", ("a whole number or null",)),
    WrongLine("train --data.crop_scale [1", ("data.crop_scale is [1", "a list of 2 numbers")),
    WrongLine("train --data.val_flip maybe", ("data.val_flip is maybe", "true or false")),
    WrongLine(
        "train --optim.kind lasr",
        ("optim.kind is lasr: it must be one of sgd, lars, lamb, rmsprop, adamw", "lars?"),
    ),
    WrongLine("export --to onx", ("--to is onx", "one of onnx,", "did you mean onnx?")),
    WrongLine("benchmark --windows 0", ("--windows is 0: it must be at least 1",)),
    WrongLine("predict a.jpg --checkpoint x --top 0", ("--top is 0", "at least 1")),
    # Files.
    WrongLine("train --config resnet5", ("resnet5 does not exist here (", "mean resnet50?")),
    WrongLine("train --config ./wde.yaml", ("did you mean wide.yaml?",)),
    WrongLine("train --config .", ("is a folder",)),
    # What is missing.
    WrongLine("predict a.jpg", ("--weights W is missing",)),
    WrongLine("export --checkpoint x --to onnx", ("--output is missing",)),
)


@pytest.mark.slow
def test_errors_name_what_is_wrong_and_what_was_meant(capsys, tmp_path, monkeypatch):
    """In a folder that holds the file wide.yaml."""
    (tmp_path / "wide.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    for line, words in WRONG_LINES:
        arguments = line.split()
        printed = error_of(capsys, *arguments)
        for word in words:
            assert word in printed, (line, printed)
        command = arguments[0]
        if command == "tran":
            command = "COMMAND"
        assert f"usage: resnet-dist {command}" in printed


class WrongFile(NamedTuple):
    """A wrong file of settings, the line that is wrong, and what its error says."""

    text: str
    line: int
    words: tuple[str, ...]


WRONG_FILES = (
    WrongFile(
        "seed: 1\noptim:\n  base_lr: fast\n",
        line=3,
        words=("optim.base_lr is 'fast'", "a number"),
    ),
    WrongFile(
        "optim:\n  learning_rate: 0.1\n",
        line=2,
        words=("no setting optim.learning_rate",),
    ),
    WrongFile(
        "seed: 1\ntrain:\n  epoch: 3\n",
        line=3,
        words=("did you mean train.epochs?",),
    ),
    WrongFile(
        "optim:\n  momentum: 2\n",
        line=2,
        words=("optim.momentum is 2", "in [0, 1)"),
    ),
    WrongFile(
        "train:\n\n  precision: bf\n",
        line=3,
        words=("one of auto, fp32, bf16, fp16",),
    ),
    WrongFile(
        "seed: 1\nseed: 2\n",
        line=2,
        words=("seed is set twice", "line 1"),
    ),
    WrongFile(
        "seed: 1\nmodel: resnet50\n",
        line=2,
        words=("model must hold settings",),
    ),
    WrongFile(
        "- 1\n",
        line=1,
        words=("the file must hold settings",),
    ),
    WrongFile(
        "seed: 1\nmodel: {name: a\n",
        line=3,
        words=("not valid YAML",),
    ),
    WrongFile(
        "seed: 1\noutput_dir: !!python/name:os.system\n",
        line=2,
        words=("not valid YAML",),
    ),
    WrongFile(
        "cluster: {nodes: 1}\n",
        line=1,
        words=("resnet-dist submit",),
    ),
)


@pytest.mark.slow
def test_errors_in_files_name_file_and_line(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    words_of_train = ("train", "--config", str(path))
    for wrong in WRONG_FILES:
        path.write_text(wrong.text)
        printed = error_of(capsys, *words_of_train)
        case = (wrong.text, printed)
        for word in wrong.words:
            assert word in printed, case
        assert f"line {wrong.line}" in printed, case
        assert str(path) in printed, case

    # A rule across several settings is broken.
    path.write_text("data:\n  val_crop_size: 300\n")
    error_of(capsys, *words_of_train)
    path.write_text("schedule:\n  warmup_epochs: 100\n")
    assert f"({path}, line 2)" in error_of(capsys, *words_of_train)
    printed = error_of(capsys, *words_of_train, "--schedule.warmup_epochs", "200")
    assert "200" in printed
    assert str(path) not in printed

    path.write_bytes(b"seed: \xff\n")
    assert "cannot read" in error_of(capsys, *words_of_train)


def test_what_yaml_can_say(tmp_path):
    """Anchors, merged mappings, null, and numbers as YAML 1.2 writes them."""
    path = tmp_path / "a.yaml"
    path.write_text(
        """
optim: &base {base_lr: 1e-4, eps: null}
schedule:
  milestones: [8, 9.5, 1e1]
data: {crop_scale: [1e-1, 1]}
train:
  <<: {epochs: 30}
  loss: bce
"""
    )
    config = settings_of("train", "--config", str(path))
    assert config.optim.base_lr == 1e-4
    assert config.optim.eps is None
    assert config.schedule.milestones == (8.0, 9.5, 10.0)
    assert config.data.crop_scale == (0.1, 1.0)
    assert config.train.epochs == 30.0
    assert config.train.loss == "bce"
    assert isinstance(config.train.epochs, float)
    path.write_text("# nothing\n")
    assert settings_of("train", "--config", str(path)) == Config()


def test_recipes_are_found_by_name_and_paths_come_first(tmp_path, monkeypatch):
    recipe = recipes.recipe_folder() / "resnet50.yaml"
    assert "resnet50" in recipes.recipe_names()
    monkeypatch.chdir(tmp_path)
    for name in ("resnet50", "resnet50.yaml", "configs/resnet50.yaml"):
        assert recipes.find_recipe(name) == recipe

    # A file of that name wins, but a bare name is always a recipe.
    own_file = tmp_path / "resnet50.yaml"
    own_file.write_text("seed: 8\n")
    (tmp_path / "configs").mkdir()
    assert recipes.find_recipe("resnet50") == recipe
    config = settings_of("train", "--config", "resnet50.yaml")
    assert config.seed == 8
    monkeypatch.setenv("HOME", str(tmp_path))
    config = settings_of("train", "--config=~/resnet50.yaml")
    assert config.seed == 8

    folders_without_recipes = (tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(recipes, "_FOLDERS", folders_without_recipes)
    with pytest.raises(ValueError, match="no recipes"):
        recipes.find_recipe("resnet50")


def test_recipes_of_an_installed_package_are_found(tmp_path, monkeypatch):
    installed = tmp_path / "configs"
    installed.mkdir()
    (installed / "quickstart.yaml").write_text("seed: 9\n")
    _, of_repository = recipes._FOLDERS
    monkeypatch.setattr(recipes, "_FOLDERS", (installed, of_repository))
    config = settings_of("train", "--config", "quickstart")
    assert config.seed == 9


def test_settings_of_earlier_versions_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setitem(settings.RENAMED_SETTINGS, "train.passes", "train.epochs")
    old_file = tmp_path / "old.yaml"
    old_file.write_text("train: {passes: 40}\n")
    config = settings_of("train", "--config", str(old_file))
    assert config.train.epochs == 40
    config = config_from_dict({"train": {"passes": 50}})
    assert config.train.epochs == 50

    present = setting_hints()
    for old, new in settings.RENAMED_SETTINGS.items():
        assert new in present
        assert old not in present


def test_a_config_survives_its_dict_and_every_line_of_help_its_words():
    default = Config()
    assert config_from_dict(to_dict(default)) == default
    config = config_from_dict({"seed": 4})
    assert config.seed == 4
    with pytest.raises(ValueError, match="no setting train.epoch; did you mean train.epochs"):
        config_from_dict({"train": {"epoch": 4}})

    for hint in setting_hints().values():
        words = describe_type(hint)
        assert "<" not in words
        assert "typing" not in words
    assert field_meanings(Config).keys() == {"output_dir", "seed"}


# Prints the help of the command in its arguments, then the CPU time, then what it has imported.
TIMED_HELP = """
import resource, sys
from resnet_dist import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as ending:
    assert not ending.code
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = {'torch', 'numpy', 'wandb', 'torchvision'} & set(sys.modules)
print('FIGURES', usage.ru_utime + usage.ru_stime, sorted(heavy))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], ["train"], ["submit"], ["predict"], ["data", "show"]])
def test_help_is_quick_and_in_words(command):
    """At most a second of CPU time (torch alone takes several), without torch and numpy."""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", TIMED_HELP, *command, "--help"],
            capture_output=True,
            check=True,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        text, _, figures = done.stdout.partition("FIGURES")
        cpu_seconds, _, heavy_modules = figures.strip().partition(" ")
        seconds.append(float(cpu_seconds))
        assert heavy_modules == "[]"
        assert text.startswith("usage: ")
        assert "Annotated" not in text
        if min(seconds) < 1.0:
            return
    raise AssertionError(f"{seconds} s")


def test_version(capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--version"])
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    assert printed == f"resnet-dist {__version__}\n"


@pytest.mark.slow
def test_usage_shows_how_the_command_was_started(monkeypatch, capsys):
    for script, command, words in (
        ("/usr/bin/resnet-dist", "train", "usage: resnet-dist train "),
        ("train.py", "train", "usage: python train.py "),
        ("slurm/submit.py", "submit", "usage: python slurm/submit.py "),
        ("/x/resnet_dist/cli.py", "doctor", "usage: python -m resnet_dist.cli doctor "),
    ):
        monkeypatch.setattr(sys, "argv", [script])
        assert words in error_of(capsys, command, "--nonsense")
    monkeypatch.setenv("RANK", "1")
    assert error_of(capsys, "train", "--nonsense") == ""


def test_print_config_shows_files_and_options_together(files, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["train", "--seed", "8", "--print_config", *files])
    assert ending.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 8
    assert printed["train"]["epochs"] == 20
    assert printed["output_dir"] == "first"


@pytest.mark.slow
def test_the_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = settings_of(
        "train",
        "--output_dir=~/run",
        "--data.data_dir=~/data",
        "--data.exclude=~/list.txt",
        "--checkpoint.resume=~/a.pt",
        "--checkpoint.init_from=torchvision:resnet50:IMAGENET1K_V2",
    )
    assert config.output_dir == "/home/me/run"
    assert config.data.data_dir == "/home/me/data"
    assert config.data.exclude == "/home/me/list.txt"
    assert config.checkpoint.resume == "/home/me/a.pt"
    assert config.checkpoint.init_from == "torchvision:resnet50:IMAGENET1K_V2"
    assert Config(output_dir="~").output_dir == "/home/me"

    line, _ = cli._prepare(["predict", "--checkpoint=~/a.pt", "~/b.jpg"])
    predict_options = line.options()
    assert predict_options["checkpoint_file"] == "/home/me/a.pt"
    assert predict_options["images"] == ["/home/me/b.jpg"]
    line, _ = cli._prepare(["export", "--output=~/c.onnx"])
    export_options = line.options()
    assert export_options["output"] == "/home/me/c.onnx"


@pytest.mark.slow
def test_environment_variables_in_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: $SCRATCH/run\ndata: {data_dir: '${SCRATCH}/data'}\n")
    config = settings_of(
        "train",
        *("--config", str(recipe)),
        "--checkpoint.resume=$SCRATCH/a.pt",
    )
    assert config.output_dir == "/scratch/me/run"
    assert config.data.data_dir == "/scratch/me/data"
    assert config.checkpoint.resume == "/scratch/me/a.pt"

    line, _ = cli._prepare(["predict", "--checkpoint=$SCRATCH/a.pt", "$SCRATCH/b.jpg"])
    assert line.options()["images"] == ["/scratch/me/b.jpg"]

    with pytest.raises(ValueError, match=r"output_dir.*NOWHERE is not set"):
        Config(output_dir="$NOWHERE/run")

    # A path that exists as it is written is kept.
    odd = tmp_path / "$NOWHERE"
    odd.mkdir()
    assert Config(output_dir=str(odd)).output_dir == str(odd)


# Text that YAML might take for something else.
ODD_TEXTS = ("null", "1e5", "yes", "[a", "{x", "a: b", "#", "'", "007", "-")


def example_texts():
    """Any text, but none that names the home folder or an environment variable."""
    printable = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
    texts = st.sampled_from(ODD_TEXTS) | st.text(printable, max_size=9)

    def is_plain(text):
        return not text.startswith("~") and "$" not in text

    return texts.filter(is_plain)


def example_integers():
    """Small ones are drawn more often."""
    return st.integers(0, 40) | st.integers(-(2**40), 2**40)


def example_floats():
    """Usual values, fractions, and any size."""
    usual = st.sampled_from([0.0, 0.5, 1.0, 1e-5, 30.0])
    return usual | st.floats(0, 1) | st.floats(1e-9, 1e9)


SIMPLE_TYPES = {
    type(None): st.none(),
    bool: st.booleans(),
    str: example_texts(),
    int: example_integers(),
    float: example_floats(),
}


def example_tuples(items):
    """Tuples of those types of items; (X, ...) means any number of them."""
    if Ellipsis in items:
        lists = st.lists(example_values(items[0]), max_size=3)
        return lists.map(tuple)
    # Ranges: the lower bound comes first.
    tuples = st.tuples(*(example_values(item) for item in items))
    return tuples.map(sorted).map(tuple)


def example_values(hint):
    """Values of a setting's type that its rules allow."""
    plain, rules = split_hint(hint)
    kind = type_origin(plain)
    if plain in SIMPLE_TYPES:
        values = SIMPLE_TYPES[plain]
    elif kind is Literal:
        values = st.sampled_from(get_args(plain))
    elif kind is tuple:
        values = example_tuples(get_args(plain))
    else:
        values = st.one_of([example_values(member) for member in get_args(plain)])

    def is_allowed(value):
        return value is None or all(rule.holds(value) for rule in rules)

    return values.filter(is_allowed)


@st.composite
def configs(draw):
    """A config with a few settings that differ from their default."""
    hints = setting_hints()
    names = st.sampled_from(sorted(hints))
    keys = draw(st.lists(names, max_size=6, unique=True))
    values = {key: draw(example_values(hints[key])) for key in keys}
    try:
        return values, build_config(values)
    except ValueError:
        # A rule across several settings is broken.
        assume(False)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
    ],
)
@given(configs())
def test_a_config_survives_yaml_and_the_command_line(tmp_path, drawn):
    values, config = drawn
    path = tmp_path / "config.yaml"
    tree = to_dict(config)
    assert config_from_dict(tree) == config
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    read = read_yaml(path, setting_hints())
    assert build_config(read.values) == config

    arguments = []
    for key, value in values.items():
        is_text = isinstance(value, str)
        text = value if is_text else as_yaml(value)
        arguments.append(f"--{key}={text}")
    assert settings_of("train", *arguments) == config
    assert settings_of("train", "--config", str(path)) == config
