"""The process group of a run, collective operations on it, and signals that all ranks agree on."""

import contextlib
import ctypes
import os
import re
import signal
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

from resnet_dist.distributed.interfaces import list_interfaces
from resnet_dist.distributed.rendezvous import Launcher, LostRankError, meet, read_launcher
from resnet_dist.distributed.watchdog import Watchdog

# Words of gloo's messages about the network interfaces of this machine.
_NO_INTERFACE = ("Unable to find address", "Unable to find interface", "Unable to resolve", "bind:")

# Environment variables of NCCL, where the user has not set them.
_NCCL_DEFAULTS = {
    # The project's watchdog names the lost rank and ends the process. NCCL's monitor would abort it
    # without a message.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # A dump of flight records after a time-out of a collective would delay the end.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}

# A SIGINT that comes later than this after the first one is another key press.
_SECOND_INTERRUPT_SECONDS = 1.0

T = TypeVar("T")

# What `signal.signal` returns.
_Handler = Callable[[int, FrameType | None], object] | int | None


@dataclass(frozen=True)
class Runtime:
    """The place of one rank in the run, and collective operations on all ranks.

    Attributes:
        rank: Rank of this process.
        local_rank: Rank among the processes of this machine.
        world_size: Number of ranks that train.
        local_world_size: Number of processes on this machine.
        device: The device of this rank.
        cpu_group: A gloo group of all ranks, for small messages that must not wait for the device.
        watchdog: Watches the other ranks.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None
    watchdog: Watchdog | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which alone writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        dist.barrier(group=self.cpu_group)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place, and return it."""
        dist.all_reduce(tensor)
        return tensor

    def sum_integer(self, number: int) -> int:
        """Return the sum of `number` over the ranks."""
        tensor = torch.tensor(number, device=self.device)
        self.all_reduce_sum(tensor)
        return int(tensor)

    def gather_numbers(self, numbers: list[float]) -> list[list[float]]:
        """Return the `numbers` of each rank in order of rank, on every rank.

        They are sent over the CPU group. Every rank must pass equally many.
        """
        own = torch.tensor(numbers, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own, group=self.cpu_group)
        return [tensor.tolist() for tensor in gathered]

    def gather_objects(self, value: T) -> list[T] | None:
        """Return the `value` of each rank in order of rank, on the main process; None elsewhere.

        The values are pickled and sent over the CPU group. Every rank must call this.
        """
        gathered: list[T] | None = None
        if self.is_main:
            gathered = [value] * self.world_size
        dist.gather_object(value, gathered, dst=0, group=self.cpu_group)
        return gathered

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Copy the buffers of the main process (running statistics) to every rank, in place."""
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def broadcast_object(self, value: T) -> T:
        """Return the `value` of the main process on every rank; it must be small and picklable."""
        cpu = torch.device("cpu")
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group, device=cpu)
        return box[0]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` in the main process alone, and return its result on every rank.

        Raises:
            ValueError: `function` has raised an exception. Every rank raises it, since a rank that
                waits for the result of a main process that has ended would hang.
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
        """Like `on_main`, for work that may take longer than the time-out of a collective.

        It runs in a thread, and every second the main process tells the others that it continues.
        """
        pool = ThreadPoolExecutor(1)
        work = None
        try:
            if self.is_main:
                work = pool.submit(function)
            while self.on_main(lambda: _still_runs(work)):
                pass
            return self.on_main(lambda: _result(work))
        finally:
            # An interrupt reaches the caller at once, who may know how to end the work.
            pool.shutdown(wait=False)

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """Like `long_on_main`, for a large result, such as a file that is read once for all ranks.

        The bytes are not pickled, but sent as a tensor.
        """
        payload = b""

        def read() -> int:
            nonlocal payload
            payload = function()
            return len(payload)

        size = self.long_on_main(read)
        if self.is_main:
            writable = bytearray(payload)
            buffer = torch.frombuffer(writable, dtype=torch.uint8)
        else:
            buffer = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(buffer, src=0, group=self.cpu_group)
        return buffer.numpy().tobytes()


def _still_runs(work: Future[T] | None) -> bool:
    """Wait at most a second for the work of the main process; return whether it still runs."""
    assert work is not None
    finished = wait([work], timeout=1)
    return bool(finished.not_done)


def _result(work: Future[T] | None) -> T:
    assert work is not None
    return work.result()


def join_ranks(launcher: Launcher, timeout_s: float, world_size: int = 0) -> Watchdog:
    """Connect to the other ranks, and start to watch them.

    Args:
        launcher: The launcher's description of this process.
        timeout_s: Seconds after which a wait for another rank is an error.
        world_size: Number of ranks that train; 0 is all. The other ranks are spares.

    Raises:
        ValueError: The address of the common store cannot be used.
        LostRankError: A rank has not joined in time, or the launcher is gone.
    """
    meeting = meet(launcher, timeout_s)
    if not world_size:
        world_size = launcher.world_size
    return Watchdog(meeting, world_size, timeout_s)


def start(
    device: str = "auto",
    timeout_s: float = 600.0,
    threads: int = 0,
    watchdog: Watchdog | None = None,
) -> Runtime:
    """Join the process group that the launcher's environment describes.

    Without a launcher this process is the only member.

    Args:
        device: "auto", "cuda" or "cpu".
        timeout_s: Seconds after which a collective that waits for a rank is an error.
        threads: Number of torch's CPU threads of this rank; 0 is its share of the cores.
        watchdog: The result of `join_ranks`, if it was called before.

    Raises:
        ValueError: `device` is "cuda" and there is no GPU, the machine has fewer GPUs than ranks (a
            launcher may also give each rank one GPU by CUDA_VISIBLE_DEVICES), the launcher's
            environment is inconsistent, or no network interface can be used.
        LostRankError: A rank or the launcher is gone.
    """
    if watchdog is None:
        watchdog = join_ranks(read_launcher(), timeout_s)
    launcher = watchdog.launcher
    use_cuda = device == "cuda"
    if device == "auto":
        use_cuda = torch.cuda.is_available()
    if use_cuda:
        place = _use_gpu(device, launcher)
    else:
        place = torch.device("cpu")
        _set_threads(threads, launcher)
        keep_freed_memory()
    cpu_group = _start_process_group(place.type, watchdog, timeout_s)
    # gloo raises an error when a rank is lost. A kernel of NCCL waits for it for ever.
    watchdog.waits_forever = place.type == "cuda"
    return Runtime(
        rank=launcher.rank,
        local_rank=launcher.local_rank,
        world_size=watchdog.world_size,
        local_world_size=launcher.local_world_size,
        device=place,
        cpu_group=cpu_group,
        watchdog=watchdog,
    )


def _set_threads(threads: int, launcher: Launcher) -> None:
    """Set the number of torch's CPU threads; 0 is this rank's share of the cores."""
    if not threads:
        cores = os.sched_getaffinity(0)
        share = len(cores) // launcher.local_world_size
        threads = max(1, share)
    torch.set_num_threads(threads)


def _use_gpu(device: str, launcher: Launcher) -> torch.device:
    """Select the GPU of this rank. Raises ValueError if the machine has too few GPUs."""
    visible = torch.cuda.device_count()
    index = launcher.local_rank
    if visible == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        # The launcher shows each rank its own GPU alone.
        index = 0
    if index >= visible:
        raise ValueError(
            f"distributed.device is {device}, but this machine shows {visible} GPUs for "
            f"{launcher.local_world_size} ranks: start fewer processes, or take "
            "--distributed.device cpu"
        )
    torch.cuda.set_device(index)
    # The shapes of a run stay the same, so that a search for the fastest kernels pays.
    torch.backends.cudnn.benchmark = True
    for name, value in _NCCL_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return torch.device("cuda", index)


def _start_process_group(kind: str, watchdog: Watchdog, timeout_s: float) -> dist.ProcessGroup:
    """Start the default process group.

    Args:
        kind: The type of the device: "cuda" for NCCL, "cpu" for gloo.
        watchdog: Holds the store, the rank, and the number of ranks.
        timeout_s: Seconds after which a collective is an error.

    Returns:
        A gloo group of the same ranks.
    """
    limit = timedelta(seconds=timeout_s)
    store = PrefixStore("group", watchdog.meeting_store)
    backend = "nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=watchdog.rank,
            world_size=watchdog.world_size,
            timeout=limit,
        )
        group = dist.new_group(backend="gloo", timeout=limit)
    except (dist.DistError, RuntimeError) as problem:
        _refuse_interface(problem)
        text = f"the process group cannot start: {_first_line(problem)}"
        if watchdog.world_size == 1:
            raise ValueError(text) from problem
        raise LostRankError(text) from problem
    assert isinstance(group, dist.ProcessGroup)
    return group


def _refuse_interface(problem: Exception) -> None:
    """Raise ValueError if gloo has found no network interface that it can use."""
    message = str(problem)
    has_no_interface = any(words in message for words in _NO_INTERFACE)
    if not has_no_interface:
        return
    what = "GLOO_SOCKET_IFNAME is not set"
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        what = f"GLOO_SOCKET_IFNAME is {chosen!r}"
    raise ValueError(
        f"the process group cannot start: {what}, and gloo finds no address to use "
        f"({_first_line(problem)}); set it to one of this machine's network interfaces that is up: "
        f"{list_interfaces()}"
    ) from problem


def _first_line(problem: Exception) -> str:
    """Return the first line of torch's message, without the C++ condition that failed."""
    lines = str(problem).splitlines()
    line = lines[0].strip()
    return re.sub(r"^\[enforce fail at [^]]*\] [^.]*\. ", "", line)


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next step.

    Otherwise it maps new pages in every step, which the kernel fills with zeros, since torch's CPU
    allocator has no cache. Measured on two cores: 8 to 18 % more images per second, for ResNet-18
    at 224 pixels and ResNet-20 at 32, in fp32 and bf16. A C library without mallopt is not changed.
    """
    # From malloc.h.
    trim_threshold = -1
    top_pad = -2
    mmap_max = -4
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
    """Leave the process group.

    The rank that serves the common store first waits up to 10 seconds for the other ranks.
    """
    watchdog.leave(10.0)
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Signals that ask a training to stop, agreed between the ranks without waiting for the device.

    A handler only records the signal. Every rank calls `poll` at the same places. It reduces the
    recorded signals over a CPU group: one call starts the reduction and the next call reads its
    result, so that its latency hides behind a step. If any rank receives a signal, all ranks
    therefore see it in the same call.

    A second SIGINT ends the process at once. It must come more than a second after the first, since
    a terminal and torchrun both deliver one key press. A launcher may have blocked a signal, so
    that it cannot end a process without a handler: it is unblocked here, and blocked again by
    `close`. SIGHUP stays ignored if nohup ignores it; torchrun passes it on also under nohup.

    Args:
        group: A CPU group of all ranks.
        watchdog: Asks for a stop like SIGTERM, once the launcher is lost.
        on_stop: Is called at once, also inside of the signal handler, when this rank is asked to
            stop.
    """

    SIGNALS = (
        0,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    )
    """The signals by priority, the highest last; 0 stands for none.

    A cluster may send SIGTERM together with SIGUSR2, which says why.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        watchdog: Watchdog | None = None,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        self.group = group
        self.watchdog = watchdog
        self.on_stop = on_stop
        self.noted = 0
        self.agreed = 0
        self.interrupted_at: float | None = None
        self.pid = os.getpid()
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        # The handlers to restore.
        self.previous: dict[int, _Handler] = {}
        for number in self.SIGNALS[1:]:
            if not _ignored_by_nohup(number):
                self.previous[number] = signal.signal(number, self._note)
        self.mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, list(self.previous))
        if watchdog is not None:
            watchdog.ask_to_stop = self._stop_for_lost_launcher

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: record it for the next `poll`."""
        if os.getpid() != self.pid:
            # A forked child inherits the handler, but takes no part in the reductions.
            return
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is None:
                self.interrupted_at = now
            elif now - self.interrupted_at > _SECOND_INTERRUPT_SECONDS:
                os._exit(128 + number)
        self._ask_to_stop(number)

    def _stop_for_lost_launcher(self) -> None:
        """Save and leave as after SIGTERM; the watchdog's thread calls this."""
        self._ask_to_stop(signal.SIGTERM)

    def _ask_to_stop(self, number: int) -> None:
        priority = self.SIGNALS.index(number)
        self.noted = max(self.noted, priority)
        if self.on_stop is not None:
            self.on_stop()

    def poll(self) -> int:
        """Return the signal that any rank had recorded at the call before, on all ranks.

        Every rank must call this equally often.

        Returns:
            The number of the signal; 0 for none.
        """
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
        """Wait for the reduction that `poll` has started; every rank must call this."""
        if self.pending is None:
            return
        work, _ = self.pending
        work.wait()
        self.pending = None

    def forget(self) -> None:
        """Continue as if the agreed signal had not come; a later signal still counts."""
        self.finish()
        if self.SIGNALS[self.noted] == self.agreed:
            self.noted = 0
        self.agreed = 0

    def close(self) -> None:
        """Restore the signal mask and the handlers from before."""
        if self.watchdog is not None:
            self.watchdog.ask_to_stop = None
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def _ignored_by_nohup(number: int) -> bool:
    """Whether this is SIGHUP in a process that was started with nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
