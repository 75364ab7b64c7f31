"""The command line: which source of a setting wins, what errors say, and which files are found."""

import os
import subprocess
import sys
from typing import Literal, get_args

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
    line, _ = cli._prepare([*command.split(), *COMMANDS[command], *arguments])
    return line.settings()[0]


def error_of(capsys, *arguments):
    """What the command line says and exits with 2 for."""
    with pytest.raises(SystemExit) as ending:
        sys.exit(cli.main(list(arguments)))
    said = capsys.readouterr().err
    assert ending.value.code == 2, said
    assert "Traceback" not in said
    return said


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
    options = ["--train.epochs", "7", "--output_dir", "typed", "--checkpoint.keep", "9"]
    for arguments in (
        [*options, *files],
        [*files, *options],
        [*options[:2], *files[:2], *options[2:], *files[2:]],
    ):
        config = settings_of(command, *arguments)
        assert config.train.epochs == 7, arguments
        assert config.output_dir == "typed", arguments
        assert config.checkpoint == CheckpointConfig(keep=9), arguments
        assert config.train.precision == "fp32", arguments
        assert config.seed == 3, arguments
    config = settings_of(command, *files)
    assert config.train.epochs == 20
    assert config.output_dir == "first"
    config = settings_of(command, *files[2:], *files[:2])
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
    arguments = ["--cluster.setup+=b", "--cluster.extra.exclude", "n3", "--cluster.dry_run"]
    for order in ([*arguments, "--config", str(profile)], ["--config", str(profile), *arguments]):
        line, _ = cli._prepare(["submit", *order])
        cluster = line.cluster(line.settings()[1])
        assert cluster.nodes == 2
        assert cluster.dry_run
        assert not cluster.wait
        assert cluster.setup == ["a", "b"]
        assert cluster.extra == {"hold": True, "exclude": "n3"}


@pytest.mark.slow
def test_a_switch_needs_no_value():
    assert settings_of("train", "--optim.nesterov").optim.nesterov is True
    assert settings_of("train", "--optim.nesterov", "false").optim.nesterov is False
    assert settings_of("train", "--optim.nesterov", "--seed", "4").seed == 4


@pytest.mark.slow
def test_errors_name_what_is_wrong_and_what_was_meant(capsys, tmp_path):
    (tmp_path / "wide.yaml").write_text("seed: 1\n")
    for arguments, words in (
        (["tran"], ["no command tran", "did you mean train?"]),
        (["data", "pck"], ["no command pck", "did you mean pack?"]),
        (["train", "--train.epoch", "3"], ["--train.epoch", "did you mean --train.epochs?"]),
        (["train", "--optim.epochs", "3"], ["optim.epochs"]),
        (["data", "pack", "--reize", "3"], ["--reize", "did you mean --resize?"]),
        (["predict", "--topp", "3"], ["--topp", "did you mean --top?"]),
        (["train", "--train.epochs"], ["--train.epochs needs a value"]),
        (["train", "--train.epochs", "many"], ["train.epochs is many", "a number"]),
        (["train", "--seed", "1.5"], ["seed is 1.5", "a whole number"]),
        (["train", "--model.num_classes", "x"], ["a whole number or null"]),
        (["train", "--data.crop_scale", "[1"], ["data.crop_scale is [1", "a list of 2 numbers"]),
        (["train", "--data.val_flip", "maybe"], ["data.val_flip is maybe", "true or false"]),
        (
            ["train", "--optim.kind", "lasr"],
            ["optim.kind is lasr: it must be one of sgd, lars, lamb, rmsprop, adamw", "lars?"],
        ),
        (["export", "--to", "onx"], ["--to is onx", "one of onnx,", "did you mean onnx?"]),
        (["train", "--config", "resnet5"], ["resnet5 does not exist here (", "mean resnet50?"]),
        (["train", "--config", f"{tmp_path}/wde.yaml"], ["did you mean wide.yaml?"]),
        (["train", "--config", str(tmp_path)], ["is a folder"]),
        (["train", "--cluster.nodes", "2"], ["cluster.nodes", "resnet-dist submit"]),
        (["train", "stray"], ["unexpected argument stray"]),
        (["benchmark", "--windows", "0"], ["--windows is 0: it must be at least 1"]),
        (["predict", "a.jpg", "--checkpoint", "x", "--top", "0"], ["--top is 0", "at least 1"]),
        (["predict", "a.jpg"], ["--weights W is missing"]),
        (["export", "--checkpoint", "x", "--to", "onnx"], ["--output is missing"]),
    ):
        said = error_of(capsys, *arguments)
        assert all(word in said for word in words), (arguments, said)
        assert f"usage: resnet-dist {arguments[0] if arguments[0] != 'tran' else 'COMMAND'}" in said


@pytest.mark.slow
def test_errors_in_files_name_file_and_line(capsys, tmp_path):
    path = tmp_path / "a.yaml"
    for text, line, words in (
        ("seed: 1\noptim:\n  base_lr: fast\n", 3, ["optim.base_lr is 'fast'", "a number"]),
        ("optim:\n  learning_rate: 0.1\n", 2, ["no setting optim.learning_rate"]),
        ("seed: 1\ntrain:\n  epoch: 3\n", 3, ["did you mean train.epochs?"]),
        ("optim:\n  momentum: 2\n", 2, ["optim.momentum is 2", "in [0, 1)"]),
        ("data:\n  val_crop_size: 300\n", 2, []),
        ("train:\n\n  precision: bf\n", 3, ["one of auto, fp32, bf16, fp16"]),
        ("seed: 1\nseed: 2\n", 2, ["seed is set twice", "line 1"]),
        ("seed: 1\nmodel: resnet50\n", 2, ["model must hold settings"]),
        ("- 1\n", 1, ["the file must hold settings"]),
        ("seed: 1\nmodel: {name: a\n", 3, ["not valid YAML"]),
        ("seed: 1\noutput_dir: !!python/name:os.system\n", 2, ["not valid YAML"]),
        ("cluster: {nodes: 1}\n", 1, ["resnet-dist submit"]),
    ):
        path.write_text(text)
        said = error_of(capsys, "train", "--config", str(path))
        assert all(word in said for word in words), (text, said)
        if words:
            assert f"line {line}" in said, (text, said)
            assert str(path) in said, (text, said)
    path.write_text("schedule:\n  warmup_epochs: 100\n")
    assert f"({path}, line 2)" in error_of(capsys, "train", "--config", str(path))
    said = error_of(capsys, "train", "--config", str(path), "--schedule.warmup_epochs", "200")
    assert "200" in said
    assert str(path) not in said
    path.write_bytes(b"seed: \xff\n")
    assert "cannot read" in error_of(capsys, "train", "--config", str(path))


def test_what_yaml_can_say(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "optim: &base {base_lr: 1e-4, eps: null}\nschedule:\n  milestones: [8, 9.5, 1e1]\n"
        "data: {crop_scale: [1e-1, 1]}\ntrain:\n  <<: {epochs: 30}\n  loss: bce\n"
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
    folder = recipes.recipe_folder()
    assert "resnet50" in recipes.recipe_names()
    monkeypatch.chdir(tmp_path)
    for name in ("resnet50", "resnet50.yaml", "configs/resnet50.yaml"):
        assert recipes.find_recipe(name) == folder / "resnet50.yaml"
    (tmp_path / "resnet50.yaml").write_text("seed: 8\n")
    (tmp_path / "configs").mkdir()
    assert recipes.find_recipe("resnet50") == folder / "resnet50.yaml"
    assert settings_of("train", "--config", "resnet50.yaml").seed == 8
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_of("train", "--config=~/resnet50.yaml").seed == 8
    monkeypatch.setattr(recipes, "_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(ValueError, match="no recipes"):
        recipes.find_recipe("resnet50")


def test_recipes_of_an_installed_package_are_found(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("seed: 9\n")
    monkeypatch.setattr(recipes, "_FOLDERS", (tmp_path / "configs", recipes._FOLDERS[1]))
    assert settings_of("train", "--config", "quickstart").seed == 9


def test_settings_of_earlier_versions_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setitem(settings.RENAMED_SETTINGS, "train.passes", "train.epochs")
    (tmp_path / "old.yaml").write_text("train: {passes: 40}\n")
    assert settings_of("train", "--config", str(tmp_path / "old.yaml")).train.epochs == 40
    assert config_from_dict({"train": {"passes": 50}}).train.epochs == 50
    for old, new in settings.RENAMED_SETTINGS.items():
        assert new in setting_hints()
        assert old not in setting_hints() or old == "train.passes"


def test_a_config_survives_its_dict_and_every_line_of_help_its_words():
    assert config_from_dict(to_dict(Config())) == Config()
    assert config_from_dict({"seed": 4}).seed == 4
    with pytest.raises(ValueError, match="no setting train.epoch; did you mean train.epochs"):
        config_from_dict({"train": {"epoch": 4}})
    for hint in setting_hints().values():
        assert "<" not in describe_type(hint)
        assert "typing" not in describe_type(hint)
    assert field_meanings(Config).keys() == {"output_dir", "seed"}


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], ["train"], ["submit"], ["predict"], ["data", "show"]])
def test_help_is_quick_and_in_words(command):
    """At most a second of CPU time (torch alone takes several), without torch and numpy."""
    code = (
        "import resource, sys\n"
        "from resnet_dist import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as ending: assert not ending.code\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'numpy', 'wandb', 'torchvision'} & set(sys.modules)\n"
        "print('FIGURES', usage.ru_utime + usage.ru_stime, sorted(heavy))\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--help"],
            capture_output=True,
            check=True,
            text=True,
            env={**os.environ, "COLUMNS": "100"},
        )
        text, _, figures = done.stdout.partition("FIGURES")
        cpu, _, heavy = figures.strip().partition(" ")
        seconds.append(float(cpu))
        assert heavy == "[]"
        assert text.startswith("usage: ")
        assert "Annotated" not in text
        if min(seconds) < 1.0:
            return
    raise AssertionError(f"{seconds} s")


def test_version(capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--version"])
    assert ending.value.code == 0
    assert capsys.readouterr().out == f"resnet-dist {__version__}\n"


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
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["seed"] == 8
    assert tree["train"]["epochs"] == 20
    assert tree["output_dir"] == "first"


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
    for arguments, name, path in (
        (["predict", "--checkpoint=~/a.pt", "~/b.jpg"], "checkpoint_file", "/home/me/a.pt"),
        (["predict", "--checkpoint=~/a.pt", "~/b.jpg"], "images", ["/home/me/b.jpg"]),
        (["export", "--output=~/c.onnx"], "output", "/home/me/c.onnx"),
    ):
        line, _ = cli._prepare(arguments)
        assert line.options()[name] == path


@pytest.mark.slow
def test_environment_variables_in_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: $SCRATCH/run\ndata: {data_dir: '${SCRATCH}/data'}\n")
    config = settings_of("train", "--config", str(recipe), "--checkpoint.resume=$SCRATCH/a.pt")
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


def example_values(hint):
    """Values of a setting's type that its rules allow."""
    plain, rules = split_hint(hint)
    kind = type_origin(plain)
    if plain is type(None):
        values = st.none()
    elif kind is Literal:
        values = st.sampled_from(get_args(plain))
    elif plain is bool:
        values = st.booleans()
    elif plain is str:
        # Text that YAML might take for something else is the hard part.
        odd = st.sampled_from(
            ["null", "1e5", "yes", "[a", "{x", "a: b", "#", "'", "007", "~x", "-"]
        )
        values = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=9)
        values = (odd | values).filter(lambda text: "~" not in text[:1] and "$" not in text)
    elif plain in (int, float):
        values = numbers_for(plain)
    elif kind is tuple:
        items = get_args(plain)
        if Ellipsis in items:
            values = st.lists(example_values(items[0]), max_size=3).map(tuple)
        else:
            values = st.tuples(*map(example_values, items)).map(sorted).map(tuple)
    else:
        values = st.one_of([example_values(one) for one in get_args(plain)])
    return values.filter(lambda value: value is None or all(rule.holds(value) for rule in rules))


def numbers_for(kind):
    if kind is int:
        return st.integers(0, 40) | st.integers(-(2**40), 2**40)
    return st.sampled_from([0.0, 0.5, 1.0, 1e-5, 30.0]) | st.floats(0, 1) | st.floats(1e-9, 1e9)


@st.composite
def configs(draw):
    """A config with a few settings that differ from their default."""
    values = {}
    for key in draw(st.lists(st.sampled_from(sorted(setting_hints())), max_size=6, unique=True)):
        values[key] = draw(example_values(setting_hints()[key]))
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
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    assert build_config(read_yaml(path, setting_hints()).values) == config
    assert config_from_dict(to_dict(config)) == config
    arguments = []
    for key, value in values.items():
        text = value if isinstance(value, str) else as_yaml(value)
        arguments.append(f"--{key}={text}")
    assert settings_of("train", *arguments) == config
    assert settings_of("train", "--config", str(path)) == config
