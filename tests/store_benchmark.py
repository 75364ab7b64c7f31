"""What reading from an object store costs, against the same shards on the disk.

Prints the client's CPU time per image, and the share of the time that a training with steps of
50 ms waits for data. The server is a small one for ranges in a process of its own, which answers
after 30 ms:

    PYTHONPATH=. python tests/store_benchmark.py --batch 16 --steps 40 --rounds 3
"""

import argparse
import multiprocessing
import os
import re
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.dirname(__file__))

from image_files import OneProcess, encode, picture, train_loader, write_split
from store_server import answer, in_child, read_head

from resnet_dist.cli import main
from resnet_dist.data.sources.scan import build_index

META = b'ETag: "pinned"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT'


def serve(connection, folder, latency):
    """Answer requests for ranges of the files in a folder."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = b""
    while True:
        head, buffer = read_head(connection, buffer)
        if head is None:
            return
        time.sleep(latency)
        method, target = head.decode().split(" ", 2)[:2]
        path = folder / target.partition("?")[0].split("/", 2)[-1]
        size = path.stat().st_size
        wanted = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head)
        if method == "HEAD":
            length = f"Content-Length: {size}".encode()
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + META + b"\r\n" + length + b"\r\n\r\n")
        elif wanted is None:
            connection.sendall(answer(200, path.read_bytes(), META))
        else:
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1, size)
            more = META + f"\r\nContent-Range: bytes {start}-{stop - 1}/{size}".encode()
            head = f"HTTP/1.1 206 Partial\r\nContent-Length: {stop - start}\r\n".encode()
            connection.sendall(head + more + b"\r\n\r\n")
            with open(path, "rb") as file:
                connection.sendfile(file, start, stop - start)


def run_server(sender, folder, latency):
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    sender.send(listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        arguments = (connection, folder, latency)
        threading.Thread(target=serve, args=arguments, daemon=True).start()


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(url, folder, args, step_s, cache_dir):
    """(CPU time per image in us, fraction of the time that a step waits for data)."""
    index = build_index(url, "train", OneProcess())
    loader = train_loader(
        index,
        folder,
        global_batch_size=args.batch,
        train_crop_size=224,
        cache_dir=cache_dir,
    )
    warm_up = 8
    batches = loader.batches(0, warm_up + args.steps)
    for _ in range(warm_up):
        next(batches)
        time.sleep(step_s)
    waited = 0.0
    cpu = cpu_seconds()
    started = time.monotonic()
    for _ in range(args.steps):
        before = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        time.sleep(step_s)
        # As the training loop does.
        del batch
    images = args.batch * args.steps
    result = (cpu_seconds() - cpu) / images * 1e6, waited / (time.monotonic() - started)
    loader.close()
    return result


def write_data(folder, images):
    """Photographs of 500 x 375 pixels and about 110 KB, in shards."""
    files = [encode(picture(375, 500, seed), quality=95) for seed in range(40)]
    write_split(folder / "images", [files[number % 40] for number in range(images)])
    main(["data", "pack", str(folder / "images"), str(folder / "shards"), "--shard_mb", "16"])
    return len(files[0])


def main_program():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 16), ("steps", 40), ("rounds", 3), ("images", 640)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--latency_ms", type=float, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_data(folder, args.images)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, folder / "shards", args.latency_ms / 1000)
        server = context.Process(target=run_server, args=arguments, daemon=True)
        server.start()
        remote = f"http://127.0.0.1:{receiver.recv()}/set"
        places = {
            "disk": (str(folder / "shards"), ""),
            "store": (remote, ""),
            "store, warm cache": (remote, str(folder / "cache")),
        }
        in_child(measure, remote, folder, args, 0.0, str(folder / "cache"))
        figures = {name: [] for name in places}
        for _ in range(args.rounds):
            for name, (url, cache) in places.items():
                figures[name].append(in_child(measure, url, folder, args, 0.05, cache))
        server.kill()
    print(f"{size} bytes an image, load average {os.getloadavg()[0]:.1f}")
    base = [cpu for cpu, _ in figures["disk"]]
    for name, rounds in figures.items():
        ratios = [cpu / other for (cpu, _), other in zip(rounds, base, strict=True)]
        cpu, waited = np.median(rounds, axis=0)
        print(
            f"{name:20s} CPU {cpu:6.0f} us an image, {statistics.median(ratios):.3f} of the disk "
            f"({min(ratios):.3f} to {max(ratios):.3f}), data wait {100 * waited:.1f} %"
        )


if __name__ == "__main__":
    main_program()
