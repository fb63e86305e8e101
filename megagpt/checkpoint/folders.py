"""Which checkpoints a run has, which one a name means, and which ones are kept."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megagpt.checkpoint import state
from megagpt.checkpoint.foreign import what_is
from megagpt.checkpoint.integrity import SUMS, damage_to, read_sums
from megagpt.config import CheckpointConfig
from megagpt.errors import UserError
from megagpt.files import delete, flush, open_own, os_reason, replace_text, require_regular, sha256_of

LATEST = "latest"
BEST = "best"
_NAME = re.compile(r"step-([0-9]{6,18})")
_POINTER = re.compile(r"(step-[0-9]{6,18}) ([0-9a-f]{64})\n")
_STEP = re.compile(r"[0-9]{1,18}")
REPLACED = ".replaced"  # what a checkpoint of the same step is called while the new one takes its place


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a run after `step` steps lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: complete ones, as far as names tell."""
    try:
        found = [p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    except ValueError:  # no name for a folder
        return []
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint folder is named after."""
    match = _NAME.fullmatch(folder.name.removesuffix(REPLACED))
    assert match, folder
    return int(match[1])


def find(path: str | Path) -> Path:
    """The checkpoint that --load means: RUN, RUN@latest, RUN@best, RUN@STEP, or the folder of a checkpoint.

    Raises UserError naming what is there instead. Hashes are not looked at (`integrity.damage_of` does), but for the
    one that `latest` has.
    """
    try:
        if _is_checkpoint(Path(path)):
            return _placed(Path(path))
        run, which = _split(path)
        if which == LATEST:
            return pointed(run)
        if which == BEST:
            return _best(run)
        if _STEP.fullmatch(which) and folder_of(run, int(which)).is_dir():
            return folder_of(run, int(which))
    except (OSError, ValueError) as error:  # no right to look; a name too long, or not of this file system
        reason = os_reason(error) if isinstance(error, OSError) else error
        raise UserError(f"--load {str(path)!a}: cannot be looked for ({reason}); check --load") from None
    raise UserError(f"{run} has no checkpoint {which!r}; give --load {run}@ and latest, best, or one of {_steps(run)}")


def older_than(folder: Path) -> list[Path]:
    """The checkpoints to fall back on, the newest first; none for a checkpoint that lies in no run."""
    if not _NAME.fullmatch(folder.name.removesuffix(REPLACED)):
        return []
    run = folder.parent.parent
    return [p for p in reversed(checkpoints_of(run)) if step_of(p) < step_of(folder)]


def point_to(folder: Path) -> None:
    """Make `latest` mean this checkpoint, from one moment to the next."""
    digest = sha256_of(folder / SUMS)
    replace_text(folder.parent / LATEST, f"{folder.name} {digest}\n")


def pointed(run: Path) -> Path:
    """The checkpoint that `latest` names.  Raises UserError where it names none, or one that has changed since."""
    pointer = run / "checkpoints" / LATEST
    try:
        require_regular(pointer)
        text = pointer.read_bytes().decode("ascii", errors="replace")
    except (OSError, ValueError):  # ValueError: no name for a file
        if not checkpoints_of(run) and (foreign := what_is(run)):
            raise UserError(foreign) from None
        raise UserError(f"no checkpoint in {run}: wanted {pointer}; {_instead(run)}") from None
    match = _POINTER.fullmatch(text)
    if match is None:
        raise UserError(
            f"{pointer} holds {text[:40]!r}, which names no checkpoint; give --load {run}@ and {_steps(run)}"
        )
    for name in (match[1], match[1] + REPLACED):  # the second: a crash between two renames
        folder = pointer.parent / name
        if (folder / SUMS).is_file() and sha256_of(folder / SUMS) == match[2]:
            return folder
    raise UserError(
        f"{pointer} names {match[1]}, whose {SUMS} is missing or not the one that was written; "
        f"give --load {run}@ and one of {_steps(run)}, or add --load-fallback"
    )


def _instead(run: Path) -> str:
    """What to load where a run has no `latest`."""
    if checkpoints_of(run):
        return f"it has the steps {_steps(run)}: --load {run}@STEP"
    try:
        if run.is_file():
            return "that is a file, give the folder of a run: --load RUN"
        runs = sorted(path.parent.parent for path in run.glob(f"*/checkpoints/{LATEST}"))
    except (OSError, ValueError):  # ValueError: no name for a file
        runs = []
    shown = ", ".join(map(str, runs[:3])) + (" …" if len(runs) > 3 else "")
    return f"it holds runs, give one of them: --load {shown}" if runs else "check --load"


def commit(temporary: Path, final: Path) -> None:
    """Give a checkpoint that is complete and on the disk its name, and `latest` to it.

    A crash at any point leaves `latest` naming the checkpoint of before or this one, and both of them whole.
    """
    replaced = final.with_name(final.name + REPLACED)
    if os.path.lexists(final):
        if os.path.lexists(replaced):  # a crash before `latest` had moved: final is complete, as its name tells
            point_to(final)
            delete(replaced)
        os.replace(final, replaced)
    os.replace(temporary, final)
    flush(final.parent)
    point_to(final)
    with suppress(OSError):
        delete(replaced)


def best_of(run: Path) -> Path | None:
    """The checkpoint with the highest validation score, or the lowest loss; None where none was measured.

    One whose state is damaged is not considered: it could not be loaded, and keeping others must not fail for it.
    """
    measured = [(worse, folder) for folder in checkpoints_of(run) if (worse := _how_bad(folder)) is not None]
    return min(measured)[1] if measured else None


def drop_old(newest: Path, config: CheckpointConfig) -> list[Path]:
    """Delete what the keep rules do not keep after `newest` was saved, and return it. Without keep_last: nothing.

    Checkpoints of later steps, from before the run went back to an earlier one, are nobody's to delete here.
    """
    if config.keep_last is None:
        return []
    run = newest.parent.parent
    found = [p for p in checkpoints_of(run) if step_of(p) <= step_of(newest)]
    kept = set(found[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {p for p in found if step_of(p) % config.keep_every == 0}
    if config.keep_best:
        best = best_of(run)
        kept |= {best} if best else set()
    dropped = [p for p in found if p not in kept]
    for folder in dropped:
        remove(folder)
    return dropped


def remove(folder: Path) -> None:
    """Delete a checkpoint: first its name, so that a crash on the way leaves none that looks complete."""
    doomed = folder.with_name(folder.name + ".deleted.tmp")
    delete(doomed)
    os.replace(folder, doomed)
    delete(doomed)


def mend(run: Path) -> None:
    """Clear up what a crash left. Only the holder of the run's lock may do this."""
    for path in (run / "checkpoints").glob("*.tmp"):
        delete(path)
    for replaced in (run / "checkpoints").glob(f"*{REPLACED}"):
        final = replaced.with_name(replaced.name.removesuffix(REPLACED))
        if final.exists() and not _points_to(run, replaced):
            remove(replaced)
        else:  # its successor has no pointer yet, or not even its name
            if final.exists():
                remove(final)
            os.replace(replaced, final)


def run_of(path: str | Path) -> Path:
    """The run folder that what --load means lies in."""
    if _is_checkpoint(Path(path)):
        return _placed(Path(path)).parent.parent
    run, _ = _split(path)
    return run


def require_begun(config: CheckpointConfig) -> None:
    """Raise UserError where --load means the run in --save, and that has no checkpoint yet: on a first start."""
    load, save = config.load, config.save
    if load is None or save is None or run_of(load).absolute() != Path(save).absolute() or checkpoints_of(Path(save)):
        return
    remedy = f"--save {save} --auto-resume, without --load, begins it now and goes on with it later"
    raise UserError(f"--load {load}", "has no checkpoint yet", remedy, ["checkpoint.load", "checkpoint.save"])


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder, so that no other run writes to it; a process that dies lets go of it.

    Raises UserError naming the process that has it, or why the folder cannot be locked.
    """
    try:
        file = open_own(run / "lock", "a+", errors="replace")
    except OSError as error:
        raise UserError(f"{run / 'lock'}: cannot be written ({os_reason(error)}); give another --save") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run} is being written by another run ({file.read().strip()}); wait for it, stop it, or give another "
                "--save"
            ) from None
        except OSError as error:
            raise UserError(
                f"{run / 'lock'}: this file system has no locks ({os_reason(error)}); give a --save on one that has"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _is_checkpoint(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None or (path / SUMS).exists()


def _split(path: str | Path) -> tuple[Path, str]:
    """RUN@STEP -> (RUN, STEP); RUN -> (RUN, latest); RUN/checkpoints and what lies in it mean RUN."""
    run, at, which = str(path).rpartition("@")
    run, which = (Path(run), which) if at and not Path(path).exists() else (Path(path), LATEST)
    folder = _placed(run).parent if run.name == LATEST else _placed(run)
    is_inside = folder.name == "checkpoints" and not (folder / "checkpoints").exists()
    return (folder.parent if is_inside else run), which


def _placed(path: Path) -> Path:
    """The path with as many folders before it as are asked for: `.` and `step-000100` have some, unsaid."""
    return Path(os.path.abspath(path)) if len(path.parts) < 3 or ".." in path.parts else path


def _points_to(run: Path, folder: Path) -> bool:
    try:
        return pointed(run) == folder
    except UserError:  # to nothing that is there: for whoever loads to say
        return False


def _how_bad(folder: Path) -> float | None:
    """What the best of a run has least of, as its validation found it."""
    try:
        if damage_to(folder, [state.NAME], read_sums(folder)):
            return None
        at = state.read_state(folder)
        return at.validation_loss if at.validation_score is None else -at.validation_score
    except UserError:  # damaged, which whoever loads or verifies it says
        return None


def _best(run: Path) -> Path:
    best = best_of(run)
    if best is None:
        raise UserError(
            f"no checkpoint of {run} has a validation loss; save at a step that is validated "
            f"(--save-interval a multiple of --eval-interval), or give --load {run}@ and one of {_steps(run)}"
        )
    return best


def _steps(run: Path) -> str:
    steps = [str(step_of(p)) for p in checkpoints_of(run)]
    return ", ".join(steps if len(steps) <= 8 else [*steps[:2], "…", *steps[-5:]]) or "(none)"
