"""Train on a SLURM cluster; the same command again resumes.

`python slurm/submit.py --help` lists every option, and docs/slurm.md has examples. It is the
same as `resnet-dist submit`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resnet_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
