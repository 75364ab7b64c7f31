"""The command line: `resnet-dist COMMAND`.

Only the options of the command in question are set up, and what a command needs is imported when it
runs: help and errors come before torch is imported.
"""

import functools
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass

from resnet_dist import __version__, weights_options
from resnet_dist.config import Config
from resnet_dist.settings.cluster import ClusterConfig
from resnet_dist.settings.options import (
    CommandLine,
    Parser,
    add_config_options,
    add_json_option,
    config_or_print,
    is_first_rank,
    print_error,
    program_name,
)
from resnet_dist.settings.rules import NonNegativeFloat, NonNegativeInt, PositiveInt
from resnet_dist.text import did_you_mean, print_warnings_plainly, printable

# torch prints pages of warnings about a lost rank; our own message is one line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

_CONFIG_USAGE = "[--config FILE ...] [--section.key VALUE ...]"


@dataclass(frozen=True)
class Command:
    """A command: its line in the list of commands, its options, and what it does."""

    summary: str
    add_options: Callable[[Parser], None]
    run: Callable[[CommandLine], int]
    usage: str | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names.

    Args:
        arguments: The words after the program's name; None means those of this process.

    Returns:
        The exit code.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    if not arguments:
        arguments = ["--help"]
    print_warnings_plainly()
    line, command = _prepare(arguments)
    try:
        return command.run(line)
    except BrokenPipeError:
        # The reader has gone, as in `| head`. Python flushes once more at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 141


def parse_config(arguments: list[str]) -> Config:
    """The config that the arguments of `resnet-dist train` describe."""
    line, _ = _prepare(["train", *arguments])
    config, _ = line.settings()
    return config


def _prepare(arguments: list[str]) -> tuple[CommandLine, Command]:
    """Find the command that `arguments` name, and set up a command line with its options.

    Ends the process if they name none, or ask for the list of commands.
    """
    top = Parser("COMMAND [--help]", "Distributed training of image classification networks.")
    top.prog = program_name(())
    top.add_argument("--version", action="version", version=f"resnet-dist {__version__}")
    name, parser = _add_commands(top, COMMANDS, arguments)
    if name != "data":
        line = CommandLine(top, parser, (name,), arguments)
        return line, COMMANDS[name]

    # The command `data` has commands of its own.
    commands = _data_commands()
    rest = arguments[1:] or ["--help"]
    action, parser = _add_commands(parser, commands, rest, "data")
    line = CommandLine(top, parser, (name, action), arguments)
    return line, commands[action]


def _add_commands(
    parser: Parser, commands: dict[str, "Command"], arguments: list[str], *before: str
) -> tuple[str, Parser]:
    """Add commands to a parser; only the one that comes first in `arguments` gets its options.

    Args:
        parser: The parser that the commands are added to.
        commands: The commands by name.
        arguments: The words from the name of the command on.
        *before: Names of the commands that these belong to.

    Returns:
        The name of the chosen command, and its parser.
    """
    chosen = arguments[0]
    subcommands = parser.add_subcommands(
        dest="action" if before else "command",
        title="commands",
        description=" ",
        metavar="COMMAND",
    )
    for name, command in commands.items():
        subparser = Parser(command.usage, command.summary)
        subcommands.add_subcommand(name, subparser, help=command.summary)
        subparser.prog = program_name((*before, name))
        if name == chosen:
            command.add_options(subparser)
            found = subparser
    if chosen in commands:
        return chosen, found
    if not chosen.startswith("-"):
        similar = did_you_mean(chosen, commands)
        parser.error(f"there is no command {printable(chosen)}{similar}")
    # Prints the help, the version, or an error about an unknown option, and ends the process.
    parser.parse_args([chosen])
    raise AssertionError("an option in place of a command ends the process")


def _train(line: CommandLine) -> int:
    """Train; without any argument the quickstart, and say so."""
    quickstart = ""
    if len(line.arguments) == 1:
        quickstart = "quickstart"
        if is_first_rank():
            print("no arguments: running the quickstart, --config quickstart", flush=True)
    config, _ = config_or_print(line, first_file=quickstart)

    from resnet_dist import run
    from resnet_dist.distributed import process

    return process.run_process(config, run.train, resolve_auto=False)


def _add_no_options(parser: Parser) -> None:
    """The command has a parser of its own."""


def _launch(line: CommandLine) -> int:
    """Start a command or a script on several processes, with torchrun's options."""
    from resnet_dist.commands.launch import launch_workers

    return launch_workers(line.arguments[1:], COMMANDS)


def _add_submit_options(parser: Parser) -> None:
    add_config_options(parser)
    parser.add_settings(ClusterConfig, "cluster.")


def _submit(line: CommandLine) -> int:
    """Submit one job, or one for each file of `cluster.configs`."""
    config, options = config_or_print(line)
    cluster = line.cluster(options)
    configs = []
    for part in cluster.configs.split(","):
        name = part.strip()
        if name:
            config_of_file, _ = line.settings(first_file=name)
            configs.append(config_of_file)
    if not configs:
        configs = [config]

    from resnet_dist.launch.submission import submit_jobs

    try:
        return submit_jobs(configs, cluster, _typed_command(line))
    except ValueError as problem:
        print_error(problem)
        return 2


def _typed_command(line: CommandLine) -> str:
    """The command as the user typed it."""
    words = shlex.join(line.arguments[1:])
    return f"{line.parser.prog} {words}"


def _add_benchmark_options(parser: Parser) -> None:
    from resnet_dist.commands import benchmark_options

    benchmark_options.add_benchmark_options(parser)
    add_json_option(parser)
    add_config_options(parser)


def _benchmark(line: CommandLine) -> int:
    config, options = config_or_print(line)

    from resnet_dist.commands import benchmark_options

    try:
        name = benchmark_options.chosen_benchmark(options)
    except ValueError as problem:
        line.parser.error(str(problem))

    from resnet_dist.distributed import process

    measure = benchmark_options.find_benchmark(name)
    return process.run_process(config, lambda config, runtime: measure(config, runtime, options))


def _add_doctor_options(parser: Parser) -> None:
    parser.add_option(
        "--bench",
        action="store_true",
        help="also measure each rank's device, the all-reduce and the reading of data_dir, and "
        "name the slow ranks",
    )
    add_json_option(parser)
    add_config_options(parser)


def _doctor(line: CommandLine) -> int:
    config, options = config_or_print(line)

    from resnet_dist.commands import doctor

    return doctor.run(config, options.json, options.bench)


def _add_plan_options(parser: Parser) -> None:
    parser.add_option("--gpus", type=PositiveInt, default=1, metavar="N", help="number of GPUs")
    parser.add_option(
        "--memory_gib",
        type=NonNegativeFloat,
        default=0.0,
        metavar="GIB",
        help="memory of a GPU: prints the largest batch that fits; 0: does not",
    )
    parser.add_option(
        "--hours",
        type=NonNegativeFloat,
        default=0.0,
        help="wished duration: prints how many images per second it takes; 0: does not",
    )
    parser.add_option(
        "--images",
        type=NonNegativeInt,
        default=0,
        metavar="N",
        help="number of training images; 0: those of data.data_dir, or ImageNet's",
    )
    add_json_option(parser)
    add_config_options(parser)


def _plan(line: CommandLine) -> int:
    config, options = config_or_print(line)

    from resnet_dist.commands import plan

    return plan.run(config, options)


def _no_options(parser: Parser) -> None:
    """The sub-commands of `data` have the options."""


def _add_models_options(parser: Parser) -> None:
    parser.add_option("filter", nargs="?", default="", help="only names that contain this text")
    parser.add_option("--json", action="store_true", help="print one line of JSON per network")


def _models(line: CommandLine) -> int:
    from resnet_dist.commands import models

    return models.run(line.options())


def _add_report_options(parser: Parser) -> None:
    from resnet_dist.commands import report

    report.add_arguments(parser)


def _report(line: CommandLine) -> int:
    from resnet_dist.commands import report

    return report.run(line.options())


def _add_study_options(parser: Parser) -> None:
    from resnet_dist.commands import study

    study.add_study_arguments(parser)


def _study(line: CommandLine) -> int:
    from resnet_dist.commands import study

    return study.run(line.options())


def _data_commands() -> dict[str, Command]:
    """The commands of `resnet-dist data`."""
    from resnet_dist.commands import data

    commands = {}
    for name, summary in data.SUMMARIES.items():
        add_options = functools.partial(data.add_data_options, name=name)
        commands[name] = Command(summary, add_options, _data)
    commands["show"] = Command(
        data.SUMMARIES["show"],
        _add_show_options,
        _show,
        f"[--out FILE] [--images N] [--epochs N] {_CONFIG_USAGE}",
    )
    return commands


def _add_show_options(parser: Parser) -> None:
    from resnet_dist.commands import data

    data.add_data_options(parser, name="show")
    add_config_options(parser)


def _data(line: CommandLine) -> int:
    from resnet_dist.commands import data

    options = line.options()
    options.command = line.command[-1]
    return data.run(options)


def _show(line: CommandLine) -> int:
    config, options = config_or_print(line)

    from resnet_dist.commands import show

    return show.run(config, options)


COMMANDS = {
    "train": Command(
        "train a network; the same command again resumes", add_config_options, _train, _CONFIG_USAGE
    ),
    "launch": Command(
        "start a command on several processes: torchrun with our summary and exit code",
        _add_no_options,
        _launch,
        "[TORCHRUN_OPTION ...] COMMAND|SCRIPT [ARGUMENT ...]",
    ),
    "submit": Command(
        "train on a SLURM cluster; the same command again resumes",
        _add_submit_options,
        _submit,
        f"{_CONFIG_USAGE} [--cluster.key VALUE ...]",
    ),
    "evaluate": Command(
        "top-1 and top-5 accuracy of a network on one data set or on a suite of them",
        weights_options.add_evaluate_options,
        weights_options.run_evaluate,
        f"--weights W [--data DIR] [--classes present|all] [--suite FILE] [--json] {_CONFIG_USAGE}",
    ),
    "predict": Command(
        "the most probable classes of images (JPEG or PNG)",
        weights_options.add_predict_options,
        weights_options.run_predict,
        f"--weights W [--top K] [--json] {_CONFIG_USAGE} IMAGE ...",
    ),
    "export": Command(
        "write a network for ONNX, torch.export, safetensors or torchvision, and check the result",
        weights_options.add_export_options,
        weights_options.run_export,
        f"--weights W --to FORMAT --output FILE [--raw_weights] {_CONFIG_USAGE}",
    ),
    "benchmark": Command(
        "measure the speed of the training loop (loop) or of the data loader (loader)",
        _add_benchmark_options,
        _benchmark,
        "[loop|loader] [--profile FOLDER | --models NAME,... | --determinism] [--windows N] "
        f"[--json] {_CONFIG_USAGE}",
    ),
    "data": Command(
        "get a data set ready: import, pack, download, verify, show", _no_options, _data
    ),
    "models": Command(
        "list all networks: parameters, GFLOPs (multiply-adds of one image), published accuracy",
        _add_models_options,
        _models,
    ),
    "doctor": Command(
        "check what would stop a run, also under torchrun; exit code 1: warnings, 2: errors",
        _add_doctor_options,
        _doctor,
        f"[--bench] [--json] {_CONFIG_USAGE}",
    ),
    "plan": Command(
        "compute what a training needs before it runs: memory, FLOPs, steps, data per second",
        _add_plan_options,
        _plan,
        f"[--gpus N] [--memory_gib GIB] [--hours H] [--images N] [--json] {_CONFIG_USAGE}",
    ),
    "report": Command(
        "tables, a plot and a page about runs or evaluations; differences with their uncertainty",
        _add_report_options,
        _report,
    ),
    "study": Command(
        "run the trainings of a study, with several seeds, and write its table",
        _add_study_options,
        _study,
        "[--set KEY=VALUE] [--ranks N] [--dry_run [--measure]] [--submit PROFILE] "
        "[--collect FOLDER] [--page FILE] STUDY ...",
    ),
}
if __name__ == "__main__":
    sys.exit(main())
