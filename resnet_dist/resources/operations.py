"""Watching the operations of a training step that runs on tensors without contents."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensors = list[torch.Tensor]


class OperationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the operations inside its block, and shows each of them to `see`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def see(self, operation: Any, inputs: Tensors, results: Tensors) -> None:  # noqa: ANN401
        """Take note of an operation that has run.

        Args:
            operation: The operator of torch.
            inputs: The tensors among its arguments.
            results: The tensors that it has returned.
        """
        raise NotImplementedError

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run an operation, and show it to `see`."""
        result = func(*args, **(kwargs or {}))
        self.see(func, _tensors_in((args, kwargs)), _tensors_in(result))
        return result


def _tensors_in(tree: Any) -> Tensors:  # noqa: ANN401  nested arguments of any types
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
