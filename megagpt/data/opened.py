"""What a run reads: its datasets and their tokenizers, each opened once a process."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path

from megagpt.config import DataConfig, RunConfig
from megagpt.config.values import DataPath
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.text.corpus import default_cache_dir, default_corpus
from megagpt.data.tokenizers.tokenizer import Tokenizer, tokenizers_for
from megagpt.errors import UserError, announce, require


class OpenedData:
    """The datasets of data.data_path, in its order, and the tokenizer of each.

    They are opened when they are first asked for: where several ranks run, those agree first on who reports an error.
    **Raises** then `UserError` as `IndexedDataset` and `tokenizer_for` do.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @cached_property
    def datasets(self) -> list[IndexedDataset]:
        """One a prefix."""
        return [IndexedDataset(prefix) for prefix in self.config.data_path.prefixes]

    @cached_property
    def tokenizers(self) -> list[Tokenizer | None]:
        """One a prefix; None where none is recorded or named."""
        return tokenizers_for(self.config, self.config.data_path.prefixes)


def with_text(config: RunConfig) -> tuple[RunConfig, OpenedData]:
    """The configuration with its data path and vocabulary filled in, and that data, its tokenizers opened.

    Makes the default corpus if it has to.
    """
    if not config.data.data_path:
        cache = Path(config.data.cache_dir) if config.data.cache_dir else default_cache_dir()
        path = DataPath((default_corpus(cache, announce),))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_path=path))
    data = OpenedData(config.data)
    tokenizers = [tokenizer for tokenizer in data.tokenizers if tokenizer is not None]
    if len({tokenizer.sha256 for tokenizer in tokenizers}) > 1:
        names = config.data.data_path
        raise UserError(f"the datasets of {names} were made by different tokenizers; use one for all")
    return _with_vocabulary(config, max((t.vocab_size for t in tokenizers), default=None)), data


def _with_vocabulary(config: RunConfig, size: int | None) -> RunConfig:
    """The configuration with model.vocab_size filled in. size: the tokenizer's, where there is one."""
    wanted = config.model.vocab_size
    if wanted is None and size is None:
        raise UserError(
            f"{config.data.data_path.prefixes[-1]}: no tokenizer is recorded beside it and none is named; "
            "give --tokenizer with its files, or --vocab-size"
        )
    require(
        None in (wanted, size) or size <= wanted,  # pyright: ignore[reportOperatorIssue] # neither is None
        f"model.vocab_size={wanted}",
        f"is smaller than the tokenizer's {size}",
        f"drop --vocab-size, or use at least {size}",
        "model.vocab_size",
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=wanted or size))
