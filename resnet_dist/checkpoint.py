"""The state of a run, and files of it that can be trusted.

A checkpoint is one `torch.save` file of plain types, `step_<step>.pt`, beside its SHA-256 in the
format of sha256sum. It is written to a temporary name, synced and renamed, so that a file under its
own name is whole; `last.pt` and `best.pt` are links. Nothing in it belongs to a rank: position,
order and crops follow from `step`.
"""

import contextlib
import hashlib
import io
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from resnet_dist.config import Config, to_dict
from resnet_dist.ema import Ema
from resnet_dist.models.weights import unpack

FORMAT = 1
_DEFINES_POSITION = (
    "seed",
    "train.global_batch_size",
    "data.kind",
    "data.num_samples",
    "data.fingerprint",
    "augment.repeats",
)
_DEFINES_STATE = (
    "optim.kind",
    "optim.unfreeze_from",
    "optim.backbone_lr_scale",
    *(
        f"model.{key}"
        for key in (
            "name",
            "num_classes",
            "stride_in_1x1",
            "shortcut",
            "stem",
            "avg_pool_shortcut",
            "preactivation",
            "squeeze_excitation",
            "blur_pool",
        )
    ),
)
_FREE_TO_CHANGE = (
    "output_dir",
    "data.data_dir",
    "data.exclude",
    "data.threads",
    "data.prefetch_batches",
    "data.val_batch_size",
    "data.max_bad_images",
    "log",
    "checkpoint",
    "distributed",
    "recipe",
)


@dataclass
class TrainState:
    """All that an update changes. `model` is the plain module, not its DDP wrapper."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None = None
    step: int = 0
    evaluated_step: int = -1
    best_top1: float = -1.0
    best_step: int = -1

    def state_dict(self) -> dict:
        """Plain types and tensors; the tensors are the live ones."""
        return {
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best_top1": self.best_top1,
            "best_step": self.best_step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Take everything over but the optimizer's settings, which are the present config's.

        The average starts from the weights where the checkpoint has none.
        """
        self.model.load_state_dict(saved["model"])
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict(
            {
                "state": {**own["state"], **saved["optimizer"]["state"]},
                "param_groups": own["param_groups"],
            }
        )
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.ema:
            self.ema.model.load_state_dict(saved["ema"] or saved["model"])
        self.step, self.evaluated_step = saved["step"], saved["evaluated_step"]
        self.best_top1, self.best_step = saved["best_top1"], saved["best_step"]


class Saver:
    """Writes checkpoints behind the back of the training thread. Does nothing off the main process.

    A save that fails (full disk, folder gone) is a warning: the files before it stay good and
    training goes on.
    """

    def __init__(
        self, folder: Path, keep: int, facts: dict, warn: Callable[[str], None], is_main: bool
    ) -> None:
        self.folder, self.keep, self.facts, self.warn, self.is_main = (
            folder,
            keep,
            facts,
            warn,
            is_main,
        )
        self.thread: threading.Thread | None = None
        self.failure: str | None = None
        self.saved = (-1, -1)
        """step, and step of the evaluation that it knows of, of the newest good checkpoint"""
        self.attempt = ""

    def claim(self) -> None:
        """Make this process the one that may publish here. Raises OSError where the folder cannot
        be written.

        An attempt that a cluster takes for dead may go on for a minute on a node that was cut off:
        it finds in the file `attempt` that it has a successor, before it logs or saves again.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        number = int((self._newest_attempt() or "0").split()[0]) + 1
        self.attempt = f"{number} {socket.gethostname()} {secrets.token_hex(8)}"
        temporary = self.folder / f".attempt.{os.getpid()}"
        temporary.write_text(self.attempt)
        os.replace(temporary, self.folder / "attempt")

    def check_claim(self) -> None:
        """Raise ValueError when another process has claimed the folder since."""
        if self.attempt and (newest := self._newest_attempt()) not in ("", self.attempt):
            raise ValueError(
                f"{self.folder} belongs to a newer attempt, {newest}: {self.attempt} saves no more"
            )

    def _newest_attempt(self) -> str:
        with contextlib.suppress(OSError):  # the folder may be gone, which is no claim
            return (self.folder / "attempt").read_text()
        return ""

    def save(self, state: TrainState) -> None:
        """Copy the state now (tens of milliseconds for ResNet-50), write it in the background.

        What is already saved is not written again. Raises ValueError as `check_claim`.
        """
        if not self.is_main:
            return
        self.wait()
        if self.saved == (state.step, state.evaluated_step):
            return
        self.check_claim()
        snapshot = {"format": FORMAT, **self.facts, **_copy_to_cpu(state.state_dict())}
        self.thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until the write under way is through; a failure of it is said here, on the caller's
        thread.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
            if self.failure:
                self.warn(self.failure)

    def _write(self, snapshot: dict, again: bool = True) -> None:
        step = snapshot["step"]
        path = self.folder / f"step_{step:08d}.pt"
        try:
            if not all(
                torch.isfinite(t).all() for t in snapshot["model"].values() if t.is_floating_point()
            ):
                raise ValueError(
                    "the weights hold values that are not finite; such a state is never saved"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, snapshot, self.check_claim)
            _link(self.folder / "last.pt", path.name)
            if snapshot["best_step"] == step:
                _link(self.folder / "best.pt", path.name)
            self._prune({path.name, f"step_{snapshot['best_step']:08d}.pt"})
            self.saved, self.failure = (step, snapshot["evaluated_step"]), None
        except Exception as problem:  # whatever it was, training must not end for it
            if again and isinstance(
                problem, FileNotFoundError
            ):  # the folder went away meanwhile: it is made anew
                return self._write(snapshot, again=False)
            before = (
                f"the one of step {self.saved[0]} stays"
                if self.saved[0] >= 0
                else "none is saved yet"
            )
            self.failure = (
                f"could not save the checkpoint of step {step} to {path}: {problem}; {before}"
            )

    def _prune(self, protected: set[str]) -> None:
        for path in _newest_first(self.folder)[self.keep :]:
            if path.name not in protected:
                path.unlink(missing_ok=True)
                _digest_path(path).unlink(missing_ok=True)
        for leftover in self.folder.glob("*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)


def write_checkpoint(
    path: Path, content: dict, before_publishing: Callable[[], None] = lambda: None
) -> None:
    """Write `content` so that at every moment `path` is absent, the old file or the new one, with
    its digest.

    `before_publishing` may raise, when the bytes are on disk, to leave all as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    buffer = io.BytesIO()  # torch.save hides why a disk does not take it
    torch.save(content, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        before_publishing()
        # Until the second rename the old file may still be the one there: its digest stays beside
        # the new one.
        digests = [_sha256(buffer.getbuffer()), *_read_digests(path)]
        _write_digests(path, digests)
        os.replace(temporary, path)
        _write_digests(path, digests[:1])
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    os.fsync(descriptor)
    os.close(descriptor)


def read_checkpoint(path: Path) -> bytes:
    """The bytes of a checkpoint, verified against the digest beside it where there is one.

    Raises ValueError when the file is missing, cannot be read, or does not match.
    """
    path = Path(path).resolve()  # last.pt and best.pt are links; the digest is beside the file
    try:
        payload = path.read_bytes()
        digests = _read_digests(path) if _digest_path(path).exists() else None
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"the checkpoint {path} cannot be read: {problem}") from problem
    if not payload:
        raise ValueError(f"the checkpoint {path} is empty")
    if digests is not None and _sha256(payload) not in digests:
        raise ValueError(
            f"the checkpoint {path} is damaged: its SHA-256 is not the one in {_digest_path(path).name}"
        )
    return payload


def unpack_checkpoint(payload: bytes, name: str) -> dict:
    """The content of a checkpoint's bytes. Raises ValueError when it is none, or of a newer format
    than ours.
    """
    content = unpack(payload, name)
    if "format" not in content or "model" not in content:
        raise ValueError(
            f"{name} is not a checkpoint of resnet_dist: it has no 'format' and 'model'"
        )
    refuse_newer(content, name)
    return content


def refuse_newer(content: dict, name: str) -> None:
    """Raise ValueError for a checkpoint of a newer format than ours."""
    if isinstance(number := content.get("format"), int) and number > FORMAT:
        raise ValueError(
            f"{name} has format {number}, this version reads up to {FORMAT}: update it"
        )


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a folder that matches its digest and is of our format; None where
    there never was one.

    Each damaged one is warned about, and renamed (.damaged) once a valid one is found. Raises
    ValueError when all are damaged: a run is not silently started over.
    """
    candidates, set_aside = (
        _newest_first(folder) or sorted(Path(folder).glob("step_*.pt.damaged")),
        [],
    )
    for path in candidates:
        try:
            if not _digest_path(path).exists():
                raise ValueError(
                    f"the checkpoint {path} has no {_digest_path(path).name} beside it"
                )
            payload = read_checkpoint(path)
        except ValueError as problem:
            set_aside += (
                [] if isinstance(problem.__cause__, OSError) else [path]
            )  # what cannot be read may be good
            warn(f"{problem}; trying the one before")
            continue
        try:
            unpack_checkpoint(
                payload, str(path)
            )  # of a newer format, for instance: whole, and not ours
        except ValueError as problem:
            warn(f"{problem}; trying the one before")
            continue
        for damaged in set_aside:
            with contextlib.suppress(OSError):
                damaged.rename(damaged.with_name(damaged.name + ".damaged"))
        return path
    if candidates:
        raise ValueError(
            f"none of the {len(candidates)} checkpoints in {folder} is valid: restore one, or start over "
            "with another output_dir"
        )
    return None


def refuse_lost(folder: Path) -> None:
    """Raise ValueError where a run was here and its checkpoint folder is gone: nothing is silently
    started over.
    """
    metrics = folder.parent / "metrics.jsonl"
    if not (folder / "attempt").exists() and metrics.exists() and metrics.stat().st_size:
        raise ValueError(
            f"{metrics} tells of a run whose folder {folder.name}/ is gone: bring it back, or remove "
            f"metrics.jsonl to start over, or take another output_dir"
        )


def check_resumable(saved: dict, facts: dict) -> list[str]:
    """Whether a run with `facts` can go on from `saved`; returns the settings that changed, as
    sentences.

    Raises ValueError for what would make the step mean something else (seed, batch size, data) or
    the weights not fit.
    """
    before, now = (
        {
            **_settings(of["config"]),
            "data.num_samples": of["num_samples"],
            "data.fingerprint": of["fingerprint"],
        }
        for of in (saved, facts)
    )
    changed = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or any(key == free or key.startswith(free + ".") for free in _FREE_TO_CHANGE):
            continue
        if key in _DEFINES_STATE:
            what = "optimizer" if key.startswith("optim.") else "model"
            raise ValueError(
                f"the checkpoint of step {saved['step']} holds another {what}: {key} was {old!r}, now "
                f"{new!r}; take another output_dir, or checkpoint.init_from for its weights"
            )
        if key in _DEFINES_POSITION:
            raise ValueError(
                f"the checkpoint of step {saved['step']} cannot be continued: {key} was {old!r}, now "
                f"{new!r}, and the step would mean another place in the data; take another output_dir"
            )
        changed.append(f"{key} was {old!r}, now {new!r}")
    return changed


def model_changes(saved: dict, config: Config) -> list[str]:
    """What makes the network of a checkpoint another than that of `config`, but for the classes:
    its tensors may fit all the same. Nothing for a file that is none of ours.
    """
    if not isinstance(saved.get("config"), dict):
        return []
    before, now = _settings(saved["config"]), _settings(to_dict(config))
    keys = [
        key for key in _DEFINES_STATE if key.startswith("model.") and key != "model.num_classes"
    ]
    return [
        f"{key} was {before[key]!r}, now {now[key]!r}" for key in keys if before[key] != now[key]
    ]


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {"section.key": value}."""
    flat = {}
    for key, value in tree.items():
        flat.update(
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def _settings(config: dict) -> dict:
    return {
        **flatten(to_dict(Config())),
        **flatten(config),
    }  # an older version did not know all of them


def _copy_to_cpu(tree):
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copy_to_cpu(value) for key, value in tree.items()}
    return [_copy_to_cpu(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _newest_first(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("step_*.pt"), reverse=True)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(payload: bytes | memoryview) -> str:
    return hashlib.sha256(payload).hexdigest()


def _read_digests(path: Path) -> list[str]:
    digest_path = _digest_path(path)
    lines = digest_path.read_text().splitlines() if digest_path.exists() else []
    return [line.split()[0] for line in lines if line.strip()]


def _write_digests(path: Path, digests: list[str]) -> None:
    temporary = path.with_name(path.name + ".sha256.tmp")
    with open(temporary, "w") as file:
        file.writelines(f"{digest}  {path.name}\n" for digest in digests)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, _digest_path(path))


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(link.name + ".tmp")
    with contextlib.suppress(OSError):  # without links the step's own name still leads to the file
        temporary.unlink(missing_ok=True)
        os.symlink(target, temporary)
        os.replace(temporary, link)
