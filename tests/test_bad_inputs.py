"""Every number of the list in tests/bad_inputs.py has a test that feeds it, and where training meets it, one there too.

`python -m pytest tests/test_bad_inputs.py -s` shows the tests of each number.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from tests.bad_inputs import NAMES

TESTS = Path(__file__).parent
# Not what a dataset has left behind once it is made: its text, and whether its tokenizer has an end-of-text token.
MET_BY_TRAINING = {16, 17, 18, 19, 20, 22, *range(23, 39), 49}


class Collected:
    """A pytest plugin: which tests there are for each number."""

    def __init__(self) -> None:
        self.tests: defaultdict[int, set[str]] = defaultdict(set)
        self.by_training: set[int] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("bad_input"):
                for number in mark.args:
                    self.tests[number].add(item.nodeid)
                    if "run_training" in item.fixturenames or "run_program" in item.fixturenames:  # type: ignore[attr-defined]
                        self.by_training.add(number)


@pytest.fixture(scope="module")
def collected() -> Collected:
    """From a collection of its own, so that it holds however few tests were asked for."""
    files = [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "bad_input" in file.read_text(encoding="utf-8")]
    found = Collected()
    args = ["--collect-only", "-qq", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), *files]
    assert pytest.main(args, plugins=[found]) == 0
    return found


def test_every_bad_input_has_a_test(collected: Collected) -> None:
    for number, name in NAMES.items():
        tests = sorted(collected.tests[number])
        print(f"{number:2} {name}: {len(tests)} tests, such as {tests[0] if tests else None}")
    assert {n: name for n, name in NAMES.items() if not collected.tests[n]} == {}
    assert collected.tests.keys() <= NAMES.keys()


def test_training_is_fed_them_too(collected: Collected) -> None:
    assert {n: NAMES[n] for n in MET_BY_TRAINING - collected.by_training} == {}
