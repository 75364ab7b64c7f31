"""Checks of evaluation on data sets that come as arrays, with other classes or several labels."""

from pathlib import Path

from places import Place

# isort: split
import numpy as np
import torch
from check_data import CPU, config_of, levels, runtime_on
from torch import nn

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


def array_evaluation(place: Place, folder: Path) -> str:
    """Pixels, masked logits and counts on this device are those of the CPU."""
    number = place.size(512, 20)
    rng = np.random.default_rng(0)
    images = ImageArrays(
        rng.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8), np.arange(number) % 5
    )
    config = config_of(folder, val_resize_size=32, val_crop_size=32, val_batch_size=16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(OUTPUTS)))
    found = {}
    for device in (CPU, place.device):
        runtime = runtime_on(device)
        class_map = map_classes(CLASSES, OUTPUTS, "present", "arrays")
        loader = RelabelledLoader(ArrayLoader(images, CLASSES, config, runtime), class_map, device)
        network = ClassMask(model.to(device), class_map.outputs, len(OUTPUTS))
        counter = LabelSetCounter(np.full((number, 2), 1), device)
        pixels = []
        correct = 0
        for batch in loader:
            with torch.inference_mode():
                logits = network(batch.images)
            assert bool((logits[:, 0] == -torch.inf).all()), "the logits of x are masked"
            correct += int(count_logits(logits, batch.labels).correct1)
            counter(batch, logits)
            pixels.append(levels(batch.images, config))
        found[device.type] = (torch.cat(pixels), correct, counter.reduce(NoOtherRank())[0])
    expected = found["cpu"]
    own = found[place.device.type]
    assert torch.equal(expected[0], own[0]), "the pixels differ"
    # A class may win by the last bits of a logit.
    assert abs(expected[1] - own[1]) <= 1, f"{own[1]} correct, {expected[1]} on the CPU"
    assert abs(expected[2] - own[2]) <= 1, f"{own[2]} of class e, {expected[2]} on the CPU"
    return f"{number} images, {own[1]} correct"
