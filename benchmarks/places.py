"""Our loader by the place of the data: class folders, tar shards, parquet files and an S3 store.

How to run it, with any options of `resnet-dist benchmark loader`:

    pip install -r benchmarks/requirements.txt
    python benchmarks/places.py DIR --images 320 --windows 3 --train.global_batch_size 32

The training images of DIR, in class folders, are copied to the other places: to shards by
`resnet-dist data pack`, to parquet files by Hugging Face's datasets, and the shards to a bucket.
The store is moto's server on this machine, which speaks the protocol of S3, in a process of its
own; each answer is late by `--latency_ms`. Its CPU time does not count, but it shares the cores.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rivals import list_images

from resnet_dist import cli

BUCKET = "photographs"

ROWS_OF_A_GROUP = 100
"""Rows of a row group of the parquet files of the hub."""

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
"""A web application, by the interface WSGI."""


def write_shards(data_dir: str, out: Path) -> None:
    """Copy the images to tar shards."""
    code = cli.main(["data", "pack", data_dir, str(out), "--shard_mb", "2"])
    if code != 0:
        raise SystemExit(code)


def write_parquet(data_dir: str, out: Path) -> None:
    """Copy the training images to a parquet file, as a clone of a data set of the hub has it."""
    import datasets

    datasets.disable_progress_bars()

    columns: dict[str, list[Any]] = {"image": [], "label": []}
    train = os.path.join(data_dir, "train")
    for sample in list_images(train):
        columns["image"].append({"bytes": sample.read(), "path": os.path.basename(sample.path)})
        columns["label"].append(sample.label)
    names = sorted(entry.name for entry in os.scandir(train))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    folder = out / "data"
    folder.mkdir(parents=True)
    images = datasets.Dataset.from_dict(columns, features=features)
    path = folder / "train-00000-of-00001.parquet"
    images.to_parquet(str(path), batch_size=ROWS_OF_A_GROUP)


def delayed(application: Application, seconds: float) -> Application:
    """A web application whose answers are late."""

    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(seconds)
        return application(environment, start_response)

    return answer


def run_store(sender: Connection, latency_s: float) -> None:
    """The life of the process of the store; sends its port.

    Args:
        sender: where to send the port.
        latency_s: seconds by which each answer is late.
    """
    import logging

    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    class KeepAlive(MotoRequestHandler):
        # The server ends the connection after each answer by default. Stores keep it.
        protocol_version = "HTTP/1.1"

    # A line for each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = delayed(DomainDispatcherApplication(create_backend_app), latency_s)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=KeepAlive)
    sender.send(server.server_address[1])
    server.serve_forever()


def start_store(latency_s: float) -> multiprocessing.process.BaseProcess:
    """Start a store in a process of its own, and let the clients of this process find it.

    Args:
        latency_s: seconds by which each answer is late.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_store, args=(sender, latency_s), daemon=True)
    process.start()
    port = receiver.recv()
    os.environ.update(
        AWS_ACCESS_KEY_ID="any",
        AWS_SECRET_ACCESS_KEY="any",
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
    )
    return process


def upload(folder: Path) -> str:
    """Copy a folder to the bucket; returns its address there."""
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = path.relative_to(folder.parent)
            client.upload_file(str(path), BUCKET, str(key))
    return f"s3://{BUCKET}/{folder.name}"


def main(arguments: list[str]) -> int:
    """Copy the images, and run the benchmark on all copies.

    Args:
        arguments: those of the command line.

    Returns:
        The exit code of the benchmark.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_dir", help="folder with train/<class>/, which has the images")
    parser.add_argument("--latency_ms", type=float, default=30, help="of each answer of the store")
    options, of_the_benchmark = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="resnet_dist_places_") as name:
        shards = Path(name, "shards")
        parquet = Path(name, "parquet")
        # Before any library has started threads, which would not survive the fork.
        store = start_store(options.latency_ms / 1e3)
        try:
            write_shards(options.data_dir, shards)
            write_parquet(options.data_dir, parquet)
            address = upload(shards)
            command = ["benchmark", "loader", "--data.data_dir", options.data_dir]
            roots = [str(shards), address, str(parquet)]
            return cli.main([*command, "--also", ",".join(roots), *of_the_benchmark])
        finally:
            store.kill()
            store.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
