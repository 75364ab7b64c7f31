"""Read the launcher's environment and connect the processes of a run by a common store.

torchrun and SLURM describe each process by environment variables. `read_launcher` reads all of
them in one place and rejects inconsistent values. `meet` opens the store that all processes share
(torchrun's own, or one that rank 0 serves) and waits until every rank has joined.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from resnet_dist.distributed.interfaces import check_route, list_interfaces
from resnet_dist.text import first_line

# Every launcher sets all of these variables.
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# A launcher of several ranks sets these, too.
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")

# Time between two reads of the store.
_POLL_SECONDS = 0.05

# Time to wait for the store of torchrun. It runs before torchrun starts a worker, so that a refused
# connection does not mean that the store is still to come.
_AGENT_STORE_SECONDS = 20.0

# The stores that this process has opened. A process that joins the same ranks again, as a second
# call of the Python API does, keeps its store: the other ranks may still use the one that it
# serves, or have asked there for the next start.
_stores: dict["Launcher", Store] = {}


class LostRankError(RuntimeError):
    """Another rank or the launcher is gone, before this rank could join it."""


@dataclass(frozen=True)
class Launcher:
    """The launcher's description of this process. The defaults describe a single process.

    Attributes:
        rank: Rank of this process.
        local_rank: Rank among the processes of this machine.
        world_size: Number of processes.
        local_world_size: Number of processes on this machine.
        address: Host of the common store; empty without a launcher.
        port: Port of the common store.
        agent: Process id of torchrun's agent, the parent of this process; 0 without torchrun.
        agent_store: Whether torchrun's agent serves the store; otherwise rank 0 does.
        restarts: Whether the launcher restarts failed ranks (torchrun --max-restarts).
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = ""
    port: int = 0
    agent: int = 0
    agent_store: bool = False
    restarts: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether torchrun's agent has ended: this process then has another parent."""
        if not self.agent:
            return False
        parent = os.getppid()
        return parent != self.agent

    @property
    def serves_store(self) -> bool:
        """Whether this process serves the store."""
        return self.rank == 0 and not self.agent_store


@dataclass(frozen=True)
class Peer:
    """The process of a rank."""

    host: str
    pid: int

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False for one of another machine."""
        if self.host != socket.gethostname():
            return False
        state = process_state(self.pid)
        # Z is a zombie, X a dead process (see proc(5)).
        return not state or state[0] in "ZX"


@dataclass(frozen=True)
class Meeting:
    """The ranks of one start of the run.

    Attributes:
        launcher: The launcher's description of this process.
        store: The store that the ranks share, with keys of this start alone.
        peers: The processes, in order of rank.
    """

    launcher: Launcher
    store: Store
    peers: tuple[Peer, ...]


def process_state(pid: int) -> str:
    """Return the state of a process of this machine, such as `T (stopped)`; empty if it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name == "State":
                return value.strip()
    return ""


def read_launcher(environment: Mapping[str, str] = os.environ) -> Launcher:
    """Read the launcher's environment variables.

    Args:
        environment: The variables and their values.

    Returns:
        The description of this process; the defaults if no launcher has set a variable.

    Raises:
        ValueError: The variables are incomplete or contradict each other, or srun has started
            several tasks without their ranks. The message names the variables.
    """
    known = (*_NEEDED, *_LOCAL)
    found = [name for name in known if name in environment]
    if not found:
        _refuse_bare_srun(environment)
        return Launcher()
    _refuse_missing(environment, found)
    agent = 0
    if "TORCHELASTIC_RUN_ID" in environment:
        agent = os.getppid()
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


def _refuse_missing(environment: Mapping[str, str], found: list[str]) -> None:
    """Raise ValueError if the launcher has set the variables `found`, but not all it must set."""
    needed = list(_NEEDED)
    world_size = environment.get("WORLD_SIZE", "1")
    if world_size != "1":
        needed.extend(_LOCAL)
    missing = [name for name in needed if not environment.get(name)]
    if not missing:
        return
    raise ValueError(
        f"the launcher's environment is incomplete: {_assignments(environment, found)}, but "
        f"not {', '.join(missing)}; start with torchrun, or unset {' '.join(found)} to train "
        "in one process"
    )


def _refuse_bare_srun(environment: Mapping[str, str]) -> None:
    """Raise ValueError if srun has started several tasks without a launcher.

    Each task would start as if it were alone, and all would train the same.
    """
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
    names: tuple[str, ...] = ()
    rule = ""
    if launcher.world_size < 1:
        names = ("WORLD_SIZE",)
        rule = "WORLD_SIZE must be at least 1"
    elif not 0 <= launcher.rank < launcher.world_size:
        names = ("RANK", "WORLD_SIZE")
        rule = "RANK must be from 0 to WORLD_SIZE - 1"
    elif not 1 <= launcher.local_world_size <= launcher.world_size:
        names = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
        rule = "LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE"
    elif not 0 <= launcher.local_rank < launcher.local_world_size:
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rule = "LOCAL_RANK must be from 0 to LOCAL_WORLD_SIZE - 1"
    elif not 0 < launcher.port < 2**16:
        names = ("MASTER_PORT",)
        rule = "MASTER_PORT must be from 1 to 65535"
    if rule:
        raise ValueError(
            f"the launcher's environment is inconsistent: {_assignments(environment, names)}; "
            f"{rule}; start with torchrun, or unset these variables"
        )


def _assignments(environment: Mapping[str, str], names: Iterable[str]) -> str:
    """Show variables with their values, as in a shell."""
    assignments = []
    for name in names:
        value = environment.get(name, "")
        assignments.append(f"{name}={value}")
    return ", ".join(assignments)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read a variable as an integer; `default` stands for one that is missing or empty."""
    text = environment.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name} is {text!r}: the launcher must set it to a number") from None


def meet(launcher: Launcher, timeout_s: float) -> Meeting:
    """Open the common store and wait until every rank has joined.

    Args:
        launcher: The description of this process.
        timeout_s: Seconds that the other ranks have to join.

    Returns:
        The store and the processes of all ranks; without a launcher, of this process alone.

    Raises:
        ValueError: The address of the store cannot be used.
        LostRankError: A rank has not joined in time, or the launcher is gone.
    """
    own = Peer(socket.gethostname(), os.getpid())
    if not launcher.address:
        return Meeting(launcher, HashStore(), (own,))
    deadline = time.monotonic() + timeout_s
    try:
        store = _open_store(launcher, deadline)
        token = _agree_on_token(launcher, store, own, deadline)
        here = PrefixStore(token, store)
        peers = _read_peers(here, launcher.world_size)
    except LostRankError:
        raise
    except (dist.DistError, RuntimeError) as problem:
        gone = _store_is_gone(launcher)
        raise LostRankError(f"lost at the start: {gone}; {first_line(problem)}") from problem
    return Meeting(launcher, here, peers)


def _read_peers(here: Store, world_size: int) -> tuple[Peer, ...]:
    """Read the processes of all ranks from the store."""
    peers = []
    for rank in range(world_size):
        content = here.get(f"here/{rank}")
        peer = Peer(**json.loads(content))
        peers.append(peer)
    return tuple(peers)


def _open_store(launcher: Launcher, deadline: float) -> Store:
    """Open the store of the ranks, once for all starts of this process."""
    if launcher not in _stores:
        _stores[launcher] = _serve_or_connect(launcher, deadline)
    store = _stores[launcher]
    store.set_timeout(_time_left(deadline))
    return store


def _time_left(deadline: float) -> timedelta:
    """At least a second, so that the store answers."""
    seconds = deadline - time.monotonic()
    return timedelta(seconds=max(1.0, seconds))


def _serve_or_connect(launcher: Launcher, deadline: float) -> Store:
    """Serve the store, or connect to it once it answers."""
    address = launcher.address
    port = launcher.port
    if not launcher.serves_store:
        limit = deadline
        if launcher.agent_store:
            limit = min(deadline, time.monotonic() + _AGENT_STORE_SECONDS)
        _wait_for_server(launcher, limit)
    else:
        _check_own_address(address, port)
    try:
        return TCPStore(
            address,
            port,
            is_master=launcher.serves_store,
            timeout=_time_left(deadline),
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


def _check_own_address(address: str, port: int) -> None:
    """Raise ValueError if rank 0 cannot reach its own address: torch would try for long."""
    _resolve(address)
    try:
        check_route(address, port)
    except OSError as problem:
        raise ValueError(
            f"MASTER_ADDR is {address!r}: rank 0 cannot reach this address, its own "
            f"({problem.strerror}); network interfaces that are up: {list_interfaces()}"
        ) from problem


def _wait_for_server(launcher: Launcher, deadline: float) -> None:
    """Wait until a process listens at the address of the store."""
    place = (launcher.address, launcher.port)
    while True:
        _resolve(launcher.address)
        try:
            with socket.create_connection(place, timeout=5.0):
                return
        except OSError as problem:
            reason = str(problem)
        text = f"{_store_is_gone(launcher)}; {reason}"
        _check_time(launcher, deadline, text)
        time.sleep(4 * _POLL_SECONDS)


def _resolve(address: str) -> None:
    """Raise ValueError for an unknown host, after three attempts: a name server may fail once."""
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
    """Agree with the other ranks on a random word that identifies this start of the run.

    torchrun keeps one store over restarts, so that keys of an earlier start still exist; and its
    count of restarts differs between nodes that joined at different times. Therefore rank 0 draws
    a token and gives it to each rank that asks for it with a random word (a ticket).

    Args:
        launcher: The description of this process.
        store: The store of the launcher or of rank 0.
        own: This process.
        deadline: Time of the monotonic clock at which every rank must have joined.

    Returns:
        The token, once every rank has it. It is the prefix of all keys of this start.
    """
    room = PrefixStore(f"resnet_dist/{launcher.world_size}", store)
    presence = json.dumps(vars(own))
    if launcher.rank == 0:
        token = secrets.token_hex(8)
        here = PrefixStore(token, store)
        here.set("here/0", presence)
        _hand_out_token(launcher, room, here, token, deadline)
        return token
    token = _ask_for_token(launcher, room, deadline)
    here = PrefixStore(token, store)
    here.set(f"here/{launcher.rank}", presence)
    everyone = range(launcher.world_size)
    while not here.check(["all"]):
        missing = _missing_ranks(here, everyone)
        text = _have_not_come(missing, launcher.world_size)
        _check_time(launcher, deadline, text)
        time.sleep(_POLL_SECONDS)
    return token


def _ask_for_token(launcher: Launcher, room: Store, deadline: float) -> str:
    """Wait for the answer of rank 0 to a new ticket of this rank."""
    ticket = secrets.token_hex(8)
    room.set(f"ticket/{launcher.rank}", ticket)
    answer = f"token/{ticket}"
    while not room.check([answer]):
        _check_time(launcher, deadline, "rank 0 has not come")
        time.sleep(_POLL_SECONDS)
    return room.get(answer).decode()


def _hand_out_token(
    launcher: Launcher, room: Store, here: Store, token: str, deadline: float
) -> None:
    """Answer the tickets of the other ranks, as rank 0, until all have joined.

    A rank that was restarted asks again with another ticket.

    Args:
        launcher: The description of this process.
        room: The store for tickets and answers, common to all starts with this number of ranks.
        here: The store of this start.
        token: The word that identifies this start.
        deadline: Time of the monotonic clock at which every rank must have joined.
    """
    answered: dict[int, bytes] = {}
    missing = list(range(1, launcher.world_size))
    while missing:
        for rank in missing:
            key = f"ticket/{rank}"
            if not room.check([key]):
                continue
            ticket = room.get(key)
            if answered.get(rank) != ticket:
                room.set(f"token/{ticket.decode()}", token)
                answered[rank] = ticket
        missing = _missing_ranks(here, missing)
        if missing:
            text = _have_not_come(missing, launcher.world_size)
            _check_time(launcher, deadline, text)
            time.sleep(_POLL_SECONDS)
    here.set("all", "1")


def _missing_ranks(here: Store, ranks: Iterable[int]) -> list[int]:
    """Return those of `ranks` that have not joined yet."""
    missing = []
    for rank in ranks:
        if not here.check([f"here/{rank}"]):
            missing.append(rank)
    return missing


def _check_time(launcher: Launcher, deadline: float, text: str) -> None:
    """Raise LostRankError with `text` after the deadline, or if the launcher is gone."""
    if launcher.is_gone:
        raise LostRankError("lost at the start: torchrun is gone")
    if time.monotonic() > deadline:
        raise LostRankError(f"lost at the start: {text}; distributed.timeout_s is over")


def _have_not_come(ranks: list[int], world_size: int) -> str:
    """Name the ranks that have not joined."""
    names = ", ".join(str(rank) for rank in ranks)
    if len(ranks) == 1:
        return f"rank {names} of {world_size} has not come"
    return f"ranks {names} of {world_size} have not come"


def _store_is_gone(launcher: Launcher) -> str:
    """Say which store does not answer."""
    server = "rank 0"
    if launcher.agent_store:
        server = "torchrun"
    place = f"MASTER_ADDR {launcher.address}, MASTER_PORT {launcher.port}"
    return f"the store that {server} serves at {place} does not answer"


def _reason(problem: Exception) -> str:
    """Return the first line of torch's message; C++ stack frames follow it."""
    lines = str(problem).splitlines()
    return lines[0].strip()
