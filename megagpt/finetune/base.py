"""What a fine-tuning begins with: a checkpoint of ours, or a folder of transformers; its model, tokenizer and weights.

The model and the tokenizer are read before torch is loaded, where the folder is ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.checkpoint import folders
from megagpt.checkpoint.state import read_state
from megagpt.checkpoint.strict import Allowed, require_same_names
from megagpt.cli import read_config
from megagpt.config import DataConfig, ModelConfig
from megagpt.data.tokenizers.kept import tokenizer_of_checkpoint
from megagpt.data.tokenizers.tokenizer import UNBOUND, Bounds, Tokenizer, tokenizer_of_run
from megagpt.inventory.layers import canonical
from megagpt.inventory.parameter import AVERAGE, WEIGHT

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.parallel.parameter import Named
    from megagpt.train.step.engine import Engine

NEW = ("embedding.delimiters", "head.classifier.weight", "head.classifier.bias")
"""What a task adds to a model: it begins with first values, whatever the base was trained for."""


class Base(ABC):
    """model: its architecture, without a classifier."""

    model: ModelConfig

    @abstractmethod
    def tokenizer(self, given: DataConfig) -> tuple[Tokenizer | None, Bounds]:
        """That of its texts, and what stands around these; given: names another place of it."""

    @abstractmethod
    def fill(self, engine: Engine, say: Callable[[str], None]) -> None:
        """Set the weights of a run that has not begun.  Comm: collective.  Raises a RankError where they do not fit."""


def find_base(path: str) -> Base:
    """What a path means.  Raises UserError where nothing is there that can be begun with."""
    # A folder of transformers is read with torch's types.
    return _OfTransformers(Path(path)) if (Path(path) / "config.json").is_file() else _OfOurs(path)


class _OfOurs(Base):
    def __init__(self, path: str) -> None:
        self._path = path
        self._folder = folders.find(path)
        self._state = read_state(self._folder)
        self._config = read_config(_without_classifier(self._state.config), f"{self._folder}/state.json")
        self.model = self._config.model

    def tokenizer(self, given: DataConfig) -> tuple[Tokenizer | None, Bounds]:
        sha256 = self._state.data.get("tokenizer_sha256")
        found = tokenizer_of_checkpoint(self._folder.parent.parent, self._config.data, sha256, given)
        if found is None or not found.files or self._config.data.data_path:
            return found, UNBOUND
        from megagpt.hf.tokenizer_folder import bounds_of  # of an import, as generation has it; loads torch

        return found, bounds_of(found, found.files[0].parent)

    def fill(self, engine: Engine, say: Callable[[str], None]) -> None:
        from megagpt.checkpoint.load import find_whole, read_part  # loads torch
        from megagpt.checkpoint.pieces import Reader  # likewise

        folder = find_whole(self._path, False, say, keys=[WEIGHT])

        @contextmanager
        def opened() -> Iterator[Callable[[Named], Tensor]]:
            with Reader(folder) as reader:
                held = set(reader.index.get(WEIGHT, {})) - set(NEW)
                require_same_names(folder, WEIGHT, held, canonical(self.model), Allowed(), say, Allowed())
                yield lambda named: read_part(reader, WEIGHT, named.name, named.part)

        _fill(engine, opened)


class _OfTransformers(Base):
    def __init__(self, path: Path) -> None:
        from megagpt.hf.import_folder import read_folder  # loads torch

        self._path = path
        self.model, self._lazy = read_folder(path, lambda _: None)

    def tokenizer(self, given: DataConfig) -> tuple[Tokenizer | None, Bounds]:
        from megagpt.hf.tokenizer_folder import bounds_of, find_tokenizer  # loads torch

        found = tokenizer_of_run(given) if given.tokenizer else find_tokenizer(self._path)[0]
        return found, bounds_of(found, self._path)

    def fill(self, engine: Engine, say: Callable[[str], None]) -> None:
        @contextmanager
        def opened() -> Iterator[Callable[[Named], Tensor]]:
            yield lambda named: named.part.take(self._lazy[named.name].get())

        _fill(engine, opened)


def _fill(engine: Engine, opened: Callable) -> None:
    """Write what is read of each parameter that the base has, and let an average begin with it."""
    from megagpt.processes.agree import together  # loads torch

    masters = engine.masters

    def fill() -> None:
        with opened() as read:
            for named in masters.kept[WEIGHT]:
                if named.name not in NEW:
                    values = read(named).to(masters.device)
                    for key in (WEIGHT, AVERAGE):
                        if key in masters.kept:
                            masters.write(named, key, values)

    together(fill)


def _without_classifier(config: dict) -> dict:
    """The settings of a run that was fine-tuned itself, as those of the model that it was made from."""
    return {**config, "model": {**config.get("model", {}), "n_classes": 0}, "finetune": {}}
