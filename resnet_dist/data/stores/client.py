"""Requests to object stores and web servers, through the library obstore.

Reads are blocking calls, which release Python's lock while they wait. A request that fails for a
reason that may pass is tried again, until a limit of time is over.

The library has threads of its own, which do not survive a fork. Clients are made in the process
that uses them, and a process whose parent has made one is refused, since it would hang.
"""

import functools
import math
import netrc
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar
from urllib.parse import urlsplit

from resnet_dist.data.stores.errors import RequestFailure, StoreError, classify_error

PIECE_BYTES = 2**23
"""Largest number of bytes of one request. A longer range is read in several."""

LIST_TIMEOUT_S = 60.0
"""Seconds after which a request of the start of a run (listing, index files) is an error."""

# A single request gets a fraction of the time for all attempts, within these limits.
_REQUEST_SECONDS = (0.5, 20.0)
_FRACTION_OF_A_REQUEST = 5

# Waits between attempts: doubled each time, up to the longest.
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0

# A failed request is tried again for this time after the run was asked to stop: a store that works
# then still lets the training save.
_SECONDS_AFTER_A_STOP = 5.0

_SIGN_INS = 3
# Credentials are asked for again after this time; the library does so five minutes before.
_CREDENTIALS_LIFE = timedelta(minutes=10)

Result = TypeVar("Result")

# Jitter must differ between ranks, and must not touch the random state of the training.
_jitter = random.SystemRandom()

_lock = threading.Lock()
_process_with_clients = 0
# By host: how often its credentials were refused because they had expired. Each number has a client
# of its own, which reads the credentials anew.
_sign_ins: dict[str, int] = {}
# By time.monotonic(): no request is tried again after it.
_last_attempt_at = math.inf


@dataclass(frozen=True)
class RemoteObject:
    """An object in a store, as a listing or a request describes it."""

    name: str
    """the part of its address behind the last slash"""
    size: int
    """number of bytes"""
    pin: str
    """changes when the object does: its ETag, or else the time of its modification"""


@dataclass(frozen=True)
class Listing:
    """What lies directly in a folder."""

    objects: list[RemoteObject]
    folders: list[str]
    """names of sub-folders"""


@dataclass
class Patience:
    """How long a request may be tried again, and a way to end the waiting early."""

    timeout_s: float
    """seconds for all attempts together"""
    stopped: threading.Event | None = None
    """set when nobody waits for the result any more"""

    def wait(self, seconds: float) -> bool:
        """Wait. Returns False if nobody waits for the result any more."""
        if self.stopped is None:
            time.sleep(seconds)
            return True
        return not self.stopped.wait(seconds)


def give_up_soon() -> None:
    """Soon stop to try failed requests of this process again, since the run was asked to stop.

    A request that is under way ends by its own time-out. A signal handler may call this.
    """
    global _last_attempt_at
    _last_attempt_at = min(_last_attempt_at, time.monotonic() + _SECONDS_AFTER_A_STOP)


def keep_trying() -> None:
    """Take `give_up_soon` back, since the run goes on."""
    global _last_attempt_at
    _last_attempt_at = math.inf


def list_folder(url: str) -> Listing:
    """List what lies directly in a folder.

    Args:
        url: the address of the folder, without a slash at its end; not of a web server.

    Raises:
        StoreError: the bucket cannot be listed.
    """

    def request(store: Any, path: str) -> Any:  # noqa: ANN401 - the library's objects
        import obstore

        return obstore.list_with_delimiter(store, path or None)

    found = _attempt(url, request, Patience(LIST_TIMEOUT_S))
    objects = [_describe(meta) for meta in found["objects"]]
    folders = [prefix.rpartition("/")[2] for prefix in found["common_prefixes"]]
    return Listing(objects, sorted(folders))


def look_up(url: str) -> RemoteObject:
    """Size and pin of one object.

    Raises:
        StoreError: there is no such object, or the store cannot be asked.
    """

    def request(store: Any, path: str) -> RemoteObject:  # noqa: ANN401
        import obstore

        return _describe(obstore.head(store, path))

    return _attempt(url, request, Patience(LIST_TIMEOUT_S))


def read_object(url: str) -> bytes:
    """Read a whole object.

    Raises:
        StoreError: it cannot be read.
    """

    def request(store: Any, path: str) -> bytes:  # noqa: ANN401
        import obstore

        content: bytes = obstore.get(store, path).bytes().to_bytes()
        return content

    return _attempt(url, request, Patience(LIST_TIMEOUT_S))


def read_range(url: str, offset: int, length: int, pin: str, patience: Patience) -> bytes:
    """Read a range of an object.

    Args:
        url: the address of the object.
        offset: first byte.
        length: number of bytes.
        pin: the object's pin when the index was made.
        patience: how long to try.

    Raises:
        StoreError: it cannot be read, or is not the object of the index any more.
    """
    pieces = []
    stop = offset + length
    for start in range(offset, stop, PIECE_BYTES):
        piece_stop = min(start + PIECE_BYTES, stop)
        pieces.append(_read_piece(url, start, piece_stop, pin, patience))
    if len(pieces) == 1:
        return pieces[0]
    return b"".join(pieces)


def _read_piece(url: str, start: int, stop: int, pin: str, patience: Patience) -> bytes:
    """Read at most `PIECE_BYTES` bytes of an object."""

    def request(store: Any, path: str) -> bytes:  # noqa: ANN401
        import obstore

        answer = obstore.get(store, path, options={"range": (start, stop)})
        found = _pin_of(answer.meta)
        if found != pin:
            raise StoreError(
                f"{url} has changed since this run made its list of images (it was {pin}, now "
                f"{found}): start again when it is complete, with the .idx file that belongs to it"
            )
        content: bytes = answer.bytes().to_bytes()
        if len(content) != stop - start:
            raise EOFError
        return content

    return _attempt(url, request, patience)


def _attempt(url: str, request: Callable[[Any, str], Result], patience: Patience) -> Result:
    """Make a request, again and again while it fails for a reason that may pass.

    Args:
        url: the address of the object or folder.
        request: the request, with the client and the path inside of the bucket.
        patience: how long to try.

    Raises:
        StoreError: it cannot succeed, or has not within the time.
    """
    parts = urlsplit(url)
    host = f"{parts.scheme}://{parts.netloc}"
    path = parts.path.strip("/")
    started = time.monotonic()
    attempts = 0
    expired = 0
    while True:
        sign_in = _sign_ins.get(host, 0)
        store = _open_store(host, patience.timeout_s, sign_in)
        attempts += 1
        try:
            return request(store, path)
        except StoreError:
            raise
        except Exception as error:
            if not _is_of_the_library(error):
                raise
            failure = classify_error(error, parts.scheme)
        if failure.remedy == "sign in again":
            expired += 1
            _sign_ins[host] = sign_in + 1
        wait = _wait_before(attempts)
        seconds = time.monotonic() - started
        too_late = seconds + wait > patience.timeout_s
        stops = time.monotonic() + wait > _last_attempt_at
        if failure.remedy == "none" or expired >= _SIGN_INS or too_late or stops:
            raise StoreError(_message(url, failure, attempts, seconds)) from None
        if not patience.wait(wait) or time.monotonic() > _last_attempt_at:
            raise StoreError(f"{url}: the reading was stopped")


def _is_of_the_library(error: Exception) -> bool:
    """Whether an exception tells of a failed request, and not of a mistake in the program."""
    if isinstance(error, (FileNotFoundError, EOFError)):
        return True
    return type(error).__module__.startswith("obstore") or "BaseError" in {
        kind.__name__ for kind in type(error).__mro__
    }


def _wait_before(attempts: int) -> float:
    """Seconds to wait after `attempts` failed attempts: doubled each time, with jitter."""
    longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempts - 1))
    return longest * _jitter.uniform(0.5, 1.0)


def _message(url: str, failure: RequestFailure, attempts: int, seconds: float) -> str:
    """The sentence that tells of a failed request."""
    text = f"{url} cannot be read: {failure.reason}"
    if attempts > 1:
        text = f"{text}, after {attempts} attempts in {seconds:.1f} s"
    if not failure.way_out:
        return text
    first_letter = failure.way_out[0].upper()
    way_out = first_letter + failure.way_out[1:]
    return f"{text}. {way_out}"


def _describe(meta: Any) -> RemoteObject:  # noqa: ANN401 - a dictionary of the library
    """The library's description of an object as ours."""
    name = meta["path"].rpartition("/")[2]
    return RemoteObject(name, int(meta["size"]), _pin_of(meta))


def _pin_of(meta: Any) -> str:  # noqa: ANN401
    """The pin of an object: its size, and its ETag or else the time of its modification."""
    tag = meta["e_tag"]
    if not tag:
        tag = f"modified {meta['last_modified'].isoformat()}"
    return f"{meta['size']} bytes, {tag}"


def _open_store(host: str, timeout_s: float, sign_in: int) -> Any:  # noqa: ANN401
    """The client of a bucket or web server, which is made at the first use.

    Args:
        host: scheme and bucket or host.
        timeout_s: seconds for all attempts of a request.
        sign_in: see `_sign_ins`.
    """
    global _process_with_clients
    with _lock:
        if _process_with_clients not in (0, os.getpid()):
            raise RuntimeError(
                "a process that has read from an object store was forked: the library's threads do "
                "not survive that. Fork before the first read, or use the spawn method"
            )
        _process_with_clients = os.getpid()
        return _make_store(host, timeout_s, sign_in)


@functools.lru_cache(maxsize=16)
def _make_store(host: str, timeout_s: float, sign_in: int) -> Any:  # noqa: ANN401
    """Make a client. Credentials are those that the store's own tools use."""
    store = _import_store()
    shortest, longest = _REQUEST_SECONDS
    seconds = min(longest, max(shortest, timeout_s / _FRACTION_OF_A_REQUEST))
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=seconds),
        "connect_timeout": timedelta(seconds=seconds),
        "allow_http": True,
    }
    # Attempts are repeated here, where short answers and changed objects are noticed too.
    once = {"max_retries": 0}
    scheme, _, name = host.partition("://")
    if scheme == "s3":
        settings = _s3_settings()
        return store.S3Store(name, client_options=options, retry_config=once, **settings)
    if scheme == "gs":
        return store.GCSStore(name, client_options=options, retry_config=once)
    authorization = _netrc_authorization(name)
    if authorization:
        options["default_headers"] = {"Authorization": authorization}
    return store.HTTPStore(host, client_options=options, retry_config=once)


def _import_store() -> Any:  # noqa: ANN401
    """The library's module of clients."""
    try:
        import obstore.store
    except ImportError:
        raise StoreError(
            "data.data_dir is an address, which needs the library obstore: install it by "
            "`pip install 'resnet-dist[stores]'`"
        ) from None
    return obstore.store


def _s3_settings() -> dict[str, Any]:
    """Settings of a client for S3: credentials and region, as the AWS command line finds them.

    The library itself reads the endpoint, AWS_REGION and AWS_SKIP_SIGNATURE from the environment.
    """
    skip = os.environ.get("AWS_SKIP_SIGNATURE", "")
    if skip.lower() in ("1", "true"):
        return {}
    import boto3

    session = boto3.Session()
    credentials = session.get_credentials()
    if credentials is None:
        raise StoreError(
            "there are no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or run `aws configure`; AWS_SKIP_SIGNATURE=true for a public bucket"
        )

    def sign_in() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LIFE,
        }

    settings: dict[str, Any] = {"credential_provider": sign_in}
    region_is_set = "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ
    if session.region_name and not region_is_set:
        settings["region"] = session.region_name
    return settings


def _netrc_authorization(host: str) -> str:
    """The value of the header Authorization for a web server, from ~/.netrc; "" for none."""
    import base64

    try:
        entry = netrc.netrc().authenticators(host.partition(":")[0])
    except (OSError, netrc.NetrcParseError):
        return ""
    if entry is None:
        return ""
    user, _, password = entry
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    return f"Basic {pair}"
