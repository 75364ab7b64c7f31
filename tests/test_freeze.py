"""A frozen backbone stays as it is, bit for bit; the head learns, and may learn faster."""

import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from engine_utils import CPU, FP32, ListLoader, NoSync, make_batch, rule_of
from image_files import OneProcess
from torch import nn

from resnet_dist import engine
from resnet_dist.checkpoints.state import build_state
from resnet_dist.config import Config, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.engine import train_step
from resnet_dist.evaluation import loop as evaluation
from resnet_dist.forward import train_mode
from resnet_dist.models.build import MODELS
from resnet_dist.models.weights import freeze
from resnet_dist.nonfinite import NonFinite
from resnet_dist.optim import parameter_groups


def trained(steps=3, **optim):
    """A small run on the CPU: the state before, and the state after it."""
    config = Config(
        model=ModelConfig(name="resnet20"),
        optim=OptimConfig(**optim),
        train=TrainConfig(precision="fp32", ema_decay=0.9),
    )
    state = build_state(config, 10, CPU)
    before = copy.deepcopy(state.model.state_dict())
    model = NoSync(state.model)
    rule = rule_of(config)
    engine.warm_up_ddp(model, (2, 3, 16, 16), FP32)
    for step in range(steps):
        batch = make_batch(8, 16, seed=step)
        train_step(model, state, [batch], 0.1, rule, NonFinite(state.model, step))
    return state, before


def moved(state, before):
    """The tensors that are not as they were, of the network and of its average, which must be the
    same.
    """
    of_model = changed_keys(state.model, before)
    assert changed_keys(state.ema.model, before) == of_model
    return of_model


def changed_keys(model, before):
    changed = set()
    for key, tensor in model.state_dict().items():
        if not torch.equal(tensor, before[key]):
            changed.add(key)
    return changed


def keys_that_begin_with(prefixes, keys):
    return {key for key in keys if key.startswith(prefixes)}


def names_of(groups, model):
    """The names of the parameters in some groups of an optimizer."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = []
    for group in groups:
        for parameter in group["params"]:
            names.append(name_of[parameter])
    return names


def test_a_frozen_backbone_is_bit_identical():
    """Weights, running statistics and counts, of the network and of its average; the optimizer does
    not know them.
    """
    state, before = trained(unfreeze_from="head")
    assert moved(state, before) == {"fc.weight", "fc.bias"}

    known = names_of(state.optimizer.param_groups, state.model)
    assert sorted(known) == ["fc.bias", "fc.weight"]
    assert len(state.optimizer.state) == 2
    for parameter in state.model.parameters():
        assert parameter.grad is None


def test_without_a_frozen_part_every_tensor_changes():
    state, before = trained()
    assert moved(state, before) == set(before)


@pytest.mark.slow
def test_unfrozen_from_a_stage_on():
    state, before = trained(unfreeze_from="layer3")
    last_modules = ("layer3.", "fc.")
    assert moved(state, before) == keys_that_begin_with(last_modules, before)

    state, before = trained(unfreeze_from="layer3.2.conv2", steps=1)
    last_modules = ("layer3.2.conv2", "layer3.2.bn2", "fc.")
    assert moved(state, before) == keys_that_begin_with(last_modules, before)


def test_frozen_norms_stay_in_eval_throughout():
    """Also after an evaluation; then a SyncBatchNorm says nothing to the other ranks."""

    state, _ = trained(steps=0, unfreeze_from="layer3")
    model = state.model
    no_images = ListLoader([], num_samples=0)
    evaluation.evaluate(model, no_images, OneProcess(), FP32)

    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            norms[name] = module
    assert len(norms) == 19
    for name, norm in norms.items():
        is_learning = name.startswith("layer3")
        assert norm.training == is_learning, name
    assert model.training
    assert model.layer1.training

    model.eval()
    evaluation.evaluate(model, no_images, OneProcess(), FP32)
    for module in model.modules():
        assert not module.training


def test_a_norm_without_weights_goes_with_the_layer_before():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.Dropout(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.Linear(4, 2),
    )

    freeze(model, "3")
    train_mode(model)

    is_training = [module.training for module in model]
    assert is_training == [True, False, True, True, True, True]


def test_auxiliary_heads_are_heads():
    """Inception v3 defines its auxiliary classifier amid the network."""
    with torch.device("meta"):
        model = torchvision.models.inception_v3(init_weights=False)
    model.auxiliary_weight = 0.4

    freeze(model, "Mixed_7b")

    learning = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            child, *_ = name.split(".")
            learning.add(child)
    assert learning == {"AuxLogits", "Mixed_7b", "Mixed_7c", "fc"}
    first_of_auxiliary = model.AuxLogits.conv0.conv
    last_of_auxiliary = model.AuxLogits.fc
    assert not first_of_auxiliary.weight.requires_grad
    assert last_of_auxiliary.weight.requires_grad


@pytest.mark.parametrize("name", ["layer4", "layer", "relu", "fc.weight", "Head"])
def test_a_module_that_is_not_there_is_refused(name):
    model = MODELS["resnet20"](num_classes=3)
    there_are = "head, conv1, bn1, layer1, layer2, layer3, fc"
    with pytest.raises(ValueError, match=rf"optim\.unfreeze_from is '{name}'.*{there_are}"):
        freeze(model, name)


def test_the_first_module_would_freeze_nothing():
    model = MODELS["resnet20"](num_classes=3)
    message = r"optim\.unfreeze_from is 'conv1', where the network begins"
    with pytest.raises(ValueError, match=message):
        freeze(model, "conv1")


def test_the_backbone_may_learn_more_slowly():
    """The first update of SGD without decay is the gradient times the group's learning rate."""
    plain, before = trained(steps=1, weight_decay=0.0)
    slow, _ = trained(steps=1, weight_decay=0.0, backbone_lr_scale=0.125)
    assert values_of("lr", slow.optimizer.param_groups) == [0.0125, 0.1, 0.0125, 0.1]

    for key, parameter in plain.model.named_parameters():
        slow_parameter = slow.model.get_parameter(key)
        change = parameter - before[key]
        slow_change = slow_parameter - before[key]
        scale = 0.125
        if key.startswith("fc"):
            scale = 1
        assert change.any()
        expected = change * scale
        torch.testing.assert_close(slow_change, expected, rtol=1e-3, atol=1e-7)


def values_of(key, groups):
    return [group[key] for group in groups]


def test_groups_with_a_head_of_their_own():
    """By kind of parameter and then backbone and head; without a scale the three groups of any
    run.
    """
    model = MODELS["resnet20"](num_classes=10)
    without_scale = OptimConfig(
        weight_decay=1e-4,
        norm_weight_decay=0.0,
        bias_weight_decay=1e-5,
    )
    with_scale = replace(without_scale, backbone_lr_scale=0.1)

    for group in parameter_groups(model, without_scale):
        assert "lr_scale" not in group

    weights, head_weights, norms, head_bias = parameter_groups(model, with_scale)
    check_group(weights, num_params=19, lr_scale=0.1, weight_decay=1e-4)
    check_group(head_weights, num_params=1, lr_scale=1.0, weight_decay=1e-4)
    check_group(norms, num_params=38, lr_scale=0.1, weight_decay=0.0)
    check_group(head_bias, num_params=1, lr_scale=1.0, weight_decay=1e-5)
    assert head_weights["params"][0] is model.fc.weight
    assert head_bias["params"][0] is model.fc.bias

    freeze(model, "layer3")
    groups = parameter_groups(model, OptimConfig(backbone_lr_scale=0.1))
    num_params = [len(params) for params in values_of("params", groups)]
    assert num_params == [6, 1, 12, 1]
    assert values_of("lr_scale", groups) == [0.1, 1.0, 0.1, 1.0]


def check_group(group, num_params, lr_scale, weight_decay):
    assert len(group["params"]) == num_params
    assert group["lr_scale"] == lr_scale
    assert group["weight_decay"] == weight_decay
