"""Training as a batch job, through submitit: submit, find the ranks, and decide after a signal.

On SLURM every rank is a task of its own, without torchrun in between, where it depends on the
cluster which process gets a signal. A signal only sets a flag (distributed.StopSignal); after the
checkpoint that follows, SLURM is asked what it meant. submitit's own way, a checkpoint inside the
handler, would meet a half updated model.
"""

import contextlib
import functools
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from resnet_dist.cluster import ClusterConfig
from resnet_dist.config import Config

_OF_A_LAUNCHER = re.compile(
    r"SLURM_(?!CONF$|CLUSTERS$)|SUBMITIT_|TORCHELASTIC_|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_"
)
_ALIVE = ("", "PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED")
_PORT = "import sys, resnet_dist.launch as launch; print(launch.free_port(*sys.argv[1:]))"


# At the end of the batch script: ranks that were killed or lost another leave no result and no
# error behind.
_REQUEUE_THE_LOST = """\
lost() {{
  code=$? id=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
  if [ $code != 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {limit} ] &&
      ! ls {folder}/"$id"_*_result.pkl >/dev/null 2>&1 &&
      scontrol -o show job "$id" 2>/dev/null | grep -q "JobState=RUNNING "; then
    echo "a rank was lost (code $code): requeued"
    scontrol requeue "$id"
  fi
}}
trap lost EXIT"""


@dataclass(frozen=True)
class Attempt:
    """What each rank of a job does, and does again after a requeue; submitit pickles it.

    `code` is the folder that resnet_dist must come from, `folder` the one that relative paths start
    from.
    """

    config: Config
    max_requeues: int
    code: str
    folder: str
    command: str

    def checkpoint(self):
        """What a requeued job runs: the same again, which finds its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> None:
        """Train as one rank. Raises RuntimeError when it fails; a rank of a job that is requeued
        never returns.
        """
        import submitit

        job, restarts = submitit.JobEnvironment(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        hand_over = signal.getsignal(signal.SIGUSR2)  # submitit's handler, which requeues
        signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGUSR2}
        )  # StopSignal lets it in while it can be used
        signal.signal(
            signal.SIGUSR2, lambda *_: None
        )  # in case a library's thread does not block it
        for leftover in (
            job.paths.result_pickle,
            *job.paths.folder.glob(f"{job.job_id}_*.save_tmp"),
        ):
            leftover.unlink(
                missing_ok=True
            )  # of an attempt that was killed: submitit would stumble
        os.chdir(self.folder)
        if self.code != str(Path(__file__).resolve().parents[1]):
            raise RuntimeError(
                f"resnet_dist came from {__file__}, not from {self.code}: look at cluster.setup"
            )
        if restarts > self.max_requeues:
            raise RuntimeError(
                f"requeued {restarts} times: cluster.max_requeues is {self.max_requeues}"
            )
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        os.environ.update(
            {"MASTER_ADDR": "127.0.0.1"} if job.num_nodes == 1 else {},
            RESNET_DIST_RESUME=self.command,
        )
        print(
            f"attempt {restarts}, rank {job.global_rank} of {job.num_tasks} on",
            *job.hostnames,
            flush=True,
        )
        if job.global_rank == 0 and job.name() == "slurm" and not show_job(job.job_id):
            print(
                "warning: scontrol does not answer here (a container?): nothing will be requeued",
                flush=True,
            )
        verdict = []

        def should_continue(number: int) -> bool:  # in the main process, after the checkpoint
            verdict[:] = [decide(number, show_job(job.job_id))]
            print(f"{signal.Signals(number).name}, checkpoint, {verdict[0]}", flush=True)
            return verdict == ["go on"]

        from resnet_dist.process import run_process
        from resnet_dist.watchdog import EXIT_LOST_RANK

        code = run_process(
            self.config,
            functools.partial(preflight, should_continue=should_continue),
            resolve_auto=False,
        )
        if code == 0:
            return
        if code == EXIT_LOST_RANK and job.name() == "slurm":
            sys.stdout.flush()
            os._exit(code)  # neither result nor error: the batch script requeues
        if code < 128 or verdict == ["stop"]:
            raise RuntimeError(f"rank {job.global_rank} ended with code {code}, see its log")
        if verdict == ["requeue"] and restarts >= self.max_requeues:
            raise RuntimeError(
                f"not requeued: cluster.max_requeues is {restarts}; submit again to go on"
            )
        for last in (False, False, True) if verdict == ["requeue"] else ():
            if show_job(job.job_id).get("JobState", "RUNNING") != "RUNNING":
                break  # cancelled meanwhile, or requeued already
            try:
                hand_over(signal.SIGUSR2, None)  # ends this process
            except (
                subprocess.SubprocessError,
                OSError,
            ) as problem:  # the controller is busy, or refuses
                if last:
                    raise RuntimeError(
                        f"SLURM does not requeue: {problem}; submit again to go on"
                    ) from problem
                time.sleep(5)
        while job.name() == "slurm":  # a result or an error would both look like the end of the job
            time.sleep(60)
        sys.exit(code)


def preflight(config: Config, runtime, should_continue) -> int:
    """run.train behind the quick form of `resnet-dist doctor`: a mistake costs a minute, not a
    night. ValueError.
    """
    from resnet_dist import run
    from resnet_dist.commands import doctor

    found = doctor.quick(config, runtime)
    for one in found if runtime.is_main else ():
        print("preflight: {level}, {check}: {text}".format(**one), flush=True)
    wrong = [one["text"] for one in found if one["level"] == "error"]
    if wrong:
        raise ValueError("; ".join(wrong))
    return run.train(config, runtime, should_continue)


def free_port(job_id: str, attempt: str) -> int:
    """A free port of this node, below the kernel's own; jobs do not meet there, nor a job its last
    attempt's ghost.
    """
    draw = random.Random(f"{job_id}/{attempt}")
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", draw.randrange(20000, 32768)))
            return probe.getsockname()[1]


def show_job(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says of a job; empty where it does not answer or knows it no more."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, timeout=30
        )
        return dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    return {}


def decide(number: int, job: dict[str, str]) -> str:
    """What follows a signal and its checkpoint, by what SLURM says of the job: requeue, go on, wait
    or stop.

    SIGUSR1 and SIGUSR2 come before a time limit or from a user who wants a requeue. SIGTERM alone
    is ambiguous: a running job in the grace period of a preemption is requeued, a running one
    without has met a stray signal; one that runs no more was cancelled or is being requeued, and
    another requeue would bring a cancelled job back to life. Without an answer it trains on:
    whoever wants its end will end it.
    """
    if number in (signal.SIGUSR1, signal.SIGUSR2):
        return "requeue"
    if number == signal.SIGINT or "SLURM_JOB_ID" not in os.environ:
        return "stop"
    if job.get("JobState", "RUNNING") != "RUNNING":
        return "wait"
    preempted = job.get(
        "PreemptTime", "None"
    )  # that of an earlier attempt lies before this one's start
    return (
        "requeue" if preempted[:1].isdigit() and preempted >= job.get("StartTime", "") else "go on"
    )


def count_ranks(cluster: ClusterConfig) -> int:
    """The number of ranks. Raises ValueError for what no cluster can make right."""
    tasks, limit = cluster.tasks_per_node or cluster.gpus_per_node, 60 * cluster.time_min
    for key, holds, rule in (
        (
            "nodes",
            0 < cluster.nodes < (10**6 if cluster.executor == "slurm" else 2),
            "at least 1, 1 without SLURM",
        ),
        ("gpus_per_node", cluster.gpus_per_node >= 0, "0 or above"),
        ("tasks_per_node", tasks > 0, "above 0 where there are no GPUs"),
        ("time_min", limit > 0, "above 0"),
        (
            "signal_delay_s",
            60 <= cluster.signal_delay_s < limit,
            f"from 60 to below the limit, {limit}",
        ),
    ):
        if not holds:
            raise ValueError(f"cluster.{key} is {getattr(cluster, key)!r}: it must be {rule}")
    return 1 if cluster.executor == "debug" else cluster.nodes * tasks


def batch_parameters(cluster: ClusterConfig, folder: Path, code: Path, array: bool) -> dict:
    """Submitit's parameters of the batch script, by SLURM's names. Each attempt and task has a log
    of its own.
    """
    python, job = cluster.python or shlex.quote(sys.executable), "%A_%a" if array else "%j"
    # A SIGUSR2 before Python is ready would kill the job without a requeue. Coreutils before 8.31
    # cannot block it.
    setup = [
        *cluster.setup,
        f"cd {shlex.quote(str(code))}",
        f'export MASTER_PORT=$({python} -c "{_PORT}" "${{SLURM_JOB_ID:-$$}}" "${{SLURM_RESTART_COUNT:-0}}")',
        'block="$(env --block-signal=USR2 echo env --block-signal=USR2 2>/dev/null || true)"',
        _REQUEUE_THE_LOST.format(folder=shlex.quote(str(folder)), limit=cluster.max_requeues),
    ]
    log = f"{shlex.quote(str(folder))}/{job}_%t_attempt${{SLURM_RESTART_COUNT:-0}}_log.out"
    cpus = f" --cpus-per-task={cluster.cpus_per_gpu}" if cluster.cpus_per_gpu else ""
    wanted = {
        key: getattr(cluster, key)
        for key in ("partition", "account", "qos", "constraint", "gpus_per_node")
    }
    wanted |= {
        "cpus_per_task": cluster.cpus_per_gpu,
        "mem": cluster.mem_gb and f"{cluster.mem_gb}G",
    }
    extra = {"requeue": True, "output": f"{folder}/{job}_batch_log.out", **cluster.extra}
    return {
        "job_name": folder.parent.name,
        "time": cluster.time_min,
        "nodes": cluster.nodes,
        "setup": setup,
        "ntasks_per_node": cluster.tasks_per_node or cluster.gpus_per_node,
        "stderr_to_stdout": True,
        "signal_delay_s": cluster.signal_delay_s,
        "additional_parameters": {k: v for k, v in extra.items() if v},
        "use_srun": False,
        **{key: value for key, value in wanted.items() if value},
        "python": f"srun --unbuffered --kill-on-bad-exit=1 --export=ALL --output={log}{cpus} $block {python}",
    }


def submit(configs: list[Config], cluster: ClusterConfig, command: str) -> int:
    """Submit a job, or an array with one for each config and seed, and say how to follow it.
    Returns the exit code.

    `command` is what the user typed. Raises ValueError when nothing can come of it.
    """
    world_size = count_ranks(cluster)
    seeds = [int(seed) for seed in cluster.seeds.split(",") if seed]
    configs = (
        [
            replace(config, seed=seed, output_dir=os.path.join(config.output_dir, f"seed_{seed}"))
            for config in configs
            for seed in seeds
        ]
        if seeds
        else configs
    )
    outputs = [os.path.abspath(config.output_dir) for config in configs]
    if len(set(outputs)) < len(outputs):
        raise ValueError(
            f"output_dir is {outputs[0]!r} for two jobs of the array: each needs its own"
        )
    for name in filter(_OF_A_LAUNCHER.match, list(os.environ)):
        del os.environ[name]  # of a job that this one is submitted from

    from resnet_dist import run
    from resnet_dist.layout import check_layout
    from resnet_dist.process import run_process

    for config in configs:
        check_layout(
            config.train.global_batch_size,
            world_size,
            config.train.grad_accum_steps,
            pairs=config.augment.mixup_alpha + config.augment.cutmix_alpha > 0,
        )
    if cluster.executor == "debug":
        return run_process(configs[0], run.train, resolve_auto=False)
    live = Path(__file__).resolve().parents[1]
    folder = Path(os.path.commonpath(outputs), time.strftime(f"job_%Y%m%d_%H%M%S_{os.getpid()}"))
    code = folder / "code" if cluster.snapshot else live
    parameters = batch_parameters(cluster, folder, code, len(configs) > 1)
    if cluster.dry_run:
        print(
            "\n".join(
                [
                    batch_script(parameters, folder, len(configs)),
                    *(forecast(config, cluster.nodes, world_size) for config in configs),
                ]
            )
        )
        return 0

    for part in ("resnet_dist", "configs", "train.py") if cluster.snapshot else ():
        if (live / part).exists():  # an installed package has no more than itself
            copy = shutil.copytree if (live / part).is_dir() else shutil.copy2
            copy(live / part, code / part)
    jobs = start_jobs(
        [
            Attempt(config, cluster.max_requeues, str(code), os.getcwd(), command)
            for config in configs
        ],
        cluster,
        parameters,
        folder,
    )
    for job, output in zip(jobs, outputs, strict=True):
        print(
            f"job {job.job_id}, {world_size} ranks, {output}\n  log     {folder}/{job.job_id}_0*log.out"
        )
    first, slurm = jobs[0].job_id.split("_")[0], cluster.executor == "slurm"
    print(
        f"  watch   {f'squeue -j {first}' if slurm else f'tail -F {folder}/*log.out'}\n"
        f"  cancel  {'scancel' if slurm else 'kill'} {first}\n  resume  {command}",
        flush=True,
    )
    return wait(jobs, folder) if cluster.wait else 0


def batch_script(parameters: dict, folder: Path, count: int) -> str:
    """The batch script that submitit would hand over for `count` jobs, made without SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    options = {key: value for key, value in parameters.items() if key != "python"}
    return _make_sbatch_string(
        f"{parameters['python']} -u -m submitit.core._submit {shlex.quote(str(folder))}",
        folder,
        map_count=count if count > 1 else None,
        **options,
    )


def forecast(config: Config, nodes: int, world_size: int) -> str:
    """Ranks, local batch, peak learning rate and steps of a run; the steps where its data can be
    read from here.
    """
    from resnet_dist import distributed, schedule
    from resnet_dist.data.build import build_train_loader
    from resnet_dist.layout import check_layout
    from resnet_dist.plan import build_plan

    batch, accum = config.train.global_batch_size, config.train.grad_accum_steps
    runtime = distributed.start("cpu")
    try:
        loader = build_train_loader(config, runtime)
        plan = build_plan(config, loader.steps_per_epoch)
        steps = f"{plan.total_steps} steps of {plan.steps_per_epoch} per epoch, {loader.num_samples} images"
    except (ValueError, OSError, ImportError) as problem:
        steps = f"number of steps not known here: {problem}"
    distributed.stop(runtime)
    peak = schedule.peak_lr(config.optim.base_lr, config.optim.base_batch_size, batch)
    return (
        f"{config.output_dir}: ranks 0 to {world_size - 1}, {world_size // nodes} on each of {nodes} nodes; local "
        f"batch {check_layout(batch, world_size, accum)} = {batch} / ({world_size} ranks * {accum} "
        f"micro-steps); peak lr {peak:g}; {steps}"
    )


def start_jobs(
    attempts: list[Attempt], cluster: ClusterConfig, parameters: dict, folder: Path
) -> list:
    """Hand the attempts over to submitit; its jobs, in the same order. Raises ValueError when SLURM
    refuses them.
    """
    import submitit

    local = {
        "timeout_min": cluster.time_min,
        "tasks_per_node": parameters["ntasks_per_node"],
        "stderr_to_stdout": True,
        "gpus_per_node": cluster.gpus_per_node,
        "local_setup": parameters["setup"],
    }
    slurm = {f"slurm_{key}": value for key, value in parameters.items() if key != "python"}
    try:
        executor = submitit.AutoExecutor(
            folder,
            cluster=cluster.executor,
            slurm_max_num_timeout=cluster.max_requeues,
            slurm_python=parameters["python"],
            local_python=cluster.python or shlex.quote(sys.executable),
        )
        executor.update_parameters(**(slurm if cluster.executor == "slurm" else local))
        return executor.submit_array(attempts)
    except RuntimeError as problem:
        raise ValueError(
            f"cluster.executor {cluster.executor} does not take the job: {problem}"
        ) from problem


def wait(jobs: list, folder: Path) -> int:
    """Until all jobs have ended; says how, with the error that came first. Returns 0 when all
    succeeded, else 1.

    submitit's own way takes a rank's error before a requeue, or the NODE_FAIL of a job that is
    requeued, for the end.
    """
    codes = []
    for job in jobs:
        before = ""
        while (
            state := state_of(job)
        ) in _ALIVE or state != before:  # said twice: a busy controller may misspeak
            before = state
            time.sleep(2)
        results = sorted(folder.glob(f"{job.job_id}_*_result.pkl"), key=os.path.getmtime)
        outcomes = [
            (path.name.split("_")[-2], *pickle.loads(path.read_bytes())) for path in results
        ]
        good = (
            state == "COMPLETED" or [kind for _, kind, _ in outcomes] == ["success"] * job.num_tasks
        )
        codes.append(0 if good else 1)
        print(
            f"job {job.job_id}: {state}, {'all ranks succeeded' if good else 'failed'}", flush=True
        )
        if not good:
            print(first_error(folder, job.job_id, outcomes), file=sys.stderr, flush=True)
    return max(codes)


def state_of(job) -> str:
    """The state of a job in SLURM's words; a job that lost its node and will be requeued is
    PENDING.
    """
    if hasattr(job, "_process"):  # submitit's local one
        return job.state
    shown = show_job(job.job_id)
    if not shown:  # long over: only accounting remembers it
        done = subprocess.run(
            ["sacct", "-XnPo", "State", "-j", job.job_id], capture_output=True, text=True
        )
        return (done.stdout.split() or [""])[0]
    back = shown["JobState"] in ("NODE_FAIL", "PREEMPTED") and shown["Requeue"] == "1"
    return "PENDING" if back else shown["JobState"]


def first_error(folder: Path, job_id: str, outcomes: list[tuple]) -> str:
    """What the rank that failed first said; `outcomes` are (task, kind, trace), the oldest first."""
    logs = sorted(folder.glob(f"{job_id}_*log.out"), key=os.path.getmtime)
    failed = [(task, trace) for task, kind, trace in outcomes if kind == "error"]
    for task, _ in failed:
        newest = [
            path.read_text(errors="replace")
            for path in logs
            if path.name.startswith(f"{job_id}_{task}_")
        ][-1:]
        if said := re.search(r"^error \(rank \d+\): .*", "".join(newest), re.M | re.S):
            return "\n".join(said[0].splitlines()[:40])
    return (
        f"task {failed[0][0]}: {failed[0][1]}"
        if failed
        else "\n".join(
            f"{path}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-10:])
            for path in logs
        )
    )
