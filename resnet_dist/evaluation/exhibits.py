"""What a training leaves behind for people to look at, beside its numbers.

At its start, `samples.png`: the first images as the network sees them. After its last evaluation,
`evaluation.json`: accuracy per class, confusions, calibration and a gallery. The sinks get the
picture, a table of predictions and the confusion matrix. Nothing here ends a training.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from resnet_dist.config import Config
from resnet_dist.data.types import Batch, ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.evaluation_file import (
    EVALUATION_FILE,
    EvaluatedNetwork,
    describe_evaluation,
    write_evaluation,
)
from resnet_dist.evaluation.image_collector import Collected, ImageCollector
from resnet_dist.evaluation.pictures import Tile, contact_sheet, to_levels, to_png
from resnet_dist.files import write_file
from resnet_dist.logs.log import Log
from resnet_dist.logs.sinks.base import CheckpointFile, ConfusionMatrix, Picture, Table
from resnet_dist.mix import Mixing, mix_images

SAMPLES_FILE = "samples.png"
"""Name of the contact sheet in output_dir."""

_TILES_PER_ROW = 8

# The table of predictions has the images with the largest losses.
_MOST_ROWS_OF_A_TABLE = 500


class Exhibits:
    """The exhibits of one run.

    Args:
        config: The config of the run.
        class_names: The classes, in the order of the logits.
        log: Passes them on to the sinks.
        runtime: The ranks.
    """

    def __init__(
        self, config: Config, class_names: Sequence[str], log: Log, runtime: Runtime
    ) -> None:
        self.config = config
        self.class_names = tuple(class_names)
        self.log = log
        self.runtime = runtime
        self._samples_path = Path(config.output_dir) / SAMPLES_FILE
        is_wanted = runtime.is_main and config.log.sample_images > 0
        self._are_samples_due = is_wanted and not self._samples_path.exists()

    def show_samples(
        self,
        step: int,
        batch: Batch,
        mixing: Mixing,
    ) -> None:
        """Make the contact sheet, if the run has none yet. Call it before the update.

        It shows images of this rank after augmentation, mixup and CutMix, and the first label of
        each. Only the main process does something.

        Args:
            step: The update that the batch is for.
            batch: The first micro-batch of the update.
            mixing: How the update mixes pairs of images.
        """
        if not self._are_samples_due:
            return
        self._are_samples_due = False
        count = self.config.log.sample_images
        images, _ = mix_images(batch.images, mixing(step, 0))
        labels = batch.labels[:count].tolist()
        png = to_png(contact_sheet(self._rows_of_tiles(images[:count], labels)))
        self._write(self._samples_path, png)
        self.log.attach(step, "samples", Picture(png, f"what the network sees at step {step}"))

    def _rows_of_tiles(
        self,
        images: torch.Tensor,
        labels: list[int],
    ) -> list[list[Tile]]:
        """Arrange images [n, 3, H, W] in rows."""
        data = self.config.data
        tiles = []
        for image, label in zip(images, labels, strict=True):
            pixels = to_levels(image, data.mean, data.std)
            tiles.append(Tile("training", pixels, self.class_names[label]))
        rows = []
        for first in range(0, len(tiles), _TILES_PER_ROW):
            rows.append(tiles[first : first + _TILES_PER_ROW])
        return rows

    def collector(self) -> ImageCollector:
        """What the last evaluation passes its batches to."""
        return ImageCollector(self.config.data)

    def show_evaluation(
        self, step: int, weights: str, collector: ImageCollector, loader: ValLoader
    ) -> None:
        """Write `evaluation.json`, and pass the results on to the sinks. Every rank must call this.

        Args:
            step: Number of updates of the weights.
            weights: "raw" or "averaged".
            collector: Has collected the evaluation.
            loader: The validation set.
        """
        try:
            collected = collector.gather(loader, self.runtime)
        except ValueError as problem:
            # Every rank raises it. The checkpoint of this step is not written yet.
            self.log.warn(f"there is no {EVALUATION_FILE}: {problem}")
            return
        if collected is None:
            return
        network = EvaluatedNetwork(self.config.model.name, weights, step, list(self.class_names))
        details = describe_evaluation(collected, network)
        try:
            write_evaluation(details, Path(self.config.output_dir) / EVALUATION_FILE)
        except OSError as problem:
            self.log.warn(f"{EVALUATION_FILE} cannot be written: {problem}")
        if self.log.sinks:
            self.log.attach(step, "val/predictions", table_of_predictions(collected, network))
            self.log.attach(step, "val/confusion", confusion_matrix(collected, network))

    def show_checkpoint(
        self,
        best_step: int,
        best_top1: float,
        path: Path,
    ) -> None:
        """Pass the best checkpoint on to the sinks, if `log.wandb_artifact` asks for it.

        Args:
            best_step: Its step.
            best_top1: Its top-1 accuracy in percent.
            path: The file, or a link to it.
        """
        if not self.config.log.wandb_artifact or not path.exists():
            return
        name = Path(os.path.abspath(self.config.output_dir)).name
        facts = {"step": best_step, "top1": best_top1, "model": self.config.model.name}
        self.log.attach(best_step, "best", CheckpointFile(path.resolve(), name, facts))

    def _write(
        self,
        path: Path,
        content: bytes,
    ) -> None:
        try:
            write_file(path, content)
        except OSError as problem:
            self.log.warn(f"{path.name} cannot be written: {problem}")


def table_of_predictions(
    collected: Collected,
    network: EvaluatedNetwork,
) -> Table:
    """The predictions with the largest losses, at most 500, the largest first."""
    results = collected.results
    losses = np.where(results.is_readable, results.losses, -np.inf)
    order = np.argsort(-losses, kind="stable")[:_MOST_ROWS_OF_A_TABLE]
    rows: list[list[str | int | float]] = []
    for place in order.tolist():
        label = int(results.labels[place])
        predicted = int(results.top_classes[place, 0])
        rows.append(
            [
                collected.paths[place],
                network.class_names[label],
                network.class_names[predicted],
                float(results.confidences[place]),
                float(results.losses[place]),
            ]
        )
    return Table(["path", "label", "predicted", "confidence", "loss"], rows)


def confusion_matrix(
    collected: Collected,
    network: EvaluatedNetwork,
) -> ConfusionMatrix:
    """The class and the predicted class of each image that could be decoded."""
    readable = collected.results.select(collected.results.is_readable)
    return ConfusionMatrix(
        labels=readable.labels.tolist(),
        predicted=readable.top_classes[:, 0].tolist(),
        class_names=network.class_names,
    )
