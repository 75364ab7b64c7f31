"""Whether a run is online at Weights & Biases, offline, or not there at all."""

import os
from netrc import NetrcParseError, netrc
from urllib.parse import urlsplit

# From the strictest to the most permissive.
_MODES = ("disabled", "offline", "online", "auto")

# The values of WANDB_MODE. "dryrun" and "run" are wandb's old names.
_MODES_OF_VARIABLE = {
    "disabled": "disabled",
    "offline": "offline",
    "dryrun": "offline",
    "online": "online",
    "run": "online",
    "shared": "online",
}


def wandb_mode(configured: str) -> str:
    """Combine the key `log.wandb` with the environment variable WANDB_MODE: the stricter counts.

    Args:
        configured: The value of `log.wandb`.

    Returns:
        "auto", "online", "offline" or "disabled".
    """
    variable = os.environ.get("WANDB_MODE", "")
    named = _MODES_OF_VARIABLE.get(variable, "auto")
    return min(configured, named, key=_MODES.index)


def why_offline(mode: str) -> str:
    """Find out why a run need not try to be online. The server is not asked.

    Without a key, wandb would ask the user for one.

    Args:
        mode: A result of `wandb_mode`.

    Returns:
        The reason; empty if the run should try.

    Raises:
        ImportError: wandb is not installed.
    """
    if mode == "offline":
        return "as configured"
    import wandb

    # From the environment and wandb's settings files.
    settings = wandb.setup().settings
    url = settings.base_url
    if settings.api_key or settings.identity_token_file or _has_netrc_key(url):
        return ""
    return f"no API key for {url}; `wandb login` stores one"


def _has_netrc_key(base_url: str) -> bool:
    """Whether the netrc file, where `wandb login` stores keys, has a password for this server."""
    path = os.environ.get("NETRC") or "~/.netrc"
    host = urlsplit(base_url).netloc
    try:
        entry = netrc(os.path.expanduser(path)).authenticators(host)
    except (OSError, NetrcParseError):
        return False
    return entry is not None and bool(entry[2])
