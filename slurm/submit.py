"""Train on a SLURM cluster; the same command again resumes. slurm/README.md explains the rest.

    python slurm/submit.py --config configs/resnet50.yaml --config slurm/example_gpu.yaml \\
        --data.data_dir /data/imagenet
    python slurm/submit.py --config configs/resnet50.yaml --data.data_dir /data/imagenet \\
        --cluster.nodes 4 --cluster.gpus_per_node 8 --cluster.dry_run
    python slurm/submit.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resnet_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
