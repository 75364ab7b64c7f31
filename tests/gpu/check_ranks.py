"""Checks that need several processes: two ranks on one GPU, a lost rank, the quickstart."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from places import ROOT, Place, SkippedCheckError

# isort: split
import torch
import torch.distributed as dist

from resnet_dist.distributed.watchdog import EXIT_LOST_RANK
from resnet_dist.models.sync_batch_norm import SyncBatchNorm


def norm_on_two_ranks(place: Place, folder: Path) -> str:
    """SyncBatchNorm on two ranks that share this device, over gloo, equals one whole batch."""
    # CUDA does not survive a fork; on the CPU a fork is quicker.
    context = multiprocessing.get_context("spawn" if place.is_cuda else "fork")
    store = folder / "store"
    results = [folder / f"rank{rank}.pt" for rank in range(2)]
    ranks = []
    for rank in range(2):
        arguments = (rank, str(store), str(results[rank]), str(place.device))
        ranks.append(context.Process(target=_norm_rank, args=arguments))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]

    x, target = _norm_batch()
    norm = torch.nn.BatchNorm2d(6)
    x.requires_grad_()
    y = norm(x)
    ((y - target) ** 2).sum().backward()
    parts = [torch.load(path, weights_only=True) for path in results]
    weight_gradient = parts[0]["weight"] + parts[1]["weight"]
    whole = {"y": y.detach(), "grad": x.grad, "var": norm.running_var}
    ours = {
        "y": torch.cat([part["y"] for part in parts]),
        "grad": torch.cat([part["grad"] for part in parts]),
        "var": parts[1]["var"],
    }
    for name, expected in whole.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(weight_gradient, norm.weight.grad, rtol=1e-4, atol=1e-4)
    return "output, gradients and running variance"


def _norm_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of eight images and a target, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    x = 5 + torch.randn(8, 6, 10, 10, generator=generator)
    return x, torch.randn(8, 6, 10, 10, generator=generator)


def _norm_rank(rank: int, store: str, result: str, device: str) -> None:
    """Half of the batch, on one of the two ranks."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    x, target = _norm_batch()
    half = slice(4 * rank, 4 * rank + 4)
    x = x[half].to(device).requires_grad_()
    norm = SyncBatchNorm(6).to(device)
    y = norm(x)
    ((y - target[half].to(device)) ** 2).sum().backward()
    content = {
        "y": y.detach().cpu(),
        "grad": x.grad.cpu(),
        "weight": norm.weight.grad.cpu(),
        "var": norm.running_var.cpu(),
    }
    torch.save(content, result)
    dist.barrier()
    dist.destroy_process_group()


LOST = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from resnet_dist import cli, engine

real = engine.train_step

def train_step(model, state, *rest):
    if os.environ["RANK"] == "1" and state.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, state, *rest)

engine.train_step = train_step
sys.exit(cli.main(sys.argv[2:]))
"""


def lost_rank_over_nccl(place: Place, folder: Path) -> str:
    """A rank is killed in the middle of a step: the other names it and leaves, without waiting."""
    if place.is_cuda and torch.cuda.device_count() < 2:
        raise SkippedCheckError("needs two GPUs: NCCL takes one rank per GPU")
    world_size = 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        "train",
        "--config",
        "quickstart",
        "--output_dir",
        str(folder / "run"),
        "--data.data_dir",
        str(folder / "digits"),
        "--distributed.device",
        place.device.type,
        "--distributed.timeout_s",
        "30",
        "--log.wandb",
        "disabled",
        "--log.interval_steps",
        "1",
    ]
    ranks = []
    output = folder / "printed"
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with open(output, "a") as file:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", LOST, str(ROOT), *arguments],
                    env=environment,
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        assert ranks[1].wait(timeout=120) == -signal.SIGKILL, output.read_text()[-2000:]
        lost_at = time.monotonic()
        code = ranks[0].wait(timeout=60)
        seconds = time.monotonic() - lost_at
    finally:
        for process in ranks:
            process.kill()
    printed = output.read_text()
    assert code == EXIT_LOST_RANK, printed[-2000:]
    assert "error (rank 0): lost at step" in printed or "waited" in printed, printed[-2000:]
    assert "rank 1 (host" in printed
    return f"the other rank left after {seconds:.1f} s"


def quickstart(place: Place, folder: Path) -> str:
    """The quickstart with one process: DALI's decoder, SyncBatchNorm, `precision auto`."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
        "train.py",
        "--config",
        "quickstart",
        "--distributed.device",
        place.device.type,
        "--log.wandb",
        "disabled",
        "--output_dir",
        str(folder / "run"),
        "--data.data_dir",
        str(folder / "digits"),
        # Of a rank on a CPU.
        "--distributed.threads",
        "1",
    ]
    if not place.is_full:
        command += ["--train.epochs", "1", "--schedule.warmup_epochs", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    top1 = json.loads(lines[-1])["val/top1"]
    assert top1 >= place.size(97, 5)
    return f"top-1 {top1:.2f} %"
