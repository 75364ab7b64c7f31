"""What a log line costs, with the gather of each rank's times and the compute probe in it.

Prints, for each rank, the CPU time of a gather, of the probe, and of a whole log line in the thread
that trains, and each as a share of the time from one line to the next. Options are those of
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
take_probe = engine.ComputeProbe.take
seconds_of_gather = []
seconds_of_probe = []
seconds_of_line = []
begins = []


def timed_gather(times, probe_seconds, runtime):
    """Gather; at the first line many times, with the CPU time of all threads of the process."""
    if not seconds_of_gather:
        # The threads that load data fill their queue, and then wait.
        time.sleep(2)
        runtime.barrier()
        begun = time.process_time()
        for _ in range(GATHERS):
            figures_of_ranks(times, probe_seconds, runtime)
        seconds_of_gather.append((time.process_time() - begun) / GATHERS)
    return figures_of_ranks(times, probe_seconds, runtime)


def timed_probe(probe):
    """Take the probe, with the CPU time of this thread: the probe of one thread has no other."""
    begun = time.thread_time()
    seconds = take_probe(probe)
    seconds_of_probe.append(time.thread_time() - begun)
    return seconds


def timed_line(*arguments):
    """Log, with the CPU time of this thread."""
    begins.append(time.perf_counter())
    begun = time.thread_time()
    log_training(*arguments)
    seconds_of_line.append(time.thread_time() - begun)


def main():
    engine.log_training = timed_line
    engine.figures_of_ranks = timed_gather
    engine.ComputeProbe.take = timed_probe
    code = cli.main(["train", *sys.argv[1:]])
    # The first line holds the many gathers.
    cpu_seconds = {
        "gather": seconds_of_gather[0],
        "probe": statistics.median(seconds_of_probe),
        "line": statistics.median(seconds_of_line[1:]),
    }
    interval = statistics.median(
        later - earlier for earlier, later in zip(begins[1:], begins[2:], strict=False)
    )
    rank = os.environ.get("RANK", 0)
    load = os.getloadavg()[0]
    print(f"rank {rank}: {len(begins)} lines, one every {interval:.2f} s, load {load:.1f}")
    for name, seconds in cpu_seconds.items():
        print(f"rank {rank}: {name} {seconds * 1e3:.3f} ms of CPU time, {seconds / interval:.4%}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
