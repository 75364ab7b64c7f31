"""Why a rank waits: the positions of all ranks in the launcher's store, and the end of a wait that
leads nowhere.

A thread writes down, about once a second, where its rank is: step, phase, what its main thread is
executing. So the others can name a rank that is stopped, stuck or gone, with its last stack, on any
machine, without a collective.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

import torch.distributed as dist

_GRACE_SECONDS = (
    5.0  # that a rank has to end by itself once another has failed; 30 s when the store is gone
)
EXIT_LOST_RANK = 75
"""Exit code (EX_TEMPFAIL) where another rank was lost or is stuck: the same command again goes on.
"""
_GONE = "the process that kept the ranks' store (rank 0, or torchrun) is gone"


class Watchdog:
    """One rank's position, and its view of the others'. `beat` marks progress, equally often on
    every rank.

    A rank that has not moved on for 0.85 `timeout_s` ends its process with code EXIT_LOST_RANK if another is
    behind it, or has been silent for a third of that. Where nobody is, all do the same (compile,
    wait for the storage) and it does nothing. An error that another rank has published ends it with
    that one's code. When the store is gone, it sends itself SIGTERM: save and leave.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.store, self.rank, self.world_size, self.timeout_s = store, rank, world_size, timeout_s
        self.host, self.interval = socket.gethostname(), min(1.0, timeout_s / 25)
        self.step, self.phase, self.count, self.moved = 0, "start", 0, time.monotonic()
        self.beats: dict[
            int, tuple[float, dict]
        ] = {}  # the last known of the ranks looked at, and when it was news
        self.error: dict | None = (
            None  # what another rank has published: rank, host, code, headline
        )
        self.lost, self.curious, self.ended = False, False, threading.Event()
        if world_size > 1:
            self.store = store.clone()  # a connection of its own: a call may block for long
            for work in (self._pulse, self._watch):
                threading.Thread(target=work, name="watchdog", daemon=True).start()

    def beat(self, step: int, phase: str) -> None:
        """The training thread is here now."""
        self.step, self.phase, self.moved, self.count = (
            step,
            phase,
            time.monotonic(),
            self.count + 1,
        )

    def find_cause(self, cause: Exception) -> dict:
        """The error for which a collective failed with `cause`: another rank's, or who is gone.
        Takes seconds.
        """
        self.curious, deadline = True, time.monotonic() + 2 + 3 * self.interval
        while not self.error and not self.lost and time.monotonic() < deadline:
            time.sleep(0.02)
        gone = (
            _GONE
            if self.lost
            else self._behind(deadline - 1 - 2 * self.interval) or "nobody seems to be gone"
        )
        text = f"lost at step {self.step} ({self.phase}): {gone}; {str(cause).splitlines()[0]}"
        return self.error or self.own(text, EXIT_LOST_RANK)

    def own(self, headline: str, code: int = 1) -> dict:
        """An error of this rank."""
        return {"rank": self.rank, "host": self.host, "code": code, "headline": headline}

    def fail(self, error: dict, text: str = "") -> int:
        """Publish `error`, print it (or `text`) unless this machine knows it already, and part;
        returns its code.
        """
        text, new = text or error["headline"], True
        if error["rank"] != self.rank:
            text, new = (
                f"rank {error['rank']} on {error['host']} failed first: {text}",
                error["host"] != self.host,
            )
        with contextlib.suppress(RuntimeError):  # without a store everyone speaks
            if self.store.add("failed", 1) == 1:  # the first of several stands
                self.store.set("error", json.dumps(error))
            new = new and self.store.add(f"said/{self.host}/{text}", 1) == 1
        if new:
            print(f"error (rank {self.rank}): {text}", file=sys.stderr, flush=True)
        self.leave(2.0)
        return error["code"]

    def leave(self, seconds: float) -> None:
        """Watch no longer; rank 0, which may keep the store, stays up to `seconds` until all have
        come here.
        """
        self.ended.set()
        with contextlib.suppress(RuntimeError):
            deadline, here = time.monotonic() + seconds, self.store.add("parted", 1)
            while self.rank == 0 and here < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                here = self.store.add("parted", 0)

    def _pulse(self) -> None:
        """All regular talk with the store: a call hangs when the process that keeps it is stopped."""
        ticks, seldom = 0, max(1, int(0.05 * self.timeout_s / self.interval))
        while not self.lost and not self.ended.wait(self.interval):
            ticks, stuck = ticks + 1, time.monotonic() - self.moved > 0.5 * self.timeout_s
            stack = list(
                traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident))
            )[:8]
            calls = [
                f"{os.path.basename(frame.f_code.co_filename)}:{n} {frame.f_code.co_name}"
                for frame, n in stack
            ]
            try:
                self.store.set(
                    f"beat/{self.rank}",
                    json.dumps(
                        {
                            "ticks": ticks,
                            "count": self.count,
                            "step": self.step,
                            "phase": self.phase,
                            "host": self.host,
                            "pid": os.getpid(),
                            "stack": " < ".join(calls),
                        }
                    ),
                )
                for rank in range(
                    self.world_size if self.curious or stuck and ticks % seldom == 0 else 1
                ):
                    beat = (
                        json.loads(self.store.get(f"beat/{rank}"))
                        if self.store.check([f"beat/{rank}"])
                        else None
                    )
                    if beat and beat != self.beats.get(rank, (0, None))[1]:
                        self.beats[rank] = time.monotonic(), beat
                if self.store.check(["error"]):
                    self.error = json.loads(self.store.get("error"))
            except RuntimeError:
                self.lost, self.store = (
                    True,
                    dist.HashStore(),
                )  # which nobody else sees, and nothing hangs in

    def _watch(self) -> None:
        failed = verdict = None
        while not self.ended.wait(self.interval):
            now, count = time.monotonic(), self.count
            if self.error or self.lost:
                if failed is None and not self.error:
                    print(
                        f"warning (rank {self.rank}): {_GONE}: saving, and leaving",
                        file=sys.stderr,
                        flush=True,
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                if now - (failed := failed or now) > _GRACE_SECONDS * (1 if self.error else 6):
                    verdict = self.error or self.own(_GONE, EXIT_LOST_RANK)
            elif now - self.moved > (
                limit := self.timeout_s * (0.85 if count else 2.0)
            ):  # imports starve threads
                behind = self._behind(recent := now - 0.35 * limit)
                if behind and self.count == count:
                    if (
                        self.beats.get(0, (now, {}))[0] <= recent
                    ):  # rank 0 may be what keeps the store
                        self.store = dist.HashStore()
                    verdict = self.own(
                        f"waited {limit:g} s at step {self.step} ({self.phase}) for {behind}; "
                        f"distributed.timeout_s is {self.timeout_s:g}",
                        EXIT_LOST_RANK,
                    )
            if verdict:  # the main thread may hang, and the store: wait for neither
                threading.Thread(target=self.fail, args=(verdict,), daemon=True).start()
                time.sleep(3 * self.interval)  # the others may read it from this very process
                os._exit(verdict["code"])

    def _behind(self, since: float) -> str:
        """All that is known of the other ranks that have been silent `since` then, or are not as
        far as this one.
        """
        found = []
        for rank, (heard, beat) in sorted(self.beats.items()):
            if rank != self.rank and (heard <= since or beat["count"] < self.count):
                pid, state = beat["pid"] if beat["host"] == self.host else "elsewhere", ""
                with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
                    state = status.readlines()[2].removeprefix("State:").strip() + ", "
                found.append(
                    f"rank {rank} (host {beat['host']}, process {beat['pid']}), {state}last heard of at step "
                    f"{beat['step']} ({beat['phase']}) in {beat['stack']}"
                )
        return "; ".join(found)
