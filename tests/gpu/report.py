"""Prove and measure the project on one GPU, in at most 8 minutes and without a network.

    python tests/gpu/report.py --photographs DIR [--out FOLDER]
    make gpu PYTHON=python3 PHOTOGRAPHS=DIR

It runs the checks of tests/gpu, then measures what docs/gpu.md lists, and writes gpu_report.md and
gpu_report.json. The most important come first; what finds no time is recorded as such, and `--only
checks` or `--only figures` gives one half all of the time. Each check and each part of the figures
has its own limit. One that fails, dies or takes too long is recorded, and the others go on.

DIR holds at least a few hundred photographs as JPEG files, in folders or not; without it the
figures that need JPEG files are left out. The environment needs torch 2.9 to 2.14, torchvision,
DALI, NumPy, Pillow, PyYAML and tqdm.

    python tests/gpu/report.py --dry-run --device cpu

runs all of it at a tiny size; its figures mean nothing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# Modules by what needs them.
REQUIRED = {
    "torch": "everything",
    "torchvision": "the bare loop and its loader",
    "nvidia.dali": "the data path",
    "numpy": "the data path",
    "PIL": "the data path (package pillow)",
    "yaml": "the settings (package pyyaml)",
    "tqdm": "the console",
}
OPTIONAL = {
    "jsonargparse": "the checks quickstart and lost_rank_over_nccl, which use the command line",
    "pynvml": "the energy of an image (package nvidia-ml-py)",
    "matplotlib": "nothing here, but pictures of profiles",
}
NEEDS_COMMAND_LINE = {"quickstart", "lost_rank_over_nccl"}
OLDEST_TORCH = (2, 9)
NEWEST_TORCH = (2, 14)

BUDGET_SECONDS = 470
CHECKS_SHARE = 0.6
"""of the budget, at most; what the checks leave is for the figures"""
DRY_RUN_FACTOR = 4
"""of all limits: a CPU is slow"""

PHOTOGRAPH_ENDINGS = {".jpg", ".jpeg"}
FEWEST_IMAGES = 2048
"""files of the arranged folder: photographs are linked several times if there are fewer"""


@dataclass
class Result:
    """What became of one check or part."""

    name: str
    outcome: str
    """passed, failed, skipped, died, timed out, or no time"""
    seconds: float = 0.0
    text: str = ""
    figures: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A program that prints one line of JSON when an item starts and one when it has ended."""

    command: list[str]
    limits: dict[str, float]
    """seconds for each item, in order"""
    log: Path
    """takes what the program prints on stderr"""


class ItemReader:
    """The lines of JSON of a running program, with a time-out for each."""

    def __init__(self, program: Program, names: Sequence[str]) -> None:
        with open(program.log, "ab") as log:
            self.process = subprocess.Popen(
                [*program.command, *names],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                text=True,
                # So that what it has started can be ended with it.
                start_new_session=True,
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next(self, seconds: float) -> dict | None:
        """The next line; None at the end of the program. Raises queue.Empty after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                return None
            if line.startswith('{"name"'):
                return json.loads(line)

    def end(self) -> int:
        """End the program and what it has started; returns its exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def run_items(program: Program, deadline: float) -> list[Result]:
    """Run all items of a program, in a new process after each one that dies or hangs.

    Args:
        program: The program and its items.
        deadline: When the last item must have ended (time.monotonic).
    """
    results: list[Result] = []
    left = list(program.limits)
    while left:
        if time.monotonic() >= deadline:
            results += [Result(name, "no time") for name in left]
            return results
        found = run_until_failure(program, left, deadline)
        results += found
        left = left[len(found) :]
    return results


def run_until_failure(program: Program, names: list[str], deadline: float) -> list[Result]:
    """Run items in one process, until it has done them all, dies or hangs.

    Returns:
        At least one result, in the order of the names.
    """
    reader = ItemReader(program, names)
    results = []
    try:
        for name in names:
            start = time.monotonic()
            # The first item waits for the imports.
            allowed = program.limits[name] + (0 if results else 30)
            limit = min(start + allowed, deadline)
            result = read_result(reader, name, limit)
            results.append(result)
            has_ended = result.outcome in ("died", "timed out")
            if has_ended:
                result.seconds = round(time.monotonic() - start, 1)
                result.text += tail(program.log)
            print(f"  {result.outcome:10}{result.seconds:7.1f} s  {result.name}", flush=True)
            if has_ended:
                return results
    finally:
        reader.end()
    return results


def read_result(reader: ItemReader, name: str, limit: float) -> Result:
    """Wait for the end of one item.

    Args:
        reader: The running program.
        name: The item.
        limit: When it must have ended (time.monotonic).
    """
    while True:
        try:
            line = reader.next(limit - time.monotonic())
        except queue.Empty:
            return Result(name, "timed out", text="it took longer than its limit\n")
        if line is None:
            return Result(name, "died", text=f"exit code {reader.process.wait()}\n")
        if line["outcome"] != "started":
            assert line["name"] == name
            return Result(**line)


def tail(log: Path) -> str:
    """The end of what a program printed on stderr."""
    return log.read_text(errors="replace")[-1500:]


def check_environment() -> list[str]:
    """Look for the modules and the version of torch, without importing anything heavy.

    Returns:
        Remarks about what is optional and missing, or untried.

    Raises:
        SystemExit: If something that everything needs is missing.
    """
    missing = [name for name in REQUIRED if not has_module(name)]
    if missing:
        needs = "; ".join(f"{name}: {REQUIRED[name]}" for name in missing)
        raise SystemExit(f"error: {sys.executable} lacks {', '.join(missing)} ({needs})")
    remarks = []
    for name, use in OPTIONAL.items():
        if not has_module(name):
            remarks.append(f"{name} is missing; it is needed for {use}")
    numbers = re.findall(r"\d+", metadata.version("torch"))
    version = (int(numbers[0]), int(numbers[1]))
    if not OLDEST_TORCH <= version <= NEWEST_TORCH:
        remarks.append(f"torch {metadata.version('torch')} is untried: 2.9 to 2.14 are known")
    return remarks


def has_module(name: str) -> bool:
    """Whether a module can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # Of the package that holds it.
        return False


def dali_builds() -> list[str]:
    """The installed builds of DALI with their versions."""
    builds = set()
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith("nvidia-dali-cuda"):
            builds.add(f"{name} {distribution.version}")
    return sorted(builds)


def describe_machine(device: str) -> dict[str, object]:
    """Versions and hardware."""
    import torch

    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dali": ", ".join(dali_builds()) or "not installed as a wheel",
        "cores": len(os.sched_getaffinity(0)),
        "device": "CPU",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        driver = Path("/proc/driver/nvidia/version")
        if driver.exists():
            facts["driver"] = driver.read_text().splitlines()[0]
    return facts


def commit() -> str:
    """The commit of the checkout; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def arrange_photographs(source: Path, folder: Path, fewest: int) -> Path:
    """Link photographs into class folders, as the loaders need them.

    Args:
        source: A folder with JPEG files, at any depth.
        folder: Where the arranged folder goes.
        fewest: Files that there must be; photographs are linked several times.

    Raises:
        SystemExit: If there are no photographs.
    """
    photographs = []
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in PHOTOGRAPH_ENDINGS and path.is_file():
            photographs.append(path.resolve())
    if not photographs:
        raise SystemExit(f"error: --photographs {source} holds no .jpg or .jpeg files")
    train = folder / "train"
    number = 0
    while number < fewest:
        for path in photographs:
            group = train / f"class{number % 8}"
            group.mkdir(parents=True, exist_ok=True)
            (group / f"{number:06d}.jpg").symlink_to(path)
            number += 1
    print(f"{len(photographs)} photographs, linked as {number} files")
    return folder


def made_up_photographs(folder: Path) -> Path:
    """A few drawn pictures, for a dry run; no figure of them is kept."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from image_files import encode, picture, write_split

    write_split(str(folder), [encode(picture(200, 260, seed)) for seed in range(16)])
    return folder


@contextlib.contextmanager
def photographs_of(options: argparse.Namespace) -> Iterator[Path | None]:
    """The arranged folder of photographs; None without any."""
    with tempfile.TemporaryDirectory(prefix="photographs_") as name:
        folder = Path(name)
        if options.photographs is not None:
            fewest = 32 if options.dry_run else FEWEST_IMAGES
            yield arrange_photographs(options.photographs, folder, fewest)
        elif options.dry_run:
            yield made_up_photographs(folder)
        else:
            yield None


def run_checks(options: argparse.Namespace, deadline: float) -> list[Result]:
    """Run the checks of tests/gpu."""
    from checks import CHECKS

    limits = {}
    results = []
    for name, check in CHECKS.items():
        if name in NEEDS_COMMAND_LINE and not has_module("jsonargparse"):
            results.append(Result(name, "skipped", text="jsonargparse is missing"))
        else:
            limits[name] = float(check.seconds * factor(options))
    command = [sys.executable, str(HERE / "checks.py"), "--device", options.device]
    if options.dry_run:
        command.append("--small")
    program = Program(command, limits, options.out / "checks.log")
    return run_items(program, deadline) + results


def run_figures(options: argparse.Namespace, deadline: float) -> list[Result]:
    """Measure the figures."""
    from figures import PARTS

    limits = {}
    for name, part in PARTS.items():
        limits[name] = float(part.seconds * factor(options))
    command = [sys.executable, str(HERE / "figures.py"), "--device", options.device]
    if options.dry_run:
        command.append("--small")
    with photographs_of(options) as photographs:
        if photographs is not None:
            command += ["--photographs", str(photographs)]
        program = Program(command, limits, options.out / "figures.log")
        results = run_items(program, deadline)
    if options.photographs is None:
        for result in results:
            if PARTS[result.name].needs_photographs and result.figures:
                result.figures = {}
                result.text = "ran on made-up images: no figures"
    return results


def factor(options: argparse.Namespace) -> int:
    """What all limits are multiplied by."""
    return DRY_RUN_FACTOR if options.dry_run else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="real JPEG files")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the report")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, to try the program")
    parser.add_argument("--seconds", type=int, default=0, help="budget; default: 470")
    parser.add_argument("--only", choices=["checks", "figures"], help="one half, with all the time")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.dry_run:
        parser.error("--device cpu is for --dry-run: the sizes are those of a GPU")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Write the report.

    Returns:
        0 if every check passed and every part ran, or was skipped for a reason; otherwise 1.
    """
    started = time.monotonic()
    options = parse(arguments)
    remarks = check_environment()
    print(f"DALI: {', '.join(dali_builds()) or 'not installed as a wheel'}", flush=True)
    for remark in remarks:
        print(f"note: {remark}", flush=True)
    sys.path.insert(0, str(HERE))
    # PyTorch reads it at the first matrix product; train.deterministic needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    machine = describe_machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("checks.log", "figures.log"):
        (options.out / name).unlink(missing_ok=True)

    budget = (options.seconds or BUDGET_SECONDS) * factor(options)
    checks = []
    figures = []
    if options.only != "figures":
        share = 1.0 if options.only else CHECKS_SHARE
        checks = run_checks(options, started + share * budget)
    if options.only != "checks":
        figures = run_figures(options, started + budget)
    seconds = time.monotonic() - started

    from page import Report, write_report

    report = Report(machine, remarks, checks, figures, seconds, options.dry_run)
    write_report(report, options.out)
    bad = [one.name for one in (*checks, *figures) if one.outcome not in ("passed", "skipped")]
    print(f"{seconds:.0f} s; written to {options.out}/gpu_report.md and gpu_report.json")
    if bad:
        print(f"not passed: {', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
