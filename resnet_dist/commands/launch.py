"""`resnet-dist launch`: torchrun, with our last words on the screen and our exit code.

torchrun ends with code 1 whatever its workers' codes are, and prints a page about their failure
below what they said themselves. This command takes torchrun's options, calls its API, and stays
silent about what the workers have explained.
"""

import logging
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Collection

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from resnet_dist.distributed.watchdog import EXIT_LOST_RANK
from resnet_dist.text import printable

_TIMEOUT_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"

_SHUTDOWN_SECONDS = 600
"""Time that ranks have to save after a signal; torchrun kills them after 30 s."""

_DESCRIPTION = (
    "torchrun, with the exit code of the first rank that failed and one line that says what it "
    "means. In place of a script it also takes a command of resnet-dist, for example: "
    "resnet-dist launch --nproc_per_node 8 train --config FILE"
)

_MEANINGS = {
    1: "an unexpected error, see its traceback above",
    2: "an error that you can mend, see above",
    EXIT_LOST_RANK: "a rank was lost; the same command resumes",
}


def launch_workers(arguments: list[str], commands: Collection[str]) -> int:
    """Start the ranks as torchrun does, wait for them, and return the exit code of the first one
    that failed.

    Args:
        arguments: torchrun's options, then a script or one of `commands`, then its arguments.
        commands: the commands of `resnet-dist`, each of which can be launched.

    Returns:
        0; the failed rank's code (1, 2, 75 or 128 + signal); 2 if the ranks of several nodes did
        not find each other.
    """
    parser = torchrun.get_args_parser()
    parser.prog = "resnet-dist launch"
    parser.description = _DESCRIPTION
    options = parser.parse_args(arguments)
    if options.training_script in commands:
        _run_as_module(options)
    os.environ["RESNET_DIST_RESUME"] = shlex.join(["resnet-dist", "launch", *arguments])
    if getattr(options, "shutdown_timeout", 0) is None and _TIMEOUT_VARIABLE not in os.environ:
        options.shutdown_timeout = _SHUTDOWN_SECONDS
    _let_nodes_join_again(options)
    _silence_torchrun()
    try:
        torchrun.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return _say_how_it_ended(rank, failure.exitcode)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except (RendezvousError, ValueError) as problem:
        print(f"error: torchrun could not start: {printable(problem)}", file=sys.stderr)
        return 2
    return 0


def _run_as_module(options: Namespace) -> None:
    """`launch ... train --config X` stands for `launch ... -m resnet_dist.cli train --config X`."""
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.training_script = "resnet_dist.cli"
    options.module = True


def _let_nodes_join_again(options: Namespace) -> None:
    """Where nodes may come and go, let rank 0 serve a new store at each start.

    torch 2.14 keeps the first store of torchrun's agent, and does not tell its address to a node
    that joins later: all agents then fail after a minute.
    """
    fewest, most = torchrun.parse_min_max_nnodes(options.nnodes)
    if fewest < most:
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _silence_torchrun() -> None:
    """Keep torchrun's reports off the screen, unless the user asks for them by LOGLEVEL."""
    if "LOGLEVEL" in os.environ:
        return
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _say_how_it_ended(rank: int, exitcode: int) -> int:
    """One line below what the ranks have said; returns the exit code for the shell."""
    code = exitcode
    meaning = _MEANINGS.get(code, "")
    if exitcode < 0:
        code = 128 - exitcode
        meaning = f"killed by {signal.Signals(-exitcode).name}; the same command resumes"
    elif code > 128:
        meaning = f"stopped by {signal.Signals(code - 128).name}; the same command resumes"
    print(f"rank {rank} ended with exit code {code}: {meaning}", file=sys.stderr, flush=True)
    return code
