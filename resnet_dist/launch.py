"""Training as a batch job, through submitit: submit, find the ranks, and decide after a signal.

On SLURM every rank is a task of its own, without torchrun in between, where it depends on the cluster which process
gets a signal. A signal only sets a flag (distributed.StopSignal); after the checkpoint that follows, SLURM is asked
what it meant. submitit's own way, a checkpoint inside the handler, would meet a half updated model.
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

from resnet_dist.config import ClusterConfig, Config

_OF_A_LAUNCHER = re.compile(r"SLURM_(?!CONF$|CLUSTERS$)|SUBMITIT_|TORCHELASTIC_|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_")
_PORT = "import sys, resnet_dist.launch as launch; print(launch.free_port(*sys.argv[1:]))"


@dataclass(frozen=True)
class Attempt:
    """What each rank of a job does, and does again after a requeue; submitit pickles it."""

    config: Config
    cluster: ClusterConfig
    code: str
    """folder that resnet_dist must come from"""
    folder: str
    """folder that relative paths start from"""
    command: str
    """what the user typed"""

    def checkpoint(self):
        """What a requeued job runs: the same again, which finds its checkpoint."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)

    def __call__(self) -> int:
        """Train as one rank. Returns 0, or raises RuntimeError when it fails; a requeued rank never returns."""
        import submitit
        job, restarts = submitit.JobEnvironment(), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        hand_over = signal.getsignal(signal.SIGUSR2)     # submitit's handler, which requeues
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})       # StopSignal lets it in while it can be used
        signal.signal(signal.SIGUSR2, lambda *_: None)   # in case a library's thread does not block it
        for leftover in (job.paths.result_pickle, *job.paths.folder.glob(f"{job.job_id}_*.save_tmp")):
            leftover.unlink(missing_ok=True)             # of an attempt that was killed: submitit would stumble
        os.chdir(self.folder)
        if self.code != str(Path(__file__).resolve().parents[1]):
            raise RuntimeError(f"resnet_dist came from {__file__}, not from {self.code}: look at cluster.setup")
        if restarts > self.cluster.max_requeues:
            raise RuntimeError(f"requeued {restarts} times: cluster.max_requeues is {self.cluster.max_requeues}")
        os.environ.update(ranks(job), RESNET_DIST_RESUME=self.command)
        if not job.global_rank:
            print(f"attempt {restarts} of job {job.job_id}, {job.num_tasks} ranks on", *job.hostnames, flush=True)
        verdict = []

        def goes_on(number: int) -> bool:
            verdict[:] = [decide(number, show_job(os.environ.get("SLURM_JOB_ID", "")))]
            print(f"{signal.Signals(number).name}, checkpoint, {verdict[0]}", flush=True)
            return verdict == ["go on"]

        from resnet_dist import run
        code = run.main(self.config, functools.partial(run.train, goes_on=goes_on))
        if code <= 128:
            if code:
                raise RuntimeError(f"rank {job.global_rank} ended with code {code}, see its log")
            return 0
        if verdict == ["requeue"] and restarts >= self.cluster.max_requeues:
            raise RuntimeError(f"not requeued: cluster.max_requeues is {restarts}; submit again to go on")
        if verdict == ["requeue"]:
            try:
                hand_over(signal.SIGUSR2, None)          # ends this process
            except (subprocess.SubprocessError, OSError) as problem:     # requeued already, or not at all
                if show_job(os.environ["SLURM_JOB_ID"]).get("JobState") == "RUNNING":
                    raise RuntimeError(f"SLURM does not requeue: {problem}; submit again to go on") from problem
        elif verdict == ["stop"]:
            raise RuntimeError(f"ended by {signal.Signals(code - 128).name}; submit again to go on")
        elif job.name() != "slurm":
            sys.exit(code)
        while True:                                      # a result or an error would both look like the end of the job
            time.sleep(60)


def ranks(job) -> dict[str, str]:
    """torch's environment of this process, from submitit's `job`; the batch script has chosen MASTER_PORT."""
    return {"RANK": str(job.global_rank), "WORLD_SIZE": str(job.num_tasks), "LOCAL_RANK": str(job.local_rank),
            "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
            "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"}


def free_port(job_id: str, attempt: str) -> int:
    """A port that nobody listens on here, below those that the kernel gives away, drawn anew for each job and attempt.

    Jobs that share a node do not meet, nor does a job the ghost of its last attempt.
    """
    draw = random.Random(f"{job_id}/{attempt}")
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", draw.randrange(20000, 32768)))
            return probe.getsockname()[1]


def show_job(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says of a job; empty where it does not answer or knows it no more."""
    for _ in range(3):                                   # a signal to all processes of the job may end scontrol too
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, timeout=30)
            if done.returncode >= 0:
                return dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    return {}


def decide(number: int, job: dict[str, str]) -> str:
    """What follows a signal and its checkpoint, by what SLURM says of the job: requeue, go on, wait or stop.

    SIGUSR1 and SIGUSR2 come before a time limit or from a user who wants a requeue. SIGTERM alone is ambiguous: a
    running job in the grace period of a preemption is requeued, a running one without has met a stray signal; one that
    runs no more was cancelled or is being requeued, and another requeue would bring a cancelled job back to life.
    Without an answer it trains on: whoever wants its end will end it.
    """
    if number in (signal.SIGUSR1, signal.SIGUSR2):
        return "requeue"
    if number == signal.SIGINT or "SLURM_JOB_ID" not in os.environ:
        return "stop"
    if job.get("JobState", "RUNNING") != "RUNNING":
        return "wait"
    preempted = job.get("PreemptTime", "None")           # that of an earlier attempt lies before this one's start
    return "requeue" if preempted[:1].isdigit() and preempted >= job["StartTime"] else "go on"


def check_cluster(cluster: ClusterConfig) -> int:
    """The number of ranks. Raises ValueError for what no cluster can make right."""
    tasks, limit = cluster.tasks_per_node or cluster.gpus_per_node, 60 * cluster.time_min
    for key, holds, text in (
            ("nodes", cluster.nodes == 1 or cluster.nodes > 1 and cluster.executor == "slurm",
             f"it must be above 0, and 1 for the executor {cluster.executor}"),
            ("gpus_per_node", cluster.gpus_per_node >= 0, "it must be 0 or above"),
            ("tasks_per_node", tasks > 0, "without GPUs, name the number of processes"),
            ("time_min", limit > 0, "it must be above 0"),
            ("signal_delay_s", 60 <= cluster.signal_delay_s < limit, f"it must be from 60 up to the limit, {limit} s")):
        if not holds:
            raise ValueError(f"cluster.{key} is {getattr(cluster, key)!r}: {text}")
    return 1 if cluster.executor == "debug" else cluster.nodes * tasks


def batch_parameters(cluster: ClusterConfig, folder: Path, code: Path, name: str, array: bool) -> dict:
    """submitit's parameters of the batch script, by SLURM's names. Each attempt and task has a log of its own."""
    python, job = cluster.python or shlex.quote(sys.executable), "%A_%a" if array else "%j"
    setup = [*cluster.setup, f"cd {shlex.quote(str(code))}",
             f'export MASTER_PORT=$({python} -c "{_PORT}" "${{SLURM_JOB_ID:-$$}}" "${{SLURM_RESTART_COUNT:-0}}")']
    if cluster.executor != "slurm":
        return {"setup": setup}
    # A SIGUSR2 before Python is ready would kill the job without a requeue. Coreutils before 8.31 cannot block it.
    setup.append("block=$(env --block-signal=USR2 true 2>/dev/null && echo env --block-signal=USR2)")
    log = f"{shlex.quote(str(folder))}/{job}_%t_attempt${{SLURM_RESTART_COUNT:-0}}_log.out"
    cpus = f" --cpus-per-task={cluster.cpus_per_gpu}" if cluster.cpus_per_gpu else ""
    wanted = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos,
              "constraint": cluster.constraint, "cpus_per_task": cluster.cpus_per_gpu,
              "mem": cluster.mem_gb and f"{cluster.mem_gb}G", "gpus_per_node": cluster.gpus_per_node}
    extra = {"requeue": True, "output": f"{folder}/{job}_batch_log.out", **cluster.extra}
    return {"job_name": name, "time": cluster.time_min, "nodes": cluster.nodes, "setup": setup, "use_srun": False,
            "ntasks_per_node": cluster.tasks_per_node or cluster.gpus_per_node, "stderr_to_stdout": True,
            "signal_delay_s": cluster.signal_delay_s, "additional_parameters": {k: v for k, v in extra.items() if v},
            "python": f"srun --unbuffered --kill-on-bad-exit=1 --output={log}{cpus} $block {python}",
            **{key: value for key, value in wanted.items() if value}}


def submit(configs: list[Config], cluster: ClusterConfig, command: str) -> int:
    """Submit a job, or an array with one for each config and seed, and say how to follow it. Returns the exit code.

    `command` is what the user typed. Raises ValueError when nothing can come of it, before SLURM is asked.
    """
    world_size = check_cluster(cluster)
    seeds = [int(seed) for seed in cluster.seeds.split(",") if seed]
    configs = [replace(config, seed=seed, output_dir=os.path.join(config.output_dir, f"seed_{seed}"))
               for config in configs for seed in seeds] if seeds else configs
    outputs = [os.path.abspath(config.output_dir) for config in configs]
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"output_dir is {outputs[0]!r} for two jobs of the array: each needs its own")
    for name in filter(_OF_A_LAUNCHER.match, list(os.environ)):
        del os.environ[name]                             # of a job that this one is submitted from

    from resnet_dist import run
    for config in configs:
        run.check_layout(config.train.global_batch_size, world_size, config.train.grad_accum_steps)
    base, live = Path(os.path.commonpath(outputs)), Path(__file__).resolve().parents[1]
    folder = base / time.strftime(f"job_%Y%m%d_%H%M%S_{os.getpid()}")
    code = folder / "code" if cluster.snapshot else live
    parameters = batch_parameters(cluster, folder, code, base.name, len(configs) > 1)
    if cluster.executor == "debug":
        return run.main(configs[0])
    if cluster.dry_run:
        print(batch_script(parameters, folder, len(configs)))
        for config in configs:
            print(forecast(config, cluster, world_size))
        return 0

    for part in ("resnet_dist", "train.py", "configs") if code != live else ():
        if (live / part).is_dir():
            shutil.copytree(live / part, code / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (live / part).exists():
            shutil.copy2(live / part, code)
    attempts = [Attempt(config, cluster, str(code), os.getcwd(), command) for config in configs]
    jobs = start_jobs(attempts, parameters, folder, world_size)
    for job, output in zip(jobs, outputs, strict=True):
        print(f"job {job.job_id}, {world_size} ranks, {output}\n  log     {folder}/{job.job_id}_0*log.out")
    watch = f"squeue -j {jobs[0].job_id.split('_')[0]}" if cluster.executor == "slurm" else f"tail -F {folder}/*log.out"
    stop = f"scancel {jobs[0].job_id.split('_')[0]}" if cluster.executor == "slurm" else f"kill {jobs[0].job_id}"
    print(f"  watch   {watch}\n  cancel  {stop}\n  resume  {command}", flush=True)
    return wait(jobs, folder) if cluster.wait else 0


def batch_script(parameters: dict, folder: Path, count: int) -> str:
    """The batch script that submitit would hand over, made without SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string
    options = {key: value for key, value in parameters.items() if key != "python"}
    return _make_sbatch_string(f"{parameters.get('python', '')} -u -m submitit.core._submit {shlex.quote(str(folder))}",
                               folder, map_count=count if count > 1 else None, **options)


def forecast(config: Config, cluster: ClusterConfig, world_size: int) -> str:
    """Ranks, local batch, peak learning rate and steps of a run; the steps where its data can be read from here."""
    from resnet_dist import distributed, run, schedule
    from resnet_dist.data.build import build_train_loader
    train, peak = config.train, schedule.peak_lr(
        config.optim.base_lr, config.optim.base_batch_size, config.train.global_batch_size)
    try:
        loader = build_train_loader(config.data, distributed.start("cpu"), seed=config.seed, global_batch_size=
                                    train.global_batch_size, grad_accum_steps=train.grad_accum_steps,
                                    dtype=run.engine.DTYPES[train.precision], output_dir="")
        plan = run.build_plan(config, loader.steps_per_epoch)
        steps = f"{plan.total_steps} steps of {plan.steps_per_epoch} per epoch, {loader.num_samples} images"
        loader.close()
    except (ValueError, OSError, ImportError) as problem:
        steps = f"number of steps not known here: {problem}"
    distributed.stop()
    tasks = world_size // cluster.nodes
    return (f"{config.output_dir}: ranks 0 to {world_size - 1}, {tasks} on each of {cluster.nodes} nodes; local batch "
            f"{run.check_layout(train.global_batch_size, world_size, train.grad_accum_steps)} = "
            f"{train.global_batch_size} / ({world_size} ranks * {train.grad_accum_steps} micro-steps); "
            f"peak lr {peak:g}; {steps}")


def start_jobs(attempts: list[Attempt], parameters: dict, folder: Path, world_size: int) -> list:
    """Hand the attempts over to submitit; its jobs, in the same order."""
    import submitit
    cluster = attempts[0].cluster
    python = parameters.pop("python", cluster.python or shlex.quote(sys.executable))
    if cluster.executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("cluster.executor is 'slurm': there is no sbatch here; take local, or --cluster.dry_run true")
    executor = submitit.AutoExecutor(folder, cluster=cluster.executor, local_python=python, slurm_python=python,
                                     slurm_max_num_timeout=cluster.max_requeues)
    if cluster.executor == "local":
        executor.update_parameters(timeout_min=cluster.time_min, tasks_per_node=world_size, stderr_to_stdout=True,
                                   gpus_per_node=cluster.gpus_per_node, local_setup=parameters["setup"])
    else:
        executor.update_parameters(**{f"slurm_{key}": value for key, value in parameters.items()})
    try:
        return executor.submit_array(attempts)
    except submitit.core.utils.FailedJobError as problem:
        raise ValueError(f"sbatch refuses: {problem}") from problem


def wait(jobs: list, folder: Path) -> int:
    """Until all jobs have ended; says how, with the error that came first. Returns 0 when all succeeded, else 1.

    submitit's own way takes a rank's error before a requeue, or the NODE_FAIL of a job that is requeued, for the end.
    """
    codes = []
    for job in jobs:
        while not (state := end_state(job)):
            time.sleep(2)
        for _ in range(15):                              # a shared folder may be slow to show what others wrote
            results = sorted(folder.glob(f"{job.job_id}_*_result.pkl"), key=os.path.getmtime)
            if len(results) == job.num_tasks or state != "COMPLETED":
                break
            time.sleep(1)
        outcomes = {path: pickle.loads(path.read_bytes()) for path in results}
        codes.append(int([kind for kind, _ in outcomes.values()] != ["success"] * job.num_tasks))
        print(f"job {job.job_id}: {state}, {'failed' if codes[-1] else 'all ranks succeeded'}", flush=True)
        if codes[-1]:
            print(first_error(folder, job.job_id, outcomes), file=sys.stderr, flush=True)
    return max(codes)


def end_state(job) -> str:
    """The state that a job has ended with; empty while it runs, waits, or is to be requeued."""
    if hasattr(job, "_process"):                         # submitit's local one
        return job.state if job.done() else ""
    shown = show_job(job.job_id)
    if not shown:                                        # long over: only accounting remembers it
        done = subprocess.run(["sacct", "-XnPo", "State", "-j", job.job_id], capture_output=True, text=True)
        shown = {"JobState": (done.stdout.split() or [""])[0]}
    state = shown["JobState"]
    back = state in ("NODE_FAIL", "PREEMPTED") and shown.get("Requeue") == "1"
    return "" if back or state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "") else state


def first_error(folder: Path, job_id: str, outcomes: dict[Path, tuple]) -> str:
    """What the rank that failed first said; `outcomes` of the tasks by their files, the oldest first."""
    failed = [(path.name.split("_")[-2], trace) for path, (kind, trace) in outcomes.items() if kind == "error"]
    for task, _ in failed:
        log = max(folder.glob(f"{job_id}_{task}_*log.out"), key=os.path.getmtime, default=None)
        said = re.search(r"^error \(rank \d+\): .*", log.read_text(errors="replace") if log else "", re.M | re.S)
        if said:
            return "\n".join(said[0].splitlines()[:40])
    if failed:
        return f"task {failed[0][0]}: {failed[0][1]}"
    logs = sorted(folder.glob(f"{job_id}_*log.out"), key=os.path.getmtime)
    return "\n".join(line for log in logs for line in [f"{log}:", *log.read_text(errors="replace").splitlines()[-10:]])
