"""An S3 server on this machine (moto's) with a small proxy before it that makes trouble.

Both run in one forked process, so that the process of the tests keeps neither their threads nor
boto3. Clients run in forked processes too (`in_child`): the threads of the client library do not
survive a fork, and later tests fork ranks.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.request

from dist_utils import begin_forked_process

SECRETS = ("AKIAEXAMPLEKEY", "very-secret-key", "very-secret-token")

META = (
    b'ETag: "abc"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nContent-Type: application/xml'
)


class Faults:
    """What the proxy does with requests for objects; `PUT /faults` changes it."""

    def __init__(self):
        self.change({})

    def change(self, wanted):
        self.latency = wanted.get("latency", 0.0)
        self.errors = wanted.get("errors", 0.0)
        self.truncated = wanted.get("truncated", 0.0)
        self.hang = wanted.get("hang", False)
        self.answer = wanted.get("answer", "")  # "403:AccessDenied"
        self.only = re.compile(wanted.get("only", ""))
        self.keys = wanted.get("keys", 0)  # in canned pages of a listing
        self.requests = 0
        self.random = random.Random(0)


def read_head(connection, buffer):
    while b"\r\n\r\n" not in buffer:
        data = connection.recv(65536)
        if not data:
            return None, b""
        buffer += data
    head, _, rest = buffer.partition(b"\r\n\r\n")
    return head, rest


def content_length(head):
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return int(found[1]) if found else 0


def read_body(connection, length, buffer):
    while len(buffer) < length:
        data = connection.recv(1 << 20)
        if not data:
            break
        buffer += data
    return buffer[:length], buffer[length:]


def answer(status, body=b"", more=META):
    line = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n".encode()
    return line + more + b"\r\n\r\n" + body


def canned_page(target, keys):
    """A page of 1,000 keys of a listing, by the number in the continuation token."""
    found = re.search(r"continuation-token=(\d+)", target)
    first = int(found[1]) if found else 0
    last = min(first + 1000, keys)
    contents = "".join(
        f"<Contents><Key>set/train/image-{i:08d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z"
        f"</LastModified><ETag>&quot;{i:032x}&quot;</ETag><Size>110000</Size></Contents>"
        for i in range(first, last)
    )
    more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < keys else ""
    return (
        f"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name>{more}"
        f"<IsTruncated>{str(last < keys).lower()}</IsTruncated>{contents}</ListBucketResult>"
    ).encode()


def serve(connection, port, faults):
    """One connection of a client: each request goes on to the real server, or to trouble."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    upstream = socket.create_connection(("127.0.0.1", port))
    buffer = b""
    with connection, upstream:
        while True:
            head, buffer = read_head(connection, buffer)
            if head is None:
                return
            body, buffer = read_body(connection, content_length(head), buffer)
            method, target = head.split(b" ", 2)[:2]
            if target == b"/faults":
                if method == b"PUT":
                    faults.change(json.loads(body))
                connection.sendall(answer(200, str(faults.requests).encode()))
                continue
            faults.requests += 1
            touched = faults.only.search(target.decode())
            draw = faults.random.random()
            if faults.hang and touched:
                time.sleep(60)
                return
            time.sleep(faults.latency)
            if faults.keys:
                connection.sendall(answer(200, canned_page(target.decode(), faults.keys)))
                continue
            if touched and (faults.answer or draw < faults.errors):
                status, _, code = (faults.answer or "503:SlowDown").partition(":")
                text = f"<Error><Code>{code}</Code><AWSAccessKeyId>{SECRETS[0]}</AWSAccessKeyId>"
                connection.sendall(answer(status, f"{text}</Error>".encode()))
                continue
            upstream.sendall(head + b"\r\n\r\n" + body)
            reply, rest = read_head(upstream, b"")
            length = 0 if method == b"HEAD" else content_length(reply)
            content, _ = read_body(upstream, length, rest)
            if touched and length and faults.errors <= draw < faults.errors + faults.truncated:
                connection.sendall(reply + b"\r\n\r\n" + content[: length // 2])
                return
            connection.sendall(reply + b"\r\n\r\n" + content)


def run_server(sender):
    """The life of the server's process."""
    from moto.server import ThreadedMotoServer

    real = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    real.start()
    _, port = real.get_host_and_port()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    faults = Faults()
    sender.send((port, listener.getsockname()[1]))

    def quietly(connection):
        with contextlib.suppress(OSError, AttributeError, IndexError):
            serve(connection, port, faults)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=quietly, args=(connection,), daemon=True).start()


class Store:
    """The server as the tests see it."""

    def __init__(self):
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=run_server, args=(sender,), daemon=True)
        self.process.start()
        self.port, self.proxy_port = receiver.recv()
        self.web = f"http://127.0.0.1:{self.proxy_port}"

    def environment(self):
        key, secret, token = SECRETS
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_SESSION_TOKEN": token,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.web,
        }

    def put(self, path, content=b""):
        """Write an object, or make a bucket."""
        url = f"http://127.0.0.1:{self.port}/{path}"
        # With urllib's own type, that of a form, the server waits for more.
        kind = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read"}
        request = urllib.request.Request(url, data=content, method="PUT", headers=kind)
        urllib.request.urlopen(request).close()

    def delete(self, path):
        url = f"http://127.0.0.1:{self.port}/{path}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def upload(self, folder, bucket, prefix=""):
        """Write all files below a folder, but for hidden ones and the index of the split, which
        nobody may need."""
        self.put(bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.name != "index.bin":
                self.put(f"{bucket}/{prefix}{path.relative_to(folder)}", path.read_bytes())

    def trouble(self, **faults):
        """From now on the proxy does this, and nothing else."""
        request = urllib.request.Request(
            f"{self.web}/faults", data=json.dumps(faults).encode(), method="PUT"
        )
        urllib.request.urlopen(request).close()

    def requests(self):
        """Number of requests since the last call of `trouble`."""
        with urllib.request.urlopen(f"{self.web}/faults") as reply:
            return int(reply.read())

    def close(self):
        self.process.kill()
        self.process.join()


def start_child(function, *args):
    """Fork a process that calls `function(*args)`; returns it and the pipe for its result."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def in_child(function, *args):
    """What `function(*args)` returns in a forked process. Raises AssertionError if it fails."""
    process, receiver = start_child(function, *args)
    try:
        assert receiver.poll(120), "no answer from the forked process"
        failure, result = receiver.recv()
        assert failure is None, failure
        return result
    finally:
        process.kill()
        process.join()


def _child(sender, function, args):
    begin_forked_process()
    try:
        sender.send((None, function(*args)))
    except BaseException:
        sender.send((traceback.format_exc(), None))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
