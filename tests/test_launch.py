"""Submitting without SLURM: the batch script, the ports, what a signal means, and who may write."""

import itertools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from dist_utils import options, small_run

from resnet_dist import cli
from resnet_dist.checkpoints.checkpoint import Saver, TrainState
from resnet_dist.distributed import runtime as distributed
from resnet_dist.distributed.rendezvous import Launcher, Meeting, Peer
from resnet_dist.distributed.runtime import StopSignal
from resnet_dist.distributed.watchdog import Watchdog
from resnet_dist.launch import status
from resnet_dist.launch.rank import end_rank, free_port, judge_signal
from resnet_dist.launch.script import check_text
from resnet_dist.settings.cluster import ClusterConfig
from resnet_dist.settings.options import field_meanings

RECIPE = ["submit", "--config", "configs/resnet50.yaml", "--data.data_dir", "/data/imagenet"]


def dry_run(capsys, *arguments):
    """The batch script and the summary that a dry run of the recipe prints."""
    assert cli.main([*RECIPE, *arguments, "--cluster.dry_run"]) == 0
    return capsys.readouterr().out


def test_dry_run_prints_the_batch_script_and_what_it_trains(capsys, monkeypatch, tmp_path):
    """Every key arrives where it should; nothing is written, and SLURM need not be there."""
    monkeypatch.setenv("PATH", "")
    said = dry_run(
        capsys,
        *options(
            cluster__nodes=4,
            cluster__gpus_per_node=8,
            cluster__time_min=1440,
            cluster__partition="gpu",
            cluster__account="lab",
            cluster__qos="night",
            cluster__constraint="a100",
            cluster__cpus_per_gpu=12,
            cluster__mem_gb=400,
            cluster__signal_delay_s=180,
        ),
        "--cluster.setup+=module load cuda",
        *options(
            cluster__extra__exclusive="true",
            cluster__extra__exclude="n7",
            data__kind="synthetic",
            data__synthetic_images=2048,
            output_dir=tmp_path / "a run",
        ),
    )
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=1440",
        "--partition=gpu",
        "--account=lab",
        "--qos=night",
        "--constraint=a100",
        "--cpus-per-task=12",
        "--mem=400G",
        "--requeue",
        "--signal=USR2@180",
        "--exclusive",
        "--exclude=n7",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in said
    setup = said.index("\nmodule load cuda\n")
    port = said.index("export MASTER_PORT=")
    command = said.index("\nsrun ")
    assert setup < port < command
    srun = said[command:].splitlines()[1]
    for words in (
        " --kill-on-bad-exit=1 ",
        " --cpus-per-task=12 ",
        "_attempt${SLURM_RESTART_COUNT:-0}_",
    ):
        assert words in srun
    # Quoted for the shell.
    assert srun.count(f"'{tmp_path}/a run/job_") == 2
    assert (
        "ranks 0 to 31, 8 on each of 4 nodes; local batch 32 = 1024 / (32 ranks * 1 micro-steps); "
        "peak lr 0.4; "
        "180 steps of 2 per epoch, 2048 images"
    ) in said
    assert list(tmp_path.iterdir()) == []

    # Bash parses the script without running it.
    script = said[: command + 1] + srun
    subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=True)


@pytest.mark.slow
def test_dry_run_of_an_array_and_of_data_that_is_not_here(capsys, tmp_path):
    for name, base_lr in (("a", 0.1), ("b", 0.2)):
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"output_dir: {tmp_path / name}\noptim: {{base_lr: {base_lr}}}\n")
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        "cluster: {partition: gpu, gpus_per_node: 4, setup: [module load cuda], "
        "extra: {hold: true}}\n"
    )
    arguments = [
        "submit",
        *options(
            config=profile,
            cluster__configs=f"{tmp_path}/a.yaml,{tmp_path}/b.yaml",
            cluster__seeds="0,1,2",
            data__data_dir=tmp_path / "none",
        ),
        "--cluster.dry_run",
    ]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --array=0-5%6\n" in said
    assert "%A_%a_%t_attempt" in said
    assert "#SBATCH --partition=gpu\n" in said
    assert "#SBATCH --hold\n" in said
    assert "\nmodule load cuda\n" in said
    pattern = (
        rf"{tmp_path}/(\S+): ranks 0 to 3.* peak lr (\S+); "
        "number of steps not known here: data.data_dir"
    )
    assert re.findall(pattern, said) == [
        ("a/seed_0", "0.1"),
        ("a/seed_1", "0.1"),
        ("a/seed_2", "0.1"),
        ("b/seed_0", "0.2"),
        ("b/seed_1", "0.2"),
        ("b/seed_2", "0.2"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster.nodes", "0"], ["cluster.nodes", "0"]),
        (
            ["--cluster.nodes", "2", "--cluster.executor", "local"],
            ["cluster.nodes", "1 without SLURM"],
        ),
        (["--cluster.gpus_per_node", "0"], ["cluster.tasks_per_node"]),
        (["--cluster.signal_delay_s", "30"], ["cluster.signal_delay_s", "60"]),
        (["--cluster.time_min", "2"], ["cluster.signal_delay_s", "120"]),
        (["--cluster.gpus_per_node", "3"], ["train.global_batch_size", "3 ranks"]),
        (["--cluster.seeds", "1,1"], ["output_dir", "two jobs"]),
        (["--cluster.seeds", "1,two"], ["cluster.seeds", "1,two", "whole numbers"]),
        (["--cluster.max_requeues", "-1"], ["cluster.max_requeues", "0 or more"]),
        (["--data.data_dir", ""], ["data.data_dir is empty", "train/"]),
        (["--data.data_dir", "docs"], ["data.data_dir is 'docs'", "no folder train/"]),
        (
            ["--data.val_resize_size", "8", "--data.val_crop_size", "8", "--model.name", "vgg11"],
            ["data.val_crop_size", "vgg11"],
        ),
        (["--optim.unfreeze_from", "layer9"], ["optim.unfreeze_from", "layer9"]),
        (
            options(
                cluster__gpus_per_node=0,
                cluster__tasks_per_node=1,
                distributed__device="cuda",
            ),
            ["distributed.device is 'cuda'", "cluster.gpus_per_node is 0"],
        ),
    ],
)
def test_what_cannot_work_is_refused_before_slurm_is_asked(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("PATH", "")
    assert cli.main([*RECIPE, *arguments]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said


CONTROL = [
    "\n#SBATCH --uid=0\ntouch INTRUDER",
    "\rtouch INTRUDER",
    "\x1b[2J",
    "a\x00b",
    "\u2028touch INTRUDER",
    "\x85",
]
ENTERS_THE_SCRIPT = [
    "--output_dir={}",
    "--cluster.partition={}",
    "--cluster.account={}",
    "--cluster.qos={}",
    "--cluster.constraint={}",
    "--cluster.python=python{}",
    "--cluster.extra.comment=a{}",
]


@pytest.mark.slow
def test_no_text_breaks_out_of_its_line_of_the_script(capsys):
    """Whatever enters the batch script is refused with a newline in it."""
    wrong = []
    two_lines = CONTROL[0]
    for argument in ENTERS_THE_SCRIPT:
        word = argument.format(two_lines)
        code = cli.main([*RECIPE, word, "--cluster.dry_run"])
        said = capsys.readouterr().err
        is_refused = code == 2 and "control character '\\n'" in said
        if not is_refused or two_lines in said:
            wrong.append((word, code, said))
    assert wrong == []


def test_every_control_character_is_refused_and_shown_harmlessly():
    for text in CONTROL:
        with pytest.raises(ValueError, match="control character") as refused:
            check_text("cluster.partition", f"gpu{text}")
        assert str(refused.value).isprintable()
    for text in ("gpu", "größe", 'it\'s "a" $(b) `c`'):
        check_text("cluster.partition", text)
    check_text("cluster.setup", "if true; then\n\tmodule load cuda\nfi", allowed="\n\t")


@pytest.mark.slow
def test_names_of_directives_are_names(capsys, tmp_path):
    profile = tmp_path / "profile.yaml"
    for name in ("a b", "-x", "comment\ntouch INTRUDER", "", "exclude=n1 --uid", "größe"):
        profile.write_text(json.dumps({"cluster": {"extra": {name: "value"}}}))
        assert cli.main([*RECIPE, "--config", str(profile), "--cluster.dry_run"]) == 2
        said = capsys.readouterr().err
        assert "cluster.extra has the key" in said, said
        assert len(said.splitlines()) <= 4, said


ODD = """it's "a" $(touch INTRUDER) `touch INTRUDER`; touch INTRUDER & #x {} *?"""


def test_odd_but_printable_texts_are_quoted(capsys, monkeypatch, tmp_path):
    """Bash runs the whole script, with programs of ours in place of srun and scontrol: each text
    arrives as it is, and nothing in it runs.
    """
    folder = tmp_path / ODD
    printed = dry_run(capsys, "--output_dir", str(folder), f"--cluster.extra.comment={ODD}")
    # After the script comes the summary, which begins with a path.
    script, _, _ = printed.rpartition("\n/")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("srun", "scontrol"):
        program = programs / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    work = tmp_path / "work"
    work.mkdir()
    # The folder of the code does not exist: `cd` must not leave the test's own folder.
    done = subprocess.run(
        ["/bin/bash"],
        input=script,
        cwd=work,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert list(tmp_path.rglob("INTRUDER")) == [], done.stdout + done.stderr
    words = done.stdout.splitlines()
    output = next(word for word in words if word.startswith("--output="))
    assert output.startswith(f"--output={folder}/job_")
    # The folder that submitit gets.
    assert any(word.startswith(f"{folder}/job_") for word in words)


def test_folders_that_slurm_would_read_otherwise(capsys):
    for name in ("100%j", "a\\b"):
        assert cli.main([*RECIPE, "--output_dir", f"/tmp/{name}", "--cluster.dry_run"]) == 2
        assert "have a meaning for SLURM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["cluster.cpus_per_gpu is 0"]),
        (["--cluster.cpus_per_gpu", "8"], []),
        (["--cluster.extra.exclusive", "true"], []),
        (
            ["--cluster.cpus_per_gpu", "8", "--distributed.device", "cpu"],
            ["cluster.gpus_per_node is 1, but distributed.device is cpu"],
        ),
        (
            ["--cluster.cpus_per_gpu", "8", "--checkpoint.init_from", "/none/last.pt"],
            ["checkpoint.init_from is '/none/last.pt'"],
        ),
    ],
)
def test_what_is_probably_not_meant_gets_a_warning(capsys, arguments, words):
    """The data folder of RECIPE is not on this machine, which is a warning in each case."""
    assert cli.main([*RECIPE, *arguments, "--cluster.dry_run"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 + len(words)
    for start in ["data.data_dir is '/data/imagenet'", *words]:
        assert any(line.startswith(f"warning: {start}") for line in said), said


def test_without_slurm_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert cli.main([*RECIPE, "--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "does not take the job" in said
    assert "srun" in said


def test_ports_differ_between_jobs_and_attempts():
    """Equal for all ranks, below the kernel's own, and free."""
    ports = {}
    for job, attempt in itertools.product("1234567", "012"):
        ports[job, attempt] = free_port(job, attempt)
    assert min(ports.values()) >= 20000
    assert max(ports.values()) < 32768
    assert len(set(ports.values())) == len(ports)
    with socket.socket() as taken:
        taken.bind(("", ports["1", "0"]))
        taken.listen()
        assert free_port("1", "0") not in ports.values()
    assert free_port("1", "0") == ports["1", "0"]


class FakePlace:
    """As much of submitit's JobEnvironment as the end of a rank needs."""

    def __init__(self, rank, executor="slurm"):
        self.global_rank = rank
        self.job_id = "7"
        self.executor = executor

    def name(self):
        return self.executor


class Exited(BaseException):
    """In place of the end of the process: what follows os._exit never runs."""


class Ending(NamedTuple):
    """How a rank leaves the training, and what its process must do then.

    `expected` is an exit code, a part of an exception's message, "returns" or "waits".
    """

    code: int
    expected: int | str
    verdict: str | None = None
    rank: int = 0
    executor: str = "slurm"
    attempt: int = 0


ENDINGS = (
    # The training is finished, also after a signal that has no consequence.
    Ending(0, "returns"),
    Ending(0, "returns", verdict="go on", attempt=9),
    # An error.
    Ending(1, "ended with code 1", rank=1),
    Ending(2, "ended with code 2"),
    # A rank was lost.
    Ending(75, 75, rank=1),
    Ending(75, "ended with code 75", rank=1, executor="local"),
    # A signal.
    Ending(140, 140, verdict="requeue"),
    Ending(140, "cluster.max_requeues is 3", verdict="requeue", attempt=3),
    Ending(143, 143, verdict="wait", attempt=3),
    Ending(140, "waits", rank=1),
    Ending(130, "ended with code 130", verdict="stop"),
    Ending(143, "ended with code 143", verdict="stop", executor="local"),
    Ending(143, 143, rank=1, executor="local"),
)


@pytest.mark.parametrize("case", ENDINGS)
def test_how_a_rank_ends(monkeypatch, case):
    """A return and an exception leave a result, which ends the job; an exit code does not."""
    before = signal.getsignal(signal.SIGTERM)

    def leave(how):
        raise Exited(how)

    monkeypatch.setattr("resnet_dist.launch.rank.os._exit", leave)
    monkeypatch.setattr("resnet_dist.launch.rank.time.sleep", lambda seconds: leave("waits"))
    place = FakePlace(case.rank, case.executor)
    try:
        end_rank(case.code, case.verdict, place, case.attempt, max_requeues=3)
        found = "returns"
    except (Exited, SystemExit) as exited:
        found = exited.args[0]
    except RuntimeError as problem:
        assert case.expected in str(problem)
        return
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == case.expected


RUNNING = (
    "JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts=1 StartTime=2026-01-02T10:00:00 "
    "PreemptTime="
)


@pytest.mark.parametrize(
    ("number", "shown", "verdict"),
    [
        (signal.SIGUSR2, RUNNING + "None", "requeue"),
        (signal.SIGUSR1, "", "requeue"),
        (signal.SIGINT, RUNNING + "None", "stop"),
        (signal.SIGTERM, RUNNING + "None", "go on"),
        (signal.SIGTERM, RUNNING + "2026-01-02T10:30:00", "requeue"),
        # The preemption of an earlier attempt.
        (signal.SIGTERM, RUNNING + "2026-01-02T09:30:00", "go on"),
        (signal.SIGTERM, RUNNING.replace("RUNNING", "COMPLETING") + "None", "wait"),
        (signal.SIGTERM, RUNNING.replace("RUNNING", "CANCELLED") + "None", "wait"),
        (signal.SIGTERM, RUNNING.replace("RUNNING", "PENDING") + "2026-01-02T10:30:00", "wait"),
        (signal.SIGTERM, "", "go on"),
    ],
)
def test_what_a_signal_means(monkeypatch, tmp_path, number, shown, verdict):
    """By what `scontrol show job` prints; a program of that name prints it here."""
    program = tmp_path / "scontrol"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = '-o show job 7' ] && echo '{shown}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert judge_signal(number, status.show_job("7")) == verdict


def test_sigterm_outside_slurm_stops(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert judge_signal(signal.SIGTERM, {}) == "stop"


def test_the_submitters_launcher_is_forgotten(capsys, monkeypatch):
    """A job that is submitted from a job must not take that one's ranks for its own; SLURM_CONF
    says where SLURM is.
    """
    forgotten = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "MASTER_ADDR", "RANK", "LOCAL_RANK")
    kept = ("SLURM_CONF", "LOCAL_SCRATCH")
    for name in (*forgotten, *kept):
        monkeypatch.setenv(name, "0")
    dry_run(capsys)
    starts = ("SLURM", "MASTER", "RANK", "LOCAL")
    left = [name for name in os.environ if name.startswith(starts)]
    assert set(left) == set(kept)


class FakeJob:
    """As much of a submitit job as the client needs."""

    def __init__(self, job_id, num_tasks):
        self.job_id = job_id
        self.num_tasks = num_tasks


def test_the_client_shows_the_first_real_error(capsys, monkeypatch, tmp_path):
    """Rank 1 fails, rank 0 only loses its peer; an earlier attempt's NODE_FAIL and its logs do not
    count.
    """
    states = iter(
        [
            "JobState=NODE_FAIL Requeue=1",
            "JobState=PENDING",
            "JobState=CANCELLED",
            "JobState=COMPLETING",
            "JobState=FAILED",
            "JobState=FAILED",
        ]
    )

    def show_job(job_id):
        return dict(re.findall(r"(\w+)=(\S*)", next(states)))

    monkeypatch.setattr(status, "show_job", show_job)
    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    texts = {
        "7_1_attempt0": "error (rank 1): an old story\n",
        "7_1_attempt1": "step 3\nerror (rank 1): no memory\nfoo\n",
        "7_0_attempt1": "error (rank 0): connection closed by peer\n",
    }
    for time_of_change, (name, text) in enumerate(texts.items()):
        path = tmp_path / f"{name}_log.out"
        path.write_text(text)
        os.utime(path, (time_of_change, time_of_change))
    for time_of_change, task in enumerate((1, 0)):
        path = tmp_path / f"7_{task}_result.pkl"
        path.write_bytes(pickle.dumps(("error", "RuntimeError")))
        os.utime(path, (time_of_change, time_of_change))
    assert status.wait([FakeJob("7", 2)], tmp_path) == 1
    said = capsys.readouterr()
    assert "job 7: FAILED, failed" in said.out
    assert said.err == "error (rank 1): no memory\nfoo\n"


def test_an_older_attempt_cannot_publish(tmp_path):
    """Split brain: the old writer is refused, at its next save and also in the middle of one, and
    leaves no trace.
    """
    folder = tmp_path / "checkpoints"
    warnings = []
    model = torch.nn.Linear(2, 2)
    state = TrainState(
        model,
        torch.optim.SGD(model.parameters()),
        torch.amp.GradScaler("cpu", enabled=False),
        step=5,
    )
    old = Saver(folder, 3, {}, warnings.append, is_main=True)
    new = Saver(folder, 3, {}, warnings.append, is_main=True)
    old.claim()
    old.save(state)
    old.wait()
    new.claim()
    state.step = 10
    with pytest.raises(ValueError, match="belongs to a newer attempt, 2 "):
        old.save(state)
    # A write that had begun before.
    old._write({"step": 10, "evaluated_step": -1, "best_step": -1, "model": {}})
    assert "newer attempt" in old.failure
    new.save(state)
    new.wait()
    names = sorted(path.name for path in folder.glob("[!.]*"))
    assert names == [
        "attempt",
        "last.pt",
        "saved",
        "step_00000005.pt",
        "step_00000005.pt.sha256",
        "step_00000010.pt",
        "step_00000010.pt.sha256",
    ]
    assert warnings == []


@pytest.fixture
def group_of_one():
    """A process group of this process alone."""
    runtime = distributed.start("cpu", 60)
    yield
    distributed.stop(runtime)


def test_blocked_signals_are_let_in_and_blocked_again(group_of_one):
    """What came before the handler stood is not lost, what comes after it has gone does no harm;
    USR2 outranks TERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        stop = StopSignal(None)
        assert stop.poll() == 0
        assert stop.poll() == signal.SIGUSR2
        stop.forget()
        assert stop.poll() == 0
        assert stop.poll() == 0

        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll() == 0
        assert stop.poll() == signal.SIGTERM
        # While it is decided about SIGTERM.
        os.kill(os.getpid(), signal.SIGUSR2)
        stop.forget()
        assert stop.poll() == 0
        assert stop.poll() == signal.SIGUSR2
        stop.finish()
        stop.close()

        # This one would end the process if it were let in.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert signal.SIGUSR2 in signal.sigpending()
    finally:
        # Takes the waiting one away.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("visible", "environment", "index"), [(8, "0,1,2,3,4,5,6,7", 3), (1, "5", 0), (1, "", None)]
)
def test_one_gpu_of_its_own_or_all_of_them(monkeypatch, visible, environment, index):
    """A launcher may bind one GPU to each process; otherwise too many ranks are refused."""
    chosen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "_start_process_group", lambda *_: None)
    launcher = Launcher(local_rank=3, local_world_size=8)
    alone = Meeting(launcher, torch.distributed.HashStore(), (Peer("here", os.getpid()),))
    watchdog = Watchdog(alone, 1, 60)
    if index is None:
        with pytest.raises(ValueError, match="shows 1 GPUs for 8 ranks"):
            distributed.start("cuda", watchdog=watchdog)
    else:
        device = distributed.start("cuda", watchdog=watchdog).device
        assert device == torch.device("cuda", index)
        assert chosen == [index]


@pytest.mark.slow
def test_the_local_executor_trains(tmp_path):
    """Two ranks on this machine, without SLURM, from a copy of the code; as a user who waits."""
    done = subprocess.run(
        [
            sys.executable,
            "slurm/submit.py",
            *small_run(
                data__data_dir=tmp_path / "digits",
                output_dir=tmp_path / "run",
                train__global_batch_size=64,
                train__epochs=0.2,
                schedule__warmup_epochs=0,
                cluster__executor="local",
                cluster__gpus_per_node=0,
                cluster__tasks_per_node=2,
            ),
            "--cluster.wait",
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FINISHED, all ranks succeeded" in done.stdout
    folder = next((tmp_path / "run").glob("job_*"))
    log = next(folder.glob("*_0_log.out"))
    assert "64 = 2 cpu ranks * 1 micro-steps * 32" in log.read_text()
    assert (folder / "code/resnet_dist/launch/rank.py").exists()


def test_every_key_of_the_cluster_is_explained():
    meanings = field_meanings(ClusterConfig)
    for name in ClusterConfig.__dataclass_fields__:
        assert len(meanings[name]) > 10, name
