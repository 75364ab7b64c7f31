"""The text that a run prints at its start and at its end."""

import shlex
from pathlib import Path

from resnet_dist.checkpoints.restore import checkpoint_folder
from resnet_dist.config import Config
from resnet_dist.distributed.process import resume_command
from resnet_dist.engine import Services, Training
from resnet_dist.text import printable


def summary_at_start(config: Config, parts: Training) -> str:
    """Describe the network and the data in one line.

    Args:
        config: The settings of the run.
        parts: The network and the data loaders.
    """
    num_parameters = 0
    for parameter in parts.state.model.parameters():
        num_parameters += parameter.numel()
    millions = num_parameters / 1e6
    num_train = parts.train_loader.num_samples
    num_val = parts.val_loader.num_samples
    return (
        f"{config.model.name}, {millions:.2f} M parameters, {config.model.num_classes} classes, "
        f"{num_train} training and {num_val} validation images"
    )


def summary_at_end(
    config: Config,
    parts: Training,
    services: Services,
) -> str:
    """Describe how the run ended, where its files are, and which commands come next.

    For a finished run these are evaluate, predict and report. For a stopped run it is the command
    that resumes it.

    Args:
        config: The settings of the run.
        parts: The training state and the plan.
        services: The log, whose sinks have files too, and the process group.

    Returns:
        A headline, and one indented line for each file or command.
    """
    is_finished = parts.state.step >= parts.plan.total_steps
    folder = Path(config.output_dir)
    checkpoints = _checkpoint_links(config)
    rows = {
        "checkpoints": printable(", ".join(checkpoints) or "none"),
        "config": printable(folder / "config.yaml"),
        "metrics": printable(folder / "metrics.jsonl"),
    }
    for sink, location in services.log.locations().items():
        rows[sink] = printable(location)
    if not is_finished:
        rows["resume"] = resume_command(services.runtime)
    elif checkpoints:
        # The last link is best.pt if there is one.
        best = printable(shlex.quote(checkpoints[-1]))
        run_folder = printable(shlex.quote(str(folder)))
        rows["evaluate"] = f"resnet-dist evaluate --weights {best}"
        rows["predict"] = f"resnet-dist predict --weights {best} IMAGE_OR_FOLDER"
        rows["report"] = f"resnet-dist report {run_folder}"

    lines = [_headline(parts, is_finished)]
    for name, value in rows.items():
        lines.append(f"  {name:<11}  {value}")
    return "\n".join(lines)


def _headline(parts: Training, is_finished: bool) -> str:
    """Describe whether the run is finished, and its best accuracy.

    Args:
        parts: The training state and the plan.
        is_finished: Whether all steps are done.
    """
    state = parts.state
    headline = f"stopped at step {state.step} of {parts.plan.total_steps}"
    if is_finished:
        headline = "finished"
    if state.best_step >= 0:
        headline += f"; best val top-1 {state.best_top1:.2f} % at step {state.best_step}"
    return headline


def _checkpoint_links(config: Config) -> list[str]:
    """Find the links to the newest and to the best checkpoint.

    Returns:
        The paths of last.pt and best.pt, as far as they exist.
    """
    folder = checkpoint_folder(config)
    links = []
    for name in ("last.pt", "best.pt"):
        link = folder / name
        if link.exists():
            links.append(str(link))
    return links
