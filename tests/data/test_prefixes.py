"""A name that is no dataset's: what is said is that it is not there, and what was meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter
from megagpt.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("web_text_document", "v1.0_text_document"):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.array([1, 2, 3]))
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "other.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "half_text_document.bin").write_bytes(b"")
    (tmp_path / "running_text_document.idx.partial").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    return tmp_path


MEANT = {
    "nosuch_text_document": "give what tools/preprocess_data.py wrote",
    "wed_text_document": "did you mean {}/web_text_document?",
    "web_txt_document": "did you mean {}/web_text_document?",
    "web": "did you mean {}/web_text_document?",
    "v1.0": "did you mean {}/v1.0_text_document?",
    "web_text_document.bin": "the prefix has no .bin: give {}/web_text_document",
    "v1.0_text_document.idx": "the prefix has no .idx: give {}/v1.0_text_document",
    ".": "it is a folder, in which there are {0}/v1.0_text_document, {0}/web_text_document",
    "empty": "it is a folder without datasets",
    "nowhere/web_text_document": "there is no folder {}/nowhere either",
    "corpus.jsonl": "it is text: turn it into tokens first",
    "other": "give what tools/preprocess_data.py wrote",
    "half_text_document": "half_text_document.idx: not there, though the other file of the dataset is",
    "running_text_document": "preprocessing has not ended",
}


@pytest.mark.parametrize("name", MEANT)
def test_what_was_meant(folder: Path, name: str, run_training, run_tool):
    """At the start of a run too, where a missing tokenizer would be the second thing that is wrong."""
    words = MEANT[name].format(folder)
    with pytest.raises(UserError) as refused:
        IndexedDataset(folder / name)
    assert words in str(refused.value)
    run_training("--data-path", folder / name).refused("not there", words)
