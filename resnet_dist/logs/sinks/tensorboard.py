"""The metrics of a run for TensorBoard: `tensorboard --logdir OUTPUT_DIR/tensorboard`."""

import io
import json
import shlex
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from resnet_dist.logs.sinks.base import Attachment, Numbers, Picture, RunInfo, require_library

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Event files in the folder `tensorboard` of the run."""

    name = "TensorBoard"
    location = "none"

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def start(self, run: RunInfo) -> None:
        """Open a new event file.

        Raises:
            ValueError: The library is not installed.
        """
        advice = "pip install resnet-dist[tensorboard], or take it out of log.sinks"
        require_library("tensorboard", advice)
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        # The steps after the checkpoint are repeated: TensorBoard hides the earlier points.
        self._writer = SummaryWriter(str(folder), purge_step=run.start_step + 1)
        settings = json.dumps(run.run_config, indent=2, default=str)
        self._writer.add_text("config", f"```\n{settings}\n```", run.start_step)
        self.location = f"tensorboard --logdir {shlex.quote(str(folder))}"

    def log(self, step: int, values: Numbers) -> None:
        """Add a point to each curve."""
        assert self._writer is not None
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Show a picture; tables and files are ignored."""
        assert self._writer is not None
        if isinstance(item, Picture):
            with Image.open(io.BytesIO(item.png)) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(key, pixels, step, dataformats="HWC")
            self._writer.flush()

    def close(self, exit_code: int) -> None:
        """Write the remaining points and close the file."""
        assert self._writer is not None
        self._writer.close()
