"""What each rank of the elastic test runs: the command line, with its batches written down and its
steps slowed, so that whoever kills an agent finds the run under way.

    worker.py FOLDER SECONDS_PER_STEP train --config ...
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_utils import record_batches

from resnet_dist import engine


def main() -> int:
    folder = Path(sys.argv[1])
    seconds_per_step = float(sys.argv[2])
    command_line = sys.argv[3:]
    real = engine.train_step

    def train_step(*arguments):
        time.sleep(seconds_per_step)
        return real(*arguments)

    engine.train_step = train_step
    with open(folder / "pids", "a") as file:
        file.write(f"{os.getppid()} {os.getpid()}\n")
    recording_main = record_batches(folder)
    return recording_main(command_line)


if __name__ == "__main__":
    sys.exit(main())
