"""Exponential moving average of the weights (Polyak and Juditsky 1992).

`torch.optim.swa_utils.AveragedModel` is not used: at every step it reads from the device whether
it is the first step, and the host has to wait.
"""

import copy

import torch
from torch import nn


class Ema:
    """Keeps a copy of the model with averaged weights, which is evaluated beside the model.

    After each step, `average = decay * average + (1 - decay) * model`. Parameters and running
    statistics are averaged. Integer buffers such as num_batches_tracked are copied.

    Args:
        model: The network that is trained. The average starts as a copy of it.
        decay: Weight of the old average, from 0 to 1.

    Attributes:
        decay: As above.
        model: The averaged network, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model)
        self.model.requires_grad_(False)
        self.model.eval()
        # Pairs of lists for torch's operations on many tensors: floating point, and integers.
        self._averages: list[torch.Tensor] = []
        self._sources: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._source_counts: list[torch.Tensor] = []
        sources = model.state_dict()
        for name, average in self.model.state_dict().items():
            source = sources[name]
            if average.is_floating_point():
                self._averages.append(average)
                self._sources.append(source)
            else:
                self._counts.append(average)
                self._source_counts.append(source)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights of the model.

        Call this after each step. It does not wait for the device.
        """
        weight = 1 - self.decay
        torch._foreach_lerp_(self._averages, self._sources, weight)
        if self._counts:
            torch._foreach_copy_(self._counts, self._source_counts)
