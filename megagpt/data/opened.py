"""What a run reads: its datasets and their tokenizers, each opened once a process."""

from __future__ import annotations

from functools import cached_property

from megagpt.config import DataConfig
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.tokenizers.tokenizer import Tokenizer, tokenizers_for


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
