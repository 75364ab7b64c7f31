"""The processes of a run: who am I, how do we agree, and how do we stop together."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from resnet_dist.rendezvous import Launcher, LostRankError, meet, read_launcher
from resnet_dist.watchdog import Watchdog

_NO_INTERFACE = ("Unable to find address", "Unable to find interface", "Unable to resolve", "bind:")
"""Words of gloo's messages about the network interfaces of this machine."""

_NCCL_DEFAULTS = {
    # Our watchdog names the lost rank and ends the process; NCCL's would abort it without a word.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # Do not dump flight records when a collective times out: it delays the end.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Environment of NCCL where the user has set none."""

_SECOND_INTERRUPT_SECONDS = 1.0
"""A SIGINT that comes later than this after the first is another key press."""

T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """One rank's place in the run."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None
    """a gloo group of all ranks for small agreements that must not wait for the device"""
    watchdog: Watchdog | None = None
    """knows where the other ranks are"""

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.cpu_group)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over the ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def sum_integer(self, number: int) -> int:
        """The sum of each rank's `number`."""
        return int(self.all_reduce_sum(torch.tensor(number, device=self.device)))

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
        """The `numbers` of each rank, on every rank, over the CPU group."""
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own, group=self.cpu_group)
        return [tensor.tolist() for tensor in found]

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the main process's buffers (running statistics), in place."""
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def broadcast_object(self, value: T) -> T:
        """The main process's `value` (small and picklable) on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group, device=torch.device("cpu"))
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns in the main process, on every rank.

        Whatever it raises is raised on every rank, as ValueError: a rank that waited for the result
        of a main process that is gone would hang.
        """
        result: T | None = None
        error: str | None = None
        if self.is_main:
            try:
                result = function()
            except ValueError as problem:
                error = str(problem)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise ValueError(error)
        return cast(T, result)

    def long_on_main(self, function: Callable[[], T]) -> T:
        """As `on_main`, for work that may take longer than a collective may wait.

        It runs in a thread, and every second the main process tells the others that it goes on.
        """
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(function) if self.is_main else None
            while self.on_main(lambda: _still_runs(work)):
                pass
            return self.on_main(lambda: _result(work))

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """As `long_on_main` for a large result: one read of a file for all ranks."""
        payload = b""

        def read() -> int:
            nonlocal payload
            payload = function()
            return len(payload)

        size = self.long_on_main(read)
        if self.is_main:
            buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        else:
            buffer = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self.cpu_group)
        return buffer.numpy().tobytes()


def _still_runs(work: Future[T] | None) -> bool:
    """Wait a second for the main process's work; whether it is still under way."""
    assert work is not None
    return bool(wait([work], timeout=1).not_done)


def _result(work: Future[T] | None) -> T:
    assert work is not None
    return work.result()


def join_ranks(launcher: Launcher, timeout_s: float, world_size: int = 0) -> Watchdog:
    """Meet the other ranks, and start to watch them.

    Of the launcher's processes the first `world_size` train (0: all); the others are spares. Raises
    ValueError and `LostRankError` as `rendezvous.meet`.
    """
    return Watchdog(meet(launcher, timeout_s), world_size or launcher.world_size, timeout_s)


def start(
    device: str = "auto",
    timeout_s: float = 600.0,
    threads: int = 0,
    watchdog: Watchdog | None = None,
) -> Runtime:
    """Join the process group that the launcher's environment describes; without a launcher it is a
    group of one.

    Args:
        device: auto, cuda or cpu.
        timeout_s: seconds after which a collective that waits for a rank is an error.
        threads: torch threads of this rank on the CPU; 0 is its share of the cores.
        watchdog: what `join_ranks` returned, if it was called before.

    Raises:
        ValueError: `device` is "cuda" and there is none, the machine has fewer GPUs than ranks (a
            launcher may also show each rank its own one by CUDA_VISIBLE_DEVICES), the launcher's
            environment is inconsistent, or no network interface can be used.
        LostRankError: a rank or the launcher is gone.
    """
    if watchdog is None:
        watchdog = join_ranks(read_launcher(), timeout_s)
    launcher = watchdog.launcher
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        place = _use_gpu(device, launcher)
    else:
        place = torch.device("cpu")
        share = max(1, len(os.sched_getaffinity(0)) // launcher.local_world_size)
        torch.set_num_threads(threads or share)
        keep_freed_memory()
    cpu_group = _start_process_group(kind, watchdog, timeout_s)
    return Runtime(
        launcher.rank,
        launcher.local_rank,
        watchdog.world_size,
        launcher.local_world_size,
        place,
        cpu_group,
        watchdog,
    )


def _use_gpu(device: str, launcher: Launcher) -> torch.device:
    """Take this rank's GPU. Raises ValueError where the machine has too few."""
    visible = torch.cuda.device_count()
    only_own = visible == 1 and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    index = 0 if only_own else launcher.local_rank
    if index >= visible:
        raise ValueError(
            f"distributed.device is {device}, but this machine shows {visible} GPUs for "
            f"{launcher.local_world_size} ranks: start fewer processes, or take "
            "--distributed.device cpu"
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.benchmark = True  # the shapes of a run stay the same
    for name, value in _NCCL_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return torch.device("cuda", index)


def _start_process_group(kind: str, watchdog: Watchdog, timeout_s: float) -> dist.ProcessGroup:
    """Start the default group for `kind` (nccl or gloo); returns a gloo group of the same ranks."""
    limit = timedelta(seconds=timeout_s)
    backend = "nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", watchdog.meeting_store),
            rank=watchdog.rank,
            world_size=watchdog.world_size,
            timeout=limit,
        )
        group = dist.new_group(backend="gloo", timeout=limit)
    except (dist.DistError, RuntimeError) as problem:
        _refuse_interface(problem)
        if watchdog.world_size == 1:
            raise ValueError(f"the process group cannot start: {_first_line(problem)}") from problem
        raise LostRankError(f"the process group cannot start: {_first_line(problem)}") from problem
    assert isinstance(group, dist.ProcessGroup)
    return group


def _refuse_interface(problem: Exception) -> None:
    """Raise ValueError when gloo found no network interface to talk on."""
    message = str(problem)
    has_no_interface = any(words in message for words in _NO_INTERFACE)
    if not has_no_interface:
        return
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    interfaces = ", ".join(name for _, name in socket.if_nameindex()) or "none"
    what = f"GLOO_SOCKET_IFNAME is {name!r}" if name else "GLOO_SOCKET_IFNAME is not set"
    raise ValueError(
        f"the process group cannot start: {what}, and gloo finds no address to use "
        f"({_first_line(problem)}); set it to one of this machine's network interfaces that is up: "
        f"{interfaces}"
    ) from problem


def _first_line(problem: Exception) -> str:
    """The first line of torch's message, without the condition in its C++ code that failed."""
    line = str(problem).splitlines()[0].strip()
    return re.sub(r"^\[enforce fail at [^]]*\] [^.]*\. ", "", line)


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, instead of mapping and zeroing fresh pages in every
    step.

    torch's CPU allocator has no cache of its own. Measured on two cores: 8 to 18 % more images per
    second, for ResNet-18 at 224 pixels and ResNet-20 at 32, in fp32 and bf16. A C library without
    mallopt is left as it is.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(top_pad, 2**26)


def stop(runtime: Runtime) -> None:
    """Leave the process group."""
    assert runtime.watchdog is not None
    leave_ranks(runtime.watchdog)


def leave_ranks(watchdog: Watchdog) -> None:
    """Leave the process group, and wait for the other ranks if this one serves their store."""
    watchdog.leave(10.0)
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Signals that ask for an end, agreed between the ranks without waiting for the device.

    A handler only notes the signal. `poll`, called by every rank at the same places, reduces what
    was noted over a CPU group: started in one call and read in the next, so that its latency hides
    behind a step. All ranks therefore learn of a signal, sent to any one of them, in the same call.

    A second SIGINT (more than a second after the first, since a terminal and torchrun both deliver
    one key press) ends the process at once. A launcher may have blocked a signal, so that it cannot
    end a process that is not ready for it: it is let in here, and blocked again by `close`. SIGHUP
    stays ignored where nohup ignores it; torchrun, also under nohup, passes it on.
    """

    SIGNALS = (
        0,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    )
    """Of several signals the later one counts: SIGTERM alone may mean anything, and SIGUSR2 beside
    it says what. 0 stands for none."""

    def __init__(self, group: dist.ProcessGroup | None, watchdog: Watchdog | None = None) -> None:
        self.group = group
        self.watchdog = watchdog
        self.noted = 0
        self.agreed = 0
        self.interrupted_at: float | None = None
        self.pid = os.getpid()
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        numbers = [number for number in self.SIGNALS[1:] if not _ignored_by_nohup(number)]
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        self.mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        if watchdog is not None:
            watchdog.ask_to_stop = self._stop_for_lost_launcher

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a forked child inherits the handler, not the duty
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is None:
                self.interrupted_at = now
            elif now - self.interrupted_at > _SECOND_INTERRUPT_SECONDS:
                os._exit(128 + number)
        self.noted = max(self.noted, self.SIGNALS.index(number))

    def _stop_for_lost_launcher(self) -> None:
        """Called by the watchdog's thread: save and leave as after SIGTERM."""
        self.noted = max(self.noted, self.SIGNALS.index(signal.SIGTERM))

    def poll(self) -> int:
        """The signal that any rank had noted one call ago, on all ranks; 0 for none."""
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            self.agreed = self.SIGNALS[int(flag)]
        flag = torch.tensor([self.noted], dtype=torch.int32)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = (work, flag)
        return self.agreed

    def finish(self) -> None:
        """Wait for the reduction under way, with the other ranks."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None

    def forget(self) -> None:
        """Train on as if the agreed signal had not come; one noted since then still counts."""
        self.finish()
        if self.SIGNALS[self.noted] == self.agreed:
            self.noted = 0
        self.agreed = 0

    def close(self) -> None:
        """Give the signals back."""
        if self.watchdog is not None:
            self.watchdog.ask_to_stop = None
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _ignored_by_nohup(number: int) -> bool:
    """Whether the user started this process so that it survives the end of the session."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
