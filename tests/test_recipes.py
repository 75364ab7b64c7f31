"""Every file of configs/: its settings have an effect, its facts are true, its numbers golden.

The golden numbers are tests/golden/recipes.json, and the table of configs/README.md comes from the
section `recipe` of each file. After a change that is meant: `python tests/test_recipes.py --write`
writes both anew; then read the difference.
"""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from module_utils import count_parameters

from resnet_dist.cli import parse_config
from resnet_dist.config import Config
from resnet_dist.data.sampling.order import steps_per_epoch
from resnet_dist.layout import check_layout
from resnet_dist.models.build import MODELS, build_model
from resnet_dist.models.resnet import FAMILY
from resnet_dist.models.zoo import check_image_size
from resnet_dist.optim import parameter_groups
from resnet_dist.schedule import build_schedule, epochs_to_steps, peak_lr
from resnet_dist.settings.cluster import ClusterConfig
from resnet_dist.settings.reading import setting_hints
from resnet_dist.settings.remarks import recipe_mismatch, remarks

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "tests" / "golden" / "recipes.json"
README = CONFIGS / "README.md"
TABLE_MARK = "<!-- table -->\n"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# No published training.
OURS = {
    "quickstart",
    "resnet50",
    "cifar10_resnet20",
    "speed_cifar10",
    "study_cifar10",
    "lecun1998_lenet5",
}
PUBLISHED = [name for name in NAMES if name not in OURS]
EPOCHS = (0, 0.5, 1, 2, 4, 5, 8, 12, 15, 25, 30, 45, 60, 75, 80, 85, 100, 123, 150, 249, 300, 450)


class DataSize(NamedTuple):
    """Size of a data set."""

    num_images: int
    num_classes: int


IMAGENET = DataSize(1_281_167, 1000)
CIFAR10 = DataSize(50_000, 10)
DIGITS = DataSize(1_442, 10)


def path_of(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


@functools.cache
def load(name: str) -> Config:
    return parse_config(["--config", str(path_of(name))])


def data_of(config: Config) -> DataSize:
    """Number of training images, and of classes."""
    if config.data.kind == "digits":
        return DIGITS
    if config.data.train_crop_size == 32:
        return CIFAR10
    return IMAGENET


@functools.cache
def network(section, num_classes: int) -> torch.nn.Module:
    """The network of a model section, without memory for its parameters."""
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
            "dropout": 0.0,
            "blur_pool": False,
        }
    section = dataclasses.replace(config.model, **same)
    return network(section, data_of(config).num_classes)


def groups_of(config: Config) -> list[list[float]]:
    """[parameters, weight decay, lr_scale] of each group of the optimizer."""
    groups = []
    for group in parameter_groups(network_of(config), config.optim):
        size = sum(parameter.numel() for parameter in group["params"])
        lr_scale = group.get("lr_scale", 1.0)
        groups.append([size, group["weight_decay"], lr_scale])
    return groups


def numbers(name: str) -> dict:
    """What the golden file holds of a config."""
    config = load(name)
    train = config.train
    optim = config.optim
    per_epoch = steps_per_epoch(
        data_of(config).num_images,
        train.global_batch_size,
        config.augment.repeats,
    )
    total = epochs_to_steps(train.epochs, per_epoch)
    peak = peak_lr(optim.base_lr, optim.base_batch_size, train.global_batch_size)
    schedule = build_schedule(config.schedule, peak, per_epoch, total)

    steps = {}
    for epoch in EPOCHS:
        if epoch < train.epochs:
            steps[f"{epoch:g}"] = epochs_to_steps(epoch, per_epoch)
    steps["last update"] = total - 1
    curve = {}
    for label, step in steps.items():
        with_12_digits = f"{schedule.lr(step):.12g}"
        curve[label] = float(with_12_digits)

    return {
        "model": config.model.name,
        "parameters": count_parameters(network_of(config)),
        "groups": groups_of(config),
        "updates": total,
        "peak_lr": peak,
        "lr_at_epoch": curve,
    }


def table() -> str:
    """The table of configs/README.md, in Markdown."""
    lines = [
        "| recipe | epochs | batch | GPUs | published top-1 | top-5 | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PUBLISHED:
        config = load(name)
        recipe = config.recipe
        cells = (
            f"[{name}]({name}.yaml)",
            f"{round(config.train.epochs, 1):g}",
            f"{config.train.global_batch_size:,}",
            str(recipe.world_size),
            written(name, "top1"),
            written(name, "top5"),
            recipe.reference,
        )
        row = " | ".join(cells)
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


def written(name: str, key: str) -> str:
    """A figure of the recipe with as many digits as the file has; "" for none."""
    tree = yaml.compose(path_of(name).read_text())
    sections = {label.value: section for label, section in tree.value}
    for label, figure in sections["recipe"].value:
        if label.value == key:
            return figure.value
    return ""


def check_all(check, names=NAMES) -> None:
    """Call `check(name)` for each recipe, and show all that fail."""
    failures = []
    for name in names:
        try:
            check(name)
        except Exception as problem:
            failures.append(f"{name}: {type(problem).__name__}: {problem}")
    assert not failures, "\n".join(failures)


def golden_text() -> str:
    """JSON with one line for each entry of a config, so that a difference can be read."""
    blocks = []
    for name in NAMES:
        lines = []
        for key, value in numbers(name).items():
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        entries = ",\n".join(lines)
        blocks.append(f'"{name}": {{\n{entries}\n}}')
    all_blocks = ",\n".join(blocks)
    return f"{{\n{all_blocks}\n}}\n"


def write() -> None:
    """Write the golden file and the table anew."""
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden_text())
    before, _, after = README.read_text().split(TABLE_MARK)
    README.write_text(TABLE_MARK.join([before, table(), after]))


@pytest.mark.slow
def test_numbers_equal_the_golden_file():
    """Curve, groups and size, to 1e-9; the file holds every config and no other."""
    golden = json.loads(GOLDEN.read_text())
    assert list(golden) == NAMES

    def check(name):
        expected = golden[name]
        found = numbers(name)
        curve = expected.pop("lr_at_epoch")
        assert found["lr_at_epoch"] == pytest.approx(curve, rel=1e-9, abs=1e-15)
        peak = expected.pop("peak_lr")
        assert found["peak_lr"] == pytest.approx(peak, rel=1e-9)
        for key, value in expected.items():
            assert found[key] == value, key

    check_all(check)


@pytest.mark.slow
def test_no_setting_is_without_effect():
    def check(name):
        config = load(name)
        world_size = config.recipe.world_size
        if world_size == 0:
            world_size = 1
        assert remarks(config, "cuda") == []
        assert recipe_mismatch(config, world_size) == []
        check_image_size(config.model.name, config.data)
        folder = "study" if name == "study_cifar10" else name
        assert config.output_dir == f"runs/{folder}"
        assert config.model.name in MODELS

    check_all(check)


def test_every_recipe_says_how_where_and_what():
    known = set(setting_hints())
    for field in dataclasses.fields(ClusterConfig):
        known.add(f"cluster.{field.name}")

    def check(name):
        recipe = load(name).recipe
        for key in ("command", "hardware", "expected", "source"):
            assert getattr(recipe, key), f"recipe.{key} is missing"
        if name != "quickstart":
            assert f"configs/{name}.yaml" in recipe.command
        used = re.findall(r"--([a-z_0-9]+\.[a-z_0-9]+)", recipe.command)
        assert set(used) <= known
        is_published = name in PUBLISHED
        assert bool(recipe.reference) == is_published

    check_all(check)


def ranks_of(command: str) -> int:
    """How many ranks a command starts."""
    ranks = 1
    for option in ("nproc_per_node", "cluster.nodes", "cluster.gpus_per_node"):
        found = re.search(rf"--{option} (\d+)", command)
        if found:
            ranks *= int(found[1])
    return ranks


@pytest.mark.slow
def test_the_facts_of_a_recipe_are_those_of_its_settings():
    """Updates, batch, peak, ranks and local batch, which the facts have from the source."""

    def check(name):
        config = load(name)
        found = numbers(name)
        recipe = config.recipe
        assert recipe.updates == found["updates"]
        assert found["peak_lr"] == pytest.approx(recipe.peak_lr, rel=1e-9)

        ranks = ranks_of(recipe.command)
        assert ranks == recipe.world_size
        augment = config.augment
        batch_size = config.train.global_batch_size
        local_batch_size = check_layout(
            batch_size,
            ranks,
            config.train.grad_accum_steps,
            pairs=augment.mixup_alpha > 0 or augment.cutmix_alpha > 0,
        )
        assert recipe.local_batch_size == local_batch_size
        assert f"{recipe.local_batch_size:,} images on " in recipe.hardware
        # The batch may differ a little from that of the source.
        assert abs(recipe.global_batch_size / batch_size - 1) < 0.02

        # The figures in words are those in numbers; "" is for none.
        assert written(name, "top1") in recipe.expected
        assert written(name, "top5") in recipe.expected

    check_all(check, PUBLISHED)


def test_figures_and_sizes_are_those_that_torchvision_publishes():
    from torchvision.models import get_weight

    names = [name for name in PUBLISHED if "_Weights." in load(name).recipe.expected]
    assert len(names) > 15

    def check(name):
        config = load(name)
        weights_name = re.search(r"\w+_Weights\.\w+", config.recipe.expected)[0]
        meta = get_weight(weights_name).meta
        figures = meta["_metrics"]["ImageNet-1K"]
        assert written(name, "top1") == f"{figures['acc@1']:.2f}"
        assert written(name, "top5") == f"{figures['acc@5']:.2f}"
        assert count_parameters(network_of(config)) == meta["num_params"]

    check_all(check, names)


# Millions of parameters that He et al. 2015 and 2016 publish.
MILLIONS = {
    "resnet20": 0.27,
    "resnet32": 0.46,
    "resnet44": 0.66,
    "resnet56": 0.85,
    "resnet110": 1.7,
    "preresnet110": 1.7,
    "preresnet164": 1.7,
}


# Millions of parameters of timm's networks, from its results/results-imagenet.csv.
TIMM_MILLIONS = {"resnet50d": 25.58, "resnetrs50": 35.69}


def main_modules(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of a network of torchvision, without its auxiliary classifiers."""
    return [module for name, module in network.named_children() if not name.startswith("aux")]


def counterpart_of(name: str) -> str:
    """He et al. 2015: a plain network is as large as the ResNet with option A."""
    if "plain" in name:
        return name.replace("plain", "resnet")
    return name.replace("resnet", "plain")


@pytest.mark.slow
def test_sizes_are_those_of_torchvision_and_the_papers():
    """Numbers of parameters that others publish: torchvision's, timm's, and the papers' in
    millions.
    """
    from torchvision.models import get_model_weights, list_models

    def check(name):
        config = load(name)
        model = config.model.name
        network = network_of(config)
        size = count_parameters(network)
        if config.model.shortcut == "A" or model.startswith("plain"):
            counterpart = load(counterpart_of(name))
            assert size == count_parameters(network_of(counterpart))
        elif model in MILLIONS:
            tolerance = 0.05 if size > 1e6 else 0.005
            assert size / 1e6 == pytest.approx(MILLIONS[model], abs=tolerance)
        elif model in TIMM_MILLIONS:
            assert round(size / 1e6, 2) == TIMM_MILLIONS[model]
        elif model == "densenet264":
            # There are no published weights; it has about 33 million.
            assert 33e6 < size < 34e6
        else:
            assert model in list_models()
            published = {weights.meta["num_params"] for weights in get_model_weights(model)}
            without_auxiliary = count_parameters(*main_modules(network))
            assert size in published or without_auxiliary in published

    check_all(check, PUBLISHED)


def test_the_average_of_torchvision_per_step():
    """torchvision: every 32 steps, 1 - decay scaled by batch * steps / epochs
    (references/classification/train.py).
    """
    per_update = 1 - (1 - 0.99998) * 1024 * 32 / 600
    per_step = per_update ** (1 / 32)
    names = [name for name in NAMES if name.startswith("torchvision_v2")]
    assert len(names) == 8
    for name in names:
        config = load(name)
        ema_decay = config.train.ema_decay
        assert ema_decay == pytest.approx(per_step, abs=1e-9)
        assert f"{per_update:.8f}" in config.recipe.source
        assert str(ema_decay) in config.recipe.source


def test_the_table_is_that_of_the_recipes():
    _, present, _ = README.read_text().split(TABLE_MARK)
    assert present == table(), "python tests/test_recipes.py --write"


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
