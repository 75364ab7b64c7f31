"""Every file of configs/: it parses without a remark, its head comment is true, its numbers equal
the golden ones.

The golden numbers are tests/golden/recipes.json, and the table of configs/README.md comes from the
head comments. After a change that is meant: `python tests/test_recipes.py --write` writes both
anew; then read the difference.
"""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from resnet_dist.cli import parse_config
from resnet_dist.cluster import ClusterConfig
from resnet_dist.config import Config
from resnet_dist.data.sampling.order import steps_per_epoch
from resnet_dist.layout import check_layout
from resnet_dist.models.build import MODELS, build_model
from resnet_dist.models.resnet import FAMILY
from resnet_dist.models.zoo import check_image_size
from resnet_dist.optim import parameter_groups
from resnet_dist.remarks import far_from_recipe, remarks
from resnet_dist.schedule import build_schedule, epochs_to_steps, peak_lr
from resnet_dist.settings import setting_hints

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "recipes.json"
README = ROOT / "configs" / "README.md"
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
OURS = {
    "quickstart",
    "resnet50",
    "cifar10_resnet20",
    "study_cifar10",
    "lecun1998_lenet5",
}  # no published training
PUBLISHED = [name for name in NAMES if name not in OURS]
EPOCHS = (0, 0.5, 1, 2, 4, 5, 8, 12, 15, 25, 30, 45, 60, 75, 80, 85, 100, 123, 150, 249, 300, 450)
IMAGES = {
    "imagenet": (1_281_167, 1000),
    "cifar10": (50_000, 10),
    "digits": (1_442, 10),
}  # to train, classes


@functools.cache
def load(name: str) -> Config:
    return parse_config(["--config", str(ROOT / "configs" / f"{name}.yaml")])


def data_of(config: Config) -> tuple[int, int]:
    kind = (
        "digits"
        if config.data.kind == "digits"
        else "cifar10"
        if config.data.train_crop_size == 32
        else "imagenet"
    )
    return IMAGES[kind]


@functools.cache
def network(section, num_classes: int) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(section, num_classes)


def network_of(config: Config) -> torch.nn.Module:
    """Built once for all configs that differ only in what changes no parameter's shape."""
    same = {"sync_batch_norm": True}
    if config.model.name in FAMILY:
        same |= {
            "zero_init_residual": False,
            "stride_in_1x1": False,
            "stochastic_depth": 0.0,
            "blur_pool": False,
        }
    return network(dataclasses.replace(config.model, **same), data_of(config)[1])


def count(module: torch.nn.Module, without: str = " ") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith(without))


def numbers(name: str) -> dict:
    """What the golden file holds of a config; a group is [parameters, weight decay, lr_scale]."""
    config = load(name)
    model, train = network_of(config), config.train
    per_epoch = steps_per_epoch(data_of(config)[0], train.global_batch_size, config.augment.repeats)
    total = epochs_to_steps(train.epochs, per_epoch)
    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, train.global_batch_size)
    schedule = build_schedule(config.schedule, peak, per_epoch, total)
    steps = {
        f"{epoch:g}": epochs_to_steps(epoch, per_epoch) for epoch in EPOCHS if epoch < train.epochs
    }
    steps |= {"last update": total - 1}
    groups = [
        [sum(p.numel() for p in group["params"]), group["weight_decay"], group.get("lr_scale", 1.0)]
        for group in parameter_groups(model, config.optim)
    ]
    return {
        "model": config.model.name,
        "parameters": count(model),
        "groups": groups,
        "updates": total,
        "peak_lr": peak,
        "lr_at_epoch": {key: float(f"{schedule.lr(step):.12g}") for key, step in steps.items()},
    }


def head(name: str) -> dict[str, str]:
    """The labelled parts of a head comment, {"Command": ..., ...}, and its title as "Title"."""
    parts, label = {"Title": ""}, "Title"
    for line in (ROOT / "configs" / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            return {label: text.strip() for label, text in parts.items()}
        if found := re.match(r"# ([A-Z][a-z]+): +(.*)", line):
            label, line = found[1], f"# {found[2]}"
            parts[label] = ""
        parts[label] += " " + line[1:].strip()
    raise AssertionError(f"{name} is nothing but a comment")


def published(name: str) -> tuple[str, str]:
    """(top-1, top-5) in percent as the head comment has them, the first of each; "" for none."""
    text = head(name)["Expected"]
    found = [re.search(rf"([\d.]+)(?: \+- [\d.]+)? % top-{k}\b", text) for k in (1, 5)]
    return tuple(match[1] if match else "" for match in found)


def table() -> str:
    lines = [
        "| recipe | epochs | batch | GPUs | published top-1 | top-5 | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PUBLISHED:
        config, (top1, top5) = load(name), published(name)
        source = re.split(r",|;| \(|(?<!al)\. |\.$", head(name)["Source"])[0].removeprefix(
            "github.com/"
        )
        cells = (
            f"[{name}]({name}.yaml)",
            f"{round(config.train.epochs, 1):g}",
            f"{config.train.global_batch_size:,}",
            config.recipe.world_size,
            top1,
            top5,
            source,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def golden_text() -> str:
    """JSON with one line for each entry of a config, so that a difference can be read."""
    blocks = []
    for name in NAMES:
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in numbers(name).items()
        ]
        blocks.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def write() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden_text())
    before, after = README.read_text().split("<!-- table -->\n")[::2]
    README.write_text(f"{before}<!-- table -->\n{table()}<!-- table -->\n{after}")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_equal_the_golden_file(name):
    """Curve, groups and size, to 1e-9; the file holds every config and no other."""
    golden = json.loads(GOLDEN.read_text())
    assert list(golden) == NAMES
    want, have = golden[name], numbers(name)
    assert have["lr_at_epoch"] == pytest.approx(want.pop("lr_at_epoch"), rel=1e-9, abs=1e-15)
    assert have["peak_lr"] == pytest.approx(want.pop("peak_lr"), rel=1e-9)
    assert {key: have[key] for key in want} == want


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_is_without_effect(name):
    config = load(name)
    assert remarks(config, "cuda") == []
    assert far_from_recipe(config, config.recipe.world_size or 1) == []
    check_image_size(config.model.name, config.data)
    assert config.output_dir == ("runs/study" if name == "study_cifar10" else f"runs/{name}")
    assert config.model.name in MODELS


@pytest.mark.parametrize("name", NAMES)
def test_the_head_comment_is_complete_and_its_options_exist(name):
    parts = head(name)
    assert {"Command", "Hardware", "Expected", "Source"} <= set(parts), "label missing"
    assert name == "quickstart" or f"configs/{name}.yaml" in parts["Command"]
    known = set(setting_hints())
    known |= {f"cluster.{field.name}" for field in dataclasses.fields(ClusterConfig)}
    used = re.findall(r"--([a-z_0-9]+\.[a-z_0-9]+)", " ".join(parts.values()))
    assert set(used) <= known
    if name in PUBLISHED:
        assert "This project has not run it." in parts["Expected"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_comment_states_the_run(name):
    """Epochs, updates, batch, peak, ranks and local batch, which the comment has from the source,
    are the config's.
    """
    config, parts = load(name), head(name)
    sentence = (
        r"([\d.]+) epochs = ([\d,]+) updates of ([\d,]+) images; peak learning rate ([\d.]+)\."
    )
    found = re.fullmatch(sentence, parts["Run"])
    epochs, updates, batch, peak = (float(text.replace(",", "")) for text in found.groups())
    have = numbers(name)
    assert (epochs, updates, batch) == (
        config.train.epochs,
        have["updates"],
        config.train.global_batch_size,
    )
    assert have["peak_lr"] == pytest.approx(peak, rel=1e-9)
    ranks = 1
    for option in ("nproc_per_node", "cluster.nodes", "cluster.gpus_per_node"):
        ranks *= (
            int(found[1]) if (found := re.search(rf"--{option} (\d+)", parts["Command"])) else 1
        )
    assert ranks == config.recipe.world_size
    local = int(re.search(r"([\d,]+) images on ", parts["Hardware"])[1].replace(",", ""))
    mixes = bool(config.augment.mixup_alpha or config.augment.cutmix_alpha)
    assert local == check_layout(
        config.train.global_batch_size, ranks, config.train.grad_accum_steps, pairs=mixes
    )
    assert abs(config.recipe.global_batch_size / config.train.global_batch_size - 1) < 0.02


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if "_Weights." in head(name)["Expected"]]
)
def test_figures_and_sizes_are_those_that_torchvision_publishes(name):
    from torchvision.models import get_weight

    weights = get_weight(re.search(r"\w+_Weights\.\w+", head(name)["Expected"])[0])
    figures = weights.meta["_metrics"]["ImageNet-1K"]
    assert published(name) == (f"{figures['acc@1']:.2f}", f"{figures['acc@5']:.2f}")
    assert count(network_of(load(name))) == weights.meta["num_params"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_torchvision_and_the_papers(name):
    """Numbers of parameters that others publish: torchvision's, and the papers' in millions."""
    from torchvision.models import get_model_weights, list_models

    config = load(name)
    model, size = network_of(config), count(network_of(config))
    millions = {
        "resnet20": 0.27,
        "resnet32": 0.46,
        "resnet44": 0.66,
        "resnet56": 0.85,
        "resnet110": 1.7,  # He 2015
        "preresnet110": 1.7,
        "preresnet164": 1.7,
    }  # He 2016
    if config.model.shortcut == "A" or config.model.name.startswith(
        "plain"
    ):  # He et al. 2015: of the same size
        twin = (
            name.replace("plain", "resnet") if "plain" in name else name.replace("resnet", "plain")
        )
        assert size == count(network_of(load(twin)))
    elif config.model.name in millions:
        assert size / 1e6 == pytest.approx(
            millions[config.model.name], abs=0.05 if size > 1e6 else 0.005
        )
    elif config.model.name == "densenet264":  # no published weights; about 33 million
        assert 33e6 < size < 34e6
    else:
        assert config.model.name in list_models()
        theirs = {weights.meta["num_params"] for weights in get_model_weights(config.model.name)}
        assert theirs & {size, count(model, without="aux")}


def test_the_average_of_torchvision_per_step():
    """torchvision: every 32 steps, 1 - decay scaled by batch * steps / epochs
    (references/classification/train.py).
    """
    per_update = 1 - (1 - 0.99998) * 1024 * 32 / 600
    names = [name for name in NAMES if name.startswith("torchvision_v2")]
    assert len(names) == 8
    for name in names:
        assert load(name).train.ema_decay == pytest.approx(per_update ** (1 / 32), abs=1e-9)
        assert (
            f"{per_update:.8f}" in head(name)["Source"]
            and str(load(name).train.ema_decay) in head(name)["Source"]
        )


def test_the_table_is_that_of_the_head_comments():
    assert README.read_text().split("<!-- table -->\n")[1] == table(), (
        "python tests/test_recipes.py --write"
    )


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
