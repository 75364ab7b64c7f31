"""The quickstart's training in plain PyTorch: one process, one file, nothing saved.

    python examples/minimal.py data/digits

The loss curve equals the one of

    python train.py --train.precision fp32 --model.sync_batch_norm false --config quickstart

(a test compares them). So this file shows what a training needs, and the rest of the repository
what it takes to run one for real: many processes and mixed precision, a fast and tolerant data
path, checkpoints and exact resume, signals, logs, other networks and recipes.

Read it from the top: the settings, the images, the network, the learning rate, the loop.

Some pure functions come from the package, so that both see the same pixels: the order of the
images, the random crops, and the digits themselves.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor, resize, resized_crop

from resnet_dist.data.sampling.crops import random_windows
from resnet_dist.data.sampling.order import rows_at
from resnet_dist.data.sources.digits import write_digits
from resnet_dist.rng import derive_seed

# ---- Settings

SEED = 0
EPOCHS = 14
BATCH_SIZE = 64

# The learning rate for batches of 256 images.
BASE_LR = 0.2
WARMUP_EPOCHS = 1
# The learning rate at step 0, as a fraction of the highest one.
WARMUP_START = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

# The side of the images in the files, and of what the network gets, in pixels.
IMAGE_SIZE = 32
CROP_SIZE = 16
# Area of a random crop, as a fraction of the image, and its width over its height.
CROP_SCALE = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
MEAN = 0.5
STD = 0.5


# ---- The images


def read_images(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a folder with one sub-folder for each class.

    Returns:
        The pixels, uint8 [N, 3, IMAGE_SIZE, IMAGE_SIZE], and the labels, int64 [N].
    """
    images = []
    labels = []
    for image, label in ImageFolder(str(folder), transform=pil_to_tensor):
        images.append(image)
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def random_crops(images: torch.Tensor, rows: np.ndarray, epoch: int) -> torch.Tensor:
    """Take a random resized crop of each of the images `rows`.

    Returns:
        uint8 [B, 3, CROP_SIZE, CROP_SIZE].
    """
    sizes = np.full(len(rows), IMAGE_SIZE)
    windows = random_windows(SEED, epoch, rows, sizes, sizes, CROP_SCALE, CROP_RATIO)
    crops = []
    for row, window in zip(rows, windows.tolist(), strict=True):
        top, left, height, width = window
        crop = resized_crop(images[row], top, left, height, width, [CROP_SIZE, CROP_SIZE])
        crops.append(crop)
    return torch.stack(crops)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Compute (pixels / 255 - MEAN) / STD: what the network gets.

    It is written as offset + pixels * factor, which rounds as the package does.
    """
    offset = torch.tensor(-MEAN / STD)
    factor = torch.tensor(1 / (255 * STD))
    inputs = torch.addcmul(offset, pixels.float(), factor)
    return inputs.contiguous(memory_format=torch.channels_last)


def train_batches(
    images: torch.Tensor, labels: torch.Tensor, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of an epoch, in random order. What is left of the images at the end is dropped.

    Yields:
        The inputs of the network, [BATCH_SIZE, 3, CROP_SIZE, CROP_SIZE], and their labels.
    """
    for number in range(len(images) // BATCH_SIZE):
        start = number * BATCH_SIZE
        positions = np.arange(start, start + BATCH_SIZE)
        rows = rows_at(SEED, epoch, len(images), positions)
        crops = random_crops(images, rows, epoch)
        yield normalize(crops), labels[rows]


# ---- The network: ResNet-20 for small images (He et al. 2015, section 4.2)


def conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution. It needs no bias, because a batch norm follows."""
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut without parameters (He et al. 2015, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out = self.conv1(x)
        out = self.bn1(out)
        out = F.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """Take every `stride`-th pixel, and put zeros in the new channels."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


def make_stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Three blocks. The first one changes the number of channels and the resolution."""
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride),
        BasicBlock(channels, channels),
        BasicBlock(channels, channels),
    )


class ResNet20(nn.Module):
    """Three stages of three blocks: 16, 32 and 64 channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = make_stage(16, 16, stride=1)
        self.layer2 = make_stage(16, 32, stride=2)
        self.layer3 = make_stage(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] to logits [B, num_classes]."""
        x = self.conv1(images)
        x = self.bn1(x)
        x = F.relu(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        features = x.mean(dim=(2, 3))
        return self.fc(features)


def build_model(num_classes: int) -> nn.Module:
    """A ResNet-20 with random weights (He et al. 2015, "Delving Deep into Rectifiers")."""
    torch.manual_seed(derive_seed(SEED, "init"))
    model = ResNet20(num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return model.to(memory_format=torch.channels_last)


# ---- The learning rate


def learning_rate(step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    peak_lr = BASE_LR * BATCH_SIZE / 256
    warmup_steps = WARMUP_EPOCHS * steps_per_epoch
    if step < warmup_steps:
        progress = step / warmup_steps
        return peak_lr * (WARMUP_START + (1 - WARMUP_START) * progress)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak_lr * (1 + math.cos(math.pi * progress)) / 2


# ---- The loop


def train(folder: Path, epochs: int = EPOCHS) -> tuple[nn.Module, list[float]]:
    """Train on folder/train.

    Returns:
        The network, and the loss of each step.
    """
    images, labels = read_images(folder / "train")
    num_classes = int(labels.max()) + 1
    steps_per_epoch = len(images) // BATCH_SIZE
    total_steps = epochs * steps_per_epoch

    model = build_model(num_classes)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=BASE_LR,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )

    model.train()
    losses: list[float] = []
    for epoch in range(epochs):
        for inputs, targets in train_batches(images, labels, epoch):
            step = len(losses)
            lr = learning_rate(step, steps_per_epoch, total_steps)
            optimizer.param_groups[0]["lr"] = lr

            logits = model(inputs)
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean_loss = np.mean(losses[-steps_per_epoch:])
        print(f"epoch {epoch + 1}/{epochs}: loss {mean_loss:.4f}")
    return model, losses


@torch.inference_mode()
def evaluate(model: nn.Module, folder: Path) -> float:
    """Top-1 accuracy on folder/val, in percent. The images are resized, not cropped."""
    images, labels = read_images(folder / "val")
    pixels = resize(images, [CROP_SIZE, CROP_SIZE])
    model.eval()
    logits = model(normalize(pixels))
    predicted = logits.argmax(dim=1)
    is_correct = predicted == labels
    return 100 * is_correct.float().mean().item()


def main() -> None:
    """Write the digits to the folder of the command line, train, and print the accuracy."""
    folder = Path("data/digits")
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
    write_digits(str(folder))
    model, _ = train(folder)
    top1 = evaluate(model, folder)
    print(f"top-1 {top1:.2f} %")


if __name__ == "__main__":
    main()
