"""What a request to an object store has failed with, as a sentence.

The texts of the library are never shown: they may hold parts of a request, and with them
credentials. A message is built from the status, the code of the error, and our own words.
"""

import re
from dataclasses import dataclass
from typing import Literal

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,60})</Code>")
_KIND = re.compile(r"kind: (Timeout|Connect|Interrupted|Request|Decode)\b")

_EXPIRED = {"ExpiredToken", "TokenRefreshRequired", "RequestExpired", "ExpiredTokenException"}
_REFUSED_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure"}

_WORDS_OF_KINDS = {
    "Timeout": "it has not answered in time",
    "Connect": "no connection",
    "Interrupted": "the answer was cut off",
    "Request": "the connection was lost",
    "Decode": "the answer was cut off",
}

_HOW_TO_SIGN_IN = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, `aws sso login`, or the role "
    "of the machine; AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the account "
    "of the machine; GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "http": "~/.netrc",
}

Remedy = Literal["retry", "sign in again", "none"]


class StoreError(ValueError):
    """A store cannot deliver what a run needs. The message names the address and the way out."""


@dataclass(frozen=True)
class RequestFailure:
    """Why a request failed."""

    reason: str
    """part of a sentence"""
    remedy: Remedy
    """whether another attempt may succeed, perhaps with new credentials"""
    way_out: str = ""
    """what the user can do"""


def classify_error(error: Exception, scheme: str) -> RequestFailure:
    """Find out why a request failed.

    Args:
        error: what a request has raised.
        scheme: "s3", "gs", "https" or "http".
    """
    text = str(error)
    code = _first_group(_CODE, text)
    status = _first_group(_STATUS, text)
    name = type(error).__name__
    sign_in = _HOW_TO_SIGN_IN[scheme.replace("https", "http")]
    if code in _EXPIRED:
        way_out = f"renew the credentials ({sign_in}) and start again"
        return RequestFailure(f"the credentials have expired ({code})", "sign in again", way_out)
    if code in _REFUSED_KEYS or status == "401":
        way_out = f"check the credentials: {sign_in}"
        return RequestFailure(
            f"it does not accept the credentials{_in_brackets(code)}", "none", way_out
        )
    if status == "403":
        way_out = f"ask for the permission to list and to read, or use other credentials: {sign_in}"
        return RequestFailure(f"no permission{_in_brackets(code)}", "none", way_out)
    if status == "404" or isinstance(error, FileNotFoundError):
        return _not_found(code)
    if name == "PreconditionError":
        return RequestFailure("the object has changed", "none")
    if name == "NotSupportedError" or "NotPartial" in text:
        return RequestFailure(
            "the server does not serve ranges of a file", "none", "use another server"
        )
    return _other(text, status, code)


def _not_found(code: str) -> RequestFailure:
    """An object or bucket that is not there."""
    if code == "NoSuchBucket":
        return RequestFailure("there is no such bucket", "none", "check its name and the endpoint")
    return RequestFailure("there is no such object", "none")


def _other(text: str, status: str, code: str) -> RequestFailure:
    """A failure that the library has no name for."""
    if "BareRedirect" in text:
        way_out = "set AWS_REGION to the region of the bucket"
        return RequestFailure("the bucket is in another region", "none", way_out)
    if status:
        reason = f"it answers with status {status}{_in_brackets(code)}"
        may_pass = status.startswith("5") or status in ("408", "425", "429")
        return RequestFailure(reason, "retry" if may_pass else "none")
    if "builder error" in text or "URL scheme is not allowed" in text:
        return RequestFailure("the endpoint is no valid address", "none", "check AWS_ENDPOINT_URL")
    kind = _first_group(_KIND, text)
    return RequestFailure(
        _WORDS_OF_KINDS.get(kind, "the answer was not what was asked for"), "retry"
    )


def _first_group(pattern: re.Pattern[str], text: str) -> str:
    """What the first group of a pattern matches; "" if it does not match."""
    match = pattern.search(text)
    return match.group(1) if match else ""


def _in_brackets(code: str) -> str:
    return f" ({code})" if code else ""
