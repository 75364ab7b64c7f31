"""What a log line costs, and the gather of each rank's times in it.

Prints, for each rank, the CPU time of a gather, that of a whole log line in the thread that trains,
and both as a share of the time from one line to the next. Options are those of
`resnet-dist train`:

    PYTHONPATH=. torchrun --nproc_per_node 2 tests/log_benchmark.py --config quickstart \
        --data.data_dir data/digits --log.interval_steps 50 --train.epochs 28
"""

import os
import statistics
import sys
import time

from resnet_dist import cli, engine

GATHERS = 500

log_training = engine.log_training
figures_of_ranks = engine.figures_of_ranks
seconds_of_gather = []
seconds_of_line = []
begins = []


def timed_gather(times, runtime):
    """Gather; at the first line many times, with the CPU time of all threads of the process."""
    if not seconds_of_gather:
        # The threads that load data fill their queue, and then wait.
        time.sleep(2)
        runtime.barrier()
        begun = time.process_time()
        for _ in range(GATHERS):
            figures_of_ranks(times, runtime)
        seconds_of_gather.append((time.process_time() - begun) / GATHERS)
    return figures_of_ranks(times, runtime)


def timed_line(*arguments):
    """Log, with the CPU time of this thread."""
    begins.append(time.perf_counter())
    begun = time.thread_time()
    log_training(*arguments)
    seconds_of_line.append(time.thread_time() - begun)


def main():
    engine.log_training = timed_line
    engine.figures_of_ranks = timed_gather
    code = cli.main(["train", *sys.argv[1:]])
    # The first line holds the many gathers.
    line = statistics.median(seconds_of_line[1:])
    gather = seconds_of_gather[0]
    interval = statistics.median(
        later - earlier for earlier, later in zip(begins[1:], begins[2:], strict=False)
    )
    load = os.getloadavg()[0]
    print(
        f"rank {os.environ.get('RANK', 0)}: gather {gather * 1e3:.3f} ms, line {line * 1e3:.3f} ms "
        f"of CPU time; a line every {interval:.2f} s: {gather / interval:.4%} and "
        f"{line / interval:.4%}; {len(seconds_of_line)} lines, load {load:.1f}"
    )
    return code


if __name__ == "__main__":
    raise SystemExit(main())
