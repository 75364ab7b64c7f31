"""Why a rank waits: the positions of all ranks in a common store, and the end of a wait that leads
nowhere.

A thread writes down, about once a second, where its rank is: step, phase, and what its main thread
is executing. So the other ranks can name a rank that is stopped, stuck or gone, with its last
stack, on any machine, without a collective.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed import HashStore  # type: ignore[attr-defined]

from resnet_dist.rendezvous import Meeting, process_state
from resnet_dist.text import printable_lines

EXIT_LOST_RANK = 75
"""Exit code (EX_TEMPFAIL) when another rank or the launcher was lost: the same command resumes."""

_GRACE_SECONDS = 5.0
"""Time that a rank has to end by itself once another rank has published an error."""

_SAVE_SECONDS = 30.0
"""Time that a rank has to save and leave once the store is gone."""

_LEAVE_SECONDS = 60.0
"""Time that a rank has to close its loaders and logs after it has reported a failure."""

_PATIENCE = 0.85
"""Share of `timeout_s` that a rank waits: less than 1, to speak before a collective times out."""

_SILENCE = 0.35
"""Share of the wait after which a rank without news counts as silent."""

_SILENT_SECONDS_AT_START = 30.0
"""Before the first step a rank is silent after this at the earliest: imports starve its threads."""

_STACK_DEPTH = 8
"""Calls of the main thread that a rank publishes, the innermost first."""


@dataclass(frozen=True)
class Failure:
    """An error that ends the run: whose it is, the exit code, and what is printed."""

    rank: int
    host: str
    code: int
    headline: str


@dataclass(frozen=True)
class Beat:
    """Where a rank is. `ticks` counts the messages, `count` the progress of its main thread."""

    ticks: int
    count: int
    step: int
    phase: str
    stack: str


@dataclass(frozen=True)
class Heard:
    """The last beat of a rank, and when it was news here (seconds of the monotonic clock)."""

    time: float
    beat: Beat


class Watchdog:
    """One rank's position, and its view of the other ranks'.

    Every rank calls `beat` equally often to mark its progress. Two threads watch: one talks to the
    store, which may block when the process that serves it is stopped; the other decides. There are
    three reasons to end this process, each with a method: another rank published an error
    (`on_published_error`), the store or torchrun is gone (`on_lost_store`), or this rank waits for
    one that is behind it or silent (`on_long_wait`). Where all ranks wait alike (for the storage,
    a compilation), nothing happens.

    Args:
        meeting: the store that the ranks share, and their processes.
        world_size: number of ranks that train; the ranks beyond it are spares.
        timeout_s: seconds after which a wait is an error.
    """

    def __init__(self, meeting: Meeting, world_size: int, timeout_s: float) -> None:
        self.launcher = meeting.launcher
        self.rank = meeting.launcher.rank
        self.peers = meeting.peers[:world_size]
        self.processes = meeting.peers
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.host = socket.gethostname()
        self.interval = min(1.0, timeout_s / 25)
        self.meeting_store = meeting.store
        self.store = meeting.store
        self.step = 0
        self.phase = "start"
        self.count = 0
        self.moved = time.monotonic()
        self.heard: dict[int, Heard] = {}
        self.read_all = 0.0
        """when the positions of all ranks were read last"""
        self.failure: Failure | None = None
        """what another rank has published"""
        self.reported: int | None = None
        """the exit code of what this rank has reported"""
        self.lost_server = ""
        """who is gone, once the store or torchrun is"""
        self.ask_to_stop: Callable[[], None] | None = None
        """what makes the training loop save and leave; None outside of it"""
        self.curious = False
        self.ended = threading.Event()
        self._failing_since: float | None = None
        is_spare = self.rank >= world_size
        self.is_watching = not is_spare and (world_size > 1 or self.launcher.agent > 0)
        if self.is_watching:
            # A connection of its own: a call may block for long.
            self.store = meeting.store.clone()
            for work in (self._talk_to_store, self._watch):
                threading.Thread(target=work, name="watchdog", daemon=True).start()

    def beat(self, step: int, phase: str) -> None:
        """Note that the training thread has come to `phase` of `step`."""
        self.step = step
        self.phase = phase
        self.moved = time.monotonic()
        self.count += 1

    def own(self, headline: str, code: int = 1) -> Failure:
        """An error of this rank."""
        return Failure(self.rank, self.host, code, headline)

    def find_cause(self, problem: Exception) -> Failure:
        """The error behind a collective that failed with `problem`: another rank's, or who is gone.

        Takes seconds where the lost rank ran on another machine: only its silence tells.
        """
        self.curious = True
        begun = time.monotonic()
        patience = 2 + 3 * self.interval
        while not self.failure and not self.lost_server and time.monotonic() < begun + patience:
            if any(peer.is_gone for peer in self.peers):
                break
            time.sleep(0.02)
        if not self.lost_server:
            # The lost rank may have said why, and the positions of all ranks name its step.
            with contextlib.suppress(RuntimeError):
                self._read_failure()
                self._read_beats(range(self.world_size))
        if self.failure:
            return self.failure
        gone = self._lost_ranks() or self.lost_server or self._behind(begun + 1)
        gone = gone or "no rank seems to be gone"
        reason = str(problem).splitlines()[0]
        text = f"lost at step {self.step} ({self.phase}): {gone}; {reason}"
        return self.own(text, EXIT_LOST_RANK)

    def fail(self, failure: Failure, text: str = "") -> int:
        """Publish `failure`, print it (or `text`) unless this machine has seen it, and leave.

        Returns the exit code.
        """
        if self.reported is not None:
            return self.reported
        text = text or failure.headline
        is_new = True
        if failure.rank != self.rank:
            text = f"rank {failure.rank} on {failure.host} failed first: {text}"
            is_new = failure.host != self.host
        with contextlib.suppress(RuntimeError):  # without a store every rank speaks
            if self.store.add("failed", 1) == 1:  # the first of several failures counts
                self.store.set("error", json.dumps(asdict(failure)))
            is_new = is_new and self.store.add(f"said/{self.host}/{text}", 1) == 1
        if is_new:
            print(f"error (rank {self.rank}): {printable_lines(text)}", file=sys.stderr, flush=True)
        self.reported = failure.code
        write_error_file(failure.headline)
        if self.is_watching:
            threading.Thread(target=self._leave_by_force, name="leave", daemon=True).start()
        self.leave(2.0)
        return failure.code

    def exit_now(self, code: int) -> None:
        """End this process without any clean-up."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _leave_by_force(self) -> None:
        """End this process after a while, whatever its main thread waits for."""
        time.sleep(_LEAVE_SECONDS)
        assert self.reported is not None
        self.exit_now(self.reported)

    def leave(self, seconds: float) -> None:
        """Stop watching. The rank that serves the store waits up to `seconds` for the others."""
        self.ended.set()
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            left = self.store.add("left", 1)
            while self.launcher.serves_store and time.monotonic() < deadline:
                gone = sum(peer.is_gone for peer in self.processes)
                if left + gone >= len(self.processes):
                    break
                time.sleep(0.02)
                left = self.store.add("left", 0)

    def tell_spares(self, code: int) -> None:
        """Tell the ranks that wait as spares with which code the others end."""
        spares = len(self.processes) - self.world_size
        if self.rank != 0 or not spares:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set("finished", str(code))

    def code_of_the_others(self) -> int | None:
        """For a spare: the exit code of the ranks that train; None while they do."""
        if self.launcher.is_gone:
            return EXIT_LOST_RANK
        try:
            if not self.store.check(["finished"]):
                return None
            code = int(self.store.get("finished"))
            self.store.add("left", 1)
        except RuntimeError:
            return EXIT_LOST_RANK
        return code

    def _talk_to_store(self) -> None:
        """Publish this rank's position and read the others', until the end."""
        ticks = 0
        while not self.lost_server:
            if self.ended.wait(self.interval):
                return
            ticks += 1
            try:
                self._exchange_positions(ticks)
                self._read_failure()
            except RuntimeError:
                who = self._who_served_the_store()
                self._give_up_store(who)
            if self.launcher.is_gone:
                self._give_up_store("torchrun, the parent of this process,")

    def _exchange_positions(self, ticks: int) -> None:
        """Publish this rank's position; read rank 0's, which may serve the store, and while
        something is wrong all of them.
        """
        position = asdict(self._position(ticks))
        self.store.set(f"beat/{self.rank}", json.dumps(position))
        waited = time.monotonic() - self.moved
        every = max(1, int(0.05 * self.timeout_s / self.interval))
        is_due = ticks % every == 0
        waits_long = waited > 0.5 * self.timeout_s
        if self.curious or (waits_long and is_due):
            self._read_beats(range(self.world_size))
        else:
            self._read_beats(range(1))

    def _position(self, ticks: int) -> Beat:
        """What this rank tells the others."""
        return Beat(
            ticks=ticks,
            count=self.count,
            step=self.step,
            phase=self.phase,
            stack=_stack_of_main_thread(),
        )

    def _read_beats(self, ranks: range) -> None:
        for rank in ranks:
            key = f"beat/{rank}"
            if not self.store.check([key]):
                continue
            told = json.loads(self.store.get(key))
            beat = Beat(**told)
            known = self.heard.get(rank)
            if known is not None and known.beat == beat:
                continue
            now = time.monotonic()
            self.heard[rank] = Heard(now, beat)
        if len(ranks) == self.world_size:
            self.read_all = time.monotonic()

    def _read_failure(self) -> None:
        if self.failure is not None:
            return
        if not self.store.check(["error"]):
            return
        published = json.loads(self.store.get("error"))
        self.failure = Failure(**published)

    def _who_served_the_store(self) -> str:
        if self.launcher.agent_store:
            return "torchrun, which kept the ranks' store,"
        server = self.peers[0]
        return f"rank 0 (host {server.host}, process {server.pid}), which kept the ranks' store,"

    def _give_up_store(self, who: str) -> None:
        self.lost_server = f"{who} is gone"
        self.store = HashStore()  # no other rank sees it, and no call to it hangs

    def _watch(self) -> None:
        """Decide, about once a second, whether this process has to end."""
        while not self.ended.wait(self.interval):
            verdict = self._verdict()
            if verdict is not None:
                self._end_process(verdict)

    def _verdict(self) -> Failure | None:
        if self.failure is not None:
            return self.on_published_error(self.failure)
        if self.lost_server:
            return self.on_lost_store()
        if time.monotonic() - self.moved > _PATIENCE * self.timeout_s:
            return self.on_long_wait()
        return None

    def on_published_error(self, failure: Failure) -> Failure | None:
        """Another rank failed: end with its code, unless this rank ends by itself soon."""
        return failure if self._time_is_over(_GRACE_SECONDS) else None

    def on_lost_store(self) -> Failure | None:
        """The store is gone, and with it the launcher or rank 0: save if possible, and leave."""
        headline = f"lost at step {self.step} ({self.phase}): {self.lost_server}"
        lost = self.own(headline, EXIT_LOST_RANK)
        if self.ask_to_stop is None:  # before or after the training loop there is nothing to save
            return lost
        if self._failing_since is None:
            warning = f"warning (rank {self.rank}): {self.lost_server}: saving, and leaving"
            print(warning, file=sys.stderr, flush=True)
            self.ask_to_stop()
        return lost if self._time_is_over(_SAVE_SECONDS) else None

    def on_long_wait(self) -> Failure | None:
        """This rank has waited for long: end if it is for a rank that is behind or silent."""
        count = self.count
        limit = _PATIENCE * self.timeout_s
        silence = _SILENCE * limit
        if count == 0:
            silence = max(silence, _SILENT_SECONDS_AT_START)
        recent = time.monotonic() - silence
        behind = self._behind(recent)
        if not behind or self.count != count:
            return None
        first = self.heard.get(0)
        if first is not None and first.time <= recent:
            # Rank 0 may serve the store: a call to it would hang.
            self.store = HashStore()
        return self.own(
            f"waited {limit:g} s at step {self.step} ({self.phase}) for {behind}; "
            f"distributed.timeout_s is {self.timeout_s:g}",
            EXIT_LOST_RANK,
        )

    def _time_is_over(self, seconds: float) -> bool:
        """Whether `seconds` have passed since this was first asked."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        return now - self._failing_since > seconds

    def _end_process(self, verdict: Failure) -> None:
        """Say why, and end the process. The main thread may hang, and so may the store."""
        threading.Thread(target=self.fail, args=(verdict,), daemon=True).start()
        # The other ranks may read the error from a store that this very process serves.
        time.sleep(3 * self.interval)
        os._exit(verdict.code)

    def _lost_ranks(self) -> str:
        """The ranks of this machine whose process has ended."""
        gone = []
        for rank, peer in enumerate(self.peers):
            if rank == self.rank:
                continue
            if peer.is_gone:
                gone.append(self._describe(rank))
        return "; ".join(gone)

    def _behind(self, since: float) -> str:
        """The other ranks that have been silent `since` then, or are not as far as this one."""
        found = []
        for rank in range(self.world_size):
            heard = self.heard.get(rank)
            if heard is None:
                # Only rank 0 is read all the time.
                is_behind = rank == 0 or self.read_all > since
            else:
                is_behind = heard.time <= since or heard.beat.count < self.count
            if is_behind and rank != self.rank:
                found.append(self._describe(rank))
        return "; ".join(found)

    def _describe(self, rank: int) -> str:
        """All that is known of a rank."""
        peer = self.peers[rank]
        text = f"rank {rank} (host {peer.host}, process {peer.pid})"
        if peer.host == self.host:
            text += f", {process_state(peer.pid) or 'gone'}"
        heard = self.heard.get(rank)
        if heard is None:
            return f"{text}, never heard of"
        beat = heard.beat
        return f"{text}, last heard of at step {beat.step} ({beat.phase}) in {beat.stack}"


def _stack_of_main_thread() -> str:
    """The calls that the main thread is in, the innermost first."""
    frames = sys._current_frames()
    main_thread = threading.main_thread()
    innermost = frames.get(main_thread.ident or 0)
    calls = []
    for frame, line in traceback.walk_stack(innermost):
        code = frame.f_code
        file = os.path.basename(code.co_filename)
        calls.append(f"{file}:{line} {code.co_name}")
        if len(calls) == _STACK_DEPTH:
            break
    return " < ".join(calls)


def write_error_file(text: str) -> None:
    """Hand `text` to torchrun, whose last words then contain it (see `@record` in its docs)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump(content, file)
