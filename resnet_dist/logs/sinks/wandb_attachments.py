"""Pictures, tables, confusion matrices and checkpoints for Weights & Biases."""

import io
from typing import TYPE_CHECKING, Any

from PIL import Image

from resnet_dist.logs.sinks.base import (
    Attachment,
    CheckpointFile,
    ConfusionMatrix,
    Picture,
    Table,
)

if TYPE_CHECKING:
    from wandb import Run

# A larger matrix is too large to be drawn; the table of predictions is still there.
_MOST_CLASSES_OF_A_MATRIX = 100


def send_attachment(run: "Run", step: int, key: str, item: Attachment) -> None:
    """Send something else than a number to a W&B run.

    Args:
        run: The W&B run.
        step: The step that it belongs to.
        key: Its name in W&B; a checkpoint has its own.
        item: A matrix of more than 100 classes is left out.
    """
    import wandb

    shown: Any
    match item:
        case CheckpointFile():
            artifact = wandb.Artifact(item.name, type="model", metadata=item.facts)
            artifact.add_file(str(item.path))
            run.log_artifact(artifact)
            return
        case Picture():
            picture = Image.open(io.BytesIO(item.png))
            shown = wandb.Image(picture, caption=item.caption)
        case Table():
            shown = wandb.Table(columns=list(item.columns), data=item.rows)
        case ConfusionMatrix():
            if len(item.class_names) > _MOST_CLASSES_OF_A_MATRIX:
                return
            shown = wandb.plot.confusion_matrix(
                y_true=item.labels,
                preds=item.predicted,
                class_names=item.class_names,
                title="Confusion matrix",
            )
    run.log({"step": step, key: shown})
