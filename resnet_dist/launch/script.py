"""The batch script of a job: its directives, what runs before the ranks, and what follows them.

Text from the configuration enters the script, so everything is quoted for the shell, and control
characters are refused: a newline would end the line that it stands in, and the rest would run.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from resnet_dist.settings.cluster import ClusterConfig
from resnet_dist.text import printable

_NAME_OF_A_DIRECTIVE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_FREE_PORT = (
    "import sys; from resnet_dist.launch.rank import free_port; print(free_port(*sys.argv[1:]))"
)

# A SIGUSR2 that comes before Python is ready would end the job without a requeue, so the ranks
# start with the signal blocked. `env` of coreutils before 8.31 cannot do that.
_BLOCK_USR2 = 'block="$(env --block-signal=USR2 echo env --block-signal=USR2 2>/dev/null || true)"'

# The one place that decides what becomes of the job once its ranks have ended (see rank.end_rank).
# Results of an earlier attempt, and temporary files of one that was killed, are removed first.
_AFTER_THE_RANKS = """\
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
results={folder}/$job
rm -f "$results"_*_result.pkl "$results"_*.save_tmp
after_the_ranks() {{
  code=$?
  # A rank with a result has finished, or has failed by itself: the same again would fail again.
  if [ $code = 0 ] || ls "$results"_*_result.pkl >/dev/null 2>&1; then return; fi
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {max_requeues} ]; then
    echo "not requeued: cluster.max_requeues is {max_requeues}"
    return
  fi
  # Otherwise the ranks have saved after a signal, or one was lost. A job that no longer runs was
  # cancelled, or SLURM requeues it: a second requeue would bring a cancelled job back to life.
  for try in 1 2 3; do
    if ! scontrol -o show job "$job" | grep -q "JobState=RUNNING "; then return; fi
    echo "the ranks ended with code $code and without a result: requeued"
    scontrol requeue "$job" && return
    sleep 5
  done
}}
trap after_the_ranks EXIT"""


def check_text(key: str, value: str, allowed: str = "") -> None:
    """Refuse control characters in a text that enters a batch script.

    Args:
        key: The setting that the text comes from, for the message.
        value: The text.
        allowed: Control characters that this setting may hold.

    Raises:
        ValueError: The text holds a control character.
    """
    for character in value:
        if not character.isprintable() and not character == " " and character not in allowed:
            raise ValueError(
                f"{key} is '{printable(value)}': it enters the batch script and must not hold the "
                f"control character '{printable(character)}'; remove it"
            )


def check_texts(cluster: ClusterConfig, folder: Path) -> None:
    """Refuse whatever could break out of its line of the batch script.

    `cluster.setup` holds shell lines on purpose; `cluster.python` holds shell words on one line.

    Raises:
        ValueError: With the key, the value and the way out.
    """
    for key in ("partition", "account", "qos", "constraint", "python"):
        check_text(f"cluster.{key}", getattr(cluster, key))
    for line in cluster.setup:
        check_text("cluster.setup", line, allowed="\n\t")
    for name, value in cluster.extra.items():
        if not _NAME_OF_A_DIRECTIVE.fullmatch(name):
            raise ValueError(
                f"cluster.extra has the key '{printable(name)}': it must be the name of an sbatch "
                "option without dashes before it, as in --cluster.extra.mail-type FAIL"
            )
        check_text(f"cluster.extra.{name}", str(value))
    check_text("output_dir", str(folder))
    if "%" in str(folder) or "\\" in str(folder):
        raise ValueError(
            f"output_dir is '{printable(folder.parent)}': % and \\ have a meaning for SLURM in the "
            "names of log files; choose a folder without them"
        )


def batch_parameters(
    cluster: ClusterConfig, folder: Path, code: Path, is_array: bool
) -> dict[str, Any]:
    """The parameters of the batch script, under the names that submitit gives them.

    Each attempt and each rank has a log of its own.

    Args:
        cluster: Where and how the job runs.
        folder: The job's folder, for the script, the logs and the results.
        code: The folder that resnet_dist is imported from.
        is_array: Whether the job is an array of several trainings.

    Raises:
        ValueError: A text would break the script.
    """
    check_texts(cluster, folder)
    job = "%A_%a" if is_array else "%j"
    extra = {"requeue": True, "output": f"{folder}/{job}_batch_log.out", **cluster.extra}
    parameters = {
        "job_name": folder.parent.name or "resnet_dist",
        "time": cluster.time_min,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "stderr_to_stdout": True,
        "signal_delay_s": cluster.signal_delay_s,
        "setup": [*setup_lines(cluster, code), *_lines_before_the_ranks(cluster, folder)],
        "additional_parameters": {key: value for key, value in extra.items() if value},
        "use_srun": False,
        "python": _start_of_a_rank(cluster, folder, job),
    }
    for key in ("partition", "account", "qos", "constraint", "gpus_per_node"):
        if getattr(cluster, key):
            parameters[key] = getattr(cluster, key)
    if cluster.cpus_per_gpu:
        parameters["cpus_per_task"] = cluster.cpus_per_gpu
    if cluster.mem_gb:
        parameters["mem"] = f"{cluster.mem_gb}G"
    return parameters


def python_words(cluster: ClusterConfig) -> str:
    """The shell words that start Python in the job."""
    return cluster.python or shlex.quote(sys.executable)


def setup_lines(cluster: ClusterConfig, code: Path) -> list[str]:
    """What the user wants first, then the folder and the port of the ranks."""
    port = f'{python_words(cluster)} -c "{_FREE_PORT}"'
    return [
        *cluster.setup,
        f"cd {shlex.quote(str(code))}",
        f'export MASTER_PORT=$({port} "${{SLURM_JOB_ID:-$$}}" "${{SLURM_RESTART_COUNT:-0}}")',
    ]


def _lines_before_the_ranks(cluster: ClusterConfig, folder: Path) -> list[str]:
    after = _AFTER_THE_RANKS.format(
        folder=shlex.quote(str(folder)), max_requeues=cluster.max_requeues
    )
    return [_BLOCK_USR2, after]


def _start_of_a_rank(cluster: ClusterConfig, folder: Path, job: str) -> str:
    """The words before `-m submitit...`: srun, which starts all ranks, and Python."""
    log = f"{shlex.quote(str(folder))}/{job}_%t_attempt${{SLURM_RESTART_COUNT:-0}}_log.out"
    words = ["srun", "--unbuffered", "--kill-on-bad-exit=1", "--export=ALL", f"--output={log}"]
    if cluster.cpus_per_gpu:
        # Since SLURM 22.05 srun does not take this from sbatch.
        words.append(f"--cpus-per-task={cluster.cpus_per_gpu}")
    return " ".join([*words, "$block", python_words(cluster)])


def batch_script(parameters: dict[str, Any], folder: Path, count: int) -> str:
    """The batch script that submitit would submit for `count` trainings, made without SLURM."""
    from submitit.slurm.slurm import _make_sbatch_string

    options = {key: value for key, value in parameters.items() if key != "python"}
    command = f"{parameters['python']} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    map_count = count if count > 1 else None
    return str(_make_sbatch_string(command, folder, map_count=map_count, **options))
