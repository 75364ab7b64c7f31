"""The command line, `resnet-dist COMMAND`. It parses first, and imports what a command needs only
then.
"""

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from resnet_dist.cluster import ClusterConfig
from resnet_dist.config import Config

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # torch's warnings about a lost rank are pages; we say it
COMMANDS = {
    "train": "train a network; also what train.py does",
    "submit": "train on a SLURM cluster; also what slurm/submit.py does",
    "evaluate": "top-1 and top-5 of a checkpoint on the validation set",
    "predict": "the most probable classes of images, by a checkpoint",
    "export": "a checkpoint's network for ONNX, torch.export, safetensors or torchvision",
    "benchmark": "speed of the whole loop beside a bare one; benchmark loader: of the data path beside others",
    "data": "get a data set ready: import, pack, download, verify, show",
    "models": "every network: parameters, GFLOPs, published accuracy",
    "doctor": "a preflight of a run: layout, folders, data, network, versions",
    "report": "a table and a plot of a run's metrics.jsonl",
}
QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def config_parser(program: str, description: str) -> ArgumentParser:
    """A parser of the whole config tree: `--config FILE` (several overlay each other),
    `--section.key VALUE`.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        description=description,
        usage="%(prog)s [--config FILE ...] [--section.key VALUE ...] [--print_config]",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; of several the later ones win"
    )
    parser.add_class_arguments(Config)
    return parser


def parse_config(parser: ArgumentParser, arguments: list[str]) -> Config:
    """The config that the arguments describe. Ends the process with a sentence when they describe
    none.

    Of several ranks only the first speaks.
    """
    silent = os.environ.get("RANK", "0") != "0"
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere if silent else sys.stderr),
    ):
        values = parser.parse_args(arguments)
        try:
            settings = vars(parser.instantiate(values))
            config = Config(
                **{
                    key: value
                    for key, value in settings.items()
                    if key not in ("config", "cluster")
                }
            )
        except ValueError as problem:
            parser.error(str(problem))
    return config


def train(arguments: list[str]) -> int:
    """Train; without any argument the quickstart, and say so."""
    parser = config_parser(
        "train.py", "Train a network on a folder of images; the same command again resumes."
    )
    if not arguments:
        if not QUICKSTART.exists():
            parser.error("name a recipe: --config FILE (the repository's folder configs/ has some)")
        if os.environ.get("RANK", "0") == "0":
            print(
                "no arguments: running the quickstart, --config configs/quickstart.yaml", flush=True
            )
        arguments = ["--config", str(QUICKSTART)]
    config = parse_config(parser, arguments)

    from resnet_dist import process, run

    return process.run_process(config, run.train, resolve_auto=False)


def submit(arguments: list[str]) -> int:
    """Train on a SLURM cluster: every option of train, and those of the cluster. Submit again to
    resume.
    """
    parser = config_parser("submit.py", submit.__doc__)
    parser.add_class_arguments(ClusterConfig, "cluster")
    arguments = [
        f"{word}=true"
        if word in ("--cluster.dry_run", "--cluster.wait") and after[:2] in ("", "--")
        else word
        for word, after in zip(arguments, [*arguments[1:], ""], strict=True)
    ]
    first = parse_config(parser, arguments)
    cluster = parser.instantiate(parser.parse_args(arguments)).cluster
    configs = [
        parse_config(parser, ["--config", file, *arguments])
        for file in cluster.configs.split(",")
        if file
    ]
    program = (
        ["resnet-dist", "submit"]
        if sys.argv[0].endswith("resnet-dist")
        else ["python", "slurm/submit.py"]
    )

    from resnet_dist.launch.submission import submit_jobs

    try:
        return submit_jobs(configs or [first], cluster, shlex.join([*program, *arguments]))
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def evaluate(arguments: list[str]) -> int:
    """Evaluate a checkpoint; with several processes: torchrun --nproc_per_node N -m resnet_dist.cli
    evaluate ...
    """
    parser = _checkpoint_parser("evaluate", evaluate.__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print the result as one line of JSON only"
    )
    return _run(parser, arguments)


def predict(arguments: list[str]) -> int:
    """Print the most probable classes of images (JPEG or PNG), seen exactly as in evaluation; in
    one process.
    """
    parser = _checkpoint_parser("predict", predict.__doc__)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="file; folder; -: paths on stdin, one a line"
    )
    parser.add_argument(
        "--top", type=_positive, default=5, metavar="K", help="number of classes (default: 5)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line, with an error if it failed",
    )
    return _run(parser, arguments)


def export(arguments: list[str]) -> int:
    """Write a checkpoint's network for other programs, and check that it computes the same there;
    in one process.
    """
    parser = _checkpoint_parser("export", export.__doc__)
    parser.add_argument(
        "--to", required=True, choices=["onnx", "torch_export", "safetensors", "torchvision"]
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="what to write; torch.export likes a .pt2"
    )
    parser.add_argument(
        "--raw_weights", action="store_true", help="not the averaged ones, where there are any"
    )
    return _run(parser, arguments)


def benchmark(arguments: list[str]) -> int:
    """Measure what the whole training loop costs beside a bare one; `benchmark loader`: the data
    path beside others.
    """
    loader = arguments[:1] == ["loader"]
    parser = argparse.ArgumentParser(
        prog="resnet-dist benchmark",
        description=benchmark.__doc__,
        epilog="takes every option of training, for instance --config FILE; with several "
        "processes: torchrun --nproc_per_node N -m resnet_dist.cli benchmark ...",
    )
    parser.add_argument("--windows", type=int, default=5, help="rounds of windows (default: 5)")
    parser.add_argument(
        "--steps",
        type=int,
        default=40,
        help="of the loop: steps of a window that count (default: 40)",
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="of the loader: images of a window (default: 2000)"
    )
    parser.add_argument(
        "--read_delay_ms",
        type=float,
        default=0,
        help="of the loader: also with this added to a read",
    )
    parser.add_argument(
        "--originals",
        default="",
        help="of the loader: data folder for the others (default: ours)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as one line of JSON only"
    )
    options, settings = parser.parse_known_args(arguments[loader:])
    config = parse_config(config_parser("resnet-dist benchmark", benchmark.__doc__), settings)

    from resnet_dist import process
    from resnet_dist.commands import benchmark as loop
    from resnet_dist.commands import benchmark_loader

    measure = benchmark_loader.compare_loaders if loader else loop.measure_training
    return process.run_process(config, lambda config, runtime: measure(config, runtime, options))


def data(arguments: list[str]) -> int:
    """Get a data set ready."""
    from resnet_dist.commands import data as command

    parser = command.build_parser()
    options, settings = parser.parse_known_args(arguments)
    if options.command != "show":
        return command.run(parser.parse_args(arguments))
    config = parse_config(config_parser("resnet-dist data show", data.__doc__), settings)

    from resnet_dist.commands import show

    return show.run(config, options)


def doctor(arguments: list[str]) -> int:
    """Check what would end a run, also under torchrun: exit code 0, 1 with warnings, 2 with errors;
    --json for JSON.
    """
    config = parse_config(
        config_parser("resnet-dist doctor", doctor.__doc__), [a for a in arguments if a != "--json"]
    )

    from resnet_dist.commands import doctor as command

    return command.run(config, "--json" in arguments)


def report(arguments: list[str]) -> int:
    """Summarise a run."""
    parser = argparse.ArgumentParser(prog="resnet-dist report", description=report.__doc__)

    from resnet_dist.commands import report as command

    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def models(arguments: list[str]) -> int:
    """List the networks."""
    from resnet_dist.commands import models as command

    return command.run(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    listing = "\n".join(f"  {name:10} {meaning}" for name, meaning in COMMANDS.items())
    if not arguments or arguments[0] not in COMMANDS:
        wrong = bool(arguments) and arguments[0] not in ("-h", "--help")
        print(
            f"usage: resnet-dist COMMAND [--help]\n\n{listing}",
            file=sys.stderr if wrong else sys.stdout,
        )
        if wrong:
            print(f"error: unknown command {arguments[0]!r}", file=sys.stderr)
        return 2 if wrong else 0
    functions = {
        "train": train,
        "submit": submit,
        "evaluate": evaluate,
        "predict": predict,
        "export": export,
        "benchmark": benchmark,
        "data": data,
        "models": models,
        "doctor": doctor,
        "report": report,
    }
    try:
        return functions[arguments[0]](arguments[1:])
    except BrokenPipeError:  # of `| head`
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes once more at its end
        return 141


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _checkpoint_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"resnet-dist {command}",
        description=description,
        allow_abbrev=False,
        epilog="--section.key VALUE changes a setting of the checkpoint: --data.data_dir",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="file of a run's checkpoints/ folder"
    )
    return parser


def _run(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Do what the parser is named after, with its options, a checkpoint's content, and its config
    with changes.
    """
    words, own = iter(arguments), parser._option_string_actions
    options, others = parser.parse_known_args(
        [  # the value of a setting is no image, wherever it stands
            f"{word}={next(words, '')}"
            if word[:2] == "--" and word not in own and "=" not in word
            else word
            for word in words
        ]
    )
    settings = [word for word in others if word[:2] == "--" or "images" not in options]
    options.images = [
        *getattr(options, "images", ()),
        *(word for word in others if word not in settings),
    ]
    if any(word.startswith("--model.") for word in settings):
        parser.error("the settings of model are the checkpoint's: they cannot be changed")
    with contextlib.suppress(KeyboardInterrupt):
        from resnet_dist.checkpoint import flatten, read_checkpoint, unpack_checkpoint
        from resnet_dist.commands import evaluate, export, predict

        try:
            saved = unpack_checkpoint(read_checkpoint(Path(options.checkpoint)), options.checkpoint)
        except ValueError as problem:
            parser.exit(2, f"error: {problem}\n" if os.environ.get("RANK", "0") == "0" else None)
        overlay = config_parser(parser.prog, parser.description)
        overlay.usage = parser.format_usage().removeprefix("usage: ").strip()
        overlay.set_defaults(flatten(saved["config"]))
        command = {"evaluate": evaluate, "predict": predict, "export": export}[
            parser.prog.split()[-1]
        ]
        return command.run(saved, parse_config(overlay, settings), options)
    return 130


if __name__ == "__main__":
    sys.exit(main())
