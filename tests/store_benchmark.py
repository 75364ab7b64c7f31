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
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(__file__))

from image_files import encode, open_split, picture, train_loader, write_split
from store_server import END_OF_HEAD, answer, in_child, read_head

from resnet_dist.cli import main

META = b'ETag: "pinned"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT'

WARM_UP_STEPS = 8

STEPS_BEHIND = 12
"""Steps that are prepared but not taken, so that reading ahead costs the same until the end."""

STEP_SECONDS = 0.05
"""of the training that is imitated"""

PICTURES = 40
"""Different pictures; more images are copies of them."""


class Figures(NamedTuple):
    """What one round of a place has cost."""

    cpu_us: float
    """CPU time per image in us"""
    waited: float
    """fraction of the time that a step waits for data"""


def serve(connection, folder, latency):
    """Answer requests for ranges of the files in a folder."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = b""
    while True:
        head, buffer = read_head(connection, buffer)
        if head is None:
            return
        time.sleep(latency)
        method, target, _ = head.decode().split(" ", 2)
        address, _, _ = target.partition("?")
        # Without the name of the bucket.
        _, _, name = address.split("/", 2)
        path = folder / name
        wanted = re.search(rb"(?i)range: bytes=(\d+)-(\d+)", head)
        if method == "HEAD":
            size = path.stat().st_size
            length = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n".encode()
            connection.sendall(length + META + END_OF_HEAD)
        elif wanted is None:
            content = path.read_bytes()
            connection.sendall(answer(200, content, META))
        else:
            first = int(wanted[1])
            last = int(wanted[2])
            send_range(connection, path, first, last)


def send_range(connection, path, first, last):
    """Answer with the bytes from `first` to `last` of a file, or to its end."""
    size = path.stat().st_size
    last = min(last, size - 1)
    length = last - first + 1
    status = f"HTTP/1.1 206 Partial\r\nContent-Length: {length}\r\n".encode()
    place = f"\r\nContent-Range: bytes {first}-{last}/{size}".encode()
    connection.sendall(status + META + place + END_OF_HEAD)
    with open(path, "rb") as file:
        connection.sendfile(file, first, length)


def run_server(sender, folder, latency):
    """The life of the server's process; sends its port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    _, port = listener.getsockname()
    sender.send(port)
    while True:
        connection, _ = listener.accept()
        arguments = (connection, folder, latency)
        thread = threading.Thread(target=serve, args=arguments, daemon=True)
        thread.start()


def start_server(folder, latency):
    """Start the server in a process of its own; returns it and its port."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, folder, latency)
    process = context.Process(target=run_server, args=arguments, daemon=True)
    process.start()
    return process, receiver.recv()


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(url, folder, args, step_s, cache_dir):
    """Read some batches of a place, with steps in between."""
    index = open_split(url)
    loader = train_loader(
        index,
        folder,
        global_batch_size=args.batch,
        train_crop_size=224,
        cache_dir=cache_dir,
    )
    num_steps = WARM_UP_STEPS + args.steps + STEPS_BEHIND
    batches = loader.batches(0, num_steps)
    for _ in range(WARM_UP_STEPS):
        next(batches)
        time.sleep(step_s)

    waited = 0.0
    cpu_before = cpu_seconds()
    started = time.monotonic()
    for _ in range(args.steps):
        before = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - before
        time.sleep(step_s)
        # As the training loop does.
        del batch
    seconds = time.monotonic() - started
    cpu = cpu_seconds() - cpu_before
    loader.close()

    images = args.batch * args.steps
    return Figures(
        cpu_us=1e6 * cpu / images,
        waited=waited / seconds,
    )


def write_data(folder, images):
    """Photographs of 500 x 375 pixels and about 110 KB, in shards; returns the bytes of one."""
    pictures = [picture(375, 500, seed) for seed in range(PICTURES)]
    files = [encode(one, quality=95) for one in pictures]
    copies = []
    for number in range(images):
        copies.append(files[number % PICTURES])
    write_split(folder / "images", copies)
    source = str(folder / "images")
    shards = str(folder / "shards")
    main(["data", "pack", source, shards, "--shard_mb", "16"])
    return len(files[0])


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--latency_ms", type=float, default=30)
    return parser.parse_args()


def print_figures(figures):
    """A line for each place: the medians of its rounds, and the ratios to the disk's.

    Args:
        figures: For each place, by its name, the figures of its rounds.
    """
    of_disk = figures["disk"]
    for name, rounds in figures.items():
        ratios = []
        for own, disk in zip(rounds, of_disk, strict=True):
            ratios.append(own.cpu_us / disk.cpu_us)
        cpu = statistics.median(one.cpu_us for one in rounds)
        waited = statistics.median(one.waited for one in rounds)
        ratio = statistics.median(ratios)
        print(
            f"{name:20s} CPU {cpu:6.0f} us an image, {ratio:.3f} of the disk "
            f"({min(ratios):.3f} to {max(ratios):.3f}), data wait {100 * waited:.1f} %"
        )


def main_program():
    args = read_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = str(folder / "cache")
        size = write_data(folder, args.images)
        server, port = start_server(folder / "shards", args.latency_ms / 1000)
        remote = f"http://127.0.0.1:{port}/set"
        places = {
            "disk": (str(folder / "shards"), ""),
            "store": (remote, ""),
            "store, warm cache": (remote, cache),
        }
        # Fills the cache.
        in_child(measure, remote, folder, args, 0.0, cache)
        figures = {place: [] for place in places}
        for _ in range(args.rounds):
            for place, (url, cache_dir) in places.items():
                found = in_child(measure, url, folder, args, STEP_SECONDS, cache_dir)
                figures[place].append(found)
        server.kill()
    load_average, _, _ = os.getloadavg()
    print(f"{size} bytes an image, load average {load_average:.1f}")
    print_figures(figures)


if __name__ == "__main__":
    main_program()
