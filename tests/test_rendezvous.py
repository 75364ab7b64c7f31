"""How ranks find each other: what a launcher's environment may say, and what a start without one,
or with a broken one, answers. Each start is a forked process on the loopback interface.
"""

import errno
import multiprocessing
import os
import re
import signal

import pytest
import torch.distributed as dist
from dist_utils import begin_forked_process, free_port, options, start_app, wait_app

from resnet_dist.config import Config
from resnet_dist.distributed import interfaces, rendezvous
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.rendezvous import Launcher, LostRankError, meet, read_launcher

WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_whole_environment_and_none():
    """Rank 0 serves the store."""
    assert read_launcher({}) == Launcher()

    second_rank = read_launcher(WHOLE)
    assert second_rank == Launcher(
        rank=1,
        local_rank=1,
        world_size=4,
        local_world_size=2,
        address="127.0.0.1",
        port=29500,
    )
    assert not second_rank.serves_store

    only_rank = read_launcher(
        {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
        }
    )
    assert only_rank == Launcher(address="localhost", port=29500)
    assert only_rank.serves_store


def test_torchrun_is_recognised():
    launcher = read_launcher(
        {
            **WHOLE,
            "RANK": "0",
            "LOCAL_RANK": "0",
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_MAX_RESTARTS": "3",
        }
    )
    assert launcher.agent == os.getppid()
    assert launcher.agent_store
    assert launcher.restarts
    assert not launcher.serves_store


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": "8", "RANK": "0"}, ["WORLD_SIZE=8", "RANK=0", "not MASTER_ADDR"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "not RANK, MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({"RANK": "1"}, ["RANK=1", "not WORLD_SIZE", "unset RANK"]),
        ({"MASTER_ADDR": "node1"}, ["MASTER_ADDR=node1", "not RANK, WORLD_SIZE, MASTER_PORT"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "not RANK"]),
        ({**WHOLE, "LOCAL_RANK": ""}, ["not LOCAL_RANK"]),
        ({**WHOLE, "RANK": "4"}, ["RANK=4, WORLD_SIZE=4", "from 0 to WORLD_SIZE - 1"]),
        ({**WHOLE, "RANK": "-1"}, ["RANK=-1"]),
        ({**WHOLE, "RANK": "one"}, ["RANK is 'one'", "number"]),
        ({**WHOLE, "WORLD_SIZE": "0"}, ["WORLD_SIZE=0", "at least 1"]),
        ({**WHOLE, "LOCAL_RANK": "2"}, ["LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"]),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "5"}, ["LOCAL_WORLD_SIZE=5, WORLD_SIZE=4"]),
        ({**WHOLE, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999", "65535"]),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            ["SLURM_NTASKS is 2", "resnet-dist submit", "torchrun"],
        ),
    ],
)
def test_an_inconsistent_environment_is_refused_by_name(environment, words):
    with pytest.raises(ValueError) as refused:
        read_launcher(environment)
    message = str(refused.value)
    for word in words:
        assert word in message


def test_a_refused_environment_ends_with_code_2(monkeypatch, capsys):
    """Before anything is read or written; of two tasks of srun only the first speaks."""

    def succeed(config, runtime):
        return 0

    monkeypatch.setenv("SLURM_NTASKS", "2")
    for rank, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert run_process(Config(), succeed) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == num_lines


def launcher_of(rank, world_size, port, address="127.0.0.1", **more):
    """What a launcher says to a rank, where all ranks are on this machine."""
    return Launcher(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        address=address,
        port=port,
        **more,
    )


def serve_store(port):
    """A store on this machine, which is there as long as its object."""
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_a_host_and_a_port_that_cannot_be_used():
    unknown_host = launcher_of(1, 2, 29500, address="no.such.host.invalid")
    with pytest.raises(ValueError, match=r"MASTER_ADDR is 'no\.such\.host\.invalid'"):
        meet(unknown_host, 5)

    port = free_port()
    other_store = serve_store(port)
    with pytest.raises(ValueError, match=f"MASTER_PORT {port} of MASTER_ADDR 127.0.0.1.*in use"):
        meet(launcher_of(0, 2, port), 5)
    del other_store


def test_a_machine_whose_interfaces_are_all_down(monkeypatch):
    """Not even loopback is there: rank 0 says so at once, and which interface to start."""
    assert "lo" in interfaces.interfaces_that_are_up()
    assert not interfaces._is_up("nosuch0")
    monkeypatch.setattr(interfaces, "_is_up", lambda name: False)
    assert interfaces.list_interfaces() == "none (`ip link set lo up` starts loopback)"

    class UnreachableSocket:
        """A socket that cannot connect to any address."""

        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def connect(self, place):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(interfaces.socket, "socket", UnreachableSocket)
    with pytest.raises(ValueError) as refused:
        meet(launcher_of(0, 2, 29500), 600)
    assert str(refused.value) == (
        "MASTER_ADDR is '127.0.0.1': rank 0 cannot reach this address, its own (Network is "
        "unreachable); network interfaces that are up: none (`ip link set lo up` starts loopback)"
    )


@pytest.mark.slow
def test_a_rank_that_does_not_come(monkeypatch):
    """The first rank names who is missing; the others that the first is."""
    first = launcher_of(0, 3, free_port())
    with pytest.raises(LostRankError, match="ranks 1, 2 of 3 have not come"):
        meet(first, 1)

    monkeypatch.setattr(rendezvous, "_AGENT_STORE_SECONDS", 0.5)
    for agent_store, server in ((False, "rank 0"), (True, "torchrun")):
        second = launcher_of(1, 2, free_port(), agent_store=agent_store)
        with pytest.raises(LostRankError, match=f"the store that {server} serves at MASTER_ADDR"):
            meet(second, 1)


def test_a_launcher_that_is_gone_is_not_waited_for():
    """As an orphan finds itself: its parent is another process than at its start."""
    orphan = launcher_of(1, 2, free_port(), agent=1, agent_store=False)
    with pytest.raises(LostRankError, match="torchrun is gone"):
        meet(orphan, 60)


@pytest.mark.slow
def test_keys_of_an_earlier_start_do_no_harm():
    """Torchrun keeps one store over restarts: here a start that failed comes before a good one."""
    port = free_port()
    server = serve_store(port)
    context = multiprocessing.get_context("fork")

    def join(rank, results, timeout):
        begin_forked_process()
        launcher = launcher_of(rank, 2, port, agent_store=True)
        try:
            meeting = meet(launcher, timeout)
        except LostRankError as problem:
            results.put((rank, str(problem)))
            return
        num_failed = meeting.store.add("failed", 1)
        sees_earlier_keys = num_failed > 2
        pids = [peer.pid for peer in meeting.peers]
        results.put((rank, pids, sees_earlier_keys))

    def start(rank, results, timeout):
        process = context.Process(target=join, args=(rank, results, timeout))
        process.start()
        return process

    for _ in range(2):
        results = context.SimpleQueue()
        alone = start(1, results, timeout=1.0)
        _, problem = results.get()
        assert "rank 0 has not come" in problem
        alone.join()

        first = start(0, results, timeout=60.0)
        second = start(1, results, timeout=60.0)
        found = sorted([results.get(), results.get()])
        first.join()
        second.join()
        pids = [first.pid, second.pid]
        assert found == [(0, pids, False), (1, pids, False)]
    del server


def start_small(folder, digits, entry=None):
    """The quickstart on two ranks with a short time-out."""
    arguments = [
        "train",
        *options(
            config="configs/quickstart.yaml",
            data__data_dir=digits,
            output_dir=folder / "run",
            distributed__timeout_s=30,
            distributed__threads=1,
            log__wandb="disabled",
        ),
    ]
    return start_app(2, arguments, str(folder / "log"), entry)


def test_a_network_interface_that_does_not_exist(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    processes = start_small(tmp_path, digits)
    assert wait_app(processes) == [2, 2]
    printed = (tmp_path / "log").read_text()
    assert "GLOO_SOCKET_IFNAME is 'nosuch0'" in printed
    assert re.search(r"up: .*\blo\b", printed)
    assert printed.count("error") == 1
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_rank_that_is_killed_before_the_loop(digits, tmp_path):
    """While the others build their state: they name it, and end with 75 instead of a traceback."""

    def entry(arguments):
        from resnet_dist import cli, run

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if os.environ["RANK"] == "1":
            run.build_state = die
        return cli.main(arguments)

    processes = start_small(tmp_path, digits, entry)
    codes = wait_app(processes)
    printed = (tmp_path / "log").read_text()
    assert codes == [75, -signal.SIGKILL], printed
    host = os.uname().nodename
    assert f"rank 1 (host {host}, process {processes[1].pid})" in printed
    assert "Traceback" not in printed
