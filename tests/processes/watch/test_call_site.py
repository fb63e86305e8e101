"""The stacks of threads, as another thread sees them."""

from __future__ import annotations

import threading
import time
import traceback

from megagpt.processes.watch.call_site import Line, stack_of, stacks


def test_of_a_thread_that_stands_still_it_is_what_the_traceback_module_says():
    found = {}

    def look() -> None:
        time.sleep(0.1)  # until the other thread waits for this one
        found.update(stacks())

    def nested() -> list[Line]:
        mine = [Line(f.filename, f.lineno or 0, f.name) for f in reversed(traceback.extract_stack())]
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return mine

    expected = nested()
    seen = [line for line in found[threading.main_thread().ident or 0] if line.file != threading.__file__]
    n = min(len(expected), 90)  # MAX_LINES is 100
    assert [(line.file, line.function) for line in seen[:n]] == [(line.file, line.function) for line in expected[:n]]


def test_a_thread_that_has_ended_has_none():
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    assert stack_of(thread.ident or 0) == []


def test_of_threads_that_run_it_is_always_a_stack():
    """Following their frames from Python fails here within a second or so, on a busy machine."""
    end = threading.Event()

    def calls(depth: int) -> int:
        return 1 + calls(depth - 1) if depth else 0

    def run() -> None:
        while not end.is_set():
            calls(20)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            found = stacks()
            for thread in threads:
                assert found[thread.ident or 0][-1].function == "_bootstrap"
                assert {line.function for line in found[thread.ident or 0]} <= {
                    "calls", "run", "is_set", "_bootstrap", "_bootstrap_inner",
                }  # fmt: skip
    finally:
        end.set()
