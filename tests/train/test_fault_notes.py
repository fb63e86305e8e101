"""Notes about faults: real samples, long batches, no tokenizer."""

from __future__ import annotations

import json
import math

import numpy as np

from megagpt.config.values import Split
from megagpt.data.indexed.blend import build_splits
from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter
from megagpt.train.faults.notes import MOST_TEXTS, MOST_TOKENS, FaultNotes


def test_a_note_without_a_tokenizer_holds_tokens_and_where_they_lie(tmp_path):
    prefix = str(tmp_path / "text")
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in range(40):
            writer.add_document(np.full(150, document))
    samples, _, _ = build_splits([IndexedDataset(prefix)], (), Split.parse("1"), 299, 7, (19, 0, 0))
    assert samples is not None
    notes = FaultNotes(tmp_path, samples, None, writes=True)
    told = {"kind": "gradient", "loss": 2.5, "grad_norm": math.inf, "first": {"values": [math.nan]}}
    place = notes.write(12, told, range(19))
    assert place == str(tmp_path / "faults" / "step-000012.json")
    note = json.loads((tmp_path / "faults" / "step-000012.json").read_text())
    assert (note["loss"], note["grad_norm"], note["first"]["values"]) == (2.5, "inf", ["nan"])  # strict JSON
    for position, sample in enumerate(note["samples"]):
        assert sample["position"] == position
        told_tokens = [p["document"] for p in sample["documents"] for _ in range(p["n_tokens"])]
        assert told_tokens == samples[position].tolist()  # a document is full of its own number
        assert sample["documents"][0]["dataset"] == prefix
        assert sample.get("tokens") == (told_tokens[:MOST_TOKENS] if position < MOST_TEXTS else None)


def test_only_one_rank_writes(tmp_path):
    quiet = FaultNotes(tmp_path, None, None, writes=False)  # pyright: ignore[reportArgumentType]
    assert quiet.write(3, {}, [1]) == str(tmp_path / "faults" / "step-000003.json")
    assert not list(tmp_path.iterdir())
