"""The sentences that a run prints at its start and at its end."""

import shlex
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.engine import Services, Training
from resnet_dist.process import resume_command
from resnet_dist.restore import checkpoint_folder
from resnet_dist.text import printable


def summary_at_start(config: Config, parts: Training) -> str:
    """What is trained, and on what."""
    num_parameters = sum(parameter.numel() for parameter in parts.state.model.parameters())
    return (
        f"{config.model.name}, {num_parameters / 1e6:.2f} M parameters, "
        f"{config.model.num_classes} classes, {parts.train_loader.num_samples} training and "
        f"{parts.val_loader.num_samples} validation images"
    )


def summary_at_end(config: Config, parts: Training, services: Services) -> str:
    """How the run ended, where its files are, and the commands that come next.

    A finished run offers evaluate, predict and report. A stopped run offers the command that
    resumes it.
    """
    state, plan = parts.state, parts.plan
    folder = Path(config.output_dir)
    finished = state.step >= plan.total_steps
    headline = "finished" if finished else f"stopped at step {state.step} of {plan.total_steps}"
    if state.best_step >= 0:
        headline += f"; best val top-1 {state.best_top1:.2f} % at step {state.best_step}"
    links = [checkpoint_folder(config) / name for name in ("last.pt", "best.pt")]
    checkpoints = [str(link) for link in links if link.exists()]
    rows = {
        "checkpoints": printable(", ".join(checkpoints) or "none"),
        "config": printable(folder / "config.yaml"),
        "metrics": printable(folder / "metrics.jsonl"),
    }
    for sink, location in services.log.locations().items():
        rows[sink] = printable(location)
    if not finished:
        rows["resume"] = resume_command(services.runtime)
    elif checkpoints:
        best = printable(shlex.quote(checkpoints[-1]))
        rows["evaluate"] = f"resnet-dist evaluate --checkpoint {best}"
        rows["predict"] = f"resnet-dist predict --checkpoint {best} IMAGE_OR_FOLDER"
        rows["report"] = f"resnet-dist report {printable(shlex.quote(str(folder)))}"
    return "\n".join([headline, *(f"  {name:<11}  {value}" for name, value in rows.items())])
