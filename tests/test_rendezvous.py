"""How ranks find each other: what a launcher's environment may say, and what a start without one,
or with a broken one, answers. Each start is a forked process on the loopback interface.
"""

import errno
import os
import re
import signal
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist
from dist_utils import begin_forked_process, free_port, start_app, wait_app

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
    assert read_launcher({}) == Launcher()
    expected = Launcher(1, 1, 4, 2, "127.0.0.1", 29500)
    assert read_launcher(WHOLE) == expected
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert read_launcher(one) == Launcher(address="localhost", port=29500)
    assert not expected.serves_store
    assert read_launcher(one).serves_store


def test_torchrun_is_recognised():
    elastic = {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
    }
    launcher = read_launcher({**WHOLE, "RANK": "0", "LOCAL_RANK": "0", **elastic})
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
    for word in words:
        assert word in str(refused.value)


def test_a_refused_environment_ends_with_code_2(monkeypatch, capsys):
    """Before anything is read or written; of two tasks of srun only the first speaks."""
    monkeypatch.setenv("SLURM_NTASKS", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("SLURM_PROCID", rank)
        assert run_process(Config(), lambda config, runtime: 0) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_host_and_a_port_that_cannot_be_used():
    with pytest.raises(ValueError, match=r"MASTER_ADDR is 'no\.such\.host\.invalid'"):
        meet(Launcher(1, 1, 2, 2, "no.such.host.invalid", 29500), 5)
    port = free_port()
    taken = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with pytest.raises(ValueError, match=f"MASTER_PORT {port} of MASTER_ADDR 127.0.0.1.*in use"):
        meet(Launcher(0, 0, 2, 2, "127.0.0.1", port), 5)
    del taken


def test_a_machine_whose_interfaces_are_all_down(monkeypatch):
    """Not even loopback is there: rank 0 says so at once, and which interface to start."""
    assert "lo" in interfaces.interfaces_that_are_up()
    assert not interfaces._is_up("nosuch0")
    monkeypatch.setattr(interfaces, "_is_up", lambda name: False)
    assert interfaces.list_interfaces() == "none (`ip link set lo up` starts loopback)"

    def connect(place):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    datagrams = MagicMock()
    datagrams.return_value.__enter__.return_value.connect = connect
    monkeypatch.setattr(interfaces.socket, "socket", datagrams)
    with pytest.raises(ValueError) as refused:
        meet(Launcher(0, 0, 2, 2, "127.0.0.1", 29500), 600)
    assert str(refused.value) == (
        "MASTER_ADDR is '127.0.0.1': rank 0 cannot reach this address, its own (Network is "
        "unreachable); network interfaces that are up: none (`ip link set lo up` starts loopback)"
    )


@pytest.mark.slow
def test_a_rank_that_does_not_come(monkeypatch):
    """The first rank names who is missing; the others that the first is."""
    with pytest.raises(LostRankError, match="ranks 1, 2 of 3 have not come"):
        meet(Launcher(0, 0, 3, 3, "127.0.0.1", free_port()), 1)
    monkeypatch.setattr(rendezvous, "_AGENT_STORE_SECONDS", 0.5)
    for agent_store, server in ((False, "rank 0"), (True, "torchrun")):
        launcher = Launcher(1, 1, 2, 2, "127.0.0.1", free_port(), agent_store=agent_store)
        with pytest.raises(LostRankError, match=f"the store that {server} serves at MASTER_ADDR"):
            meet(launcher, 1)


def test_a_launcher_that_is_gone_is_not_waited_for():
    """As an orphan finds itself: its parent is another process than at its start."""
    launcher = Launcher(1, 1, 2, 2, "127.0.0.1", free_port(), agent=1, agent_store=False)
    with pytest.raises(LostRankError, match="torchrun is gone"):
        meet(launcher, 60)


@pytest.mark.slow
def test_keys_of_an_earlier_start_do_no_harm():
    """Torchrun keeps one store over restarts: here a start that failed comes before a good one."""
    from multiprocessing import get_context

    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    context = get_context("fork")

    def join(rank, results, timeout):
        begin_forked_process()
        launcher = Launcher(rank, rank, 2, 2, "127.0.0.1", port, agent_store=True)
        try:
            meeting = meet(launcher, timeout)
        except LostRankError as problem:
            results.put((rank, str(problem)))
            return
        earlier = meeting.store.add("failed", 1) > 2
        results.put((rank, [peer.pid for peer in meeting.peers], earlier))

    for _ in range(2):
        results = context.SimpleQueue()
        alone = context.Process(target=join, args=(1, results, 1.0))
        alone.start()
        assert "rank 0 has not come" in results.get()[1]
        alone.join()
        both = [context.Process(target=join, args=(rank, results, 60.0)) for rank in range(2)]
        for process in both:
            process.start()
        found = sorted(results.get() for _ in both)
        for process in both:
            process.join()
        pids = [process.pid for process in both]
        assert found == [(0, pids, False), (1, pids, False)]
    del server


def start_small(folder, digits, entry=None, world_size=2):
    """The quickstart with a short time-out."""
    arguments = ["train", "--config", "configs/quickstart.yaml", "--data.data_dir", digits]
    arguments += ["--output_dir", str(folder / "run"), "--distributed.timeout_s", "30"]
    arguments += ["--log.wandb", "disabled", "--distributed.threads", "1"]
    return start_app(world_size, arguments, str(folder / "log"), entry)


def test_a_network_interface_that_does_not_exist(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert wait_app(start_small(tmp_path, digits)) == [2, 2]
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

        def build_state(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if os.environ["RANK"] == "1":
            run.build_state = build_state
        return cli.main(arguments)

    processes = start_small(tmp_path, digits, entry)
    assert wait_app(processes) == [75, -signal.SIGKILL], (tmp_path / "log").read_text()
    printed = (tmp_path / "log").read_text()
    assert f"rank 1 (host {os.uname().nodename}, process {processes[1].pid})" in printed
    assert "Traceback" not in printed
