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

import pytest
import torch
import yaml

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
GOLDEN = ROOT / "tests" / "golden" / "recipes.json"
README = ROOT / "configs" / "README.md"
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
OURS = {
    "quickstart",
    "resnet50",
    "cifar10_resnet20",
    "speed_cifar10",
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
    """Number of training images, and of classes."""
    if config.data.kind == "digits":
        return IMAGES["digits"]
    if config.data.train_crop_size == 32:
        return IMAGES["cifar10"]
    return IMAGES["imagenet"]


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
            "dropout": 0.0,
            "blur_pool": False,
        }
    return network(dataclasses.replace(config.model, **same), data_of(config)[1])


def count(module: torch.nn.Module, without: str = " ") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith(without))


def numbers(name: str) -> dict:
    """What the golden file holds of a config; a group is [parameters, weight decay, lr_scale]."""
    config = load(name)
    model = network_of(config)
    train = config.train
    per_epoch = steps_per_epoch(data_of(config)[0], train.global_batch_size, config.augment.repeats)
    total = epochs_to_steps(train.epochs, per_epoch)
    peak = peak_lr(config.optim.base_lr, config.optim.base_batch_size, train.global_batch_size)
    schedule = build_schedule(config.schedule, peak, per_epoch, total)
    steps = {
        f"{epoch:g}": epochs_to_steps(epoch, per_epoch) for epoch in EPOCHS if epoch < train.epochs
    }
    steps |= {"last update": total - 1}
    groups = []
    for group in parameter_groups(model, config.optim):
        num_parameters = sum(parameter.numel() for parameter in group["params"])
        groups.append([num_parameters, group["weight_decay"], group.get("lr_scale", 1.0)])
    return {
        "model": config.model.name,
        "parameters": count(model),
        "groups": groups,
        "updates": total,
        "peak_lr": peak,
        "lr_at_epoch": {key: float(f"{schedule.lr(step):.12g}") for key, step in steps.items()},
    }


def table() -> str:
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
            recipe.world_size,
            written(name, "top1"),
            written(name, "top5"),
            recipe.reference,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def written(name: str, key: str) -> str:
    """A figure of the recipe with as many digits as the file has; "" for none."""
    node = yaml.compose((ROOT / "configs" / f"{name}.yaml").read_text())
    recipe = next(value for label, value in node.value if label.value == "recipe")
    return next((value.value for label, value in recipe.value if label.value == key), "")


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
        entries = numbers(name).items()
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries]
        blocks.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def write() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden_text())
    before, after = README.read_text().split("<!-- table -->\n")[::2]
    README.write_text(f"{before}<!-- table -->\n{table()}<!-- table -->\n{after}")


@pytest.mark.slow
def test_numbers_equal_the_golden_file():
    """Curve, groups and size, to 1e-9; the file holds every config and no other."""
    golden = json.loads(GOLDEN.read_text())
    assert list(golden) == NAMES

    def check(name):
        want = golden[name]
        have = numbers(name)
        assert have["lr_at_epoch"] == pytest.approx(want.pop("lr_at_epoch"), rel=1e-9, abs=1e-15)
        assert have["peak_lr"] == pytest.approx(want.pop("peak_lr"), rel=1e-9)
        assert {key: have[key] for key in want} == want

    check_all(check)


@pytest.mark.slow
def test_no_setting_is_without_effect():
    def check(name):
        config = load(name)
        assert remarks(config, "cuda") == []
        assert recipe_mismatch(config, config.recipe.world_size or 1) == []
        check_image_size(config.model.name, config.data)
        assert config.output_dir == ("runs/study" if name == "study_cifar10" else f"runs/{name}")
        assert config.model.name in MODELS

    check_all(check)


def test_every_recipe_says_how_where_and_what():
    known = set(setting_hints()) | {
        f"cluster.{field.name}" for field in dataclasses.fields(ClusterConfig)
    }

    def check(name):
        recipe = load(name).recipe
        for key in ("command", "hardware", "expected", "source"):
            assert getattr(recipe, key), f"recipe.{key} is missing"
        assert name == "quickstart" or f"configs/{name}.yaml" in recipe.command
        used = re.findall(r"--([a-z_0-9]+\.[a-z_0-9]+)", recipe.command)
        assert set(used) <= known
        assert bool(recipe.reference) == (name in PUBLISHED)

    check_all(check)


@pytest.mark.slow
def test_the_facts_of_a_recipe_are_those_of_its_settings():
    """Updates, batch, peak, ranks and local batch, which the facts have from the source."""

    def check(name):
        config = load(name)
        have = numbers(name)
        recipe = config.recipe
        assert recipe.updates == have["updates"]
        assert have["peak_lr"] == pytest.approx(recipe.peak_lr, rel=1e-9)
        ranks = 1
        for option in ("nproc_per_node", "cluster.nodes", "cluster.gpus_per_node"):
            found = re.search(rf"--{option} (\d+)", recipe.command)
            ranks *= int(found[1]) if found else 1
        assert ranks == recipe.world_size
        mixes = bool(config.augment.mixup_alpha or config.augment.cutmix_alpha)
        batch_size = config.train.global_batch_size
        assert recipe.local_batch_size == check_layout(
            batch_size, ranks, config.train.grad_accum_steps, pairs=mixes
        )
        assert f"{recipe.local_batch_size:,} images on " in recipe.hardware
        assert abs(recipe.global_batch_size / batch_size - 1) < 0.02
        for key in ("top1", "top5"):
            assert not written(name, key) or written(name, key) in recipe.expected

    check_all(check, PUBLISHED)


def test_figures_and_sizes_are_those_that_torchvision_publishes():
    from torchvision.models import get_weight

    names = [name for name in PUBLISHED if "_Weights." in load(name).recipe.expected]
    assert len(names) > 15

    def check(name):
        weights = get_weight(re.search(r"\w+_Weights\.\w+", load(name).recipe.expected)[0])
        figures = weights.meta["_metrics"]["ImageNet-1K"]
        published = (f"{figures['acc@1']:.2f}", f"{figures['acc@5']:.2f}")
        assert (written(name, "top1"), written(name, "top5")) == published
        assert count(network_of(load(name))) == weights.meta["num_params"]

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
        size = count(network)
        if config.model.shortcut == "A" or model.startswith("plain"):
            # He et al. 2015: a plain network is as large as the ResNet with option A.
            pair = ("plain", "resnet") if "plain" in name else ("resnet", "plain")
            assert size == count(network_of(load(name.replace(*pair))))
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
            theirs = {weights.meta["num_params"] for weights in get_model_weights(model)}
            assert theirs & {size, count(network, without="aux")}

    check_all(check, PUBLISHED)


def test_the_average_of_torchvision_per_step():
    """torchvision: every 32 steps, 1 - decay scaled by batch * steps / epochs
    (references/classification/train.py).
    """
    per_update = 1 - (1 - 0.99998) * 1024 * 32 / 600
    names = [name for name in NAMES if name.startswith("torchvision_v2")]
    assert len(names) == 8
    for name in names:
        assert load(name).train.ema_decay == pytest.approx(per_update ** (1 / 32), abs=1e-9)
        assert f"{per_update:.8f}" in load(name).recipe.source
        assert str(load(name).train.ema_decay) in load(name).recipe.source


def test_the_table_is_that_of_the_recipes():
    assert README.read_text().split("<!-- table -->\n")[1] == table(), (
        "python tests/test_recipes.py --write"
    )


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
