"""Run a function on several ranks, each a forked process on this machine that talks gloo.

Forking starts in milliseconds where torchrun needs seconds to import torch again. It is safe as
long as the parent has run no parallel region before: OpenMP's threads do not survive a fork.
`tests/conftest.py` keeps it at one thread.
"""

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from resnet_dist.checkpoints.checkpoint_file import read_checkpoint, unpack_checkpoint

TIMEOUT_SECONDS = 180

CLOCK_KEYS = {
    "time",
    "elapsed",
    "elapsed_cpu",
    "train/images_per_second",
    "train/data_wait_fraction",
    "train/step_seconds",
    "ranks/data_seconds",
    "ranks/step_seconds",
    "ranks/probe_seconds",
    "ranks/memory_gib",
    "train/memory_gib",
}
"""What depends on the clock or the memory in a line of metrics.jsonl"""


def run_ranks(fn, world_size: int, *args) -> list:
    """Call `fn(rank, world_size, *args)` on `world_size` ranks and return what each returned, in
    order of rank.

    The results are pickled: return numpy arrays and plain values, not tensors. Raises RuntimeError
    with the traceback of the first rank that fails, and when it takes longer than TIMEOUT_SECONDS.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, fn, rank, world_size, os.path.join(folder, "store"), args)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks])
        finally:
            for process, receiver in ranks:
                # After an answer a rank only has to exit; one that waits for a failed peer has to
                # be ended.
                process.join(5 if sys.exc_info()[0] is None else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
                receiver.close()


def _collect(receivers: list) -> list:
    """The answers of all ranks; raises as soon as one of them is a failure."""
    results = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = multiprocessing.connection.wait(
            waiting, timeout=max(0, deadline - time.monotonic())
        )
        if not ready:
            missing = [rank for rank in range(len(receivers)) if rank not in results]
            raise RuntimeError(f"no answer from ranks {missing} after {TIMEOUT_SECONDS} s")
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                failure = "the process died without an answer"
            if failure:
                raise RuntimeError(f"rank {rank} of {len(receivers)} failed:\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def begin_forked_process() -> None:
    """Call this first in each forked process."""
    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Objects of the parent are never freed here. A DALI pipeline would wait for its threads, which
    # do not survive a fork, or abort.
    gc.freeze()
    # A process that hangs prints where it is, before it is ended: after a time, and at SIGABRT.
    stderr = 2
    faulthandler.enable(file=stderr)
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 10, file=stderr)


def _child(sender, fn, rank: int, world_size: int, store_path: str, args: tuple) -> None:
    """The life of one rank: join the group, call, answer (failure, result), leave."""
    begin_forked_process()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # Gloo looks up the host's name otherwise, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args)
        # Nobody leaves while another still needs the connections.
        dist.barrier()
        dist.destroy_process_group()
        sender.send((None, result))
    except BaseException:
        sender.send((traceback.format_exc(), None))


def cpu_runtime(rank=0, world_size=1, cpu_group=None, local_world_size=None):
    """The runtime of a rank in the process group of `run_ranks`."""
    from resnet_dist.distributed.runtime import Runtime

    if local_world_size is None:
        local_world_size = world_size
    return Runtime(
        rank=rank,
        local_rank=rank % local_world_size,
        world_size=world_size,
        local_world_size=local_world_size,
        device=torch.device("cpu"),
        cpu_group=cpu_group,
    )


def options(**settings: object) -> list[str]:
    """Settings as words of a command line, with `__` for the dot: `options(train__epochs=2)` gives
    `["--train.epochs", "2"]`.
    """
    words = []
    for name, value in settings.items():
        key = name.replace("__", ".")
        words += [f"--{key}", str(value)]
    return words


TINY_NETWORK = "resnet8"
"""Name of ResNet-20's smaller brother, with one block in each stage, for runs that may have any
network. It takes a third of the collectives. Only processes of `start_app` know it.
"""

SMALL_RUN = {
    "config": Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml",
    "data__train_crop_size": 8,
    "data__val_resize_size": 8,
    "data__val_crop_size": 8,
    "data__threads": 1,
    "train__global_batch_size": 120,
    "train__precision": "fp32",
    "log__interval_steps": 1,
    "log__wandb": "disabled",
    "distributed__timeout_s": 60,
    "distributed__threads": 1,
}


def small_run(**settings: object) -> list[str]:
    """Options of a training that takes seconds: 8 pixels, twelve steps an epoch of the digits, each
    step logged. `settings` override these, see `options`.
    """
    return options(**(SMALL_RUN | settings))


def start_app(world_size: int, arguments: list[str], output: str, entry=None) -> list:
    """Fork `world_size` processes that run the command line as torchrun would start it; returns the
    processes.

    `arguments` begin with the command ("train", ...). What they print is appended to the file
    `output`. `entry` may take the place of `resnet_dist.cli.main` (to run it with something
    changed).
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = []
    for rank in range(world_size):
        process = context.Process(
            target=_app, args=(rank, world_size, port, arguments, output, entry), daemon=True
        )
        process.start()
        process.output = output
        processes.append(process)
    return processes


def run_app(
    world_size: int, arguments: list[str], output: str, entry=None, timeout: float = TIMEOUT_SECONDS
) -> list:
    """As `start_app`, and wait: the exit codes, in order of rank."""
    processes = start_app(world_size, arguments, output, entry)
    return wait_app(processes, timeout)


def run_to_the_end(world_size: int, arguments: list[str], folder: Path, entry=None) -> None:
    """As `run_app`, where every rank must end well. What is printed goes to `folder / "log"`."""
    log = folder / "log"
    codes = run_app(world_size, arguments, str(log), entry)
    assert codes == [0] * world_size, log.read_text()


def run_command(folder, words, world_size=1, entry=None) -> tuple[int, str]:
    """Run a command on `world_size` ranks, which must all end with the same exit code.

    Returns:
        The exit code, and what the ranks have printed, which goes through a file in `folder`.
    """
    log = folder / "printed"
    log.unlink(missing_ok=True)
    codes = run_app(world_size, [str(word) for word in words], str(log), entry)
    assert len(set(codes)) == 1, log.read_text()
    return codes[0], log.read_text()


def wait_app(processes: list, timeout: float = TIMEOUT_SECONDS) -> list[int]:
    """The exit codes of what `start_app` returned (negative: killed by that signal).

    Raises RuntimeError if processes take longer than `timeout` seconds, with what they have printed
    and where they are. They are ended.
    """
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in late:
        _abort(processes[rank])
    if late:
        printed = Path(processes[0].output).read_text(errors="replace")
        raise RuntimeError(f"ranks {late} were still running after {timeout} s:\n{printed[-8000:]}")
    return [process.exitcode for process in processes]


def _abort(process) -> None:
    """End a process; it prints where all its threads are."""
    os.kill(process.pid, signal.SIGABRT)
    process.join(5)
    process.kill()
    process.join()


def wait_for_step(output_dir, step, processes, saved=-1):
    """Until the run in `output_dir` has logged `step` and has a checkpoint of step `saved` or a
    later one; none of the `processes` may end before. What is to be killed then should be slowed
    down from there on: see `slow_from`.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        for process in processes:
            assert process.is_alive(), "the run ended before it could be killed"
        is_saved = max(saved_steps(output_dir), default=-1) >= saved
        if is_saved and last_logged_step(output_dir) >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached, or {saved} not saved")


def last_logged_step(output_dir):
    """The newest step that a run has logged; 0 before the first one."""
    lines = whole_lines(output_dir)
    return lines[-1]["step"] if lines else 0


def whole_lines(output_dir):
    """The lines of metrics.jsonl of a run that is under way: the last one may be half written, and
    there may be no file yet.
    """
    path = output_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def logged_lines(output_dir):
    """The lines of metrics.jsonl of a run that has ended."""
    text = (output_dir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without_clock(lines):
    """Lines of metrics.jsonl without what depends on the clock or the memory."""
    kept = []
    for line in lines:
        kept.append({key: value for key, value in line.items() if key not in CLOCK_KEYS})
    return kept


def last_checkpoint(output_dir):
    """The content of last.pt."""
    path = output_dir / "checkpoints" / "last.pt"
    return unpack_checkpoint(read_checkpoint(path), "last.pt")


def saved_steps(output_dir):
    """The steps of the checkpoints that are whole: a file has its name once its digest is there."""
    steps = []
    for path in (output_dir / "checkpoints").glob("step_*.pt"):
        number = path.stem.removeprefix("step_")
        steps.append(int(number))
    return steps


def slow_from(step, entry=None, seconds=0.4):
    """The command line's main (or `entry`) whose updates take `seconds` longer from that step on,
    so that whoever waits for it finds the run under way, however busy the machine is.
    """

    def slowed(arguments):
        from resnet_dist import cli, engine

        real = engine.train_step

        def train_step(model, state, *rest):
            if state.step >= step:
                time.sleep(seconds)
            return real(model, state, *rest)

        engine.train_step = train_step
        main = cli.main if entry is None else entry
        return main(arguments)

    return slowed


def in_double(entry):
    """`entry` in double precision, where it says fp32: what differs by rounding alone then hardly
    differs at all.
    """

    def doubled(arguments):
        from resnet_dist import precision
        from resnet_dist.checkpoints import state

        real = state.build_model
        # The loader's type, and with it the model's.
        precision.DTYPES["fp32"] = torch.float64

        def build_model(section, num_classes):
            torch.set_default_dtype(torch.float64)
            return real(section, num_classes)

        state.build_model = build_model
        return entry(arguments)

    return doubled


def record_batches(folder):
    """The command line's main with a training step that writes down what it was given."""

    def entry(arguments):
        from resnet_dist import cli, engine

        real = engine.train_step
        rank = os.environ["RANK"]

        def train_step(model, state, micro_batches, lr, *rest):
            with open(folder / f"batches_{rank}.jsonl", "a") as file:
                for batch in micro_batches:
                    rows = batch.indices.tolist()
                    labels = batch.labels.tolist()
                    sums = batch.images.double().sum((1, 2, 3)).tolist()
                    line = json.dumps([state.step, lr, rows, labels, sums])
                    file.write(f"{line}\n")
            return real(model, state, micro_batches, lr, *rest)

        engine.train_step = train_step
        return cli.main(arguments)

    return entry


def by_step(folder):
    """For each step the learning rate and its samples (row, label, sum of the crop's pixels), over
    all ranks. What a killed attempt had read of a step and the next one read again must be the
    same.
    """
    steps = {}
    for path in sorted(folder.glob("batches_*.jsonl")):
        for line in path.read_text().splitlines():
            step, lr, rows, labels, sums = json.loads(line)
            lr_before, samples = steps.setdefault(step, (lr, set()))
            assert lr == lr_before
            samples.update(zip(rows, labels, sums, strict=True))
    return {step: (lr, sorted(samples)) for step, (lr, samples) in steps.items()}


def free_port() -> int:
    """A TCP port that nobody listens on just now, and below those that the kernel gives to whoever
    asks for any (and those of tests/slurm): it stays free until it is used, and a rank that calls
    there too early finds nobody.
    """
    generator = random.SystemRandom()
    while True:
        port = generator.randrange(10000, 16000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def add_tiny_network() -> None:
    """Let `model.name` take TINY_NETWORK in this process."""
    from resnet_dist.models.build import MODELS
    from resnet_dist.models.resnet import FAMILY, ResNet

    block, _, options = FAMILY["resnet20"]
    MODELS[TINY_NETWORK] = partial(ResNet, block, (1, 1, 1), **options)


def _app(rank: int, world_size: int, port: int, arguments: list[str], output: str, entry) -> None:
    """One rank of the application in a forked process, with the environment that torchrun would
    give it.
    """
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # In place of pytest's streams.
    sys.stdout = os.fdopen(os.dup(descriptor), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(descriptor), "w", buffering=1)
    begin_forked_process()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if entry is None:
        from resnet_dist.cli import main as entry
    add_tiny_network()
    code = 1
    try:
        code = entry(arguments)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A forked child must not run the parent's clean-up.
        os._exit(code)


def equal_trees(a, b) -> bool:
    """Whether two trees of plain values and tensors are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_trees(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal_trees, a, b))
    return a == b
