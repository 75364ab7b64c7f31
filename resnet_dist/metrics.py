"""Accuracy as integer counts: summed on the device, reduced once over the ranks, divided last."""

import math
from dataclasses import dataclass

import torch

from resnet_dist.data.types import IGNORED_LABEL
from resnet_dist.distributed.runtime import Runtime

FIRST_TOP5_CLASSES = 6
"""Fewest classes for which top-5 says anything: among five, every label is in the top 5."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Number of correct images, sum of the losses, number of images: scalars on the device."""

    correct1: torch.Tensor
    """int64: images whose label has the highest logit"""
    correct5: torch.Tensor
    """int64: images whose label is among the five highest logits"""
    loss_sum: torch.Tensor
    """float64: sum of the losses of the images"""
    num: torch.Tensor
    """int64: images"""

    @staticmethod
    def zero(device: torch.device) -> "Counts":
        """Nothing counted yet."""
        integers = torch.zeros(3, dtype=torch.int64, device=device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        correct1, correct5, num = integers.unbind()
        return Counts(correct1, correct5, loss_sum, num)

    @staticmethod
    def of(logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor) -> "Counts":
        """The counts of one batch.

        An image with the label IGNORED_LABEL, or with a NaN among its logits, counts in `num` and
        is never correct. Equal logits rank by class id: which one torch.topk returns differs
        between devices, and bf16 has many of them.

        Args:
            logits: [B, C].
            labels: int64 [B].
            losses: [B], one of each image.
        """
        num_images, num_classes = logits.shape
        has_label = labels != IGNORED_LABEL
        label = labels.where(has_label, 0)[:, None]
        logit_of_label = logits.gather(1, label)

        # The rank of the label: the number of classes before it in the order of the logits.
        classes = torch.arange(num_classes, device=logits.device)
        is_higher = logits > logit_of_label
        is_equal = logits == logit_of_label
        is_equal_and_before = is_equal & (classes < label)
        is_before = is_higher | is_equal_and_before
        rank_of_label = is_before.sum(1)

        has_nan = logits.isnan().any(1)
        can_be_correct = has_label & ~has_nan
        is_correct1 = can_be_correct & (rank_of_label < 1)
        is_correct5 = can_be_correct & (rank_of_label < 5)
        # A fill on the device, without a copy from the host.
        num = torch.full((), num_images, dtype=torch.int64, device=labels.device)
        return Counts(
            correct1=is_correct1.sum(),
            correct5=is_correct5.sum(),
            loss_sum=losses.sum(dtype=torch.float64),
            num=num,
        )

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.correct1 + other.correct1,
            self.correct5 + other.correct5,
            self.loss_sum + other.loss_sum,
            self.num + other.num,
        )

    def _packed(self) -> torch.Tensor:
        """All four as float64 [4], which holds integers below 2**53 exactly."""
        values = [self.correct1, self.correct5, self.loss_sum, self.num]
        return torch.stack([value.double() for value in values])

    def reduce(self, runtime: Runtime) -> "Counts":
        """The sum over all ranks, by one all-reduce of 32 bytes."""
        total = runtime.all_reduce_sum(self._packed())
        correct1, correct5, loss_sum, num = total.unbind()
        return Counts(
            correct1=correct1.long(),
            correct5=correct5.long(),
            loss_sum=loss_sum,
            num=num.long(),
        )

    def result(self, num_classes: int = FIRST_TOP5_CLASSES) -> dict[str, float | int]:
        """The counts as plain numbers. The only method that waits for the device.

        Args:
            num_classes: With fewer than six classes every image is a top-5 hit, so that top5 and
                correct5 are left out.

        Returns:
            top1 and top5 in percent, the mean loss, num, correct1 and correct5. A mean over no
            image is NaN.
        """
        correct1, correct5, loss_sum, num = self._packed().tolist()
        share = math.nan
        if num:
            share = 1 / num
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
