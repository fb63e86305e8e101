"""The stacks of threads, as another thread sees them."""

from __future__ import annotations

import threading
import time
import traceback

from megagpt.watch.stacks import Line, parse, stacks


def test_what_faulthandler_writes_is_read():
    text = (
        "Thread 0x00007f12 [worker] (most recent call first):\n"
        '  File "/a b/"c".py", line 7 in f\n'
        '  File "/d.py", line ??? in <module>\n'
        "\n"
        "Thread 0x00007f13 (most recent call first):\n"
        "  <no Python frame>\n"
        "\n"
        "Current thread 0x00007f14 (most recent call first):\n"
        '  File "/e.py", line 1 in g\n'
        "  ...\n"
    )
    assert parse(text) == {
        0x7F12: [Line('/a b/"c".py', 7, "f"), Line("/d.py", 0, "<module>")],
        0x7F14: [Line("/e.py", 1, "g")],
    }


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
    n = min(len(expected), 90)  # faulthandler stops after 100
    assert [(line.file, line.function) for line in seen[:n]] == [(line.file, line.function) for line in expected[:n]]


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
