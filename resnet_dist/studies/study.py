"""A study and its trials, as the commands use them."""

from dataclasses import dataclass, replace
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.logs.history import Clock


@dataclass(frozen=True)
class Trial:
    """One training of a study: a run with one seed."""

    run: str
    """name of the run in the study"""
    seed: int
    config: Config
    """all settings of the training"""
    words: list[str]
    """the same settings as options of `resnet-dist train`"""

    @property
    def folder(self) -> Path:
        """The output_dir of the training."""
        return Path(self.config.output_dir)


@dataclass(frozen=True)
class Study:
    """A question and the trainings that answer it."""

    path: Path
    """the YAML file"""
    title: str
    question: str
    notes: str
    """what to know about the result, in Markdown; may be empty"""
    metric: str
    """accuracy in percent that is compared, for instance val/top1"""
    clock: Clock
    """what times mean: "wall", or "cpu" for the CPU time of the main process"""
    targets: tuple[float, ...]
    """accuracies in percent whose time is reported"""
    trials: tuple[Trial, ...]
    compare: tuple[tuple[str, str], ...]
    """pairs of runs whose difference is reported"""

    @property
    def name(self) -> str:
        """The name of the file, without its suffix."""
        return self.path.stem

    def run_names(self) -> list[str]:
        """The names of the runs, in the order of the file."""
        names: list[str] = []
        for trial in self.trials:
            if trial.run not in names:
                names.append(trial.run)
        return names

    def of_run(self, name: str) -> list[Trial]:
        """The trials of one run, one for each seed."""
        return [trial for trial in self.trials if trial.run == name]


def folder_name(run: str, seed: int) -> str:
    """The name of a trial's folder, for instance "shortcut_A_seed0"."""
    characters = [character if character.isalnum() else "_" for character in run]
    name = "".join(characters)
    return f"{name}_seed{seed}"


def move_results(study: Study, folder: Path) -> Study:
    """The same study with its results in `folder`/NAME, where `resnet-dist study --collect` puts
    them.
    """
    moved = []
    for trial in study.trials:
        place = folder / study.name / trial.folder.name
        config = replace(trial.config, output_dir=str(place))
        moved.append(replace(trial, config=config))
    return replace(study, trials=tuple(moved))
