"""tools/inspect_data.py: what it shows of a dataset."""

from __future__ import annotations

from pathlib import Path

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.samples import GPTSamples


def test_counts_and_lengths(dataset_prefix: str, run_tool) -> None:
    outcome = run_tool("inspect_data", dataset_prefix)
    outcome.succeeded()
    shown = dict(line.split(None, 1) for line in outcome.out.splitlines()[:5])
    assert (shown["documents"], shown["tokens"], shown["dtype"]) == ("3", "14", "uint16")
    assert "bytes, vocabulary of 257" in outcome.out and "id 256, appended" in outcome.out
    bars = [line.split() for line in outcome.out.splitlines() if "█" in line]
    assert [(bar[0], bar[2], bar[3]) for bar in bars] == [("2", "3", "1"), ("4", "7", "2")]
    assert run_tool("inspect_data", f"{dataset_prefix}.idx").out == outcome.out


def test_document(dataset_prefix: str, run_tool) -> None:
    assert run_tool("inspect_data", dataset_prefix, "--document", 2).out == "document 2: 5 tokens\nabcd\n"
    run_tool("inspect_data", dataset_prefix, "--document", 3).refused("--document 3", "0 to 2")


def test_sample_names_its_documents(dataset_prefix: str, run_tool) -> None:
    outcome = run_tool("inspect_data", dataset_prefix, "--sample", 0, "--seq-len", 8, "--split", "1")
    outcome.succeeded()
    dataset = IndexedDataset(dataset_prefix)
    samples = GPTSamples(dataset, documents=(0, 3), num_samples=1, seq_len=8, seed=1234)
    pieces = samples.documents_of(0)
    assert len(pieces) > 1
    for document, offset, length in pieces:
        assert f"tokens {offset} to {offset + length - 1} of sequence {document}" in outcome.out
    text = bytes(int(token) for token in samples[0] if token < 256).decode()
    assert "".join(line for line in outcome.out.splitlines() if not line.startswith("──")) == text
    run_tool("inspect_data", dataset_prefix, "--sample", 99, "--seq-len", 8, "--split", "1").refused("--sample 99")


def test_dataset_without_a_record(dataset_prefix: str, run_tool) -> None:
    Path(f"{dataset_prefix}.json").unlink()
    assert "not recorded" in run_tool("inspect_data", dataset_prefix).out
    outcome = run_tool("inspect_data", dataset_prefix, "--document", 1)
    assert outcome.out.endswith("\n104 105 256\n") and "--tokenizer" in outcome.err
    named = run_tool("inspect_data", dataset_prefix, "--document", 1, "--tokenizer", "bytes")
    assert named.out.endswith("\nhi\n") and not named.err


def test_verify(dataset_prefix: str, run_tool) -> None:
    outcome = run_tool("inspect_data", dataset_prefix, "--verify")
    outcome.succeeded()
    assert "verified" in outcome.out and "14 tokens" in outcome.out and "SHA-256" in outcome.out
