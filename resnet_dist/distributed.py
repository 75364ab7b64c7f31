"""The processes of a run: who am I, how do we agree, and how do we stop together."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from resnet_dist.watchdog import Watchdog


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

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank the main process's buffers (running statistics), in place."""
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)

    def broadcast_object(self, value):
        """The main process's `value` (small and picklable) on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group, device=torch.device("cpu"))
        return box[0]

    def on_main(self, function: Callable[[], object]):
        """What `function` returns in the main process, on every rank.

        Whatever it raises is raised on every rank, as ValueError: a rank that waited for the result
        of a main process that is gone would hang.
        """
        result = error = None
        if self.is_main:
            try:
                result = function()
            except Exception as problem:
                error = (
                    str(problem)
                    if isinstance(problem, ValueError)
                    else f"{type(problem).__name__}: {problem}"
                )
        result, error = self.broadcast_object((result, error))
        if error is not None:
            raise ValueError(error)
        return result

    def bytes_from_main(self, function: Callable[[], bytes]) -> bytes:
        """As `on_main` for a large result: one read of a file, however many ranks there are.

        It may take longer than the time-out of a collective: the others hear every second that it
        goes on.
        """
        payload: list[bytes] = []
        with ThreadPoolExecutor(1) as pool:
            pending = [pool.submit(function)] if self.is_main else []
            while self.on_main(lambda: len(wait(pending, timeout=1).not_done)):
                pass
            size = self.on_main(lambda: payload.append(pending[0].result()) or len(payload[0]))
        buffer = (
            torch.frombuffer(bytearray(payload[0]), dtype=torch.uint8)
            if payload
            else torch.empty(size, dtype=torch.uint8)
        )
        dist.broadcast(buffer, src=0, group=self.cpu_group)
        return buffer.numpy().tobytes()


def start(device: str = "auto", timeout_s: float = 600.0, threads: int = 0) -> Runtime:
    """Join the process group that the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, ...)
    describes.

    Without a launcher it is a group of one. Raises ValueError when `device` is "cuda" and there is
    none, or when the machine has fewer GPUs than ranks; a launcher may also show each rank its own
    one (CUDA_VISIBLE_DEVICES).
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        visible = torch.cuda.device_count()
        index = 0 if visible == 1 and os.environ.get("CUDA_VISIBLE_DEVICES") else local_rank
        if index >= visible:
            raise ValueError(
                f"distributed.device is {device}, but this machine shows {visible} GPUs for "
                f"{local_world_size} ranks: start fewer processes, or take --distributed.device cpu"
            )
        torch.cuda.set_device(index)
        torch.backends.cudnn.benchmark = True  # the shapes of a run stay the same
    else:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world_size))
        keep_freed_memory()
    limit = timedelta(seconds=timeout_s)
    backend = "nccl" if kind == "cuda" else "gloo"
    rendezvous = (
        {}
        if "MASTER_ADDR" in os.environ
        else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    dist.init_process_group(backend, timeout=limit, **rendezvous)
    return Runtime(
        rank,
        local_rank,
        world_size,
        local_world_size,
        torch.device(kind, index) if kind == "cuda" else torch.device("cpu"),
        dist.new_group(backend="gloo", timeout=limit),
        Watchdog(dist.distributed_c10d._get_default_store(), rank, world_size, timeout_s),
    )


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
    runtime.watchdog.leave(10.0)
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Signals that ask for an end, agreed between the ranks without waiting for the device.

    A handler only notes the signal. `poll`, called by every rank at the same places, reduces what
    was noted over a CPU group: started in one call and read in the next, so that its latency hides
    behind a step. All ranks therefore learn of a signal, sent to any one of them, in the same call.
    A second SIGINT (more than a second after the first, since a terminal and torchrun both deliver
    one key press) ends the process at once. A launcher may have blocked a signal, so that it cannot
    end a process that is not ready for it: it is let in here, and blocked again by `close`.
    """

    SIGNALS = (0, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    """of several the later wins: SIGTERM alone may mean anything, SIGUSR2 beside it says what; 0 is
    none"""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.noted = self.agreed = 0
        self.interrupted_at = 0.0
        self.pid = os.getpid()
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS[1:]}
        self.mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS[1:])

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self.pid:  # a forked child inherits the handler, not the duty
            return
        if number == signal.SIGINT:
            if self.interrupted_at and time.monotonic() - self.interrupted_at > 1.0:
                os._exit(128 + number)
            self.interrupted_at = self.interrupted_at or time.monotonic()
        self.noted = max(self.noted, self.SIGNALS.index(number))

    def poll(self) -> int:
        """The signal that any rank had noted one call ago, on all ranks; 0 for none."""
        if self.pending is not None:
            work, flag = self.pending
            work.wait()
            self.agreed = self.SIGNALS[int(flag)]
        flag = torch.tensor([self.noted], dtype=torch.int32)
        self.pending = (
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True),
            flag,
        )
        return self.agreed

    def finish(self) -> None:
        """Wait for the reduction under way, with the other ranks."""
        if self.pending is not None:
            self.pending[0].wait()
            self.pending = None

    def forget(self) -> None:
        """Go on as if the agreed signal had not come; another one, noted since, still counts."""
        self.finish()
        self.noted, self.agreed = 0 if self.SIGNALS[self.noted] == self.agreed else self.noted, 0

    def close(self) -> None:
        """Give the signals back."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
