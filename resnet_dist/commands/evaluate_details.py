"""The files that `resnet-dist evaluate` writes about each image and each class."""

from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config import DataConfig
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.evaluation_file import (
    EvaluatedNetwork,
    describe_evaluation,
    write_evaluation,
)
from resnet_dist.evaluation.image_collector import Collected, ImageCollector
from resnet_dist.evaluation.predictions_file import check_can_write_predictions, write_predictions
from resnet_dist.text import printable


@dataclass(frozen=True)
class DetailFiles:
    """Where the details go; an empty name means that the file is not wanted."""

    predictions: str = ""
    """Parquet file with the predictions for each image"""
    details: str = ""
    """JSON file for `resnet-dist report`: classes, confusions, calibration, images"""

    @property
    def are_wanted(self) -> bool:
        """Whether any file is to be written."""
        return bool(self.predictions or self.details)


def check_detail_files(files: DetailFiles) -> None:
    """Find out before the evaluation whether its details can be written.

    Raises:
        ValueError: They cannot be written.
    """
    if files.predictions:
        check_can_write_predictions()
    named = {"predictions": files.predictions, "details": files.details}
    suffixes = {"predictions": ".parquet", "details": ".json"}
    for option, name in named.items():
        if not name:
            continue
        path = Path(name)
        if path.suffix != suffixes[option]:
            raise ValueError(
                f"--{option} is {printable(name)!r}: its name must end in {suffixes[option]}, by "
                "which `resnet-dist report` knows it"
            )
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(
                f"--{option} is {printable(name)!r}: this must be a file in a folder that exists"
            )


class DetailWriter:
    """Collect an evaluation, and write its files.

    Args:
        files: Where they go.
        data: The section `data` of the config.
        network: What is evaluated.
        outputs: Which output of the network each class of the images is.

    Attributes:
        collector: To be passed to the evaluation; None if no file is wanted.
    """

    def __init__(
        self,
        files: DetailFiles,
        data: DataConfig,
        network: EvaluatedNetwork,
        outputs: tuple[int, ...],
    ) -> None:
        self.collector = ImageCollector(data) if files.are_wanted else None
        self._files = files
        self._network = network
        self._outputs = outputs

    def write(self, loader: ValLoader, runtime: Runtime) -> None:
        """Write the files in the main process. Every rank must call this.

        Args:
            loader: The images.
            runtime: The ranks.

        Raises:
            ValueError: On every rank, if a file cannot be written.
        """
        if self.collector is None:
            return
        collected = self.collector.gather(loader, runtime, self._outputs)

        def write() -> None:
            assert collected is not None
            _write(self._files, collected, self._network)

        runtime.on_main(write)


def _write(files: DetailFiles, collected: Collected, network: EvaluatedNetwork) -> None:
    """Write the files. Raises ValueError if one of them cannot be written."""
    try:
        if files.predictions:
            write_predictions(collected, network, Path(files.predictions))
        if files.details:
            details = describe_evaluation(collected, network)
            write_evaluation(details, Path(files.details))
    except OSError as problem:
        raise ValueError(
            f"the details of the evaluation cannot be written: {printable(problem)}; "
            "--predictions and --details name the files"
        ) from problem
