"""Settings that are parsed once: what their text means, that it is written as it was read, and what is refused."""

from __future__ import annotations

from decimal import Decimal

import pytest

from megagpt.config import DataConfig, FaultConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig, plain
from megagpt.config.kernels import Kernels
from megagpt.config.pattern import Pattern
from megagpt.config.values import BatchSteps, DataPath, Partition, Split, StepSet
from megagpt.errors import UserError

TEXTS = {
    Kernels: ["auto", "reference,norm=cpu,softmax=auto", "auto,attention=flex"],
    Pattern: ["dense", "window:256", "bigbird:64:3:1:0"],
    DataPath: ["", "A", "0.70 A 30 B"],
    Split: ["949,50,1", "0.90,0.05,.05", "1", "0,1"],
    BatchSteps: ["", "256@1,512@50001"],
    StepSet: ["", "57", "57,60-62"],
    Partition: ["flops", "parameters", "uniform", "3,4,4,3"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in TEXTS.items() for text in texts])
def test_text_is_written_as_it_was_read(kind, text):
    value = kind.parse(text)
    assert kind.parse(str(value)) == value and hash(value) == hash(kind.parse(text))
    shown = {"0.90,0.05,.05": "0.90,0.05,0.05"}.get(text, text)
    assert str(value) == shown


def test_what_the_text_means():
    assert DataPath.parse(("0.7", "A b", "30", "B")) == DataPath(("A b", "B"), (Decimal("0.7"), Decimal(30)))
    assert Split.parse("2, 1").shares == (2, 1, 0)
    assert dict(BatchSteps.parse("4@1, 8@5")) == {1: 4, 5: 8}
    assert list(StepSet.parse(" 57,60-62")) == [57, 60, 61, 62]
    assert Partition.parse("3, 1").counts == (3, 1)


REFUSED = [
    *((DataPath, text) for text in ["0.7 A B", "0.7 A 0.3", "-1 A 2 B", "nan A 1 B", "inf A 1 B", "0 A 0 B"]),
    *((Split, text) for text in ["", "a", "1,2,3,4", "-1,2,3", "1,,2", "nan", "inf,1", "0,0,0", "1e3,1", "1;2"]),
    (Split, "9" * 400),
    *((BatchSteps, text) for text in ["4", "4@", "@1", "4@0", "0@1", "4@1,", "4@2", "4@1,4@2", "x@1", "-4@1"]),
    (BatchSteps, "4@" + "1" * 5000),
    *((StepSet, text) for text in ["0", "5-4", "x", "1-", "-1", "²", "1" * 5000]),
    *((Partition, text) for text in ["", "flop", "3,x", "3,,1", "1" * 5000]),
    *((Kernels, text) for text in ["fast", "auto,norm=fast", "norm=", "=cpu,x"]),
    *((Pattern, text) for text in ["", "window", "window:x", "window:0", "dense:1", "banded:4"]),
]
KEYS = {
    DataPath: "data.data_path", Split: "data.split", BatchSteps: "train.batch_steps", StepSet: "faults.skip_steps",
    Partition: "parallel.partition", Kernels: "train.kernels", Pattern: "model.attention",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_what_is_refused_names_its_key(kind, text):
    with pytest.raises(UserError) as caught:
        kind.parse(text)
    assert caught.value.keys == (KEYS[kind],)
    assert str(caught.value).startswith(KEYS[kind]) and "; " in str(caught.value)


def test_a_configuration_takes_texts_and_gives_them_back():
    config = RunConfig(
        model=ModelConfig(attention=("dense", "window:8")),  # pyright: ignore[reportArgumentType]
        parallel=ParallelConfig(partition="2,2"),  # pyright: ignore[reportArgumentType]
        data=DataConfig(data_path=("0.7", "A", "0.3", "B"), split="9,1"),  # pyright: ignore[reportArgumentType]
        train=TrainConfig(kernels="auto,norm=cpu", batch_steps="4@1,8@9"),  # pyright: ignore[reportArgumentType]
        faults=FaultConfig(skip_steps="5-7"),  # pyright: ignore[reportArgumentType]
    )
    assert config.model.pattern(1) == Pattern("window", (8,)) and config.train.kernels["norm"] == "cpu"
    values = plain(config)
    assert values["model"]["attention"] == ["dense", "window:8"]
    assert values["data"]["data_path"] == ["0.7", "A", "0.3", "B"] and values["data"]["split"] == "9,1"
    assert (values["train"]["kernels"], values["train"]["batch_steps"]) == ("auto,norm=cpu", "4@1,8@9")
    assert (values["faults"]["skip_steps"], values["parallel"]["partition"]) == ("5-7", "2,2")
