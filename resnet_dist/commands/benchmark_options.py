"""The options of `resnet-dist benchmark`, and which benchmark they choose.

What a benchmark needs is imported when it is chosen: the help comes before torch is imported.
"""

from collections.abc import Callable

from jsonargparse import Namespace

from resnet_dist.settings.options import Parser
from resnet_dist.settings.rules import NonNegativeFloat, PositiveInt


def add_benchmark_options(parser: Parser) -> None:
    """Add the options of all benchmarks."""
    parser.add_option(
        "what",
        nargs="?",
        choices=["loop", "loader"],
        default="loop",
        help="loop: the whole training loop against a bare one; loader: the data loader against "
        "others",
    )
    parser.add_option("--windows", type=PositiveInt, default=5, help="number of measurements")
    parser.add_option("--steps", type=PositiveInt, default=40, help="loop: steps per measurement")
    _add_loader_options(parser)
    parser.add_path(
        "--profile",
        default="",
        metavar="FOLDER",
        help="profile a step: Chrome trace, and a table and picture by kind of kernel",
    )
    parser.add_option(
        "--models",
        type=str,
        default="",
        metavar="NAME,...",
        help="compare networks on random pixels, by precision, with and without train.compile",
    )
    parser.add_option(
        "--precisions",
        type=str,
        default="",
        metavar="NAME,...",
        help="models: fp32, bf16, fp16; empty: those that the hardware has",
    )
    parser.add_path(
        "--out",
        default="",
        metavar="STEM",
        help="models: also write STEM.json and STEM.md",
    )
    parser.add_option(
        "--determinism",
        action="store_true",
        help="measure what train.deterministic costs",
    )


def _add_loader_options(parser: Parser) -> None:
    """Add the options of the comparison of loaders."""
    parser.add_option(
        "--images", type=PositiveInt, default=2000, help="loader: images per measurement"
    )
    parser.add_option(
        "--read_delay_ms",
        type=NonNegativeFloat,
        default=0.0,
        help="loader: measure also with this delay added to each read",
    )
    parser.add_path(
        "--originals",
        default="",
        help="loader: data folder for the other loaders; empty: data_dir",
    )
    parser.add_path(
        "--also",
        default="",
        metavar="ROOT,...",
        help="loader: measure ours also on these data folders or addresses, which hold the same "
        "images; parquet files are read as in evaluation",
    )
    parser.add_path(
        "--rivals",
        default="",
        metavar="FILE[:NAME,...]",
        help="loader: compare also with the loaders of a Python file: benchmarks/rivals.py has "
        "ffcv, webdataset, litdata and mosaicml",
    )


def chosen_benchmark(options: Namespace) -> str:
    """The name of the benchmark that the options ask for.

    Raises:
        ValueError: If they ask for more than one.
    """
    chosen = [name for name in ("profile", "models", "determinism") if options[name]]
    if options.what == "loader":
        chosen.append("loader")
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} are separate benchmarks: choose one of them")
    return chosen[0] if chosen else "loop"


def find_benchmark(name: str) -> Callable[..., int]:
    """The function `(config, runtime, options)` of a benchmark, whose module is imported here."""
    if name == "loader":
        from resnet_dist.commands.benchmark_loader import compare_loaders

        return compare_loaders
    if name == "profile":
        from resnet_dist.commands.benchmark_profile import profile_training

        return profile_training
    if name == "models":
        from resnet_dist.commands.benchmark_models import compare_models

        return compare_models
    if name == "determinism":
        from resnet_dist.commands.benchmark_determinism import measure_determinism

        return measure_determinism
    from resnet_dist.commands.benchmark import measure_training

    return measure_training
