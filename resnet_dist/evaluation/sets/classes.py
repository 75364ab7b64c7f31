"""From the classes of a data set to the outputs of a network.

A data set may have its class folders in another order than the network has its outputs, it may name
them by numbers, and it may have only part of the classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from resnet_dist.data.sources.index import first_names
from resnet_dist.data.types import Batch, ValLoader
from resnet_dist.models.class_names import BACKGROUND

Classes = Literal["", "present", "all"]
"""What happens to the logits of classes that the data set does not have. present: they are masked,
so that only its classes compete (ImageNet-A and -R are evaluated so); all: they are kept; empty: a
data set without some of the classes is refused.
"""


@dataclass(frozen=True)
class ClassMap:
    """Which output of the network each class of a data set is."""

    outputs: tuple[int, ...]
    """the output of each class of the data set"""
    names: tuple[str, ...]
    """the names of all outputs"""
    is_masked: bool
    """whether only the classes of the data set compete"""
    remarks: tuple[str, ...] = ()
    """sentences for the user about what was found"""

    @property
    def num_competing(self) -> int:
        """Number of classes that an image may be assigned to."""
        if self.is_masked:
            return len(self.outputs)
        return len(self.names)


def map_classes(
    found: Sequence[str],
    names: Sequence[str],
    classes: Classes,
    place: str,
    option: str = "--classes ",
) -> ClassMap:
    """Find the output of each class of a data set.

    Args:
        found: The classes of the data set, as its folders are named, in their order.
        names: The names of the outputs of the network.
        classes: What to do if the data set has only part of the classes.
        place: The folder of the data set, for messages.
        option: How the user writes `classes`, for messages.

    Raises:
        ValueError: The data set has classes that the network does not have, or lacks some and
            `classes` is empty.
    """
    outputs, remark = _match(found, names, place)
    remarks = [remark] if remark else []
    num_missing = len(names) - len(set(outputs))
    if num_missing and not classes:
        present = set(outputs)
        missing = [name for number, name in enumerate(names) if number not in present]
        raise ValueError(
            f"{place} has {len(found)} of the {len(names)} classes of the network (not there: "
            f"{first_names(missing, 3)}): add {option}present to let only the classes of the data "
            f"set compete, as ImageNet-A and ImageNet-R are evaluated, or {option}all to keep the "
            "logits of the others"
        )
    is_masked = bool(num_missing) and classes == "present"
    if num_missing:
        what = "the logits of the others are kept (classes: all)"
        if is_masked:
            what = "the logits of the others are masked (classes: present)"
        remarks.append(f"{len(found)} of the {len(names)} classes are present: {what}")
    return ClassMap(tuple(outputs), tuple(names), is_masked, tuple(remarks))


def _match(found: Sequence[str], names: Sequence[str], place: str) -> tuple[list[int], str]:
    """The output of each class, and a sentence if they do not simply have the same names.

    Raises:
        ValueError: There are classes that the network does not have.
    """
    number_of = {name: number for number, name in enumerate(names)}
    if all(name in number_of for name in found):
        outputs = [number_of[name] for name in found]
        if outputs == sorted(outputs):
            return outputs, ""
        return outputs, (
            f"{place} has its classes in another order than the network: they are assigned by name"
        )
    if all(name.isascii() and name.isdigit() for name in found):
        return _match_numbers(found, names, place)
    unknown = [name for name in found if name not in number_of]
    unknown_names = first_names(unknown, 3)
    output_names = first_names(names, 3)
    raise ValueError(
        f"{place} has {len(unknown)} classes that the network does not have ({unknown_names}); "
        f"its outputs are {output_names}: choose the data set of these classes, or remove or "
        "rename the folders"
    )


def _match_numbers(found: Sequence[str], names: Sequence[str], place: str) -> tuple[list[int], str]:
    """Match folders that are named by the numbers of the classes, as those of ImageNet-V2.

    Sorted as text, the folder 10 comes before the folder 2.
    """
    numbers = [int(name) for name in found]
    if len(set(numbers)) != len(numbers):
        raise ValueError(
            f"{place} has two folders for the same number of a class: remove or rename one"
        )
    num_outputs = len(names)
    lowest = min(numbers)
    highest = max(numbers)
    outputs = numbers
    first_is_background = bool(names) and names[0] == BACKGROUND
    if first_is_background and lowest == 0 and len(found) < num_outputs:
        outputs = [number + 1 for number in numbers]
    if max(outputs) >= num_outputs:
        hint = ""
        if lowest == 1 and highest == num_outputs:
            hint = " They seem to count from 1: rename them to count from 0."
        raise ValueError(
            f"{place} names its classes by numbers up to {highest}, but the network has "
            f"{num_outputs} classes, numbered from 0.{hint} Choose the data set of these classes"
        )
    return outputs, (
        f"{place} names its classes by numbers: they are taken as class ids, and not in the order "
        "of the text (0, 1, 10, 100, ...)"
    )


class ClassMask(nn.Module):
    """A network whose logits are minus infinity except for some classes.

    Args:
        model: The network, images [B, 3, H, W] to logits [B, C].
        outputs: The classes that compete.
        num_classes: C.
    """

    def __init__(self, model: nn.Module, outputs: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.model = model
        is_masked = torch.ones(num_classes, dtype=torch.bool)
        is_masked[list(outputs)] = False
        device = next(model.parameters()).device
        # No buffer: those are sent from rank 0 to the others before each evaluation.
        self.is_masked = is_masked.to(device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images, [B, C]."""
        logits: torch.Tensor = self.model(images)
        return logits.masked_fill(self.is_masked, -torch.inf)


class RelabelledLoader:
    """A `ValLoader` whose labels are outputs of the network instead of classes of the data set.

    Args:
        loader: The loader of the data set.
        class_map: Which output each class is.
        device: The device of the labels.
    """

    def __init__(self, loader: ValLoader, class_map: ClassMap, device: torch.device) -> None:
        self.loader = loader
        self.class_names = class_map.names
        self.num_samples = loader.num_samples
        self.rounds = loader.rounds
        self.mirrored = loader.mirrored
        self._outputs = torch.tensor(class_map.outputs, device=device)

    @property
    def num_bad(self) -> int:
        """Number of broken images that this rank has met so far."""
        return self.loader.num_bad

    def remarks(self) -> list[str]:
        """Those of the loader."""
        return self.loader.remarks()

    def close(self) -> None:
        """Close the loader of the data set."""
        self.loader.close()

    def __iter__(self) -> Iterator[Batch | None]:
        """The batches of the data set with other labels."""
        for batch in self.loader:
            if batch is None:
                yield None
                continue
            labels = batch.labels
            # A broken image keeps IGNORED_LABEL, which is negative.
            outputs = self._outputs[labels.clamp(min=0)]
            yield replace(batch, labels=labels.where(labels < 0, outputs))
