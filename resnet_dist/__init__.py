"""Distributed training of image classification networks.

The names in `__all__` are the Python interface (see `resnet_dist.api`). Each is imported when it is
first used, so that `import resnet_dist` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_dist.api import (
        EvaluationTransform,
        ImagePrediction,
        Network,
        create_model,
        evaluate,
        load,
        predict,
        train,
    )
    from resnet_dist.config import Config

__version__ = "0.1.0"

__all__ = [
    "Config",
    "EvaluationTransform",
    "ImagePrediction",
    "Network",
    "__version__",
    "create_model",
    "evaluate",
    "load",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  the type depends on the name
    """Import a name of the interface (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "resnet_dist.config" if name == "Config" else "resnet_dist.api"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """The names of the interface, for completion."""
    return sorted(__all__)
