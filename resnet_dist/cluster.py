"""The knobs of `resnet-dist submit`: where and how a job runs (see launch.py)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ClusterConfig:
    """Where and how `resnet-dist submit` starts a training; no part of the training's own settings."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """slurm: a batch job; local: processes on this machine, in the background; debug: one rank in
    this process"""
    nodes: int = 1
    """number of machines"""
    gpus_per_node: int = 1
    """GPUs of a node; each gets a process of its own"""
    tasks_per_node: int = 0
    """processes of a node; 0 = gpus_per_node. With gpus_per_node 0 they train on the CPU"""
    time_min: int = 1440
    """time limit of one attempt in minutes; a run that takes longer is requeued and goes on"""
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
    """further sbatch directives: `--cluster.extra.exclude n3` becomes `--exclude=n3`, true one
    without a value"""
    signal_delay_s: int = 120
    """seconds before the time limit at which the run saves and is requeued; at least 60 and the
    time of a save, since SLURM looks once in a minute"""
    max_requeues: int = 100
    """requeues, for whatever reason, after which the job ends with an error"""
    seeds: str = ""
    """a job array, one job for each of these seeds (0,1,2), each in a folder of its own below
    output_dir"""
    configs: str = ""
    """a job array, one job for each of these YAML files (a.yaml,b.yaml), read before all other
    settings"""
    snapshot: bool = True
    """run a copy of the code that is made now, whatever becomes of the original while the job waits
    """
    dry_run: bool = False
    """print the batch script and what it would train; submit nothing"""
    wait: bool = False
    """stay until the job has ended, and show its first error"""
