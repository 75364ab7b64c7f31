"""Accuracy as integer counts: added up on the device, reduced once over the ranks, divided last."""

import math
from dataclasses import dataclass

import torch

from resnet_dist.data.types import IGNORED_LABEL

FIRST_TOP5_CLASSES = 6
"""Fewest classes for which top-5 says anything: among five, every label is in the top 5."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Hits, summed loss and number of images; scalar tensors on the device."""

    correct1: torch.Tensor
    """int64, images whose label is the highest logit"""
    correct5: torch.Tensor
    """int64, images whose label is among the five highest logits (all classes, where there are
    fewer)"""
    loss_sum: torch.Tensor
    """float64, sum of the images' losses"""
    num: torch.Tensor
    """int64, images"""

    @staticmethod
    def zero(device: torch.device) -> "Counts":
        """Nothing counted yet."""
        integers = torch.zeros(3, dtype=torch.int64, device=device)
        return Counts(
            integers[0],
            integers[1],
            torch.zeros((), dtype=torch.float64, device=device),
            integers[2],
        )

    @staticmethod
    def of(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> "Counts":
        """The counts of one batch: logits [B, C], labels int64 [B], losses [B] (one of each image).

        A label of IGNORED_LABEL, and a row of logits that has a NaN, counts in `num` and is never a
        hit. Equal logits rank by class id: which of them torch.topk returns differs between
        devices, and bf16 has many of them.
        """
        valid = labels != IGNORED_LABEL
        own_class = labels.where(valid, 0)[:, None]
        own = logits.gather(1, own_class)
        classes = torch.arange(logits.shape[1], device=logits.device)
        above = ((logits > own) | ((logits == own) & (classes < own_class))).sum(1)
        valid = valid & ~logits.isnan().any(1)
        num = torch.full(
            (), len(labels), dtype=torch.int64, device=labels.device
        )  # a fill: no copy from the host
        return Counts(
            (valid & (above < 1)).sum(),
            (valid & (above < 5)).sum(),
            losses.sum(dtype=torch.float64),
            num,
        )

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.correct1 + other.correct1,
            self.correct5 + other.correct5,
            self.loss_sum + other.loss_sum,
            self.num + other.num,
        )

    def _packed(self) -> torch.Tensor:
        """All four as float64 [4]: integers are exact in it below 2**53."""
        return torch.stack(
            [
                self.correct1.double(),
                self.correct5.double(),
                self.loss_sum.double(),
                self.num.double(),
            ]
        )

    def reduce(self, runtime) -> "Counts":
        """The sum over all ranks, by one all-reduce of 32 bytes."""
        correct1, correct5, loss_sum, num = runtime.all_reduce_sum(self._packed()).unbind()
        return Counts(correct1.long(), correct5.long(), loss_sum, num.long())

    def result(self, num_classes: int = FIRST_TOP5_CLASSES) -> dict[str, float | int]:
        """The counts as plain numbers. The only method that waits for the device.

        Returns: top1 and top5 in percent, the mean loss, num, correct1 and correct5. A mean over no
            image is NaN. With fewer than six `num_classes` every image is a top-5 hit, so that
            top5 and correct5 are left out.
        """
        correct1, correct5, loss_sum, num = self._packed().tolist()
        share = 1 / num if num else math.nan
        values = {
            "top1": 100 * correct1 * share,
            "loss": loss_sum * share,
            "num": int(num),
            "correct1": int(correct1),
        }
        if num_classes >= FIRST_TOP5_CLASSES:
            values["top5"] = 100 * correct5 * share
            values["correct5"] = int(correct5)
        return values
