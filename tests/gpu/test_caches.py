"""The caches on a GPU: the same pixels as on the CPU. Not yet run on a GPU."""

import pytest
import torch
from image_files import OneProcess, encode, picture, write_split

from resnet_dist.config import AugmentConfig, Config, DataConfig, TrainConfig
from resnet_dist.data.build import build_train_loader, build_val_loader

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, and this machine has none"
)

# The largest difference of two roundings in the normalisation, and of one level of a pixel.
ROUNDING = 1e-5
LEVEL = 1 / 255 / min(DataConfig().std)


def build(folder, device, **data):
    config = Config(
        data=DataConfig(data_dir=str(folder), train_crop_size=32, **data),
        train=TrainConfig(precision="fp32", global_batch_size=16),
        augment=AugmentConfig(lighting_std=0.1, random_erasing=0.5),
        output_dir=str(folder),
    )
    runtime = OneProcess()
    runtime.device = torch.device(device)
    return config, runtime


def train_images(folder, device, **data):
    config, runtime = build(folder, device, **data)
    loader = build_train_loader(config, runtime, cached=True)
    images = torch.cat([batch.images.cpu() for batch in loader.batches(1, 4)])
    loader.close()
    return images


def test_training_caches_show_what_the_cpu_shows(tmp_path):
    write_split(tmp_path, [encode(picture(32, 32, i)) for i in range(64)])
    expected = train_images(tmp_path, "cpu", train_crop="pad")
    for kind in ("host", "device", "auto"):
        shown = train_images(tmp_path, "cuda:0", train_crop="pad", train_cache=kind)
        assert (shown - expected).abs().max() <= ROUNDING, kind
    # Resized by DALI on the GPU, by torch on the CPU.
    for interpolation in ("bilinear", "random"):
        data = {"train_interpolation": interpolation}
        expected = train_images(tmp_path, "cpu", train_cache="off", **data)
        shown = train_images(tmp_path, "cuda:0", train_cache="host", **data)
        assert (shown - expected).abs().mean() <= LEVEL, interpolation
    with pytest.raises(ValueError, match="--data.train_cache host"):
        train_images(tmp_path, "cuda:0", train_cache="device")


def test_evaluation_shows_what_the_cpu_shows_with_and_without_the_cache(tmp_path):
    files = [encode(picture(80 + 9 * i, 150 - 7 * i, seed=i)) for i in range(12)]
    write_split(tmp_path, files, split="val")
    shown = {}
    for device in ("cpu", "cuda:0"):
        data = {"val_resize_size": 72, "val_crop_size": 64, "val_batch_size": 8}
        config, runtime = build(tmp_path, device, **data)
        loader = build_val_loader(config, runtime, cached=True)
        for evaluation in range(3):
            batches = [batch.images.cpu() for batch in loader]
            shown[device, evaluation] = torch.cat(batches)
        loader.close()
    for images in shown.values():
        assert (images - shown["cpu", 0]).abs().max() <= ROUNDING
