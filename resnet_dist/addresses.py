"""Addresses of data in object stores and on web servers, such as s3://bucket/folder."""

import re
from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "https", "http")
"""The schemes that `data.data_dir` may have: Amazon S3 and stores that speak its protocol, Google
Cloud Storage, and web servers."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What a pathlib.Path makes of an address.
_COLLAPSED = re.compile(r"(?:s3|gs|https?):/[^/]")


def is_url(path: str) -> bool:
    """Whether a path is an address with a scheme, such as s3://bucket/folder."""
    return _URL.match(path) is not None


def check_url(url: str) -> str:
    """Check an address, and return it without slashes at its end.

    The errors do not repeat the address, since it may hold a password.

    Raises:
        ValueError: the scheme is unknown, the name of the bucket or host is missing, or the address
            holds credentials or an empty part.
    """
    if _COLLAPSED.match(url):
        raise ValueError("a slash is missing behind the scheme; pass it as text, not as a Path")
    if not is_url(url):
        return url
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    parts = urlsplit(url)
    if url.partition("://")[0] not in SCHEMES:
        raise ValueError(f"addresses begin with {known}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "the address holds a user, a password or parameters, which would be written to logs. "
            "Give credentials in the environment or in the files of the store's own tools"
        )
    if not parts.netloc:
        raise ValueError("the name of the bucket or host is missing")
    folder = parts.path.rstrip("/")
    if "//" in folder or "/./" in f"{folder}/" or "/../" in f"{folder}/":
        raise ValueError("the address has an empty part, or a part that is . or ..")
    return f"{parts.scheme}://{parts.netloc}{folder}"


def without_secrets(url: str) -> str:
    """An address for messages, without what may be a password in it."""
    return re.sub(r"(://)[^/@]*@|[?#].*$", r"\1", url)
