"""Detect and name the rank that the others wait for.

A thread of each rank publishes its position in a common store about once a second: the step, the
phase, and the stack of the main thread. The other ranks can therefore name a rank that is stopped,
stuck or gone, with its last stack, on any machine and without a collective.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed import HashStore  # type: ignore[attr-defined]

from resnet_dist.distributed.error_file import write_error_file
from resnet_dist.distributed.rendezvous import Meeting, process_state
from resnet_dist.distributed.stacks import stack_of_main_thread
from resnet_dist.text import first_line, printable_lines

EXIT_LOST_RANK = 75
"""Exit code (EX_TEMPFAIL) when another rank or the launcher was lost: the same command resumes."""

# Time that a rank has to end by itself once another rank has published an error.
_GRACE_SECONDS = 5.0

# Time that a rank has to save and leave once the store is gone.
_SAVE_SECONDS = 30.0

# Time that a rank has to close its loaders and logs after it has reported a failure.
_LEAVE_SECONDS = 60.0

# A rank waits for this share of `timeout_s`. It is less than 1, so that the watchdog reports the
# wait before the collective times out.
_PATIENCE = 0.85

# A rank without news for this share of the wait counts as silent.
_SILENCE = 0.35

COMPILE_PHASE = "compile"

# Before the first step and in the phase `COMPILE_PHASE`, a rank counts as silent after this time at
# the earliest: imports and compilers can keep its threads from running.
_SILENT_SECONDS_AT_START = 30.0

# Time that a rank has after another process of its machine is gone, where only this thread can
# notice it: the checkpoint that is being written gets finished, and torchrun waits 30 s.
_LOST_PEER_SECONDS = 15.0


@dataclass(frozen=True)
class Failure:
    """An error that ends the run.

    Attributes:
        rank: The rank that failed.
        host: The name of its machine.
        code: The exit code of the process.
        headline: The message, without a traceback.
    """

    rank: int
    host: str
    code: int
    headline: str


@dataclass(frozen=True)
class Beat:
    """The published position of a rank.

    Attributes:
        ticks: Number of messages that the rank has published.
        count: Number of calls of `Watchdog.beat`, the progress of its main thread.
        step: The step that it trains.
        phase: What it does in this step.
        stack: The calls of its main thread, starting with the innermost.
    """

    ticks: int
    count: int
    step: int
    phase: str
    stack: str


@dataclass(frozen=True)
class Heard:
    """The last position of a rank that was received.

    Attributes:
        time: When it was received, in seconds of this process's monotonic clock.
        beat: The position.
    """

    time: float
    beat: Beat


class Watchdog:
    """The position of this rank, and what it knows of the other ranks.

    Every rank calls `beat` equally often to mark its progress. Two threads watch: one talks to the
    store, which may block when the process that serves it is stopped; the other decides. There are
    four reasons to end this process, each with a method:

    - another rank published an error (`on_published_error`);
    - the store or torchrun is gone (`on_lost_store`);
    - another rank of this machine is gone, and this one may wait in a kernel (`on_lost_peers`);
    - this rank waits for a rank that is behind it or silent (`on_long_wait`).

    Nothing happens while all ranks wait at the same place (for the storage, or a compilation).

    Args:
        meeting: The store that the ranks share, and their processes.
        world_size: Number of ranks that train; the ranks beyond it are spares.
        timeout_s: Seconds after which a wait is an error.
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
        # When the positions of all ranks were read last.
        self.read_all = 0.0
        # The error that another rank has published.
        self.failure: Failure | None = None
        # The exit code of the error that this rank has reported.
        self.reported: int | None = None
        # A sentence that names the process that is gone, once the store or torchrun is lost.
        self.lost_server = ""
        # Makes the training loop save and leave; None while no loop runs.
        self.ask_to_stop: Callable[[], None] | None = None
        # Whether the positions of all ranks are read in every interval.
        self.curious = False
        # Whether a wait for a lost rank never ends by itself: in a kernel of NCCL.
        self.waits_forever = False
        # The ranks of this machine whose process is gone, though they have not left.
        self.lost_peers = ""
        self.ended = threading.Event()
        self._failing_since: float | None = None
        is_spare = self.rank >= world_size
        has_others = world_size > 1 or self.launcher.agent > 0
        self.is_watching = has_others and not is_spare
        if self.is_watching:
            self._start_threads()

    def _start_threads(self) -> None:
        # The watchdog needs its own connection, since a call to the store may block for long.
        self.store = self.meeting_store.clone()
        for work in (self._talk_to_store, self._watch):
            thread = threading.Thread(target=work, name="watchdog", daemon=True)
            thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Record that the training thread has reached `phase` of `step`.

        Every rank must call this equally often: the watchdog compares the number of calls.

        Args:
            step: Number of the step.
            phase: What the rank does in it, in one or a few words; it appears in error messages.
        """
        self.step = step
        self.phase = phase
        self.moved = time.monotonic()
        self.count += 1

    def own(self, headline: str, code: int = 1) -> Failure:
        """Create an error of this rank.

        Args:
            headline: The message, without a traceback.
            code: The exit code of this process.
        """
        return Failure(self.rank, self.host, code, headline)

    def find_cause(self, problem: Exception) -> Failure:
        """Find the error behind a collective that failed.

        This takes seconds if the lost rank ran on another machine: only its silence shows that it
        is gone.

        Args:
            problem: What the collective raised.

        Returns:
            The error that another rank has published. Without one, an error of this rank that
            names the ranks that are gone or behind.
        """
        self.curious = True
        begun = time.monotonic()
        self._wait_for_news(begun + 2 + 3 * self.interval)
        if not self.lost_server:
            # The lost rank may have published an error, and its position names its step.
            with contextlib.suppress(RuntimeError):
                self._read_failure()
                self._read_beats(range(self.world_size))
        if self.failure:
            return self.failure
        gone = self._lost_ranks()
        if not gone:
            gone = self.lost_server
        if not gone:
            gone = self._behind(begun + 1)
        if not gone:
            gone = "no rank seems to be gone"
        text = f"lost at step {self.step} ({self.phase}): {gone}; {first_line(problem)}"
        return self.own(text, EXIT_LOST_RANK)

    def _wait_for_news(self, deadline: float) -> None:
        """Wait until it is known that a rank failed or is gone, or until `deadline`."""
        while time.monotonic() < deadline:
            if self.failure or self.lost_server:
                return
            if any(peer.is_gone for peer in self.peers):
                return
            time.sleep(0.02)

    def fail(self, failure: Failure, text: str = "") -> int:
        """Publish and print an error, and leave the other ranks.

        It is printed once per machine. A second call does nothing.

        Args:
            failure: The error.
            text: What is printed in place of `failure.headline`, such as a traceback.

        Returns:
            The exit code.
        """
        if self.reported is not None:
            return self.reported
        text = text or failure.headline
        is_own = failure.rank == self.rank
        if not is_own:
            text = f"rank {failure.rank} on {failure.host} failed first: {text}"
        # The failed rank itself prints the error on its machine.
        is_new = is_own or failure.host != self.host
        # Without a store every rank prints.
        with contextlib.suppress(RuntimeError):
            self._publish(failure)
            if is_new:
                times_printed = self.store.add(f"said/{self.host}/{text}", 1)
                is_new = times_printed == 1
        if is_new:
            shown = printable_lines(text)
            print(f"error (rank {self.rank}): {shown}", file=sys.stderr, flush=True)
        self.reported = failure.code
        write_error_file(failure.headline)
        if self.is_watching:
            thread = threading.Thread(target=self._leave_by_force, name="leave", daemon=True)
            thread.start()
        self.leave(2.0)
        return failure.code

    def _publish(self, failure: Failure) -> None:
        """Store the error for the other ranks, if it is the first one of the run."""
        number = self.store.add("failed", 1)
        if number == 1:
            content = json.dumps(asdict(failure))
            self.store.set("error", content)

    def exit_now(self, code: int) -> None:
        """End this process without any clean-up, which might wait for a lost rank."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _leave_by_force(self) -> None:
        """End this process after `_LEAVE_SECONDS`, even if its main thread still waits."""
        time.sleep(_LEAVE_SECONDS)
        assert self.reported is not None
        self.exit_now(self.reported)

    def leave(self, seconds: float) -> None:
        """Stop watching.

        Args:
            seconds: The rank that serves the store waits for the other ranks as long as this, since
                the store ends with its process.
        """
        self.ended.set()
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            left = self.store.add("left", 1)
            if not self.launcher.serves_store:
                return
            while time.monotonic() < deadline:
                gone = [peer for peer in self.processes if peer.is_gone]
                if left + len(gone) >= len(self.processes):
                    return
                time.sleep(0.02)
                left = self.store.add("left", 0)

    def tell_spares(self, code: int) -> None:
        """Publish the exit code of the training, with which the spares end, too.

        Only rank 0 does it. Without spares, or once the store is gone, nothing happens.

        Args:
            code: The exit code.
        """
        spares = len(self.processes) - self.world_size
        if self.rank != 0 or not spares:
            return
        with contextlib.suppress(RuntimeError):
            self.store.set("finished", str(code))

    def code_of_the_others(self) -> int | None:
        """Return the exit code of the ranks that train, for a spare; None while they train.

        It is `EXIT_LOST_RANK` if the store or the launcher is gone.
        """
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
        """Publish the position of this rank and read those of the others, until the run ends."""
        ticks = 0
        while not self.lost_server:
            if self.ended.wait(self.interval):
                return
            ticks += 1
            try:
                self._exchange_positions(ticks)
                self._read_failure()
                if self.waits_forever:
                    self.lost_peers = self._ranks_gone_without_a_word()
            except RuntimeError:
                who = self._who_served_the_store()
                self._give_up_store(who)
            if self.launcher.is_gone:
                self._give_up_store("torchrun, the parent of this process,")

    def _exchange_positions(self, ticks: int) -> None:
        """Publish the position of this rank, and read those of others.

        Usually this is rank 0 alone, which may serve the store. While something is wrong, the
        positions of all ranks are read.
        """
        position = asdict(self._position(ticks))
        content = json.dumps(position)
        self.store.set(f"beat/{self.rank}", content)
        waited = time.monotonic() - self.moved
        # While this rank waits long, all positions are read every 5 % of the time-out.
        seconds_between_reads = 0.05 * self.timeout_s
        every = int(seconds_between_reads / self.interval)
        is_due = ticks % max(1, every) == 0
        waits_long = waited > 0.5 * self.timeout_s
        if self.curious or (waits_long and is_due):
            self._read_beats(range(self.world_size))
        else:
            self._read_beats(range(1))

    def _position(self, ticks: int) -> Beat:
        """Describe the position of this rank for the others."""
        stack = stack_of_main_thread()
        return Beat(
            ticks=ticks,
            count=self.count,
            step=self.step,
            phase=self.phase,
            stack=stack,
        )

    def _read_beats(self, ranks: range) -> None:
        """Read the positions of `ranks`, and record those that have changed."""
        for rank in ranks:
            self._read_beat(rank)
        if len(ranks) == self.world_size:
            self.read_all = time.monotonic()

    def _read_beat(self, rank: int) -> None:
        key = f"beat/{rank}"
        if not self.store.check([key]):
            return
        content = self.store.get(key)
        beat = Beat(**json.loads(content))
        known = self.heard.get(rank)
        if known is not None and known.beat == beat:
            return
        now = time.monotonic()
        self.heard[rank] = Heard(now, beat)

    def _read_failure(self) -> None:
        """Read the error that another rank has published, if there is one."""
        if self.failure is not None:
            return
        if not self.store.check(["error"]):
            return
        content = self.store.get("error")
        published = json.loads(content)
        self.failure = Failure(**published)

    def _who_served_the_store(self) -> str:
        if self.launcher.agent_store:
            return "torchrun, which kept the ranks' store,"
        server = self.peers[0]
        return f"rank 0 (host {server.host}, process {server.pid}), which kept the ranks' store,"

    def _give_up_store(self, who: str) -> None:
        """Record that `who` is gone, and go on with a store of this process alone."""
        self.lost_server = f"{who} is gone"
        # No call to this store can hang.
        self.store = HashStore()

    def _watch(self) -> None:
        """Decide, about once a second, whether this process has to end."""
        while not self.ended.wait(self.interval):
            verdict = self._verdict()
            if verdict is not None:
                self._end_process(verdict)

    def _verdict(self) -> Failure | None:
        """Return the error that ends this process; None while it may continue."""
        if self.failure is not None:
            return self.on_published_error(self.failure)
        if self.lost_server:
            return self.on_lost_store()
        if self.lost_peers:
            return self.on_lost_peers()
        waited = time.monotonic() - self.moved
        if waited > _PATIENCE * self.timeout_s:
            return self.on_long_wait()
        return None

    def on_published_error(self, failure: Failure) -> Failure | None:
        """Decide whether the error of another rank ends this process now.

        Returns:
            The error, once this rank has had `_GRACE_SECONDS` to end by itself; None before.
        """
        if self._time_is_over(_GRACE_SECONDS):
            return failure
        return None

    def on_lost_store(self) -> Failure | None:
        """Decide what follows when the store is gone, and with it the launcher or rank 0.

        The first call asks the training loop to save and leave.

        Returns:
            An error that names the lost process, if there is no training loop or once it has had
            `_SAVE_SECONDS`; None before.
        """
        headline = f"lost at step {self.step} ({self.phase}): {self.lost_server}"
        lost = self.own(headline, EXIT_LOST_RANK)
        # Before and after the training loop there is nothing to save.
        if self.ask_to_stop is None:
            return lost
        if self._failing_since is None:
            warning = f"warning (rank {self.rank}): {self.lost_server}: saving, and leaving"
            print(warning, file=sys.stderr, flush=True)
            self.ask_to_stop()
        if self._time_is_over(_SAVE_SECONDS):
            return lost
        return None

    def on_lost_peers(self) -> Failure | None:
        """Decide what follows when another rank of this machine is gone without a word.

        Returns:
            An error that names it, once this rank has had `_LOST_PEER_SECONDS`; None before.
        """
        if not self._time_is_over(_LOST_PEER_SECONDS):
            return None
        headline = f"lost at step {self.step} ({self.phase}): {self.lost_peers}"
        return self.own(headline, EXIT_LOST_RANK)

    def on_long_wait(self) -> Failure | None:
        """Decide whether a long wait of this rank is an error.

        Returns:
            An error that names the ranks that are behind this one or silent; None if there are
            none, or if this rank has moved on meanwhile.
        """
        count = self.count
        limit = _PATIENCE * self.timeout_s
        silence = _SILENCE * limit
        if count == 0 or self.phase == COMPILE_PHASE:
            silence = max(silence, _SILENT_SECONDS_AT_START)
        recent = time.monotonic() - silence
        behind = self._behind(recent)
        if not behind or self.count != count:
            return None
        first = self.heard.get(0)
        if first is not None and first.time <= recent:
            # Rank 0 may serve the store: a call to it would hang.
            self.store = HashStore()
        headline = (
            f"waited {limit:g} s at step {self.step} ({self.phase}) for {behind}; "
            f"distributed.timeout_s is {self.timeout_s:g}"
        )
        return self.own(headline, EXIT_LOST_RANK)

    def _time_is_over(self, seconds: float) -> bool:
        """Whether `seconds` have passed since the first call of this method."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        return now - self._failing_since > seconds

    def _end_process(self, verdict: Failure) -> None:
        """Report the error, and end the process even if its main thread or the store hangs."""
        report = threading.Thread(target=self.fail, args=(verdict,), daemon=True)
        report.start()
        # The other ranks may still read the error from a store that this process serves.
        time.sleep(3 * self.interval)
        os._exit(verdict.code)

    def _lost_ranks(self) -> str:
        """Describe the other ranks of this machine whose process has ended."""
        gone = self._gone_ranks()
        return "; ".join(self._describe(rank) for rank in gone)

    def _ranks_gone_without_a_word(self) -> str:
        """Describe those of them that have not left the others before. Asks the store."""
        lost = [rank for rank in self._gone_ranks() if not self.store.check([f"left/{rank}"])]
        return "; ".join(self._describe(rank) for rank in lost)

    def _gone_ranks(self) -> list[int]:
        """The other ranks of this machine whose process has ended."""
        gone = []
        for rank, peer in enumerate(self.peers):
            if rank != self.rank and peer.is_gone:
                gone.append(rank)
        return gone

    def _behind(self, since: float) -> str:
        """Describe the other ranks that are silent or behind this one.

        Args:
            since: A rank without news after this time (monotonic clock, in seconds) is silent.

        Returns:
            The descriptions, separated by semicolons; empty if there is no such rank.
        """
        found = []
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            if self._is_behind(rank, since):
                found.append(self._describe(rank))
        return "; ".join(found)

    def _is_behind(self, rank: int, since: float) -> bool:
        heard = self.heard.get(rank)
        if heard is None:
            # The position of rank 0 is read in every interval, those of the others only at times.
            return rank == 0 or self.read_all > since
        is_silent = heard.time <= since
        return is_silent or heard.beat.count < self.count

    def _describe(self, rank: int) -> str:
        """Describe a rank: its process, the state of this process, and its last position."""
        peer = self.peers[rank]
        text = f"rank {rank} (host {peer.host}, process {peer.pid})"
        if peer.host == self.host:
            state = process_state(peer.pid) or "gone"
            text += f", {state}"
        heard = self.heard.get(rank)
        if heard is None:
            return f"{text}, never heard of"
        beat = heard.beat
        return f"{text}, last heard of at step {beat.step} ({beat.phase}) in {beat.stack}"
