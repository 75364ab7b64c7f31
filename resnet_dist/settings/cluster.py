"""The settings of `resnet-dist submit`: where and how a job runs (see the package `launch`)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ClusterConfig:
    """Where and how `resnet-dist submit` starts a training; these are not settings of it."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: a batch job; local: processes on this machine, in the background; debug: one rank in
    this process"""
    nodes: int = 1
    """number of machines"""
    gpus_per_node: int = 1
    """GPUs of each node; one process runs on each GPU"""
    tasks_per_node: int = 0
    """processes on each node; 0 = gpus_per_node. With gpus_per_node 0 they train on the CPU"""
    time_min: int = 1440
    """time limit of one attempt in minutes; a run that takes longer is requeued and resumes"""
    partition: str = ""
    """SLURM partition; empty = the cluster's default, as for account, qos and constraint"""
    account: str = ""
    """SLURM account"""
    qos: str = ""
    """SLURM quality of service"""
    constraint: str = ""
    """features that the nodes must have"""
    cpus_per_gpu: int = 0
    """CPUs of each process; 0 = the cluster's default"""
    mem_gb: int = 0
    """memory of a node in GiB; 0 = the cluster's default"""
    python: str = ""
    """shell words that start Python in the job, for instance in a container; empty = the Python
    that submits"""
    setup: list[str] = field(default_factory=list)
    """shell lines of the batch script before training: modules, variables"""
    extra: dict[str, bool | int | str] = field(default_factory=dict)
    """further options of sbatch: `--cluster.extra.exclude n3` becomes `--exclude=n3`, and true an
    option without a value"""
    signal_delay_s: int = 120
    """seconds before the time limit at which the run saves and is requeued: at least 60, since
    SLURM checks time limits once a minute, and longer than a save takes"""
    max_requeues: int = 100
    """requeues, for whatever reason, after which the job ends with an error"""
    seeds: str = ""
    """submit a job array with one training for each of these seeds (0,1,2), each in its own folder
    below output_dir"""
    configs: str = ""
    """submit a job array with one training for each of these YAML files (a.yaml,b.yaml); each file
    is read before all other settings"""
    snapshot: bool = True
    """run a copy of the code that is made now, so that later changes do not reach a waiting job"""
    dry_run: bool = False
    """print the batch script and what it would train; submit nothing"""
    wait: bool = False
    """wait until the job has ended, and show its first error"""

    @property
    def ranks_per_node(self) -> int:
        """Number of processes on each node."""
        return self.tasks_per_node or self.gpus_per_node


def count_ranks(cluster: ClusterConfig) -> int:
    """The number of ranks of a job.

    Raises:
        ValueError: A setting that no cluster can serve, with its rule.
    """
    limit_s = 60 * cluster.time_min
    if cluster.executor == "slurm":
        _require(cluster, "nodes", cluster.nodes > 0, "1 or more")
    else:
        _require(cluster, "nodes", cluster.nodes == 1, "1 without SLURM")
    _require(cluster, "gpus_per_node", cluster.gpus_per_node >= 0, "0 or more")
    _require(cluster, "tasks_per_node", cluster.tasks_per_node >= 0, "0 or more")
    _require(cluster, "tasks_per_node", cluster.ranks_per_node > 0, "1 or more without GPUs")
    _require(cluster, "cpus_per_gpu", cluster.cpus_per_gpu >= 0, "0 or more")
    _require(cluster, "mem_gb", cluster.mem_gb >= 0, "0 or more")
    _require(cluster, "max_requeues", cluster.max_requeues >= 0, "0 or more")
    _require(cluster, "time_min", limit_s > 0, "1 or more")
    _require(
        cluster,
        "signal_delay_s",
        60 <= cluster.signal_delay_s < limit_s,
        f"at least 60 and below the time limit, {limit_s}",
    )
    if cluster.executor == "debug":
        return 1
    return cluster.nodes * cluster.ranks_per_node


def seed_list(cluster: ClusterConfig) -> list[int]:
    """The seeds of a job array; empty without one.

    Raises:
        ValueError: `cluster.seeds` is not a list of whole numbers.
    """
    words = [word.strip() for word in cluster.seeds.split(",") if word.strip()]
    for word in words:
        if not word.isdecimal():
            raise ValueError(
                f"cluster.seeds is {cluster.seeds!r}: it must be whole numbers between commas, "
                "as in 0,1,2"
            )
    return [int(word) for word in words]


def _require(cluster: ClusterConfig, key: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"cluster.{key} is {getattr(cluster, key)!r}: it must be {rule}")
