"""`resnet-dist data import-hf`: a data set of the Hugging Face hub to tar shards."""

import argparse
import os
import shutil
from typing import Any

from resnet_dist.commands.import_parquet import import_folder
from resnet_dist.data.sources.index import first_names
from resnet_dist.data.sources.parquet import SUFFIX
from resnet_dist.text import first_line

_FOLDER = ".download"
_MAIN = "main"
_CONVERTED = "refs/convert/parquet"
"""Branch of a data set with the parquet files that the hub has made of its other files."""


def run(args: argparse.Namespace) -> int:
    """Download the parquet files of args.name and import them to args.out.

    The download is resumed if it was interrupted, and deleted when the shards are complete. The
    address of the hub is in the environment variable HF_ENDPOINT.

    Raises:
        ValueError: if there is no such data set, or it has no parquet files.
        ConnectionError: if the hub cannot be reached.
    """
    hub = _import_hub()
    cache = os.path.join(args.out, _FOLDER)
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        revision, folder = _find_files(hub.HfApi(endpoint=endpoint), args.name, args.config)
        hub.snapshot_download(
            args.name,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[os.path.join(folder, f"*{SUFFIX}")],
            local_dir=cache,
            endpoint=endpoint,
        )
    except hub.errors.GatedRepoError:
        raise ValueError(
            f"the data set {args.name} asks for an agreement: accept its terms on its page of the "
            f"hub, then log in with `hf auth login`, or set HF_TOKEN"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise ValueError(
            f"the hub has no data set {args.name}, or it is private: check the name, such as "
            f"ILSVRC/imagenet-1k, and log in with `hf auth login` if it is private"
        ) from None
    except ValueError:
        raise
    # Errors of a connection are OSError, or those of requests or httpx: it depends on the version.
    except Exception as error:
        raise ConnectionError(
            f"{args.name} cannot be downloaded ({first_line(error)}): run this again, with a "
            f"network; what was downloaded is kept in {cache}"
        ) from error
    import_folder(os.path.join(cache, folder), args)
    shutil.rmtree(cache)
    return 0


def _import_hub() -> Any:  # noqa: ANN401 - a module
    """The module huggingface_hub. Raises ValueError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError(
            "import-hf needs the package huggingface_hub: pip install 'resnet-dist[hub]'"
        ) from None
    return huggingface_hub


def _find_files(api: Any, name: str, config: str) -> tuple[str, str]:  # noqa: ANN401 - HfApi
    """Where the parquet files of a data set are.

    Args:
        api: the hub.
        name: the data set.
        config: its configuration, or "" if it has only one.

    Returns:
        (revision, folder); the folder is "" for the top folder.

    Raises:
        ValueError: if there are none, or more than one configuration.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    folders: set[str] = set()
    for revision in (_MAIN, _CONVERTED):
        try:
            files = api.list_repo_files(name, repo_type="dataset", revision=revision)
        except RevisionNotFoundError:
            continue
        folders = {_folder_of(file) for file in files if file.endswith(SUFFIX)}
        if config:
            folders &= {config}
        if len(folders) == 1:
            return revision, folders.pop()
        if folders:
            raise ValueError(
                f"the data set {name} has several configurations: choose one of "
                f"{first_names(sorted(folders), 20)} with --config"
            )
    of_config = f" of the configuration {config}" if config else ""
    raise ValueError(
        f"the data set {name} has no parquet files{of_config} on the hub: save it with the library "
        f"datasets (Dataset.to_parquet), and take `resnet-dist data import-parquet`"
    )


def _folder_of(file: str) -> str:
    """The folder of a configuration: that of its files, without `data` and the name of a split."""
    folder = os.path.dirname(file)
    while os.path.basename(folder) in ("data", "train", "validation", "val", "valid", "test"):
        folder = os.path.dirname(folder)
    return folder
