"""Sinks: places beside `metrics.jsonl` that get the numbers of a run.

A new sink is one module here with a class that has the five members of `base.Sink`, a line in
`build_sinks`, and its name in `LogConfig.sinks`.
"""

from resnet_dist.config import LogConfig
from resnet_dist.logs.sinks.base import Sink


def build_sinks(config: LogConfig) -> list[Sink]:
    """The sinks in `log.sinks`, but for W&B if `log.wandb` or WANDB_MODE disables it."""
    from resnet_dist.logs.sinks.csv import CsvSink
    from resnet_dist.logs.sinks.tensorboard import TensorBoardSink
    from resnet_dist.logs.sinks.wandb import WandbSink
    from resnet_dist.logs.sinks.wandb_mode import wandb_mode

    sinks: list[Sink] = []
    if "wandb" in config.sinks and wandb_mode(config.wandb) != "disabled":
        sinks.append(WandbSink())
    if "tensorboard" in config.sinks:
        sinks.append(TensorBoardSink())
    if "csv" in config.sinks:
        sinks.append(CsvSink())
    return sinks
