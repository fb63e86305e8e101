"""docs/configuration.md says what the dataclasses say."""

from __future__ import annotations

from megagpt.cli.yaml_file import dotted_keys
from tools.config_reference import PAGE, reference


def test_the_page_is_in_step():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tools/config_reference.py"


def test_the_page_has_every_setting():
    page = PAGE.read_text(encoding="utf-8")
    for key in dotted_keys():
        assert f"`--{key.replace('_', '-')}`" in page
