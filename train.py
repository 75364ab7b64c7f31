"""Train a network on a folder of images. The same command again resumes.

torchrun --nproc_per_node 2 train.py                                        the quickstart: real
digits, two minutes torchrun --nproc_per_node 8 train.py --config configs/resnet50.yaml
--data.data_dir /data/imagenet python train.py --help
every option python train.py --config configs/resnet50.yaml --print_config               the
resolved settings
"""

import sys

from resnet_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
