"""Run a function on several ranks, each a forked process on this machine that talks gloo.

Forking starts in milliseconds where torchrun needs seconds to import torch again. It is safe as long as the parent has
run no parallel region before: OpenMP's threads do not survive a fork. `tests/conftest.py` keeps it at one thread.
"""

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 60


def run_ranks(fn, world_size: int, *args) -> list:
    """Call `fn(rank, world_size, *args)` on `world_size` ranks and return what each returned, in order of rank.

    The results are pickled: return numpy arrays and plain values, not tensors. Raises RuntimeError with the traceback
    of the first rank that fails, and when it takes longer than a minute.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (sender, fn, rank, world_size, os.path.join(folder, "store"), args)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect([receiver for _, receiver in ranks])
        finally:
            for process, receiver in ranks:
                # After an answer a rank only has to exit; one that waits for a failed peer has to be ended.
                process.join(5 if sys.exc_info()[0] is None else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
                receiver.close()


def _collect(receivers: list) -> list:
    """The answers of all ranks; raises as soon as one of them is a failure."""
    results, deadline = {}, time.monotonic() + TIMEOUT_SECONDS
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(receivers)) if rank not in results]
            raise RuntimeError(f"no answer from ranks {missing} after {TIMEOUT_SECONDS} s")
        for receiver in ready:
            rank = receivers.index(receiver)
            try:
                failure, results[rank] = receiver.recv()
            except EOFError:
                failure = "the process died without an answer"
            if failure:
                raise RuntimeError(f"rank {rank} of {len(receivers)} failed:\n{failure}")
    return [results[rank] for rank in range(len(receivers))]


def _child(sender, fn, rank: int, world_size: int, store_path: str, args: tuple) -> None:
    """The life of one rank: join the group, call, answer (failure, result), leave."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # Gloo looks up the host's name otherwise, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args)
        # Nobody leaves while another still needs the connections.
        dist.barrier()
        dist.destroy_process_group()
        sender.send((None, result))
    except BaseException:
        sender.send((traceback.format_exc(), None))
