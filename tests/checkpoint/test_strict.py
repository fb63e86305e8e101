"""Loading is strict both ways: a tensor that only a checkpoint or only a model has is named, never passed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megagpt.checkpoint.load import load_weights
from megagpt.checkpoint.strict import Allowed, require_same_names
from megagpt.config import CheckpointConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import named_parameters
from megagpt.processes.agree import RankError
from megagpt.processes.local import run_ranks
from tests.checkpoint.written_checkpoint import MODEL, gpt2_tensors, weights_and_moments, write_checkpoint
from tests.parity.rank import start_engine

GATE, LAST = "blocks.0.gate", "head.norm.bias"  # of the first stage of two, and of the last


def checkpoint(run: Path, add: str | None = None, drop: str | None = None) -> Path:
    """One that also has the parameter of somebody's own block, or lacks one."""
    tensors = weights_and_moments()
    for named in tensors.values():
        if add:
            named[add] = np.ones(3, np.float32)
        if drop:
            del named[drop]
    return write_checkpoint(run, 1, tensors)


def test_names_are_compared_both_ways_and_told_at_once():
    folder, said = Path("run"), []
    many = [f"blocks.{i}.gate" for i in range(8)]
    require_same_names(folder, "weight", ["a", "b"], ["b", "a"])
    with pytest.raises(UserError) as refused:
        require_same_names(folder, "weight", ["a", *many], ["a", "head.bias"])
    for words in ("holds no weight of head.bias", "no place for, weight of blocks.0.gate, ", ", and 3 more",
                  "--allow-missing", "--allow-unused"):  # fmt: skip
        assert words in str(refused.value)
    with pytest.raises(UserError, match=r"^run holds no weight of head.bias: .*--allow-missing [^,]*$"):
        require_same_names(folder, "weight", ["a", *many], ["a", "head.bias"], Allowed(unused=True))
    with pytest.raises(UserError, match=r"; take those that it was trained with, or --allow-unused leaves them$"):
        require_same_names(folder, "weight", ["a", *many], ["a", "head.bias"], offered=Allowed(unused=True))
    require_same_names(folder, "weight", ["a", *many], ["a", "head.bias"], Allowed(True, True), said.append)
    assert len(said) == 2 and "head.bias: they keep" in said[0] and "gate, and 3 more: they are left" in said[1]


def test_a_model_takes_all_that_there_is_and_wants_no_more(tmp_path: Path):
    model, said = GPT(MODEL, SINGLE), []
    more, less = checkpoint(tmp_path / "more", add=GATE), checkpoint(tmp_path / "less", drop=LAST)
    with pytest.raises(UserError, match=r"this model has no place for, weight of blocks.0.gate: .*--allow-unused"):
        load_weights(named_parameters(model), more)
    with pytest.raises(UserError, match=r"holds no weight of head.norm.bias: .*--allow-missing"):
        load_weights(named_parameters(model), less)
    load_weights(named_parameters(model), more, allowed=Allowed(unused=True), say=said.append)
    first = torch.full_like(model.head.get_parameter("norm.bias").data, 0.25)
    model.head.get_parameter("norm.bias").data.copy_(first)
    load_weights(named_parameters(model), less, allowed=Allowed(missing=True), say=said.append)
    assert torch.equal(model.head.get_parameter("norm.bias").data, first) and len(said) == 2


def go_on(config: RunConfig, folders: list[Path]) -> list[tuple[str, bool]]:
    """What a rank of two stages says of each checkpoint, and whether it is the one that speaks."""
    engine, found = start_engine(config, 1), []
    for folder in folders:
        said: list[str] = []
        try:
            engine.load(folder, said.append)
        except RankError as error:
            found.append((str(error), error.speaks))
        else:
            found.append((" ".join(said), engine.mesh.rank == 0))
    engine.close()
    return found


def test_stages_know_what_other_stages_have(tmp_path: Path):
    """No stage takes the tensors of another for ones that nobody wants; all end where one lacks one."""
    plain, more, less = (
        checkpoint(tmp_path / name, add, drop)
        for name, add, drop in (("plain", None, None), ("more", GATE, None), ("less", None, LAST))
    )
    train = TrainConfig(micro_batch_size=1, global_batch_size=8)
    config = RunConfig(model=MODEL, train=train, parallel=ParallelConfig(pp=2), optim=OptimConfig(warmup_steps=0))
    (whole, unused, missing), (_, unused_2, missing_2) = run_ranks(go_on, 2, config, [plain, more, less])
    assert whole[0] == ""
    assert unused == (unused_2[0], True) and not unused_2[1]
    assert "no place for, weight of blocks.0.gate:" in unused[0]
    assert missing[0] == missing_2[0] and "holds no weight of head.norm.bias:" in missing[0]
    allowed = replace(config, checkpoint=CheckpointConfig(allow_missing=True, allow_unused=True))
    (unused, missing), _ = run_ranks(go_on, 2, allowed, [more, less])
    assert unused[0].count("exp_avg") == 2 and unused[0].count("blocks.0.gate: they are left (--allow-unused)") == 3
    assert missing[0].count("head.norm.bias: they keep their first values (--allow-missing)") == 3


def test_an_average_is_not_dropped_without_a_word(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "run", 1, weights_and_moments() | {"ema": gpt2_tensors()})
    config = RunConfig(model=MODEL, train=TrainConfig(micro_batch_size=1, global_batch_size=8))
    ((refused, speaks),) = run_ranks(go_on, 1, config, [folder])[0]
    assert speaks and "keeps an average of the weights, and this run none; keep it with --optim.ema-decay" in refused
