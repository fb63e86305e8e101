"""The environment as launchers leave it, and as nobody should."""

from __future__ import annotations

import pytest

from megagpt.errors import UserError
from megagpt.processes.launched import Launched, launched, speaks

WHOLE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}


def test_what_a_launcher_leaves():
    assert launched(WHOLE) == Launched(3, 1, 4, "node-a", 29500, on_one_machine=False)
    whole = launched(WHOLE | {"LOCAL_WORLD_SIZE": "4"})
    assert whole and whole.on_one_machine


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"MASTER_PORT": "abc", "LOCAL_RANK": "0"}])
def test_without_a_launcher(environment):
    assert launched(environment) is None


REFUSED = {
    "RANK alone": ({"RANK": "0"}, "has RANK=0, but no WORLD_SIZE and no MASTER_ADDR and no MASTER_PORT"),
    "nowhere to meet": ({"RANK": "0", "WORLD_SIZE": "1"}, "no MASTER_ADDR"),
    "left over": ({"WORLD_SIZE": "2"}, "has WORLD_SIZE=2, but no RANK"),
    "no port": (WHOLE | {"MASTER_PORT": "abc"}, "MASTER_PORT=abc in the environment, wanted 1 to 65535"),
    "too large a port": (WHOLE | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
    "a port of too many digits": (WHOLE | {"MASTER_PORT": "9" * 5000}, "MASTER_PORT=999"),
    "a rank too many": (WHOLE | {"RANK": "4"}, "RANK=4 in the environment, wanted 0 to 3"),
    "a negative rank": (WHOLE | {"RANK": "-1"}, "RANK=-1"),
    "not in ASCII": (WHOLE | {"RANK": "²"}, "RANK=²"),
    "nobody": (WHOLE | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment, wanted 1 or more"),
    "no local rank": (WHOLE | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_half_an_environment_is_told(name):
    environment, told = REFUSED[name]
    with pytest.raises(UserError) as refused:
        launched(environment)
    assert told in str(refused.value) and "unset" in str(refused.value)


def test_only_a_rank_that_has_a_rank_0_is_silent():
    assert not speaks(WHOLE)
    others = ({}, WHOLE | {"RANK": "0"}, WHOLE | {"RANK": "4"}, WHOLE | {"RANK": "x"}, {"RANK": "1"},
              {"RANK": "1", "WORLD_SIZE": "2"}, WHOLE | {"WORLD_SIZE": "9" * 5000})  # fmt: skip
    assert all(map(speaks, others))
