"""Lays the four files of a new op: softcap's, the worked example, under the new name, with the places to fill marked.

    python -m megagpt.ops new NAME    (or python -m tools.new_op NAME)

Copies of what is tested cannot rot as templates do; what is laid compiles, is right, and is changed while it runs.
"""

from __future__ import annotations

import io
import keyword
import re
import subprocess
import sys
import tokenize
from contextlib import suppress
from pathlib import Path

from megagpt.errors import ArgumentParser, UserError, run_cli

EXAMPLE = "softcap"
FILES = {
    "megagpt/ops/{}.py": "the public function, its plain-torch reference, schema and gradient",
    "tests/ops/cases/{}.py": "what proves and measures it",
    "csrc/{}.cpp": "the CPU kernel",
    "csrc/{}.cu": "the CUDA kernel",
}
LONGEST = 30  # Python's lines, some of which hold it twice, stay within 120 columns

NEXT = """
As laid it computes what {example} does. Change what says TODO, and `cap`, to what you need; then, as often as you like:
  make build
  make test TESTS="tests/ops -k {name}"
  make bench-kernels OP={name}
docs/adding-a-kernel.md goes through the four files.
"""


def main() -> None:
    """Lay an op's files, and say what they are and what comes next."""
    parser = ArgumentParser(prog="python -m tools.new_op", description="The four files of a new op.")
    parser.add_argument("name", metavar="NAME")
    name = parser.parse_args().name
    lay(Path.cwd(), name)
    for file, what in FILES.items():
        print(f"{file.format(name):{len(max(FILES, key=len)) + len(name)}}{what}")
    print(NEXT.format(example=EXAMPLE, name=name), end="")


def lay(root: Path, name: str) -> list[Path]:
    """Write the files of op `name` into the repository at root: all of them, or none.

    Raises UserError for a name that is no good or taken, and outside the repository.
    """
    missing = [f.format(EXAMPLE) for f in FILES if not (root / f.format(EXAMPLE)).is_file()]
    if missing:
        raise UserError(f"{root} has no {missing[0]}; run this in the root of the repository, where csrc/ is")
    _check_name(root, name)
    texts = {root / f.format(name): render((root / f.format(EXAMPLE)).read_text(), name) for f in FILES}
    written: list[Path] = []
    try:
        for file, text in texts.items():
            with file.open("x") as out:
                written.append(file)
                out.write(text)
    except OSError as error:
        for file in written:
            file.unlink()
        raise UserError(f"{error}; nothing was laid") from error
    _tidy([file for file in written if file.suffix == ".py"])
    return written


def render(text: str, name: str) -> str:
    """One of softcap's files under another name."""
    docstring = f'"""{name}: TODO what it computes, in one line.\n\nSource: TODO authors year, section.\n"""'
    text = re.sub(r'\A"""Soft cap: squeezes.*?"""', docstring, text, flags=re.DOTALL)
    for old, new in (
        (" The worked example of docs/adding-a-kernel.md.", ""),
        ("cap · tanh(x / cap), elementwise.", "TODO: your formula, in words."),
        ("formula\n", "TODO: your formula\n"),
        ("Soft cap", name),
        (EXAMPLE, name),
    ):
        text = text.replace(old, new)
    return text


def _check_name(root: Path, name: str) -> None:
    """Raise UserError unless an op can be called `name`."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or len(name) > LONGEST:
        raise UserError(
            f"got the name {name!r}, wanted lower-case letters, digits and _, at most {LONGEST}, as in fused_norm"
        )
    # The gradient of op `a` is op `a_backward`, in a's files.
    taken = [root / f.format(n) for f in FILES for n in (name, name.removesuffix("_backward"))]
    taken += [(root / f.format(name)).with_suffix(suffix) for f in FILES for suffix in (".h", ".cuh", "")]
    for file in taken:
        if file.exists():
            raise UserError(f"{file.relative_to(root)} is there already; choose another name than {name}, or edit that")
    for file in (f.format(EXAMPLE) for f in FILES if f.endswith(".py")):
        words = tokenize.generate_tokens(io.StringIO((root / file).read_text()).readline)
        if name in {word.string for word in words if word.type == tokenize.NAME}:
            raise UserError(f"got the name {name!r}, which {file} uses for something else; choose another")


def _tidy(files: list[Path]) -> None:
    """Sort imports and break lines as the new name asks for, where ruff is installed."""
    for command in (["check", "--select", "I", "--fix"], ["format"]):
        with suppress(OSError):
            subprocess.run([sys.executable, "-m", "ruff", *command, *files], capture_output=True, check=False)


if __name__ == "__main__":
    run_cli(main)
