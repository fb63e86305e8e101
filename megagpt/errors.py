"""The one error that a user can act on: shown as one line, without a traceback, exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NoReturn

from megagpt.streams import ready_streams

EXIT_USER = 2  # what the user gave cannot work; the message says why
EXIT_PEER_LOST = 69  # another process of the run died, stopped or hung
EXIT_STOPPED = 75  # asked to stop, and saved: go on with --auto-resume

# A launcher ends all ranks as soon as one has ended: the silent ones wait until the one that speaks has spoken.
SILENT_S = 5.0


class UserError(Exception):
    """Something the user gave cannot work: what was got, what was wanted, what to do, as "got wanted; remedy".

    Where no setting is concerned, got may be the whole message.
    keys: the settings that it is about, such as "model.n_layers". where: the file that they stand in, if one is known.
    speaks: whether this process prints it. Of several ranks that fail together exactly one does.
    code: the exit code that it becomes.
    lines: where many things are wrong at once, such as unknown flags, a line of each, to be printed beneath.
    """

    def __init__(
        self,
        got: str,
        wanted: str = "",
        remedy: str = "",
        keys: Sequence[str] = (),
        where: str = "",
        speaks: bool = True,
        code: int = EXIT_USER,
        lines: Sequence[str] = (),
    ) -> None:
        super().__init__(got)
        self.got, self.wanted, self.remedy = got, wanted, remedy
        self.keys, self.where = tuple(keys), where
        self.speaks, self.code, self.lines = speaks, code, tuple(lines)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return place + " ".join(filter(None, (self.got, self.wanted))) + (f"; {self.remedy}" if self.remedy else "")


def require(ok: bool, got: str, wanted: str, remedy: str, *keys: str) -> None:
    """Raise `UserError` "got wanted; remedy" unless ok. keys: the settings that it is about ("model.n_layers")."""
    if not ok:
        raise UserError(got, wanted, remedy, keys)


def divisors(n: int, limit: int = 256) -> list[int]:
    """The divisors of n up to limit, ascending: what an error message offers."""
    return [d for d in range(1, min(n, limit) + 1) if n % d == 0]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is but for a slip of the hand; None where there is none, or where there are two.

    A slip: another section, the words in another order, a letter too many or too few, in longer names two of them. Not
    another number: beta3 is not beta1. Of two as near, the one with the same first letter.
    known: names as typed, --optim.lr or optim.lr.
    """
    found: dict[int, list[str]] = {}
    for candidate in known:
        slips = min(_slips(name, candidate), _slips(_leaf(name), _leaf(candidate)))
        found.setdefault(slips, []).append(candidate)
    slips = min(found, default=_MAX_SLIPS + 1)
    if slips > (_MAX_SLIPS if len(_leaf(name)) > 4 else 1):
        return None
    near = found[slips]
    if len(set(map(_leaf, near))) > 1:
        near = [candidate for candidate in near if _leaf(candidate)[:1] == _leaf(name)[:1]]
    return min(near, key=lambda candidate: _slips(name, candidate)) if len(set(map(_leaf, near))) == 1 else None


_MAX_SLIPS = 2  # letters


def _leaf(name: str) -> str:
    return name.split(".")[-1].strip("-").lower().replace("_", "-")


def _slips(name: str, candidate: str) -> int:
    """Letters that one has and the other lacks."""
    if re.sub(r"\D", "", name) != re.sub(r"\D", "", candidate):
        return _MAX_SLIPS + 1
    if sorted(re.split(r"[-_.]", name.strip("-"))) == sorted(re.split(r"[-_.]", candidate.strip("-"))):
        return 0
    blocks = SequenceMatcher(None, name, candidate, autojunk=False).get_matching_blocks()
    return len(name) + len(candidate) - 2 * sum(block.size for block in blocks)


class ArgumentParser(argparse.ArgumentParser):
    """The parser of every tool: a wrong argument is a `UserError`; --json_keys is --json-keys; no abbreviations.

    description: printed line by line, as it stands. An argument of type Path may begin with ~, as in the shell.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": formatter, **options})
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's takes -1e-3 for a flag until Python 3.14
        self.register("type", Path, lambda text: Path(home_expanded(text)))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's, hyphens and underscores in the names of flags being the same."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_hyphens(word) for word in words], namespace)

    def flags(self) -> dict[str, float]:
        """Each flag, and how many words it takes at most."""
        room = {None: 1, "*": math.inf, "+": math.inf, "?": 1}
        return {
            flag: room.get(action.nargs, action.nargs)  # type: ignore[misc,call-overload]
            for action in self._actions
            for flag in action.option_strings
        }

    def error(self, message: str) -> NoReturn:
        """Raise what run_cli prints on one line."""
        if valued := re.fullmatch(r"argument (\S+): ignored explicit argument (.+)", message):
            flag, *others = valued[1].split("/")
            off = [other for other in others if re.match(r"--(\w+\.)?no-", other)]
            raise UserError(
                f"{flag} takes no value, got {valued[2]};", f"{off[0]} turns it off" if off else "see --help"
            )
        raise UserError(message, remedy="see --help")


def home_expanded(path: str) -> str:
    """A path whose ~ or ~NAME at the beginning has become a folder, as in a shell, which misses that of --save=~/a."""
    return os.path.expanduser(path)


def is_flag(word: str) -> bool:
    """Whether a word of a command line is a flag, and no value such as -1e-3."""
    return re.match(r"-\.?\d|-$|--$|[^-]|$", word) is None


def _hyphens(word: str) -> str:
    flag = re.match(r"--[a-zA-Z][\w.-]*(?==|$)", word)
    return flag[0].replace("_", "-") + word[flag.end() :] if flag else word


def one_line(text: str) -> str:
    """The text with what would break the line, or play with the terminal, written as escapes: a key or a file name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def announce(text: str) -> None:
    """Say something once, however many ranks there are: local rank 0 speaks for its machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)


class Stopped(Exception):  # noqa: N818  # it is no error
    """The run was asked to end early, and saved what it had. The message, told by one rank, says where."""

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def run_cli(main: Callable[[], int | None], speaks: bool = True) -> None:
    """Run a command line tool: a `UserError` becomes `error: …` on stderr and exit code 2, `Stopped` 75, Ctrl-C 130.

    speaks: False on ranks whose errors another rank prints as well.
    """
    ready_streams()
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if error.speaks and (speaks or type(error) is not UserError):  # a subclass knows better who speaks
            print("\n".join([f"error: {one_line(str(error))}", *map(one_line, error.lines)]), file=sys.stderr)
        else:
            time.sleep(SILENT_S)
        sys.exit(error.code)
    except Stopped as stop:
        if stop.speaks:
            print(stop, flush=True)
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:  # whoever read our output has seen enough: `… --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        if speaks:
            print("interrupted", file=sys.stderr)
        sys.exit(130)
