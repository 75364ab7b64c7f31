"""Data in object stores: the same samples as on the disk, through latency and errors, and clear
sentences where a store cannot be read.
"""

import json
import math
import os
import signal
import threading
import time
from typing import NamedTuple

import boto3  # noqa: F401 - forked clients have it then
import numpy as np
import obstore.store  # noqa: F401
import pytest
from dist_utils import options, run_command, start_app, wait_app
from image_files import (
    OneProcess,
    encode,
    open_split,
    pack_shards,
    picture,
    train_loader,
    val_loader,
    write_split,
)
from store_server import SECRETS, Store, in_child, start_child

from resnet_dist.addresses import check_url, is_url
from resnet_dist.cli import main
from resnet_dist.commands import doctor_bench
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.pixels import remote_read
from resnet_dist.data.pixels.read import load
from resnet_dist.data.pixels.remote_read import (
    MAX_GAP_BYTES,
    Gate,
    ImagePlace,
    coalesce,
    requests_in_flight,
)
from resnet_dist.data.stores import client
from resnet_dist.data.stores.client import Patience, list_folder, read_range

N = 96


def small_image(number):
    """A JPEG file of one of 35 sizes."""
    height = 40 + number % 7
    width = 60 - number % 5
    return encode(picture(height, width, number))


GOOD = [small_image(number) for number in range(N)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with four shards in train/ and one in val/."""
    folder = tmp_path_factory.mktemp("stores")
    write_split(folder / "images", GOOD)
    write_split(folder / "images", GOOD[:9], split="val")
    out = folder / "shards"
    pack_by_count(folder / "images", out, "train", N // 4)
    pack_by_count(folder / "images", out, "val", 9)
    return out


def pack_by_count(images, out, split, count):
    """Shards of `count` images, in any order."""
    index = open_split(images, split)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(index))
    num_shards = math.ceil(len(index) / count)
    pack_shards(index, out / split, order, num_shards)


@pytest.fixture(scope="module")
def store(shards):
    """The server, with the shards in s3://bucket/set."""
    assert main(["data", "index-shards", str(shards)]) == 0
    server = Store()
    server.upload(shards, "bucket", "set/")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch, request):
    """What a user would have set, and a proxy without trouble."""
    if "store" not in request.fixturenames:
        return
    server = request.getfixturevalue("store")
    server.trouble()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


class Shown(NamedTuple):
    """What a batch shows."""

    rows: list[int]
    labels: list[int]
    sums: list[float]
    """sum of the pixels of each image"""


def show(index, folder, steps=5, **options):
    """What the first steps show."""
    loader = train_loader(index, folder, global_batch_size=32, **options)
    seen = []
    for batch in loader.batches(0, steps):
        pixels = batch.images.double()
        sums = pixels.sum((1, 2, 3))
        shown = Shown(
            rows=batch.indices.tolist(),
            labels=batch.labels.tolist(),
            sums=sums.tolist(),
        )
        seen.append(shown)
    loader.close()
    return seen


def sum_of_pixels(batch):
    """The sum of all pixels of a batch."""
    return batch.images.double().sum().item()


def read_all(index):
    """The bytes of all images, read one by one."""
    return [load(index, row).data for row in range(len(index))]


class Facts(NamedTuple):
    """What is to be the same on the disk and in a store."""

    fingerprint: str
    names: list[str]
    """of the images"""
    places: list[tuple[int, int]]
    """offset and length of each image in its shard"""
    data: list[bytes]
    """the bytes of each image"""
    train: list[Shown]
    val: list[float]
    """sum of the pixels of each batch"""


def facts(url, folder):
    """The facts of one address."""
    index = open_split(url)
    names = []
    places = []
    for row in range(len(index)):
        names.append(index.name(row))
        _, offset, length = index.place(row)
        places.append((offset, length))
    val_index = open_split(url, "val")
    loader = val_loader(val_index, folder, val_resize_size=32, val_crop_size=32)
    val = [sum_of_pixels(batch) for batch in loader]
    # What `doctor --bench` measures.
    assert doctor_bench._read_some(loader, OneProcess()) > 0
    loader.close()
    return Facts(
        fingerprint=index.fingerprint(),
        names=names,
        places=places,
        data=read_all(index),
        train=show(index, folder),
        val=val,
    )


@pytest.mark.slow
def test_a_run_on_a_store_is_a_run_on_the_disk(store, shards, tmp_path):
    """The index, the bytes and the batches, through latency, errors and answers cut off."""
    local = facts(str(shards), tmp_path)
    images = str(shards.parent / "images")
    assert local.fingerprint == open_split(images).fingerprint()
    store.trouble(latency=0.005, errors=0.05, truncated=0.05)
    assert in_child(facts, "s3://bucket/set", tmp_path) == local
    assert in_child(facts, f"{store.web}/bucket/set/", tmp_path) == local


def sentence(function, *args):
    """The text of the error that a call raises."""
    with pytest.raises(ValueError) as raised:
        function(*args)
    return str(raised.value)


def assert_no_secret(text):
    for secret in SECRETS:
        assert secret not in text, text


class Unreadable(NamedTuple):
    """A store that cannot be read."""

    url: str
    trouble: dict[str, object]
    """what the proxy does"""
    words: str
    """what the sentence contains"""


def sentences(store, cases):
    """What is said of each address under each trouble."""
    client.LIST_TIMEOUT_S = 1.5
    found = []
    for case in cases:
        store.trouble(**case.trouble)
        text = sentence(open_split, case.url)
        found.append(text)
    return found


@pytest.mark.slow
def test_a_store_that_cannot_be_read_is_explained(store, shards, monkeypatch):
    store.put("empty")
    store.put("loose")
    store.put("loose/train/cat/1.jpg", GOOD[0])
    for bucket in ("noindex", "lost", "other"):
        store.upload(shards, bucket)
    store.delete("noindex/train/shard-00001.tar.idx")
    store.delete("lost/train/shard-00002.tar")
    store.put("other/train/shard-00000.tar", b"0" * 1024)
    good = "s3://bucket/set"
    cases = [
        Unreadable("s3://nowhere/set", {}, "no such bucket"),
        Unreadable("s3://empty", {}, "has no folder train/"),
        Unreadable("s3://loose", {}, "data pack"),
        Unreadable(
            "s3://noindex", {}, "1 of the 4 shards in train/ have no index file beside them"
        ),
        Unreadable("s3://lost", {}, "has 3 of 4 shards"),
        Unreadable("s3://other", {}, "has 1024 bytes, but its index was made when it had"),
        Unreadable(good, {"answer": "403:AccessDenied"}, "no permission (AccessDenied)"),
        Unreadable(good, {"answer": "403:InvalidAccessKeyId"}, "does not accept the credentials"),
        Unreadable(
            good, {"answer": "400:ExpiredToken"}, "expired (ExpiredToken), after 3 attempts in"
        ),
        Unreadable(good, {"answer": "503:SlowDown"}, "status 503 (SlowDown), after"),
        Unreadable(good, {"hang": True}, "it has not answered in time, after"),
        Unreadable(f"{store.web}/bucket/nothing", {}, "shards.json"),
    ]
    found = in_child(sentences, store, cases)
    for case, text in zip(cases, found, strict=True):
        assert case.words in text, (case.words, text)
        assert_no_secret(text)

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    without_credentials = Unreadable(good, {}, "no credentials for S3")
    [text] = in_child(sentences, store, [without_credentials])
    assert without_credentials.words in text


def changed(store, content):
    """What is said of an image after its shard was replaced."""
    index = open_split("s3://changing")
    first = load(index, 0).reason
    replace_shards(store, "changing", content)
    return first, sentence(load, index, 0)


def replace_shards(store, bucket, content):
    """Write other bytes to all shards of a bucket."""
    for number in range(4):
        store.put(f"{bucket}/train/shard-0000{number}.tar", content)


def hangs(store, timeout_s):
    """What the reader says of a store that stops answering. It must also close."""
    config = DataConfig(read_timeout_s=timeout_s)
    index = open_split("s3://bucket/set")
    reader = remote_read.build_reader(index, config)
    store.trouble(hang=True)
    requested = reader.request(np.arange(64))
    text = sentence(reader.collect, requested)
    reader.close()
    return text


@pytest.mark.slow
def test_a_store_that_stops_answering_ends_the_run(store):
    text = in_child(hangs, store, 2.0)
    assert "cannot be read: it has not answered in time, after" in text


def test_a_shard_that_changes_is_noticed(store, shards):
    store.upload(shards, "changing")
    size = (shards / "train" / "shard-00000.tar").stat().st_size
    content = b"x" * size
    first, text = in_child(changed, store, content)
    assert first is None
    assert "has changed since this run made its list of images" in text


def train_arguments(data_dir, output_dir):
    """A small training on an object store."""
    settings = options(
        config="configs/quickstart.yaml",
        data__kind="folder",
        data__data_dir=data_dir,
        output_dir=output_dir,
        data__train_crop_size=16,
        data__val_resize_size=18,
        data__val_crop_size=16,
        train__global_batch_size=8,
        train__epochs=9,
        train__eval_interval_epochs=0,
        schedule__warmup_epochs=0,
        distributed__threads=1,
        log__wandb="disabled",
    )
    return ["train", *settings]


def interrupt_when_it_hangs(store, only, seconds):
    """Let requests whose path matches hang, and press Ctrl-C a while later."""
    store.trouble(hang=True, only=only)
    interrupt = (os.getpid(), signal.SIGINT)
    timer = threading.Timer(seconds, os.kill, interrupt)
    timer.start()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["start", "training"])
def test_ctrl_c_ends_a_run_whose_store_hangs(store, tmp_path, monkeypatch, place):
    """Long before data.read_timeout_s, 300 s, is over; here a request times out after a second."""
    monkeypatch.setattr(client, "_REQUEST_SECONDS", (0.5, 1.0))
    monkeypatch.setattr(client, "_SECONDS_AFTER_A_STOP", 0.5)
    monkeypatch.setattr(client, "LIST_TIMEOUT_S", 300.0)

    def entry(arguments):
        from resnet_dist import engine

        real = engine.train_step

        def train_step(model, state, *rest):
            if state.step == 1:
                interrupt_when_it_hangs(store, "", 2.0)
            return real(model, state, *rest)

        engine.train_step = train_step
        if place == "start":
            interrupt_when_it_hangs(store, "idx", 3.0)
        return main(arguments)

    arguments = train_arguments("s3://bucket/set", tmp_path / "run")
    processes = start_app(1, arguments, str(tmp_path / "log"), entry)
    codes = wait_app(processes, timeout=90)
    log = (tmp_path / "log").read_text()
    if place == "start":
        assert codes == [1], log
        assert "KeyboardInterrupt" in log, log
    else:
        assert codes == [2], log
        assert "it has not answered in time" in log, log


@pytest.mark.slow
def test_all_ranks_stop_when_a_shard_changes(store, shards, tmp_path):
    """Exit code 2 on each of them, and the sentence in place of a traceback."""
    store.upload(shards, "moving")

    def entry(arguments):
        from resnet_dist import engine

        real = engine.train_step

        def train_step(model, state, *rest):
            if state.step == 1 and os.environ["RANK"] == "1":
                replace_shards(store, "moving", b"x" * 300_000)
            return real(model, state, *rest)

        engine.train_step = train_step
        return main(arguments)

    arguments = train_arguments("s3://moving/", tmp_path / "run")
    code, log = run_command(tmp_path, arguments, 2, entry)
    assert code == 2, log
    assert "has changed since this run made its list" in log
    assert "Traceback" not in log
    assert_no_secret(log)
    for path in (tmp_path / "run").glob("*.*"):
        content = path.read_bytes()
        assert_no_secret(content.decode(errors="replace"))


def count_requests(store, folder, cache_dir, limit_gb):
    """What is shown, with the cache, and the number of requests for it."""
    index = open_split("s3://bucket/set")
    store.trouble()
    shown = show(index, folder, cache_dir=cache_dir, cache_gb=limit_gb)
    return shown, store.requests()


def size_of(folder):
    """Bytes of all files below a folder."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            size += path.stat().st_size
    return size


@pytest.mark.slow
def test_the_cache_saves_requests_and_never_lies(store, shards, tmp_path):
    """Warm, damaged, too small and shared with another data set."""
    local = show(open_split(shards), tmp_path)
    cache = tmp_path / "cache"
    (cache / "mine").mkdir(parents=True)
    (cache / "mine" / "data").write_bytes(b"not of the cache")
    cold, cold_requests = in_child(count_requests, store, tmp_path, str(cache), 1)
    warm, warm_requests = in_child(count_requests, store, tmp_path, str(cache), 1)
    assert cold == warm == local
    assert cold_requests > 0
    assert warm_requests == 0

    (data,) = cache.glob("images_*/data")
    content = bytearray(data.read_bytes())
    # Images lie in the order in which they arrived, so that one byte may meet none that is read.
    for position in range(0, len(content), 64):
        content[position] ^= 1
    data.write_bytes(content)
    damaged, requests = in_child(count_requests, store, tmp_path, str(cache), 1)
    assert damaged == local
    assert requests > 0

    limit = size_of(data.parent) // 2
    limit_gb = limit / 1e9
    halved, requests = in_child(count_requests, store, tmp_path, str(cache), limit_gb)
    assert halved == local
    assert requests > 0
    assert 0 < size_of(data.parent) <= limit

    # Another data set takes the place of one that nobody uses.
    store.upload(shards, "again")
    in_child(read_through, "s3://again", str(cache), limit)
    (other,) = cache.glob("images_*")
    assert other != data.parent
    assert size_of(other) <= limit
    assert (cache / "mine" / "data").read_bytes() == b"not of the cache"


def read_through(url, cache_dir, limit):
    config = DataConfig(cache_dir=cache_dir, cache_gb=limit / 1e9)
    index = open_split(url)
    reader = remote_read.build_reader(index, config)
    rows = np.arange(len(index))
    requested = reader.request(rows)
    images = reader.collect(requested)
    reader.close()
    return [image.data for image in images]


def hammer(url, cache_dir, limit):
    """Read everything again and again, until killed."""
    while True:
        read_through(url, cache_dir, limit)


def kill_while_caching(cache, limit, kills):
    """Kill processes that fill the cache; its largest size meanwhile."""
    largest = 0
    for kill in range(kills):
        children = []
        for _ in range(2):
            child = start_child(hammer, "s3://bucket/set", str(cache), limit)
            children.append(child)
        deadline = time.monotonic() + 30
        begun = False
        while time.monotonic() < deadline:
            largest = max(largest, size_of(cache))
            files = list(cache.glob("images_*/data"))
            if files and not begun:
                begun = True
                seconds = 0.02 * (kill % 20)
                deadline = time.monotonic() + seconds
            time.sleep(0.002)
        for process, receiver in children:
            kill_child(process, receiver)
    return largest


def kill_child(process, receiver):
    """Kill what `start_child` has started."""
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    receiver.close()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.long)])
def test_kills_leave_the_cache_usable(store, shards, tmp_path, kills):
    local = read_all(open_split(shards))
    lengths = [len(data) for data in local]
    limit = sum(lengths) // 2
    cache = tmp_path / "cache"
    cache.mkdir()
    largest = kill_while_caching(cache, limit, kills)
    assert 0 < largest <= limit
    assert in_child(read_through, "s3://bucket/set", str(cache), limit) == local


def write_steps(folder, path, cache_dir, steps):
    """Show the samples from the first step that is not written, as a resumed run does."""
    done = len(path.read_text().splitlines())
    index = open_split("s3://bucket/set")
    loader = train_loader(index, folder, global_batch_size=16, cache_dir=cache_dir)
    with open(path, "a") as file:
        for step, batch in enumerate(loader.batches(done, steps), done):
            line = json.dumps(record_of(step, batch))
            file.write(f"{line}\n")
            file.flush()
            time.sleep(0.02)


def record_of(step, batch):
    """What a step has shown, as a list that JSON can write."""
    rows = batch.indices.tolist()
    return [step, rows, sum_of_pixels(batch)]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_no_sample_is_missing_or_twice_after_kills(store, shards, tmp_path, kills):
    """A process that reads a batch every 20 ms is killed again and again, and goes on."""
    steps = 6 * (4 + kills)
    store.trouble(latency=0.03, errors=0.01, truncated=0.01)
    path = tmp_path / "steps"
    path.touch()
    cache = str(tmp_path / "cache")
    for kill in range(kills):
        before = path.stat().st_size
        enough = before + 20 * (kill % 7)
        process, receiver = start_child(write_steps, tmp_path, path, cache, steps)
        while path.stat().st_size <= enough and process.is_alive():
            time.sleep(0.002)
        assert process.is_alive(), receiver.recv()
        kill_child(process, receiver)
    in_child(write_steps, tmp_path, path, cache, steps)

    index = open_split(shards)
    loader = train_loader(index, tmp_path, global_batch_size=16)
    expected = []
    for step, batch in enumerate(loader.batches(0, steps)):
        expected.append(record_of(step, batch))
    loader.close()
    lines = path.read_text().splitlines()
    seen = [json.loads(line) for line in lines]
    assert seen == expected


def list_keys():
    listing = list_folder("s3://bucket/set/train")
    return len(listing.objects)


@pytest.mark.parametrize("keys", [20_500, pytest.param(1_281_167, marks=pytest.mark.long)])
def test_long_listings(store, keys):
    """Canned pages of 1,000 keys."""
    store.trouble(keys=keys)
    assert in_child(list_keys) == keys


def first_images(index):
    """The fingerprint, and the bytes of the first three images."""
    images = [load(index, row).data for row in range(3)]
    return index.fingerprint(), images


def google(url):
    os.environ["GOOGLE_BASE_URL"] = os.environ["AWS_ENDPOINT_URL"]
    os.environ["GOOGLE_SKIP_SIGNATURE"] = "true"
    return first_images(open_split(url))


def test_google_cloud_storage(store, shards):
    """Its protocol for reading is that of S3, but for the signature."""
    local = first_images(open_split(shards))
    assert in_child(google, "gs://bucket/set") == local


def ranges(url):
    """Neighbours come with one request; images that are too large or long are cut up right."""
    index = open_split(url)
    client.PIECE_BYTES = 1000
    shard, offset, length = index.place(3)
    data = load(index, 3).data
    pin = index.pins[shard]
    patience = Patience(5.0)
    return data == read_range(shard, offset, length, pin, patience)


def test_ranges(store):
    assert in_child(ranges, "s3://bucket/set")

    def places(*offsets, shard="a", length=100):
        return [ImagePlace(0, shard, offset, length) for offset in offsets]

    near = places(0, 100, 200 + MAX_GAP_BYTES)
    assert coalesce(near) == [near]
    behind_the_gap = 101 + MAX_GAP_BYTES
    far = places(0, behind_the_gap)
    assert coalesce(far) == [places(0), places(behind_the_gap)]
    same = places(5, 5)
    assert coalesce(same) == [same]
    in_two_shards = places(0) + places(0, shard="b")
    assert len(coalesce(in_two_shards)) == 2
    large = places(0, 5_000_000, length=4_990_000)
    assert len(coalesce(large)) == 2
    assert coalesce([]) == []


def test_the_number_of_requests_follows_the_latency():
    assert requests_in_flight(1000, 0.030) == 45
    assert requests_in_flight(1000, 0.0001) == 4
    assert requests_in_flight(1e6, 1.0) == 128
    gate = Gate(2)
    with gate, gate:
        gate.set_limit(3)
        with gate:
            assert gate.inside == gate.most == 3
    assert gate.inside == 0


def test_addresses():
    assert check_url("s3://bucket/a/") == "s3://bucket/a"
    assert check_url("/data/a//b/") == "/data/a//b/"
    assert not is_url("data/s3")
    wrong_ones = (
        "s3:/bucket/a",
        "S3://bucket",
        "hdfs://host/a",
        "s3://",
        "s3://bucket//a",
        "s3://bucket/../a",
        "https://user:secret@host/a",
        "https://host/a?X-Amz-Signature=secret",
    )
    for wrong in wrong_ones:
        with pytest.raises(ValueError) as raised:
            DataConfig(data_dir=wrong)
        text = str(raised.value)
        assert "data.data_dir is" in text
        assert "secret" not in text

    with pytest.raises(ValueError, match="output_dir is 's3://bucket/run'"):
        Config(output_dir="s3://bucket/run")
    config = DataConfig(data_dir="s3://bucket/a b/", cache_dir="~/cache")
    assert config.data_dir == "s3://bucket/a b"
    assert config.cache_dir == os.path.expanduser("~/cache")


def use_and_fork():
    list_folder("s3://bucket/set")
    child = os.fork()
    if child == 0:
        try:
            list_folder("s3://bucket/set")
        except RuntimeError as error:
            if "was forked" in str(error):
                os._exit(7)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_a_fork_after_the_first_request_is_refused(store):
    in_child(use_and_fork)
