"""Checks of evaluation on data sets that come as arrays, with other classes or several labels."""

from dataclasses import dataclass
from pathlib import Path

from places import Place

# isort: split
import numpy as np
import torch
from check_data import CPU, config_of, levels, runtime_on
from torch import nn

from resnet_dist.config import Config
from resnet_dist.evaluation.loop import count_logits
from resnet_dist.evaluation.sets.arrays import ArrayLoader, ImageArrays
from resnet_dist.evaluation.sets.classes import ClassMask, RelabelledLoader, map_classes
from resnet_dist.evaluation.sets.label_sets import LabelSetCounter

CLASSES = tuple("abcde")
OUTPUTS = tuple("xedcba")


class NoOtherRank:
    """As much of a Runtime as the counter of label sets needs."""

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over one rank."""
        return tensor


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation on one device showed and counted."""

    pixels: torch.Tensor
    correct: int
    predicted_as_e: int
    """images whose top class is e"""


def array_evaluation(place: Place, folder: Path) -> str:
    """Pixels, masked logits and counts on this device are those of the CPU."""
    number = place.size(512, 20)
    images = random_images(number)
    config = config_of(folder, val_resize_size=32, val_crop_size=32, val_batch_size=16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(OUTPUTS)))

    expected = evaluate_on(CPU, model, images, config)
    ours = evaluate_on(place.device, model, images, config)
    assert torch.equal(expected.pixels, ours.pixels), "the pixels differ"
    # A class may win by the last bits of a logit.
    correct_apart = abs(expected.correct - ours.correct)
    assert correct_apart <= 1, f"{ours.correct} correct, {expected.correct} on the CPU"
    e_apart = abs(expected.predicted_as_e - ours.predicted_as_e)
    assert e_apart <= 1, f"{ours.predicted_as_e} of class e, {expected.predicted_as_e} on the CPU"
    return f"{number} images, {ours.correct} correct"


def random_images(number: int) -> ImageArrays:
    """Images of 32 x 32 random pixels, with the five classes in turn."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(number) % len(CLASSES)
    return ImageArrays(pixels, labels)


def evaluate_on(
    device: torch.device,
    model: nn.Module,
    images: ImageArrays,
    config: Config,
) -> Evaluation:
    """Evaluate a network, whose output x is masked, on a device."""
    class_map = map_classes(CLASSES, OUTPUTS, "present", "arrays")
    array_loader = ArrayLoader(images, CLASSES, config, runtime_on(device))
    loader = RelabelledLoader(array_loader, class_map, device)
    network = ClassMask(model.to(device), class_map.outputs, len(OUTPUTS))
    # Class e is the one right label of each image; a row may name it twice.
    label_sets = np.full((len(images.labels), 2), OUTPUTS.index("e"))
    counter = LabelSetCounter(label_sets, device)
    pixels = []
    correct = 0
    for batch in loader:
        with torch.inference_mode():
            logits = network(batch.images)
        is_masked = logits[:, 0] == -torch.inf
        assert bool(is_masked.all()), "the logits of x are masked"
        counts = count_logits(logits, batch.labels)
        correct += int(counts.correct1)
        counter(batch, logits)
        pixels.append(levels(batch.images, config))
    predicted_as_e, _ = counter.reduce(NoOtherRank())
    return Evaluation(torch.cat(pixels), correct, predicted_as_e)
