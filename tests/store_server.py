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

END_OF_HEAD = b"\r\n\r\n"

KEYS_OF_A_PAGE = 1000
"""Keys of a canned page of a listing, as S3 has them."""


class Faults:
    """What the proxy does with requests for objects; `PUT /faults` changes it."""

    def __init__(self):
        self.change({})

    def change(self, wanted):
        self.latency = wanted.get("latency", 0.0)
        self.errors = wanted.get("errors", 0.0)
        self.truncated = wanted.get("truncated", 0.0)
        self.hang = wanted.get("hang", False)
        # Such as "403:AccessDenied".
        self.answer = wanted.get("answer", "")
        self.only = re.compile(wanted.get("only", ""))
        # Number of keys in canned pages of a listing.
        self.keys = wanted.get("keys", 0)
        self.requests = 0
        self.random = random.Random(0)

    def draw_trouble(self):
        """Draw what happens to a request: "error", "truncated" or ""."""
        draw = self.random.random()
        if draw < self.errors:
            return "error"
        if draw < self.errors + self.truncated:
            return "truncated"
        return ""


def read_head(connection, buffer):
    """The head of the next message, and the bytes after it; (None, b"") at the end."""
    while END_OF_HEAD not in buffer:
        data = connection.recv(65536)
        if not data:
            return None, b""
        buffer += data
    head, _, rest = buffer.partition(END_OF_HEAD)
    return head, rest


def content_length(head):
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    if found is None:
        return 0
    return int(found[1])


def read_body(connection, length, buffer):
    """A body of `length` bytes that begins in the buffer, and the bytes after it."""
    while len(buffer) < length:
        data = connection.recv(1 << 20)
        if not data:
            break
        buffer += data
    body = buffer[:length]
    rest = buffer[length:]
    return body, rest


def answer(status, body=b"", more=META):
    """A whole message."""
    line = f"HTTP/1.1 {status} X\r\n"
    length = f"Content-Length: {len(body)}\r\n"
    head = (line + length).encode() + more
    return head + END_OF_HEAD + body


def canned_page(target, keys):
    """A page of 1,000 keys of a listing, by the number in the continuation token."""
    found = re.search(r"continuation-token=(\d+)", target)
    first = 0
    if found is not None:
        first = int(found[1])
    last = min(first + KEYS_OF_A_PAGE, keys)
    is_truncated = "false"
    token = ""
    if last < keys:
        is_truncated = "true"
        token = f"<NextContinuationToken>{last}</NextContinuationToken>"
    entries = [canned_entry(number) for number in range(first, last)]
    contents = "".join(entries)
    page = (
        f"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name>{token}"
        f"<IsTruncated>{is_truncated}</IsTruncated>{contents}</ListBucketResult>"
    )
    return page.encode()


def canned_entry(number):
    """A key in a listing."""
    return (
        f"<Contents><Key>set/train/image-{number:08d}.jpg</Key>"
        f"<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{number:032x}&quot;</ETag><Size>110000</Size></Contents>"
    )


def error_page(text):
    """The answer to a request: an error such as "403:AccessDenied", with a secret in it."""
    status, _, code = text.partition(":")
    key = f"<AWSAccessKeyId>{SECRETS[0]}</AWSAccessKeyId>"
    body = f"<Error><Code>{code}</Code>{key}</Error>"
    return answer(status, body.encode())


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
                count = str(faults.requests)
                connection.sendall(answer(200, count.encode()))
                continue
            request = head + END_OF_HEAD + body
            goes_on = serve_object(connection, upstream, request, faults)
            if not goes_on:
                return


def serve_object(connection, upstream, request, faults):
    """Answer a request for an object or a listing; returns whether the connection goes on."""
    method, target = request.split(b" ", 2)[:2]
    text = target.decode()
    faults.requests += 1
    is_touched = faults.only.search(text) is not None
    trouble = faults.draw_trouble()
    if faults.hang and is_touched:
        time.sleep(60)
        return False
    time.sleep(faults.latency)
    if faults.keys:
        page = canned_page(text, faults.keys)
        connection.sendall(answer(200, page))
        return True
    if is_touched and faults.answer:
        connection.sendall(error_page(faults.answer))
        return True
    if is_touched and trouble == "error":
        connection.sendall(error_page("503:SlowDown"))
        return True

    upstream.sendall(request)
    head, rest = read_head(upstream, b"")
    length = 0
    if method != b"HEAD":
        length = content_length(head)
    body, _ = read_body(upstream, length, rest)
    if is_touched and length and trouble == "truncated":
        half = body[: length // 2]
        connection.sendall(head + END_OF_HEAD + half)
        return False
    connection.sendall(head + END_OF_HEAD + body)
    return True


def run_server(sender):
    """The life of the server's process."""
    from moto.server import ThreadedMotoServer

    real = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    real.start()
    _, port = real.get_host_and_port()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    _, proxy_port = listener.getsockname()
    faults = Faults()
    sender.send((port, proxy_port))

    def quietly(connection):
        with contextlib.suppress(OSError, AttributeError, IndexError):
            serve(connection, port, faults)

    while True:
        connection, _ = listener.accept()
        thread = threading.Thread(target=quietly, args=(connection,), daemon=True)
        thread.start()


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
        headers = {
            # With urllib's own type, that of a form, the server waits for more.
            "Content-Type": "application/octet-stream",
            "x-amz-acl": "public-read",
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=content,
            method="PUT",
            headers=headers,
        )
        urllib.request.urlopen(request).close()

    def delete(self, path):
        url = f"http://127.0.0.1:{self.port}/{path}"
        request = urllib.request.Request(url, method="DELETE")
        urllib.request.urlopen(request).close()

    def upload(self, folder, bucket, prefix=""):
        """Write all files below a folder, but for hidden ones and the index of the split, which
        nobody may need."""
        self.put(bucket)
        for path in sorted(folder.rglob("*")):
            is_hidden = path.name.startswith(".")
            if not path.is_file() or is_hidden or path.name == "index.bin":
                continue
            key = path.relative_to(folder)
            self.put(f"{bucket}/{prefix}{key}", path.read_bytes())

    def trouble(self, **faults):
        """From now on the proxy does this, and nothing else."""
        content = json.dumps(faults)
        request = urllib.request.Request(
            f"{self.web}/faults",
            data=content.encode(),
            method="PUT",
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
    process = context.Process(
        target=_child,
        args=(sender, function, args),
        daemon=True,
    )
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
        result = function(*args)
        sender.send((None, result))
    except BaseException:
        failure = traceback.format_exc()
        sender.send((failure, None))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
