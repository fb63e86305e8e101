"""The readers under arbitrary and under nearly good bytes, in the suite; `make fuzz` goes on for longer."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megagpt.cli.yaml_file import dotted_keys
from tests.fuzz.targets import (
    TARGETS,
    fuzz_argv,
    fuzz_index,
    fuzz_jsonl,
    fuzz_side_file,
    fuzz_stranger,
    fuzz_yaml,
    seeds,
)  # fmt: skip

# The folder is the test's, not the example's: a target writes its files anew each time.
FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SLOW = settings(FAST, max_examples=25)


def mutated(name: str) -> st.SearchStrategy[bytes]:
    """A seed of a target in which a few pieces are replaced, inserted or removed."""
    piece = st.tuples(st.integers(0, 2**16), st.integers(0, 12), st.binary(max_size=12))

    def apply(data: bytes, pieces: list[tuple[int, int, bytes]]) -> bytes:
        for start, length, new in pieces:
            at = start % (len(data) + 1)
            data = data[:at] + new + data[at + length :]
        return data

    return st.builds(apply, st.sampled_from(seeds(name)), st.lists(piece, max_size=4))


@pytest.mark.bad_input(23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34)
@FAST
@given(data=st.binary(max_size=300) | mutated("index"))
def test_index(data: bytes, tmp_path: Path) -> None:
    fuzz_index(data, tmp_path)


any_i64 = st.integers(-3, 12) | st.integers(-(2**63), 2**63 - 1)
any_u64 = st.integers(0, 6) | st.integers(0, 2**64 - 1) | st.sampled_from([2**31, 2**32, 2**61, 2**62 + 1, 2**63])


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """An .idx that is right but for one kind of its numbers, or not even for that."""
    code, itemsize = draw(st.sampled_from([(1, 1), (3, 2), (4, 4), (5, 8), (8, 2)]))
    lengths = draw(st.lists(st.integers(0, 6), max_size=5))
    n = len(lengths)
    pointers = [itemsize * sum(lengths[:i]) for i in range(n)]
    boundaries = [0, *sorted(draw(st.lists(st.integers(0, n), max_size=3))), n]
    counts, bin_size = [n, len(boundaries)], itemsize * sum(lengths)
    match draw(st.sampled_from(["code", "lengths", "pointers", "boundaries", "counts", "size", "nothing"])):
        case "code":
            code = draw(st.integers(0, 255))
        case "lengths":
            lengths = draw(st.lists(st.integers(-3, 6) | st.integers(-(2**31), 2**31 - 1), min_size=n, max_size=n))
        case "pointers":
            pointers = draw(st.lists(any_i64, min_size=n, max_size=n))
        case "boundaries":
            inner = st.lists(st.integers(-1, n + 1) | any_i64, max_size=3)
            boundaries = [0, *draw(inner), n] if draw(st.booleans()) else draw(inner)
            counts[1] = len(boundaries)
        case "counts":
            counts = [draw(any_u64), draw(any_u64)]
        case "size":
            bin_size = draw(st.integers(0, 100))
    header = struct.pack("<I9sQBQQ", bin_size, b"MMIDIDX\0\0", 1, code, *counts)
    form = f"<{len(lengths)}i{len(pointers)}q{len(boundaries)}q"
    return header + struct.pack(form, *lengths, *pointers, *boundaries)


@FAST
@given(data=indices())
def test_index_with_wrong_numbers(data: bytes, tmp_path: Path) -> None:
    fuzz_index(data, tmp_path)


@FAST
@given(data=st.binary(max_size=200) | mutated("side_file"))
def test_side_file(data: bytes, tmp_path: Path) -> None:
    fuzz_side_file(data, tmp_path)


texts = st.text(max_size=6) | st.sampled_from(["text", '"text"'])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
records = st.dictionaries(st.sampled_from(["text", "b"]), texts | values, max_size=2) | values
lines = st.builds(
    lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", errors="surrogatepass"),
    records,
    st.booleans(),
)
files = st.lists(lines, max_size=4).map(lambda some: b"\0" + b"\n".join(some))


@pytest.mark.bad_input(3, 5, 7, 8, 9, 10, 11, 12)
@FAST
@given(data=st.binary(max_size=200) | mutated("jsonl") | files)
@example(data=b'\0{"text": "a", "t\\u0065xt": "b"}')
@example(data=b'\0{"text": "a", "b": ' + b"[" * 1000 + b'"text"' + b"]" * 1000 + b"}")
@example(data=b'\0{"text": "a", "\\u0062": ' + b"[" * 1000 + b"]" * 1000 + b"}")
def test_jsonl(data: bytes, tmp_path: Path) -> None:
    fuzz_jsonl(data, tmp_path)


scalars = st.sampled_from(
    [
        *(
            "3",
            "-1",
            "0",
            "1e-4",
            ".nan",
            "-.inf",
            "~",
            "yes",
            "0b_",
            "0x" + "f" * 5000,
            "1" * 400,
            "1:2:3",
            "=",
            "a b",
        ),
        *("2020-01-01", '"\\0"', '"\\ud800"', "!!int ''", "!!bool maybe", "!!timestamp a", "!!binary a", "&a 3", "*a"),
        *("[1, [2]]", "{a: 1}"),
    ]
)
settings_text = st.builds(
    lambda key, value: f"{key.split('.')[0]}: {{{key.split('.')[1]}: {value}}}\n",
    st.sampled_from(dotted_keys()),
    scalars | st.text(max_size=8),
)


@pytest.mark.bad_input(49)
@FAST
@given(
    data=st.binary(max_size=200)
    | mutated("yaml")
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", errors="replace"))
    | st.lists(settings_text, max_size=3).map(lambda some: "".join(some).encode("utf-8", errors="replace"))
)
def test_yaml(data: bytes, tmp_path: Path) -> None:
    fuzz_yaml(data, tmp_path)


words = st.sampled_from(
    [
        *("--tp", "--n-layers", "--lr", "--data-path", "--model.d-ff", "--preset", "--no-recompute", "--config", "-h"),
        *(
            "2",
            "-1",
            "nan",
            "1e400",
            "9" * 5000,
            "None",
            "a",
            "",
            "gpt2-small",
            "--tp=3",
            "--optim",
            "--lr=",
            "--",
            "=",
        ),
        *("{", "\udcff"),
    ]
)


@pytest.mark.bad_input(49)
@SLOW
@given(argv=st.lists(words | st.text(max_size=6), max_size=5))
def test_argv(argv: list[str], tmp_path: Path) -> None:
    fuzz_argv("\n".join(argv).encode("utf-8", errors="surrogatepass"), tmp_path)


@FAST
@given(data=st.binary(max_size=300) | mutated("stranger"))
def test_stranger(data: bytes, tmp_path: Path) -> None:
    fuzz_stranger(data, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_pass(name: str, tmp_path: Path) -> None:
    for data in seeds(name):
        TARGETS[name](data, tmp_path)
