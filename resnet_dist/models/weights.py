"""Load weights of other programs (torchvision, timm, NVIDIA), and freeze parts of a network.

A table of patterns translates the tensor names of a file to those of the model. Every tensor of
the file and of the model is accounted for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import nn

from resnet_dist.data.sources.index import first_names
from resnet_dist.text import printable

Weights = dict[str, torch.Tensor]
Rows = dict[str, list[str]]
"""Tensor names, grouped by what happened to the tensors."""

# Keys under which training programs store weights. Averaged weights are preferred.
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

# Wrappers such as DistributedDataParallel and torch.compile prepend these to every name.
_PREFIX = r"^((module|_orig_mod|model|net)\.)+"


def _layer_from_one(match: re.Match[str]) -> str:
    """Translate NVIDIA's "layers.0." to "layer1."."""
    number = int(match[1]) + 1
    return f"layer{number}."


# Pairs of a pattern that other programs use and its replacement in our networks.
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
# Names that other programs give to the classifier.
_HEADS = r"^(fc|head|head\.fc|classifier|classifier\.fc|last_linear|classif)\.(?=(weight|bias)$)"

# Why a tensor of the model may be missing in a file.
_FRESH_HEAD = " (head, freshly initialised)"
_NO_EFFECT = " (without effect)"


def head_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Find the classifier, and the classifiers of auxiliary heads.

    The classifier is the last linear layer of the model. A model with an attribute
    `auxiliary_weight` may have auxiliary heads. Each of these is a module that ends in a linear
    layer with as many outputs as the classifier.

    Args:
        model: The network.

    Returns:
        The linear layers by name, in the order of the model. Empty if it has no linear layer.
    """
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linears[name] = module
    if not linears:
        return {}
    main = next(reversed(linears))
    candidates = {main}
    if hasattr(model, "auxiliary_weight"):
        # A later layer of the same parent module replaces an earlier one.
        last_in_parent = {}
        for name in linears:
            parent = name.rpartition(".")[0]
            last_in_parent[parent] = name
        candidates.update(last_in_parent.values())
    num_classes = linears[main].out_features
    heads = {}
    for name, module in linears.items():
        if name in candidates and module.out_features == num_classes:
            heads[name] = module
    return heads


def freeze(model: nn.Module, unfreeze_from: str) -> None:
    """Set `requires_grad` so that only the last part of a network is trained.

    Args:
        model: The network; its parameters are changed in place.
        unfreeze_from: Name of the first module that is trained, as "layer4". All parameters that
            are defined after it and the classifier are trained too. "head" trains only the
            classifier, and an empty string trains everything.

    Raises:
        ValueError: There is no such module, it has no parameters, or it is the first one, so that
            nothing would be frozen.
    """
    if not unfreeze_from:
        return
    first = _first_trained(model, unfreeze_from)
    heads = head_modules(model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        module = name.rpartition(".")[0]
        is_trained = number >= first or module in heads
        parameter.requires_grad_(is_trained)


def _first_trained(model: nn.Module, unfreeze_from: str) -> int:
    """Find the first trained parameter.

    Returns:
        Its number among the parameters of the model, from 0. For "head", the number of parameters.

    Raises:
        ValueError: As in `freeze`.
    """
    names = [name for name, _ in model.named_parameters()]
    prefix = f"{unfreeze_from}."
    first = None
    for number, name in enumerate(names):
        if name.startswith(prefix):
            first = number
            break
    if first is None and unfreeze_from == "head":
        return len(names)
    if first is None:
        top_modules = dict.fromkeys(name.split(".")[0] for name in names)
        choices = ", ".join(top_modules)
        raise ValueError(
            f"optim.unfreeze_from is {unfreeze_from!r}: the network has no such module with "
            f"parameters; choose head, {choices} or a part"
        )
    if first == 0:
        raise ValueError(
            f"optim.unfreeze_from is {unfreeze_from!r}, where the network begins: nothing would be "
            "frozen; leave it empty, or name a later module"
        )
    return first


def load_exactly(
    model: nn.Module,
    weights: Weights,
    name: str,
) -> None:
    """Load a state dict that has exactly the tensors of the model.

    Args:
        model: The network; unchanged if this raises.
        weights: The state dict.
        name: What error messages call the weights.

    Raises:
        ValueError: Names or shapes differ. The message lists the first of them.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    reshaped = []
    for key, value in own.items():
        if key not in weights:
            continue
        shape = list(weights[key].shape)
        expected = list(value.shape)
        if shape != expected:
            reshaped.append(f"{key} {shape} instead of {expected}")
    problems = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": reshaped,
    }
    found = []
    for kind, names in problems.items():
        if names:
            found.append(f"{kind}: {first_names(names, 3)}")
    if found:
        reasons = "; ".join(found)
        raise ValueError(printable(f"{name} does not fit the network: tensors {reasons}"))
    model.load_state_dict(weights)


def find_weights(content: object) -> tuple[list[str], Weights]:
    """Find the state dict in the content of a file. Averaged weights are preferred.

    Args:
        content: What the file holds: a state dict, or dictionaries that contain one.

    Returns:
        The keys that lead to the state dict, and the state dict. ([], {}) if there is none.
    """
    if not isinstance(content, dict):
        return [], {}
    for key in _NESTED:
        inner_keys, weights = find_weights(content.get(key))
        if weights:
            return [key, *inner_keys], weights
    for value in content.values():
        if isinstance(value, torch.Tensor):
            return [], content
    return [], {}


def _empty_rows() -> Rows:
    """The rows of `load_weights`, in the order in which they are printed."""
    kinds = ("loaded", "renamed", "reshaped", "skipped", "missing")
    return {kind: [] for kind in kinds}


@dataclass
class _Matching:
    """Where the tensors of a file go in the model."""

    found: Weights = field(default_factory=dict)
    """tensors by their name in the model, in the shape and type of the model"""
    rows: Rows = field(default_factory=_empty_rows)
    """see `load_weights`"""
    is_whole: bool = True
    """whether only heads and num_batches_tracked were skipped"""


def load_weights(
    model: nn.Module,
    content: dict[str, Any],
    name: str,
    key: str = "checkpoint.init_from",
) -> tuple[Rows, bool]:
    """Copy the weights in the content of a file into a model.

    The head keeps its initial values if the file has another number of classes.

    Args:
        model: The network; unchanged if this raises.
        content: What the file holds: a state dict, alone or under one of the usual keys.
        name: The file name, for error messages.
        key: The setting or option that names the file, for error messages.

    Returns:
        A tuple of two values.

        - The tensor names under "loaded", "renamed", "reshaped" (between a 1x1 convolution and a
          linear layer), "skipped" (only in the file) and "missing" (only in the model).
        - Whether everything fits: the last two lists hold only heads and num_batches_tracked,
          which old files do not have.

    Raises:
        ValueError: The file has less than half of the tensors before the head, or some of its
            values are not finite.
    """
    _, weights = find_weights(content)
    own = model.state_dict()
    heads = head_modules(model)
    main_head = next(reversed(heads), "")
    remarks = {key: _remark(key, heads) for key in own}
    matching = _match(weights, own, remarks, main_head)

    missing = [key for key in own if key not in matching.found]
    # Tensors without a remark, which are required, come first.
    missing.sort(key=remarks.__getitem__)
    matching.rows["missing"] = [key + remarks[key] for key in missing]

    num_needed = sum(1 for key in own if not remarks[key])
    num_absent = sum(1 for key in missing if not remarks[key])
    if 2 * num_absent > num_needed:
        num_found = num_needed - num_absent
        in_file = printable(first_names(list(weights), 3)) or "no tensors"
        in_model = first_names(list(own), 3)
        raise ValueError(
            f"{key} is {name!r}: it has {num_found} of the {num_needed} tensors "
            f"of the network before its head, and half are needed. The file has {in_file}; the "
            f"network {in_model}. Choose the model.name and options that it was made with"
        )
    refuse_non_finite(matching.found, f"{key} is {name!r}")
    model.load_state_dict(matching.found, strict=False)
    fits = matching.is_whole and num_absent == 0
    return matching.rows, fits


def refuse_non_finite(weights: Weights, title: str) -> None:
    """Check that no value of a tensor is NaN or infinite.

    Args:
        weights: The tensors by name.
        title: The beginning of the error message.

    Raises:
        ValueError: There is such a value. The message lists the first tensors.
    """
    broken = []
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            broken.append(key)
    if broken:
        raise ValueError(f"{title}: values that are not finite in {first_names(broken, 3)}")


def count_outputs(model: nn.Module, weights: Weights) -> int:
    """The number of classes of the classifier in a state dict of another program.

    Args:
        model: The network of the state dict, with any number of classes.
        weights: The state dict.

    Returns:
        The number of classes; 0 if the file has no classifier of this network.
    """
    own = model.state_dict()
    head = next(reversed(head_modules(model)), "")
    target = f"{head}.weight"
    file_head = _head_of_file(weights, own, head)
    for key, value in weights.items():
        is_head = key == f"{file_head}.weight" or target in _candidates(str(key), head)
        if is_head and isinstance(value, torch.Tensor) and value.ndim in (2, 4):
            return int(value.shape[0])
    return 0


def _remark(key: str, heads: dict[str, nn.Linear]) -> str:
    """Why a file may lack a tensor of the model.

    Args:
        key: The name of the tensor in the model.
        heads: The classifiers of the model.

    Returns:
        The reason, in parentheses. Empty if the tensor is required.
    """
    module = key.rpartition(".")[0]
    if module in heads:
        return _FRESH_HEAD
    if key.endswith(".num_batches_tracked"):
        return _NO_EFFECT
    return ""


def _match(
    weights: Weights,
    own: Weights,
    remarks: dict[str, str],
    head: str,
) -> _Matching:
    """Assign each tensor of a file to a tensor of the model.

    Args:
        weights: State dict of the file.
        own: State dict of the model.
        remarks: For each tensor of the model, why it may be missing; see `_remark`.
        head: Name of the classifier of the model.
    """
    matching = _Matching()
    file_head = _head_of_file(weights, own, head)
    for original_key, value in weights.items():
        key = str(original_key)
        candidates = _candidates(key, head)
        module, _, attribute = key.rpartition(".")
        if file_head and module == file_head:
            candidates.append(f"{head}.{attribute}")
        names = [name for name in candidates if name in own]
        if _place(matching, key, value, names, own):
            continue
        skipped = f"{printable(key)} {_shape(value)}"
        if names:
            expected = own[names[0]]
            skipped += f" instead of {list(expected.shape)}"
        matching.rows["skipped"].append(skipped)
        is_harmless = bool(names) and remarks[names[0]] != ""
        if not is_harmless:
            matching.is_whole = False
    return matching


def _head_of_file(
    weights: Weights,
    own: Weights,
    head: str,
) -> str:
    """Find the classifier of a file by position and shape, whatever its name is.

    It is the last linear layer of the file, if it has as many input features as that of the model.

    Returns:
        The name of the layer in the file. An empty string if there is none.
    """
    linears = []
    for key, value in weights.items():
        is_matrix = isinstance(value, torch.Tensor) and value.ndim == 2
        if is_matrix and str(key).endswith(".weight"):
            linears.append(str(key))
    expected = own.get(f"{head}.weight")
    if not linears or expected is None:
        return ""
    last = linears[-1]
    if weights[last].shape[1] != expected.shape[1]:
        return ""
    return last.removesuffix(".weight")


def _place(
    matching: _Matching,
    key: str,
    value: object,
    names: list[str],
    own: Weights,
) -> bool:
    """Give the tensor `key` of the file the first of `names` that is free and that it fits.

    Returns:
        Whether there is such a name.
    """
    for target in names:
        expected = own[target]
        if target in matching.found or not _fits(value, expected):
            continue
        matching.found[target] = value.reshape(expected.shape).to(expected.dtype)
        if value.shape != expected.shape:
            matching.rows["reshaped"].append(f"{key} -> {target}")
        elif key != target:
            matching.rows["renamed"].append(f"{key} -> {target}")
        else:
            matching.rows["loaded"].append(key)
        return True
    return False


def _shape(value: object) -> list[Any]:
    """Describe a value of a file.

    Returns:
        The shape of a tensor. For another value, a list with the name of its type.
    """
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    return [type(value).__name__]


def describe(rows: Rows, most: int = 3) -> str:
    """Format the rows of `load_weights` as a table.

    Args:
        rows: The tensor names of each kind.
        most: Largest number of names in a row.

    Returns:
        For each kind a line with the number of tensors and the first names.
    """
    lines = []
    for kind, names in rows.items():
        count = len(names)
        line = f"  {kind:8} {count:5}  {first_names(names, most)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _candidates(key: str, head: str) -> list[str]:
    """List the names that the model may have for a tensor of a file.

    Any number of the renames may apply to one name.

    Args:
        key: The name of the tensor in the file.
        head: Name of the classifier of the model.

    Returns:
        The names, the most likely one first, without duplicates.
    """
    renames = [*_RENAMES, (_HEADS, f"{head}.")]
    without_prefix = re.sub(_PREFIX, "", key)
    names = [key, without_prefix]
    for pattern, replacement in renames:
        renamed = [re.sub(pattern, replacement, name) for name in names]
        names.extend(renamed)
    unique = dict.fromkeys(names)
    return list(unique)


def _fits(value: object, own: torch.Tensor) -> TypeGuard[torch.Tensor]:
    """Whether `value` can replace the tensor `own` of the model.

    A 1x1 convolution and a linear layer are the same layer in two shapes, so one can replace the
    other.
    """
    if not isinstance(value, torch.Tensor):
        return False
    if value.is_floating_point() != own.is_floating_point():
        return False
    if value.shape == own.shape:
        return True
    if {value.ndim, own.ndim} != {2, 4}:
        return False
    return value.flatten(1).shape == own.flatten(1).shape
