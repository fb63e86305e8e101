"""Feed one target for as long as is asked, guided by which of megagpt's code an input reaches (atheris, libFuzzer).

    python -m tests.fuzz index --seconds 60

Needs the extra `fuzz` (pip install -e '.[fuzz]'). What is found is written beside the corpus, with the traceback on
stderr; `python -m tests.fuzz index --repeat FILE` runs it again. The corpus is kept and built on.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

NAMES = ("index", "side_file", "jsonl", "yaml", "argv", "stranger")


def main() -> None:
    """Ends the process: with 0 when nothing was found in time, else with libFuzzer's 77."""
    arguments = parse()
    try:
        import atheris  # an extra; here, so that its absence is one line
    except ImportError:
        sys.exit("error: atheris is not installed; install the extra: .venv/bin/python -m pip install -e '.[fuzz]'")
    with atheris.instrument_imports(include=["megagpt"]):
        targets = importlib.import_module("tests.fuzz.targets")  # imports what is to be instrumented
    target = targets.TARGETS[arguments.target]
    folder = Path(tempfile.mkdtemp(prefix="megagpt-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    corpus = Path(arguments.corpus) / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(targets.seeds(arguments.target)):
        (corpus / f"seed-{i}").write_bytes(data)
    dictionary = folder / "words"
    hexed = ["".join(f"\\x{byte:02x}" for byte in word) for word in targets.WORDS[arguments.target]]
    dictionary.write_text("".join(f'"{word}"\n' for word in hexed), encoding="ascii")
    options = [
        f"-dict={dictionary}",
        f"-max_total_time={arguments.seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=4096",
    ]
    options += [f"-artifact_prefix={corpus.parent}/{arguments.target}-", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, arguments.repeat or str(corpus)], lambda data: target(data, folder))
    atheris.Fuzz()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--seconds", type=int, default=60, help="how long (default: 60)")
    parser.add_argument("--corpus", default="runs/fuzz", help="folder of inputs that reached something new")
    parser.add_argument("--repeat", metavar="FILE", help="run one input again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
