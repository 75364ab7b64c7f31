r"""Train an image classifier. Run the same command again to resume.

Examples::

    # The quickstart: real digits, about two minutes.
    torchrun --nproc_per_node 2 train.py

    # ResNet-50 on ImageNet with 8 GPUs.
    torchrun --nproc_per_node 8 train.py --config configs/resnet50.yaml \
        --data.data_dir /data/imagenet

    # List every option.
    python train.py --help

    # Print the resolved config.
    python train.py --config configs/resnet50.yaml --print_config
"""

import sys

from resnet_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
