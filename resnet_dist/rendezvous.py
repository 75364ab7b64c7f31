"""How the processes of a run find each other: the launcher's environment and a common store.

torchrun and SLURM describe each process by environment variables. `read_launcher` reads all of
them in one place and refuses what is inconsistent. `meet` opens the store that all processes share
(torchrun's own, or one that rank 0 serves) and waits until every rank is there.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A launcher sets all of these, or it is none."""

_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""A launcher of several ranks sets these, too."""

_POLL_SECONDS = 0.05

_AGENT_STORE_SECONDS = 20.0
"""Torchrun serves its store before it starts a worker: refused connections are final, not early."""


class LostRankError(RuntimeError):
    """Another rank or the launcher is gone, before this rank could join it."""


@dataclass(frozen=True)
class Launcher:
    """What the launcher says about this process. The defaults are those of a single process."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = ""
    """host and port of the common store; empty without a launcher"""
    port: int = 0
    agent: int = 0
    """process id of torchrun's agent, the parent of this process; 0 without torchrun"""
    agent_store: bool = False
    """whether torchrun's agent serves the store; else rank 0 does"""
    restarts: bool = False
    """whether the launcher starts failed ranks again (torchrun --max-restarts)"""

    @property
    def is_gone(self) -> bool:
        """Whether torchrun's agent has ended: this process then has another parent."""
        if not self.agent:
            return False
        return os.getppid() != self.agent

    @property
    def serves_store(self) -> bool:
        """Whether this process is the one that serves the store."""
        return self.rank == 0 and not self.agent_store


@dataclass(frozen=True)
class Peer:
    """The process of a rank."""

    host: str
    pid: int

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False where it cannot be seen from here."""
        if self.host != socket.gethostname():
            return False
        state = process_state(self.pid)
        return not state or state[0] in "ZX"


@dataclass(frozen=True)
class Meeting:
    """All ranks of one start: the store that they share, and their processes in order of rank."""

    launcher: Launcher
    store: Store
    peers: tuple[Peer, ...]


def process_state(pid: int) -> str:
    """The state of a process of this machine, as in `T (stopped)`; empty if there is none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("State:"):
                return line.removeprefix("State:").strip()
    return ""


def read_launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """Read the launcher's environment variables.

    Raises ValueError, naming the variables, when they are incomplete or contradict each other, and
    when srun started several tasks without telling them their ranks.
    """
    found = [name for name in (*_NEEDED, *_LOCAL) if name in environment]
    if not found:
        _refuse_bare_srun(environment)
        return Launcher()
    several = environment.get("WORLD_SIZE", "1") != "1"
    needed = (*_NEEDED, *_LOCAL) if several else _NEEDED
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise ValueError(
            f"the launcher's environment is incomplete: {_assignments(environment, found)}, but "
            f"not {', '.join(missing)}; start with torchrun, or unset {' '.join(found)} to train "
            "in one process"
        )
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in environment else 0
    launcher = Launcher(
        rank=_number(environment, "RANK"),
        local_rank=_number(environment, "LOCAL_RANK", 0),
        world_size=_number(environment, "WORLD_SIZE"),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        agent=agent,
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts=environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0",
    )
    _check_launcher(launcher, environment)
    return launcher


def _refuse_bare_srun(environment: Mapping[str, str]) -> None:
    """Under srun each task starts as if it were alone: they would all train the same."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in environment:
        return
    raise ValueError(
        f"SLURM started {tasks} tasks (SLURM_NTASKS is {tasks}), but nothing tells them their "
        "ranks (RANK and WORLD_SIZE are not set): use `resnet-dist submit`, or one task per node "
        "that runs torchrun; for one process, srun --ntasks 1 or unset SLURM_NTASKS"
    )


def _check_launcher(launcher: Launcher, environment: Mapping[str, str]) -> None:
    """Raise ValueError when the numbers of a launcher's environment contradict each other."""
    rules = (
        (launcher.world_size >= 1, ("WORLD_SIZE",), "WORLD_SIZE must be at least 1"),
        (
            0 <= launcher.rank < launcher.world_size,
            ("RANK", "WORLD_SIZE"),
            "RANK must be from 0 to WORLD_SIZE - 1",
        ),
        (
            1 <= launcher.local_world_size <= launcher.world_size,
            ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
            "LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE",
        ),
        (
            0 <= launcher.local_rank < launcher.local_world_size,
            ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            "LOCAL_RANK must be from 0 to LOCAL_WORLD_SIZE - 1",
        ),
        (0 < launcher.port < 2**16, ("MASTER_PORT",), "MASTER_PORT must be from 1 to 65535"),
    )
    for holds, names, rule in rules:
        if not holds:
            raise ValueError(
                f"the launcher's environment is inconsistent: {_assignments(environment, names)}; "
                f"{rule}; start with torchrun, or unset these variables"
            )


def _assignments(environment: Mapping[str, str], names: tuple[str, ...] | list[str]) -> str:
    """The variables as one would type them."""
    assignments = []
    for name in names:
        value = environment.get(name, "")
        assignments.append(f"{name}={value}")
    return ", ".join(assignments)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name} is {text!r}: the launcher must set it to a number") from None


def meet(launcher: Launcher, timeout_s: float) -> Meeting:
    """Open the common store and wait until every rank has come.

    Raises ValueError when the store's address cannot be used, and LostRankError when a rank does
    not come within `timeout_s` seconds or the launcher is gone.
    """
    own = Peer(socket.gethostname(), os.getpid())
    if not launcher.address:
        return Meeting(launcher, HashStore(), (own,))
    deadline = time.monotonic() + timeout_s
    try:
        store = _open_store(launcher, deadline)
        token = _agree_on_token(launcher, store, own, deadline)
        here = PrefixStore(token, store)
        peers = tuple(Peer(**json.loads(here.get(f"here/{n}"))) for n in range(launcher.world_size))
    except (dist.DistError, RuntimeError) as problem:
        if isinstance(problem, LostRankError):
            raise
        reason = str(problem).splitlines()[0]
        raise LostRankError(f"lost at the start: {_store_is_gone(launcher)}; {reason}") from problem
    return Meeting(launcher, here, peers)


def _open_store(launcher: Launcher, deadline: float) -> Store:
    """Serve the store, or connect to it once it answers."""
    address, port = launcher.address, launcher.port
    if not launcher.serves_store:
        patience = _AGENT_STORE_SECONDS if launcher.agent_store else deadline - time.monotonic()
        _wait_for_server(launcher, min(deadline, time.monotonic() + patience))
    timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return TCPStore(
            address,
            port,
            is_master=launcher.serves_store,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistError, RuntimeError) as problem:
        if not launcher.serves_store:
            raise
        _resolve(address)
        raise ValueError(
            f"rank 0 cannot listen on MASTER_PORT {port} of MASTER_ADDR {address}: the port is in "
            f"use or not permitted; set MASTER_PORT (torchrun --master_port) to a free one "
            f"({_reason(problem)})"
        ) from problem


def _wait_for_server(launcher: Launcher, deadline: float) -> None:
    """Until something listens at the store's address."""
    place = (launcher.address, launcher.port)
    while True:
        _resolve(launcher.address)
        try:
            with socket.create_connection(place, timeout=5.0):
                return
        except OSError as problem:
            reason = str(problem)
        _check_time(launcher, deadline, f"{_store_is_gone(launcher)}; {reason}")
        time.sleep(4 * _POLL_SECONDS)


def _resolve(address: str) -> None:
    """Raise ValueError for a host that is not known here; a name server may fail now and then."""
    for attempt in range(3):
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as problem:
            if attempt == 2:
                raise ValueError(
                    f"MASTER_ADDR is {address!r}: this host is not known here ({problem}); set it "
                    "to the name or address of rank 0's machine (torchrun --rdzv_endpoint)"
                ) from problem
        time.sleep(0.5)


def _agree_on_token(launcher: Launcher, store: Store, own: Peer, deadline: float) -> str:
    """A word that stands for this start alone, once every rank has it.

    torchrun keeps one store over restarts, so that keys of an earlier start are still there; and
    its count of restarts differs between nodes that joined at different times. Therefore rank 0
    draws a token and hands it to each rank that asks for it with a word of its own.
    """
    room = PrefixStore(f"resnet_dist/{launcher.world_size}", store)
    ticket = secrets.token_hex(8)
    if launcher.rank == 0:
        token = ticket
        PrefixStore(token, store).set("here/0", json.dumps(vars(own)))
        _hand_out_token(launcher, room, PrefixStore(token, store), token, deadline)
        return token
    room.set(f"ticket/{launcher.rank}", ticket)
    answer = f"token/{ticket}"
    while not room.check([answer]):
        _check_time(launcher, deadline, "rank 0 has not come")
        time.sleep(_POLL_SECONDS)
    token = room.get(answer).decode()
    here = PrefixStore(token, store)
    here.set(f"here/{launcher.rank}", json.dumps(vars(own)))
    while not here.check(["all"]):
        missing = [n for n in range(launcher.world_size) if not here.check([f"here/{n}"])]
        _check_time(launcher, deadline, _have_not_come(missing, launcher.world_size))
        time.sleep(_POLL_SECONDS)
    return token


def _hand_out_token(
    launcher: Launcher, room: Store, here: Store, token: str, deadline: float
) -> None:
    """Rank 0's side: answer each ticket, also a newer one of the same rank, until all are here."""
    answered: dict[int, bytes] = {}
    missing = list(range(1, launcher.world_size))
    while missing:
        for rank in missing:
            key = f"ticket/{rank}"
            ticket = room.get(key) if room.check([key]) else b""
            if ticket and answered.get(rank) != ticket:
                room.set(f"token/{ticket.decode()}", token)
                answered[rank] = ticket
        missing = [rank for rank in missing if not here.check([f"here/{rank}"])]
        if missing:
            _check_time(launcher, deadline, _have_not_come(missing, launcher.world_size))
            time.sleep(_POLL_SECONDS)
    here.set("all", "1")


def _check_time(launcher: Launcher, deadline: float, text: str) -> None:
    """Raise LostRankError once the time is over, or when the launcher has gone."""
    if launcher.is_gone:
        raise LostRankError("lost at the start: torchrun is gone")
    if time.monotonic() > deadline:
        raise LostRankError(f"lost at the start: {text}; distributed.timeout_s is over")


def _have_not_come(ranks: list[int], world_size: int) -> str:
    names = ", ".join(map(str, ranks))
    if len(ranks) == 1:
        return f"rank {names} of {world_size} has not come"
    return f"ranks {names} of {world_size} have not come"


def _store_is_gone(launcher: Launcher) -> str:
    server = "torchrun" if launcher.agent_store else "rank 0"
    place = f"MASTER_ADDR {launcher.address}, MASTER_PORT {launcher.port}"
    return f"the store that {server} serves at {place} does not answer"


def _reason(problem: Exception) -> str:
    """The first line of torch's message, without what follows."""
    return str(problem).splitlines()[0].strip()
