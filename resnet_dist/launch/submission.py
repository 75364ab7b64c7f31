"""Submit a training as a job: check it, copy the code, and pass it to submitit.

The checks run before anything is submitted, so that an error costs no time in the queue.
"""

import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from resnet_dist.config import Config, DataConfig
from resnet_dist.launch.rank import RankTask
from resnet_dist.launch.script import (
    batch_parameters,
    batch_script,
    check_text,
    python_words,
    setup_lines,
)
from resnet_dist.launch.status import BatchJob, wait
from resnet_dist.settings.cluster import ClusterConfig, count_ranks, seed_list
from resnet_dist.text import printable

# The repository, or site-packages where the package is installed.
_HOME = Path(__file__).resolve().parents[2]
_COPIED = ("resnet_dist", "configs", "train.py")

# Variables that a launcher sets. SLURM_CONF and SLURM_CLUSTERS say where SLURM is.
_SET_BY_A_LAUNCHER = re.compile(
    r"SLURM_(?!CONF$|CLUSTERS$)|SUBMITIT_|TORCHELASTIC_|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_"
)
_CPUS_OF_A_PROCESS = ("cpus-per-task", "cpus_per_task", "cpus-per-gpu", "cpus_per_gpu", "exclusive")


def submit_jobs(configs: list[Config], cluster: ClusterConfig, command: str) -> int:
    """Submit a job, or an array with one job for each config and seed, and say how to follow it.

    Args:
        configs: One training each.
        cluster: Where and how they run.
        command: What the user typed; the same command again resumes.

    Returns:
        The exit code.

    Raises:
        ValueError: The job could not run; nothing was submitted.
    """
    world_size = count_ranks(cluster)
    configs = one_for_each_seed(configs, seed_list(cluster))
    outputs = output_folders(configs)
    forget_launcher()
    for config in configs:
        warnings = check_training(config, cluster, world_size)
        for warning in warnings:
            print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)
    if cluster.executor == "debug":
        from resnet_dist import run
        from resnet_dist.distributed.process import run_process

        return run_process(configs[0], run.train, resolve_auto=False)

    name = time.strftime(f"job_%Y%m%d_%H%M%S_{os.getpid()}")
    common = os.path.commonpath(outputs)
    folder = Path(common, name)
    code = folder / "code" if cluster.snapshot else _HOME
    parameters = batch_parameters(cluster, folder, code, is_array=len(configs) > 1)
    if cluster.dry_run:
        print(batch_script(parameters, folder, len(configs)))
        for config in configs:
            print(forecast(config, cluster.nodes, world_size))
        return 0

    if cluster.snapshot:
        copy_code(code)
    tasks = []
    for config in configs:
        task = RankTask(config, cluster.max_requeues, str(code), os.getcwd(), command)
        tasks.append(task)
    jobs = start_jobs(tasks, cluster, parameters, folder)
    for job, output in zip(jobs, outputs, strict=True):
        print(f"job {job.job_id}, {world_size} ranks, {printable(output)}")
        print(f"  log     {printable(folder)}/{job.job_id}_0*log.out")
    following = how_to_follow(jobs[0].job_id, cluster, folder, command)
    print(following, flush=True)
    if cluster.wait:
        return wait(jobs, folder)
    return 0


def one_for_each_seed(configs: list[Config], seeds: list[int]) -> list[Config]:
    """Combine each config with each seed.

    Args:
        configs: The configs.
        seeds: The seeds; without any, the configs are returned as they are.

    Returns:
        The configs, each with the output folder `seed_<seed>` in that of its config.
    """
    if not seeds:
        return configs
    seeded = []
    for config in configs:
        for seed in seeds:
            folder = os.path.join(config.output_dir, f"seed_{seed}")
            seeded.append(replace(config, seed=seed, output_dir=folder))
    return seeded


def output_folders(configs: list[Config]) -> list[str]:
    """Return the absolute output folders.

    Raises:
        ValueError: Two trainings share a folder, or a name holds a control character.
    """
    folders = [os.path.abspath(config.output_dir) for config in configs]
    for folder in folders:
        check_text("output_dir", folder)
        if folders.count(folder) > 1:
            raise ValueError(
                f"output_dir is {folder!r} for two jobs of the array: each needs its own"
            )
    return folders


def forget_launcher() -> None:
    """Remove the environment variables of a launcher, which sbatch would pass to the new job."""
    for name in list(os.environ):
        if _SET_BY_A_LAUNCHER.match(name):
            del os.environ[name]


def check_training(config: Config, cluster: ClusterConfig, world_size: int) -> list[str]:
    """Check what the training itself would check at its start.

    Only what is known on this machine is checked: the data may exist only on the cluster's nodes.

    Args:
        config: The training.
        cluster: Where and how it runs.
        world_size: Number of ranks.

    Returns:
        Warnings about settings that are possible, but probably a mistake.

    Raises:
        ValueError: The training cannot run.
    """
    from resnet_dist.layout import check_layout
    from resnet_dist.models.zoo import check_image_size

    check_layout(
        config.train.global_batch_size,
        world_size,
        config.train.grad_accum_steps,
        pairs=config.augment.mixup_alpha + config.augment.cutmix_alpha > 0,
    )
    check_image_size(config.model.name, config.data)
    check_network(config)
    check_device(config, cluster)
    warnings = check_data_folder(config.data)
    files = {
        "checkpoint.resume": config.checkpoint.resume,
        "checkpoint.init_from": config.checkpoint.init_from,
        "train.teacher": config.train.teacher,
    }
    for key, path in files.items():
        if not path or path.startswith("torchvision:"):
            continue
        if not os.path.exists(path):
            warnings.append(
                f"{key} is {printable(path)!r}, which does not exist on this machine: "
                "make sure that the nodes have it"
            )
    if cluster.executor == "slurm":
        warnings += remarks_on_resources(config, cluster)
    return warnings


def check_network(config: Config) -> None:
    """Build the network without memory for its weights, and freeze the configured part.

    Raises:
        ValueError: There is no such network, option or module.
    """
    from resnet_dist.models.build import build_on_meta
    from resnet_dist.models.weights import freeze

    model = build_on_meta(config.model)
    freeze(model, config.optim.unfreeze_from)


def check_device(config: Config, cluster: ClusterConfig) -> None:
    """Raise ValueError for a training on GPUs for which no GPU is reserved."""
    by_hand = any("gpus" in name or name == "gres" for name in cluster.extra)
    if config.distributed.device == "cuda" and not cluster.gpus_per_node and not by_hand:
        raise ValueError(
            "distributed.device is 'cuda', but cluster.gpus_per_node is 0: reserve GPUs, or take "
            "--distributed.device cpu"
        )


def check_data_folder(data: DataConfig) -> list[str]:
    """Check the data folder.

    Returns:
        A warning if this machine does not have the folder.

    Raises:
        ValueError: The folder is not set, or it has no `train` or no `val` folder.
    """
    if data.kind == "synthetic":
        return []
    if not data.data_dir:
        raise ValueError(
            "data.data_dir is empty: name the folder that holds train/ and val/ on the nodes"
        )
    if data.kind == "digits":
        return []
    shown = printable(data.data_dir)
    if not os.path.exists(data.data_dir):
        return [
            f"data.data_dir is '{shown}', which does not exist on this machine: make sure that the "
            "nodes have it"
        ]
    for split in ("train", "val"):
        if not os.path.isdir(os.path.join(data.data_dir, split)):
            raise ValueError(
                f"data.data_dir is '{shown}', which has no folder {split}/: name the folder that "
                "holds train/ and val/"
            )
    return []


def remarks_on_resources(config: Config, cluster: ClusterConfig) -> list[str]:
    """Return warnings about resources of SLURM that are probably a mistake."""
    remarks = []
    by_hand = any(name in cluster.extra for name in _CPUS_OF_A_PROCESS)
    if not cluster.cpus_per_gpu and not by_hand:
        remarks.append(
            "cluster.cpus_per_gpu is 0: each process gets the cluster's default number of CPUs, "
            "often 1, which is too few to read and decode images; set it"
        )
    if config.distributed.device == "cpu" and cluster.gpus_per_node:
        remarks.append(
            f"cluster.gpus_per_node is {cluster.gpus_per_node}, but distributed.device is cpu: the "
            "GPUs would stay idle; take --cluster.gpus_per_node 0 with --cluster.tasks_per_node"
        )
    return remarks


def copy_code(target: Path) -> None:
    """Copy the package, the recipes and train.py, so that later changes do not reach the job.

    Args:
        target: The new folder.

    Raises:
        ValueError: The folder cannot be written.
    """
    try:
        for name in _COPIED:
            source = _HOME / name
            if source.is_dir():
                shutil.copytree(source, target / name)
            elif source.exists():
                shutil.copy2(source, target / name)
    except OSError as problem:
        raise ValueError(
            f"output_dir: the code cannot be copied to {printable(target)}: {printable(problem)}"
        ) from problem


def start_jobs(
    tasks: list[RankTask], cluster: ClusterConfig, parameters: dict[str, Any], folder: Path
) -> list[BatchJob]:
    """Submit the tasks by submitit.

    Args:
        tasks: What each rank of a job runs, one for each job.
        cluster: Where and how the jobs run.
        parameters: The result of `batch_parameters`.
        folder: The folder of the job, for scripts, logs and results.

    Returns:
        submitit's jobs, in the same order.

    Raises:
        ValueError: SLURM refuses the job, or the folder cannot be written.
    """
    import submitit

    if cluster.executor == "slurm":
        options = {}
        for key, value in parameters.items():
            if key != "python":
                options[f"slurm_{key}"] = value
    else:
        code = Path(tasks[0].code)
        options = {
            "timeout_min": cluster.time_min,
            "tasks_per_node": cluster.ranks_per_node,
            "stderr_to_stdout": True,
            "gpus_per_node": cluster.gpus_per_node,
            "local_setup": setup_lines(cluster, code),
        }
    try:
        executor = submitit.AutoExecutor(
            folder,
            cluster=cluster.executor,
            slurm_python=parameters["python"],
            local_python=python_words(cluster),
        )
        executor.update_parameters(**options)
        return list(executor.submit_array(tasks))
    except (RuntimeError, OSError) as problem:
        raise ValueError(
            f"cluster.executor {cluster.executor} does not take the job: {problem}"
        ) from problem


def how_to_follow(job_id: str, cluster: ClusterConfig, folder: Path, command: str) -> str:
    """Return the commands that watch, cancel and resume a job, as lines of text."""
    number = job_id.split("_")[0]
    if cluster.executor == "slurm":
        watch = f"squeue -j {number}"
        cancel = f"scancel {number}"
    else:
        quoted = shlex.quote(str(folder))
        watch = f"tail -F {quoted}/*log.out"
        cancel = f"kill {number}"
    return f"  watch   {watch}\n  cancel  {cancel}\n  resume  {printable(command)}"


def forecast(config: Config, nodes: int, world_size: int) -> str:
    """Describe a training: its ranks, local batch size, peak learning rate and number of steps."""
    from resnet_dist.layout import check_layout
    from resnet_dist.schedule import peak_lr

    batch = config.train.global_batch_size
    accumulated = config.train.grad_accum_steps
    local = check_layout(batch, world_size, accumulated)
    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, batch)
    last_rank = world_size - 1
    ranks_per_node = world_size // nodes
    steps = _forecast_of_steps(config)
    return (
        f"{config.output_dir}: ranks 0 to {last_rank}, {ranks_per_node} on each of "
        f"{nodes} nodes; local batch {local} = {batch} / ({world_size} ranks * {accumulated} "
        f"micro-steps); peak lr {peak:g}; {steps}"
    )


def _forecast_of_steps(config: Config) -> str:
    """Describe the number of steps, if the data can be read on this machine."""
    from resnet_dist.data.build import build_train_loader
    from resnet_dist.distributed import runtime as distributed
    from resnet_dist.plan import build_plan

    runtime = distributed.start("cpu")
    try:
        loader = build_train_loader(config, runtime)
        plan = build_plan(config, loader.steps_per_epoch)
    except (ValueError, OSError, ImportError) as problem:
        return f"number of steps not known here: {problem}"
    finally:
        distributed.stop(runtime)
    return (
        f"{plan.total_steps} steps of {plan.steps_per_epoch} per epoch, {loader.num_samples} images"
    )
