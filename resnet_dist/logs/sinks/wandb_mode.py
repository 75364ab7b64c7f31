"""Whether a run is online at Weights & Biases, offline, or not there at all."""

import os

from resnet_dist.logs.sinks.background import describe_error

# From the strictest to the most permissive.
_MODES = ("disabled", "offline", "online", "auto")

# Other names that wandb has for them.
_OTHER_NAMES = {"dryrun": "offline", "run": "online", "shared": "online"}


def wandb_mode(configured: str) -> str:
    """Combine the key `log.wandb` with the environment variable WANDB_MODE: the stricter counts.

    Args:
        configured: The value of `log.wandb`.

    Returns:
        "auto", "online", "offline" or "disabled".
    """
    variable = os.environ.get("WANDB_MODE", "auto")
    mode = _OTHER_NAMES.get(variable, variable)
    if mode not in _MODES:
        return configured
    return min(configured, mode, key=_MODES.index)


def silence_wandb() -> None:
    """Let wandb neither print about itself nor report its own errors. Call it before the import."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def why_offline(mode: str) -> str:
    """Find out why a run need not try to be online. Neither the server nor the user is asked.

    Args:
        mode: A result of `wandb_mode`.

    Returns:
        The reason; empty if the run should try.
    """
    if mode == "offline":
        return "as configured"
    silence_wandb()
    import wandb

    active_run = wandb.run
    if active_run is not None:
        # A run of the user in this process. If it is online, there is a key; wandb.login does not
        # look for one any more.
        if active_run.offline or active_run.disabled:
            return "as the active W&B run of this process"
        return ""
    # `wandb offline` and `wandb disabled` store a mode.
    stored_mode = wandb.setup().settings.mode
    if stored_mode in ("offline", "disabled"):
        return f"wandb's settings have the mode {stored_mode}"
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        return describe_error(error)
    if not has_key:
        return "no API key; `wandb login` stores one"
    return ""
