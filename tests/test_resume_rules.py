"""Which settings may differ between a checkpoint and the run that goes on from it."""

import copy

import pytest

from resnet_dist.checkpoints.resume_rules import (
    CHANGED_WITH_A_WARNING,
    FREE_TO_CHANGE,
    check_resumable,
    flatten,
    model_changes,
    stored_config,
)
from resnet_dist.config import Config, ModelConfig, to_dict


def test_weights_of_another_network_with_the_same_tensors_are_noticed():
    """plain20 and resnet20, strides of v1 and v1.5: every name and shape is the same."""

    def config(**options):
        return Config(model=ModelConfig(**options))

    of_plain20 = config(name="plain20", num_classes=10, zero_init_residual=True)
    saved = {"config": to_dict(of_plain20)}

    def changes_to(**options):
        return model_changes(saved, config(**options))

    assert changes_to(name="plain20", num_classes=2) == []
    assert changes_to(name="resnet20") == ["model.name was 'plain20', now 'resnet20'"]
    changes = changes_to(name="plain20", stride_in_1x1=True, blur_pool=True)
    keys = [change.split()[0] for change in changes]
    assert keys == ["model.stride_in_1x1", "model.blur_pool"]

    # A checkpoint of a version that did not know a setting.
    del saved["config"]["model"]["blur_pool"]
    assert changes_to(name="plain20") == []

    # A file that holds weights alone.
    without_config = {"state_dict": {}}
    assert model_changes(without_config, config()) == []


def facts_with(**settings):
    """The facts of a run with these settings, named as data__threads for data.threads."""
    config = to_dict(Config())
    for full_name, value in settings.items():
        section, name = full_name.split("__")
        config[section][name] = value
    return {
        "config": config,
        "num_samples": 100,
        "fingerprint": "f",
    }


def saved_by(facts):
    """A checkpoint of a run with these facts."""
    return {**copy.deepcopy(facts), "step": 5}


def test_what_may_change_between_attempts():
    saved = saved_by(facts_with())

    # No message.
    now = facts_with(data__threads=7, log__interval_steps=1)
    assert check_resumable(saved, now) == []

    # A warning.
    now = facts_with(optim__base_lr=0.2)
    [warning] = check_resumable(saved, now)
    assert "optim.base_lr" in warning

    # A refusal.
    refused_settings = {
        r"another model: model\.name": {"model__name": "resnet18"},
        "another optimizer: optim.kind was 'sgd', now 'lars'; take another": {
            "optim__kind": "lars",
        },
        r"train\.global_batch_size was 256, now 512": {"train__global_batch_size": 512},
        # These two change the buffers of the optimizer.
        r"optim\.unfreeze_from": {"optim__unfreeze_from": "head"},
        r"optim\.backbone_lr_scale": {"optim__backbone_lr_scale": 0.1},
    }
    for message, settings in refused_settings.items():
        now = facts_with(**settings)
        with pytest.raises(ValueError, match=message):
            check_resumable(saved, now)

    more_samples = {**facts_with(), "num_samples": 101}
    with pytest.raises(ValueError, match=r"data\.num_samples was 100, now 101"):
        check_resumable(saved, more_samples)

    other_data = {**facts_with(), "fingerprint": "g"}
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        check_resumable(saved, other_data)


def test_a_checkpoint_that_lacks_a_setting_had_its_default():
    """It comes from a version that did not know the setting."""
    older = saved_by(facts_with())
    del older["config"]["optim"]["kind"]
    del older["config"]["optim"]["unfreeze_from"]
    del older["config"]["recipe"]
    assert check_resumable(older, facts_with()) == []
    assert check_resumable(older, facts_with(recipe__world_size=8)) == []


def test_an_unknown_difference_is_refused():
    """A setting that nobody has decided about, in each section, in the checkpoint or the config."""
    config = to_dict(Config())
    sections = [key for key, value in config.items() if isinstance(value, dict)]
    free_sections = FREE_TO_CHANGE & set(sections)

    accepted = set()
    for section in (*sections, "a_new_section"):
        known = facts_with()
        unknown = facts_with()
        unknown["config"].setdefault(section, {})
        unknown["config"][section]["a_new_setting"] = 1
        cases = (
            (saved_by(known), unknown),
            (saved_by(unknown), known),
        )
        for saved, now in cases:
            try:
                check_resumable(saved, now)
            except ValueError as problem:
                assert f"{section}.a_new_setting was" in str(problem)
            else:
                accepted.add(section)
    assert accepted == free_sections


def test_every_setting_of_the_lists_exists_and_is_in_one():
    config = to_dict(Config())
    sections = config.keys()
    settings = flatten(config).keys()
    assert settings | sections >= FREE_TO_CHANGE
    assert settings >= CHANGED_WITH_A_WARNING
    assert not FREE_TO_CHANGE & CHANGED_WITH_A_WARNING


def test_a_stored_config_of_another_version_can_be_read():
    """Unknown settings are left out, but not those of the network."""
    saved = facts_with()
    saved["config"]["log"]["fancy"] = True
    saved["config"]["gone"] = {"old": 1}
    settings = stored_config(saved, "x.pt")
    assert settings == flatten(to_dict(Config()))

    saved["config"]["model"]["attention"] = True
    with pytest.raises(ValueError, match=r"x\.pt has the setting model\.attention.*update it"):
        stored_config(saved, "x.pt")
