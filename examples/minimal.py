"""The quickstart's training in plain PyTorch: one process, one file, nothing saved.

    python examples/minimal.py data/digits

The loss curve equals the one of

    python train.py --train.precision fp32 --model.sync_batch_norm false --config quickstart

(a test compares them). So this file shows what a training needs, and the rest of the repository
what it takes to run one for real: many processes and mixed precision, a fast and tolerant data
path, checkpoints and exact resume, signals, logs, other networks and recipes.

Some pure functions come from the package, so that both see the same pixels: the order of the
images, the random crops, and the digits themselves.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from resnet_dist.data.sampling.crops import random_windows
from resnet_dist.data.sampling.order import rows_at
from resnet_dist.data.sources.digits import write_digits
from resnet_dist.rng import derive_seed

SEED = 0
EPOCHS = 14
BATCH_SIZE = 64
# The learning rate for batches of 256 images.
BASE_LR = 0.2
WARMUP_EPOCHS = 1
WARMUP_START = 0.01
WEIGHT_DECAY = 5e-4
CROP_SIZE = 16
CROP_SCALE = (0.6, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
MEAN = 0.5
STD = 0.5


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut without parameters (He et al. 2015, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        # Every `stride`-th pixel, and zeros in the new channels.
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(out + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for small images (He et al. 2015, section 4.2)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        in_channels = 16
        for number, channels in enumerate((16, 32, 64), start=1):
            blocks = []
            for place in range(3):
                stride = 2 if number > 1 and place == 0 else 1
                blocks.append(BasicBlock(in_channels, channels, stride))
                in_channels = channels
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] to logits [B, num_classes]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        features = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(features)


class Images:
    """All images of a folder with one sub-folder for each class, decoded."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("*/*.jpg"))
        classes = [path.parent.name for path in paths]
        self.class_names = sorted(set(classes))
        self.labels = torch.tensor([self.class_names.index(name) for name in classes])
        self.pixels = [np.array(Image.open(path).convert("RGB")) for path in paths]
        self.heights = np.array([pixels.shape[0] for pixels in self.pixels])
        self.widths = np.array([pixels.shape[1] for pixels in self.pixels])

    def random_crops(self, epoch: int, rows: np.ndarray) -> torch.Tensor:
        """Random resized crops as the network gets them: [B, 3, CROP_SIZE, CROP_SIZE]."""
        windows = random_windows(
            SEED, epoch, rows, self.heights[rows], self.widths[rows], CROP_SCALE, CROP_RATIO
        )
        crops = []
        for row, (y, x, height, width) in zip(rows, windows, strict=True):
            crops.append(resize(self.pixels[row][y : y + height, x : x + width]))
        return normalize(crops)

    def whole(self) -> torch.Tensor:
        """All images, not cropped: the digits have the size that the network takes."""
        return normalize([resize(pixels) for pixels in self.pixels])


def resize(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [h, w, 3] to uint8 [3, CROP_SIZE, CROP_SIZE]."""
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    size = (CROP_SIZE, CROP_SIZE)
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True)[0]


def normalize(crops: list[torch.Tensor]) -> torch.Tensor:
    """Crops, uint8 [3, H, W] each, to what the network is fed: [B, 3, H, W]."""
    pixels = torch.stack(crops).float()
    # (pixels / 255 - MEAN) / STD, in the order of operations that rounds as the package does.
    images = torch.addcmul(torch.tensor(-MEAN / STD), pixels, torch.tensor(1 / (255 * STD)))
    return images.contiguous(memory_format=torch.channels_last)


def learning_rate(step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    peak = BASE_LR * BATCH_SIZE / 256
    warmup = WARMUP_EPOCHS * steps_per_epoch
    if step < warmup:
        return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
    progress = (step - warmup) / (total_steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def train(folder: Path, epochs: int = EPOCHS) -> tuple[nn.Module, list[float]]:
    """Train on folder/train. Returns the network and the loss of each step."""
    images = Images(folder / "train")
    steps_per_epoch = len(images.labels) // BATCH_SIZE
    torch.manual_seed(derive_seed(SEED, "init"))
    model = ResNet20(len(images.class_names)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=BASE_LR,
        momentum=0.9,
        nesterov=True,
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    losses = []
    for epoch in range(epochs):
        model.train()
        for number in range(steps_per_epoch):
            positions = np.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE)
            rows = rows_at(SEED, epoch, len(images.labels), positions)
            step = epoch * steps_per_epoch + number
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps_per_epoch, epochs * steps_per_epoch)
            logits = model(images.random_crops(epoch, rows))
            loss = F.cross_entropy(logits, images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean_loss = np.mean(losses[-steps_per_epoch:])
        print(f"epoch {epoch + 1}/{epochs}: loss {mean_loss:.4f}")
    return model, losses


@torch.inference_mode()
def evaluate(model: nn.Module, folder: Path) -> float:
    """Top-1 accuracy on folder/val, in percent."""
    images = Images(folder / "val")
    model.eval()
    predicted = model(images.whole()).argmax(dim=1)
    is_correct = predicted == images.labels
    return 100 * is_correct.float().mean().item()


if __name__ == "__main__":
    data = Path("data/digits")
    if len(sys.argv) > 1:
        data = Path(sys.argv[1])
    write_digits(str(data))
    network, _ = train(data)
    print(f"top-1 {evaluate(network, data):.2f} %")
