"""Exponential moving average of the weights, evaluated beside the raw ones (Polyak and Juditsky
1992).

Not `torch.optim.swa_utils.AveragedModel`: that one asks the device in every step whether it is the
first.
"""

import copy

import torch
from torch import nn


class Ema:
    """`average = decay * average + (1 - decay) * model` after each step, for parameters and running
    statistics.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        pairs = list(
            zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        )
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [
            pair for pair in pairs if not pair[0].is_floating_point()
        ]  # num_batches_tracked: counts

    @torch.no_grad()
    def update(self) -> None:
        """Move one step towards the model's present weights; a few fused kernels, no wait for the
        device.
        """
        averages, sources = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, sources, 1 - self.decay)
        if self._copied:
            torch._foreach_copy_(*zip(*self._copied, strict=True))
