"""Weights from anywhere (ours, torchvision's, timm's, NVIDIA's), and which of them a run goes on to
train.

The names of a file are brought to those of the model by one table, and every tensor of both is
accounted for.
"""

import argparse
import hashlib
import io
import re
import socket
import sys
from pathlib import Path

import torch
from torch import nn

from resnet_dist.data.sources.index import some

_NESTED = (
    "ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "model_ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
)
"""Keys that files keep their weights under: the averaged ones come first."""
_PREFIX = r"^((module|_orig_mod|model|net)\.)+"
_RENAMES = (
    (r"^layers\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}."),  # NVIDIA, ResNets since 2021
    (r"\.squeeze\.squeeze\.", ".se.fc1."),
    (r"\.squeeze\.expand\.", ".se.fc2."),  # NVIDIA, SE-ResNets
    (r"\.se_module\.", ".se."),
    (r"^layer0\.", ""),  # timm, legacy_seresnet*
    (r"^pre_logits\.fc1\.", "classifier.0."),
    (r"^pre_logits\.fc2\.", "classifier.3."),  # timm, VGG
    (r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1"),  # torchvision, old DenseNets
)
_HEADS = r"^(fc|head|head\.fc|classifier|classifier\.fc|last_linear|classif)\.(?=(weight|bias)$)"


def head_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The classifier, by name: the last linear layer, and where there are auxiliary classifiers,
    theirs.

    Those end a module of their own with as many outputs, in a model that has an `auxiliary_weight`.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    last = next(reversed(linears), None)
    ends = (
        {name.rpartition(".")[0]: name for name in linears}.values()
        if hasattr(model, "auxiliary_weight")
        else ()
    )
    return {
        name: module
        for name, module in linears.items()
        if name == last or name in ends and module.out_features == linears[last].out_features
    }


def freeze(model: nn.Module, unfreeze_from: str) -> None:
    """Leave in training the module `unfreeze_from`, all that is defined after it, and the head
    ("head": it alone).

    "" changes nothing. Raises ValueError where there is no such module, it has no parameters, or
    nothing is before it.
    """
    if not unfreeze_from:
        return
    names = [name for name, _ in model.named_parameters()]
    first = next(
        (i for i, name in enumerate(names) if name.startswith(f"{unfreeze_from}.")), len(names)
    )
    if first == len(names) and unfreeze_from != "head":
        raise ValueError(
            f"optim.unfreeze_from is {unfreeze_from!r}: the network has no such module with parameters; "
            f"choose head, {', '.join(dict.fromkeys(name.split('.')[0] for name in names))} or a part"
        )
    if first == 0:
        raise ValueError(
            f"optim.unfreeze_from is {unfreeze_from!r}, where the network begins: nothing would be "
            "frozen; leave it empty, or name a later module"
        )
    head = {f"{name}.{kind}" for name in head_modules(model) for kind in ("weight", "bias")}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number >= first or name in head)


def download(name: str) -> bytes:
    """The file of torchvision's weights `torchvision:<model>:<weights>`, from the network or
    torch.hub's cache.

    Raises ValueError for an unknown name, where it cannot be had, and where its SHA-256 is not the
    one of its name.
    """
    from torchvision.models import get_model_weights, list_models

    _, model, kind = (name.split(":") + ["", ""])[:3]
    kinds = get_model_weights(model).__members__ if model in list_models() else {}
    if kind not in kinds:
        raise ValueError(
            f"checkpoint.init_from is {name!r}: torchvision has no such weights, only "
            f"{', '.join(f'torchvision:{model}:{kind}' for kind in kinds) or 'those of its own models'}"
        )
    url, timeout = kinds[kind].url, socket.getdefaulttimeout()
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    socket.setdefaulttimeout(60.0)  # or a server that has fallen silent would be waited for
    try:
        kinds[kind].get_state_dict(
            model_dir=str(path.parent),
            progress=sys.stderr.isatty(),
            check_hash=True,
            weights_only=True,
            map_location="cpu",
        )
        payload = path.read_bytes()
    except Exception as problem:  # of the network, the disk, the file: dozens of types
        raise ValueError(
            f"checkpoint.init_from is {name!r}: {url} could not be had ({problem}). Where there is no "
            f"network, fetch it elsewhere, and put it to {path} or give its path as checkpoint.init_from"
        ) from problem
    finally:
        socket.setdefaulttimeout(timeout)
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if digest and not hashlib.sha256(payload).hexdigest().startswith(digest[1]):
        raise ValueError(
            f"{path} is damaged: its SHA-256 does not begin with {digest[1]}; delete it"
        )
    return payload


def unpack(payload: bytes, name: str) -> dict:
    """The content of the file `name` from its bytes, of torch.save or safetensors; none of its code
    is run.

    argparse.Namespace, which torchvision and timm save their settings as, is let through: it only
    holds values. Raises ValueError where the file is damaged, needs other Python objects, or
    safetensors is not installed.
    """
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import load

            return load(payload)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return content if isinstance(content, dict) else {}
    except ImportError as problem:
        raise ValueError(
            f"{name} needs safetensors: pip install 'resnet-dist[export]' ({problem})"
        ) from problem
    except Exception as problem:  # torch raises a dozen types for a file that is none of its own
        objects = re.search(r"GLOBAL (\S+)", str(problem))
        if objects is None:
            why = str(problem).split(". ")[
                0
            ]  # torch goes on with advice to run what is in the file
            raise ValueError(
                f"{name} is damaged, or no file of torch.save or safetensors: {why}"
            ) from problem
        raise ValueError(
            f"{name} needs Python objects ({objects[1]}), which may run any code: it is not loaded. Let "
            "the program that made it save the tensors alone: torch.save({'state_dict': "
            "model.state_dict()}, 'weights.pth')"
        ) from problem


def find_weights(content) -> tuple[list[str], dict]:
    """The state dict in a file's content, averaged weights first, and the keys that lead to it;
    ([], {}) for none.
    """
    if not isinstance(content, dict):
        return [], {}
    for key in _NESTED:
        keys, weights = find_weights(content.get(key))
        if weights:
            return [key, *keys], weights
    return [], content if any(isinstance(value, torch.Tensor) for value in content.values()) else {}


def load_weights(model: nn.Module, content: dict, name: str) -> tuple[dict[str, list[str]], bool]:
    """Copy the weights in a file's content into a model; the head stays as it is where its classes
    are not as many.

    Returns the names under "loaded", "renamed", "reshaped" (1x1 convolution and linear layer),
    "skipped" (of the file) and "missing" (of the model), and whether the latter two hold nothing
    but heads and num_batches_tracked, which old files lack. Raises ValueError, with the model as
    before, where less than half of the backbone's tensors are found, and for values that are not
    finite.
    """
    weights, own, heads, found, whole = (
        find_weights(content)[1],
        model.state_dict(),
        head_modules(model),
        {},
        True,
    )
    remarks = {
        key: " (head, freshly initialised)"
        if key.rpartition(".")[0] in heads
        else " (without effect)"
        if key.endswith(".num_batches_tracked")
        else ""
        for key in own
    }
    rows = {kind: [] for kind in ("loaded", "renamed", "reshaped", "skipped", "missing")}
    for key, value in weights.items():
        names = [
            target for target in _candidates(str(key), next(reversed(heads), "")) if target in own
        ]
        target = next(
            (target for target in names if target not in found and _fits(value, own[target])), None
        )
        if target is None:
            rows["skipped"].append(
                f"{key} {list(getattr(value, 'shape', [type(value).__name__]))}"
                + (f" instead of {list(own[names[0]].shape)}" if names else "")
            )
            whole = whole and bool(names and remarks[names[0]])
            continue
        found[target] = value.reshape(own[target].shape).to(own[target].dtype)
        kind = (
            "reshaped"
            if value.shape != own[target].shape
            else "loaded"
            if key == target
            else "renamed"
        )
        rows[kind].append(key if kind == "loaded" else f"{key} -> {target}")
    missing = sorted((key for key in own if key not in found), key=remarks.get)
    rows["missing"] = [key + remarks[key] for key in missing]
    absent, needed = (sum(not remarks[key] for key in keys) for keys in (missing, own))
    if 2 * absent > needed:
        raise ValueError(
            f"checkpoint.init_from is {name!r}: it has {needed - absent} of the {needed} tensors of the network before "
            f"its head, and half are needed. The file has {some(list(weights), 3) or 'no tensors'}; "
            f"the network {some(list(own), 3)}. "
            "Choose the model.name and options that it was made with"
        )
    if broken := [key for key, value in found.items() if not torch.isfinite(value).all()]:
        raise ValueError(
            f"checkpoint.init_from is {name!r}: values that are not finite in {some(broken, 3)}"
        )
    model.load_state_dict(found, strict=False)
    return rows, whole and not absent


def describe(rows: dict[str, list[str]], most: int = 3) -> str:
    """The rows of `load_weights` as a table, with at most so many names in each."""
    return "\n".join(
        f"  {kind:8} {len(names):5}  {some(names, most)}".rstrip() for kind, names in rows.items()
    )


def _candidates(key: str, head: str) -> list[str]:
    """What the model may call the tensor that a file calls `key`, likeliest first; any number of
    renames may apply.
    """
    names = [key, re.sub(_PREFIX, "", key)]
    for pattern, replacement in (*_RENAMES, (_HEADS, f"{head}.")):
        names += [re.sub(pattern, replacement, name) for name in names]
    return list(dict.fromkeys(names))


def _fits(value, own: torch.Tensor) -> bool:
    """Whether `value` can take the place of `own`: as it is, or as the same layer in the other
    form.
    """
    if not isinstance(value, torch.Tensor) or value.is_floating_point() != own.is_floating_point():
        return False
    return value.shape == own.shape or (
        {value.ndim, own.ndim} == {2, 4} and value.flatten(1).shape == own.flatten(1).shape
    )
