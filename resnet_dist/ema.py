"""Exponential moving average of the weights, evaluated beside them (Polyak and Juditsky 1992).

`torch.optim.swa_utils.AveragedModel` is not used: it asks the device at every step whether it is
the first one, which makes the host wait.
"""

import copy

import torch
from torch import nn


class Ema:
    """`average = decay * average + (1 - decay) * model` after each step.

    Parameters and running statistics are averaged. Integer buffers (num_batches_tracked) are
    copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._averages: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._source_counts: list[torch.Tensor] = []
        sources = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                self._averages.append(average)
                self._sources.append(sources[name])
            else:
                self._counts.append(average)
                self._source_counts.append(sources[name])

    @torch.no_grad()
    def update(self) -> None:
        """Move one step towards the model's present weights, without a wait for the device."""
        torch._foreach_lerp_(self._averages, self._sources, 1 - self.decay)
        if self._counts:
            torch._foreach_copy_(self._counts, self._source_counts)
