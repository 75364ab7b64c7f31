"""Which settings may differ between a checkpoint and the run that goes on from it."""

import copy

import pytest

from resnet_dist.checkpoints import resume_rules
from resnet_dist.checkpoints.resume_rules import CHANGED_WITH_A_WARNING, FREE_TO_CHANGE, flatten
from resnet_dist.config import Config, ModelConfig, to_dict


def test_weights_of_another_network_with_the_same_tensors_are_noticed():
    """plain20 and resnet20, strides of v1 and v1.5: every name and shape is the same."""

    def config(**options):
        return Config(model=ModelConfig(**options))

    saved = {"config": to_dict(config(name="plain20", num_classes=10, zero_init_residual=True))}
    assert resume_rules.model_changes(saved, config(name="plain20", num_classes=2)) == []
    assert resume_rules.model_changes(saved, config(name="resnet20")) == [
        "model.name was 'plain20', now 'resnet20'"
    ]
    changes = resume_rules.model_changes(
        saved, config(name="plain20", stride_in_1x1=True, blur_pool=True)
    )
    assert [change.split()[0] for change in changes] == ["model.stride_in_1x1", "model.blur_pool"]
    del saved["config"]["model"]["blur_pool"]  # of a version that did not know it
    assert resume_rules.model_changes(saved, config(name="plain20")) == []
    assert resume_rules.model_changes({"state_dict": {}}, config()) == []


def test_what_may_change_between_attempts():
    def facts(**changes):
        config = to_dict(Config())
        for key, value in changes.items():
            section, name = key.split("__")
            config[section][name] = value
        return {"config": config, "num_samples": 100, "fingerprint": "f"}

    saved = {**facts(), "step": 5}
    assert resume_rules.check_resumable(saved, facts(data__threads=7, log__interval_steps=1)) == []
    changed = resume_rules.check_resumable(saved, facts(optim__base_lr=0.2))
    assert len(changed) == 1
    assert "optim.base_lr" in changed[0]
    with pytest.raises(ValueError, match=r"another model: model\.name"):
        resume_rules.check_resumable(saved, facts(model__name="resnet18"))
    with pytest.raises(
        ValueError, match="another optimizer: optim.kind was 'sgd', now 'lars'; take another"
    ):
        resume_rules.check_resumable(saved, facts(optim__kind="lars"))
    older = copy.deepcopy(saved)
    del (
        older["config"]["optim"]["kind"],
        older["config"]["recipe"],
    )  # of before these keys: it had the defaults
    assert resume_rules.check_resumable(older, facts(recipe__world_size=8)) == []
    with pytest.raises(ValueError, match=r"train\.global_batch_size was 256, now 512"):
        resume_rules.check_resumable(saved, facts(train__global_batch_size=512))
    with pytest.raises(ValueError, match=r"data\.num_samples was 100, now 101"):
        resume_rules.check_resumable(saved, {**facts(), "num_samples": 101})
    for key, value in (
        ("optim__unfreeze_from", "head"),
        ("optim__backbone_lr_scale", 0.1),
    ):  # other buffers
        with pytest.raises(ValueError, match=key.replace("__", r"\.")):
            resume_rules.check_resumable(saved, facts(**{key: value}))
    del saved["config"]["optim"]["unfreeze_from"]  # of a version that did not know it
    assert resume_rules.check_resumable(saved, facts()) == []
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        resume_rules.check_resumable(saved, {**facts(), "fingerprint": "g"})


def facts_with(**settings):
    """The facts of a run, with settings by full name (dots as double underscores)."""
    config = to_dict(Config())
    for name, value in settings.items():
        *sections, key = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    return {"config": config, "num_samples": 100, "fingerprint": "f"}


def test_an_unknown_difference_is_refused():
    """A setting that nobody has decided about, in each section, in the checkpoint or the config."""
    accepted = []
    free = {name for name in FREE_TO_CHANGE if name in to_dict(Config())}
    sections = [key for key, value in to_dict(Config()).items() if isinstance(value, dict)]
    for section in (*sections, "a_new_section"):
        config = {**to_dict(Config())}
        config[section] = {**config.get(section, {}), "a_new_setting": 1}
        new = {**facts_with(), "config": config}
        for saved, now in (({**facts_with(), "step": 5}, new), ({**new, "step": 5}, facts_with())):
            try:
                resume_rules.check_resumable(saved, now)
                accepted.append(section)
            except ValueError as problem:
                assert f"{section}.a_new_setting was" in str(problem)
    assert set(accepted) == free - {"output_dir"}


def test_every_setting_of_the_lists_exists_and_is_in_one():
    known = flatten(to_dict(Config()))
    sections = set(to_dict(Config()))
    assert known.keys() | sections >= FREE_TO_CHANGE
    assert known.keys() >= CHANGED_WITH_A_WARNING
    assert not FREE_TO_CHANGE & CHANGED_WITH_A_WARNING


def test_a_stored_config_of_another_version_can_be_read():
    """Unknown settings are left out, but not those of the network."""
    saved = facts_with()
    saved["config"]["log"]["fancy"] = True
    saved["config"]["gone"] = {"old": 1}
    settings = resume_rules.stored_config(saved, "x.pt")
    assert settings == flatten(to_dict(Config()))
    saved["config"]["model"]["attention"] = True
    with pytest.raises(ValueError, match=r"x\.pt has the setting model\.attention.*update it"):
        resume_rules.stored_config(saved, "x.pt")
