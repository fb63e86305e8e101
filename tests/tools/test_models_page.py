"""docs/models.md says what the presets say, and shows every setting that one of them makes."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import yaml

from megagpt.cli import parse_run_config
from megagpt.config import RunConfig
from megagpt.config.pattern import Pattern
from megagpt.config.values import BatchSteps
from megagpt.presets import preset_names, preset_path
from tools.models_page import PAGE, page, row

MODELS = [name for name in preset_names() if name != "tiny"]
OTHERS: dict[str, Any] = {  # what a setting is changed to, where twice as much is not possible
    "position": "none",
    "activation": "relu",
    "norm": "layernorm",
    "norm_position": "pre",
    "block": "parallel_two_norms",
    "init": "small",
    "optimizer": "lion",
    "schedule": "wsd",
    "weight_decay_times": "lr",
    "precision": "fp32",
    "attention": (Pattern.parse("window:64"),),
    "batch_steps": BatchSteps.parse("7@1"),
    "d_head": 512,
    "n_kv_heads": 2,
    "n_layers": 3,
    "warmup_steps": 77,
}


def test_the_page_is_in_step():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/models_page.py"


def test_every_setting_of_a_preset_shows():
    hidden = []
    for name in MODELS:
        config = parse_run_config(["--preset", name])
        shown = row(name, config)
        for section, settings in yaml.safe_load(preset_path(name).read_text(encoding="utf-8")).items():
            # the last of batch_steps, which is shown, is the batch size
            keys = settings.keys() - ({"global_batch_size"} if config.train.batch_steps else set())
            hidden += [f"{name}: {section}.{k}" for k in keys if row(name, changed(config, section, k)) == shown]
    assert not hidden


def changed(config: RunConfig, section: str, key: str) -> RunConfig:
    """The same run with another value of one setting, to be shown only."""
    old = getattr(config, section)
    value = getattr(old, key)
    if key in OTHERS:
        other = OTHERS[key]
    elif isinstance(value, bool):
        other = not value
    else:
        other = (value / 2 if isinstance(value, float) else 2 * value) or 0.001
    assert other != value, key
    new = copy.copy(old)
    object.__setattr__(new, key, other)  # without the checks: other settings may not go with it
    return dataclasses.replace(config, **{section: new})


def test_models_stand_by_year_and_size():
    names = [line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if "<br>`" in line]
    assert sorted(names) == sorted(MODELS)
    assert names.index("gpt1") < names.index("gpt2-xl") < names.index("gpt3-small") < names.index("gpt3-175b")
