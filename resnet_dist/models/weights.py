"""Weights of other programs (torchvision, timm, NVIDIA) in our networks, and which of them train.

The names in a file are brought to those of the model by one table, and every tensor of both is
accounted for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn

from resnet_dist.data.sources.index import some
from resnet_dist.text import printable

Weights = dict[str, torch.Tensor]
Rows = dict[str, list[str]]
"""Names of tensors by what became of them."""

# Keys that files keep their weights under: averaged weights come first.
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

_PREFIX = r"^((module|_orig_mod|model|net)\.)+"


def _layer_from_one(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) + 1}."


# Names of other programs, and ours.
_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # NVIDIA: ResNets since 2021, SE-ResNets
    (r"^layers\.(\d+)\.", _layer_from_one),
    (r"\.squeeze\.squeeze\.", ".se.fc1."),
    (r"\.squeeze\.expand\.", ".se.fc2."),
    # timm: legacy_seresnet*, VGG
    (r"\.se_module\.", ".se."),
    (r"^layer0\.", ""),
    (r"^pre_logits\.fc1\.", "classifier.0."),
    (r"^pre_logits\.fc2\.", "classifier.3."),
    # torchvision: DenseNets of 2017
    (r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1"),
)
_HEADS = r"^(fc|head|head\.fc|classifier|classifier\.fc|last_linear|classif)\.(?=(weight|bias)$)"

_FRESH_HEAD = " (head, freshly initialised)"
_NO_EFFECT = " (without effect)"


def head_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """The classifier by name: the last linear layer, and the last ones of auxiliary classifiers.

    A model with an attribute `auxiliary_weight` may have auxiliary classifiers. Each is a module
    of its own that ends in a linear layer with as many outputs as the main one.
    """
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = module
    if not linears:
        return {}
    last = next(reversed(linears))
    ends = {last}
    if hasattr(model, "auxiliary_weight"):
        last_of_module = {name.rpartition(".")[0]: name for name in linears}
        ends.update(last_of_module.values())
    heads = {}
    for name, module in linears.items():
        if name in ends and module.out_features == linears[last].out_features:
            heads[name] = module
    return heads


def freeze(model: nn.Module, unfreeze_from: str) -> None:
    """Train only the module `unfreeze_from`, all that is defined after it, and the classifier.

    "head" trains the classifier alone, "" trains everything.

    Raises:
        ValueError: There is no such module, it has no parameters, or nothing comes before it.
    """
    if not unfreeze_from:
        return
    names = [name for name, _ in model.named_parameters()]
    inside = [i for i, name in enumerate(names) if name.startswith(f"{unfreeze_from}.")]
    if not inside and unfreeze_from != "head":
        parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
        raise ValueError(
            f"optim.unfreeze_from is {unfreeze_from!r}: the network has no such module with "
            f"parameters; choose head, {parts} or a part"
        )
    first = inside[0] if inside else len(names)
    if first == 0:
        raise ValueError(
            f"optim.unfreeze_from is {unfreeze_from!r}, where the network begins: nothing would be "
            "frozen; leave it empty, or name a later module"
        )
    heads = head_modules(model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        is_in_head = name.rpartition(".")[0] in heads
        parameter.requires_grad_(number >= first or is_in_head)


def load_exactly(model: nn.Module, weights: Weights, name: str) -> None:
    """Load a state dict that has every tensor of the model, and no other.

    Raises:
        ValueError: Names or shapes differ, with the first of them; `name` says whose they are.
    """
    own = model.state_dict()
    problems: Rows = {
        "missing": [key for key in own if key not in weights],
        "unknown": [key for key in weights if key not in own],
        "of another shape": [],
    }
    for key, value in own.items():
        if key in weights and weights[key].shape != value.shape:
            shapes = f"{list(weights[key].shape)} instead of {list(value.shape)}"
            problems["of another shape"].append(f"{key} {shapes}")
    found = [f"{kind}: {some(names, 3)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(printable(f"{name} does not fit the network: tensors {'; '.join(found)}"))
    model.load_state_dict(weights)


def find_weights(content: object) -> tuple[list[str], Weights]:
    """The state dict in a file's content, averaged weights first, and the keys that lead to it.

    Returns ([], {}) if there is none.
    """
    if not isinstance(content, dict):
        return [], {}
    for key in _NESTED:
        keys, weights = find_weights(content.get(key))
        if weights:
            return [key, *keys], weights
    has_tensors = any(isinstance(value, torch.Tensor) for value in content.values())
    return [], content if has_tensors else {}


@dataclass
class _Matching:
    """Where the tensors of a file go."""

    found: Weights = field(default_factory=dict)
    """by name in the model, in its shape"""
    rows: Rows = field(
        default_factory=lambda: {
            kind: [] for kind in ("loaded", "renamed", "reshaped", "skipped", "missing")
        }
    )
    is_whole: bool = True
    """whether nothing was skipped but heads and num_batches_tracked"""


def load_weights(model: nn.Module, content: dict[str, Any], name: str) -> tuple[Rows, bool]:
    """Copy the weights in a file's content into a model.

    The head keeps its fresh values if the file has another number of classes.

    Args:
        model: The network; unchanged if this raises.
        content: What the file holds: a state dict, alone or under one of the usual keys.
        name: The file, for messages.

    Returns:
        The names of the tensors under "loaded", "renamed", "reshaped" (1x1 convolution and linear
        layer), "skipped" (in the file only) and "missing" (in the model only); and whether the
        last two hold nothing but heads and num_batches_tracked, which old files lack.

    Raises:
        ValueError: Less than half of the backbone's tensors are found, or values are not finite.
    """
    weights = find_weights(content)[1]
    own = model.state_dict()
    heads = head_modules(model)
    remarks = {key: _remark(key, heads) for key in own}
    matching = _match(weights, own, remarks, next(reversed(heads), ""))
    missing = [key for key in own if key not in matching.found]
    missing.sort(key=lambda key: remarks[key])
    matching.rows["missing"] = [key + remarks[key] for key in missing]

    needed = sum(not remarks[key] for key in own)
    absent = sum(not remarks[key] for key in missing)
    if 2 * absent > needed:
        raise ValueError(
            f"checkpoint.init_from is {name!r}: it has {needed - absent} of the {needed} tensors "
            "of the network before its head, and half are needed. The file has "
            f"{printable(some(list(weights), 3)) or 'no tensors'}; the network "
            f"{some(list(own), 3)}. Choose the model.name and options that it was made with"
        )
    broken = [key for key, value in matching.found.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"checkpoint.init_from is {name!r}: values that are not finite in {some(broken, 3)}"
        )
    model.load_state_dict(matching.found, strict=False)
    return matching.rows, matching.is_whole and not absent


def _remark(key: str, heads: dict[str, nn.Linear]) -> str:
    """Why a tensor of the model may be missing in a file; empty if it must be there."""
    if key.rpartition(".")[0] in heads:
        return _FRESH_HEAD
    if key.endswith(".num_batches_tracked"):
        return _NO_EFFECT
    return ""


def _match(weights: Weights, own: Weights, remarks: dict[str, str], head: str) -> _Matching:
    """Find the place of each tensor of a file among those of the model."""
    matching = _Matching()
    file_head = _head_of_file(weights, own, head)
    for key, value in weights.items():
        candidates = _candidates(str(key), head)
        if file_head and str(key).rpartition(".")[0] == file_head:
            candidates.append(f"{head}.{str(key).rpartition('.')[2]}")
        names = [name for name in candidates if name in own]
        free = [name for name in names if name not in matching.found]
        target = next((name for name in free if _fits(value, own[name])), None)
        if target is not None:
            _place(matching, str(key), value, target, own[target])
            continue
        skipped = f"{printable(key)} {_shape(value)}"
        if names:
            skipped += f" instead of {list(own[names[0]].shape)}"
        matching.rows["skipped"].append(skipped)
        if not names or not remarks[names[0]]:
            matching.is_whole = False
    return matching


def _head_of_file(weights: Weights, own: Weights, head: str) -> str:
    """The module that is the file's classifier by position and shape, whatever its name is.

    It is the last linear layer of the file, if it takes as many features as that of the model.
    Returns "" if there is none.
    """
    linears = []
    for key, value in weights.items():
        if str(key).endswith(".weight") and isinstance(value, torch.Tensor) and value.ndim == 2:
            linears.append(str(key))
    expected = own.get(f"{head}.weight")
    if not linears or expected is None:
        return ""
    last = linears[-1]
    if weights[last].shape[1] != expected.shape[1]:
        return ""
    return last.removesuffix(".weight")


def _place(
    matching: _Matching, key: str, value: torch.Tensor, target: str, own: torch.Tensor
) -> None:
    """Note that the tensor `key` of the file becomes the tensor `target` of the model."""
    matching.found[target] = value.reshape(own.shape).to(own.dtype)
    if value.shape != own.shape:
        matching.rows["reshaped"].append(f"{key} -> {target}")
    elif key != target:
        matching.rows["renamed"].append(f"{key} -> {target}")
    else:
        matching.rows["loaded"].append(key)


def _shape(value: object) -> list[Any]:
    """The shape of a tensor; for another value its type."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    return [type(value).__name__]


def describe(rows: Rows, most: int = 3) -> str:
    """The rows of `load_weights` as a table, with at most so many names in each."""
    lines = []
    for kind, names in rows.items():
        line = f"  {kind:8} {len(names):5}  {some(names, most)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _candidates(key: str, head: str) -> list[str]:
    """What the model may call the tensor that a file calls `key`, the likeliest name first.

    Any number of renames may apply.
    """
    names = [key, re.sub(_PREFIX, "", key)]
    for pattern, replacement in (*_RENAMES, (_HEADS, f"{head}.")):
        names += [re.sub(pattern, replacement, name) for name in names]
    return list(dict.fromkeys(names))


def _fits(value: object, own: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """Whether `value` can take the place of `own`, as it is or as the same layer in another form.

    A 1x1 convolution and a linear layer are two forms of the same layer.
    """
    if not isinstance(value, torch.Tensor) or value.is_floating_point() != own.is_floating_point():
        return False
    if value.shape == own.shape:
        return True
    if {value.ndim, own.ndim} != {2, 4}:
        return False
    return value.flatten(1).shape == own.flatten(1).shape
