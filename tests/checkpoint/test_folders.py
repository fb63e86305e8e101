"""Which checkpoint a name means, what is kept, who may write; and a crash at every single step of a commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.checkpoint import folders
from megagpt.checkpoint.integrity import damage_of
from megagpt.config import CheckpointConfig
from megagpt.errors import UserError
from megagpt.files import os_reason, replace_text, sha256_of
from tests.checkpoint.written_checkpoint import write_checkpoint

TINY = {"weight": {"x": np.zeros(2, np.float32)}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the steps 10, 20 and 30; 20 has the lowest loss."""
    for step, loss in ((10, None), (20, 2.0), (30, 2.5)):
        write_checkpoint(tmp_path / "run", step, validation_loss=loss)
    return tmp_path / "run"


def test_every_form_of_load(run: Path):
    place = run / "checkpoints"
    for name, step in {"": 30, "@latest": 30, "@best": 20, "@10": 10, "@000020": 20}.items():
        assert folders.find(f"{run}{name}") == place / f"step-{step:06d}", name
    assert folders.find(place / "step-000010") == place / "step-000010"
    exported = shutil.copytree(place / "step-000010", run.parent / "any name")
    assert folders.find(exported) == exported
    assert folders.older_than(exported) == []
    assert folders.older_than(place / "step-000030") == [place / "step-000020", place / "step-000010"]
    odd = shutil.copytree(run, run.parent / "r@5")  # an @ in the name of the run
    assert folders.find(odd) == odd / "checkpoints" / "step-000030"
    assert folders.find(f"{odd}@10") == odd / "checkpoints" / "step-000010"


REFUSED = {
    "@40": "has no checkpoint '40'; give --load .*@ and latest, best, or one of 10, 20, 30",
    "@²": "has no checkpoint '²'",
    "@-10": "has no checkpoint '-10'",
    "@" + "9" * 30: "has no checkpoint '9",
    "/elsewhere": "no checkpoint in .*elsewhere: wanted .*latest; check --load",
    "/" + "x" * 300: "cannot be looked for .*too long.*; check --load",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_means_nothing_is_refused(run: Path, name: str):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        folders.find(f"{run}{name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/latest", "checkpoints@20", "checkpoints/"])
def test_what_lies_in_a_run_means_the_run(run: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    wanted = run / "checkpoints" / ("step-000020" if "@" in name else "step-000030")
    assert folders.find(f"{run}/{name}") == wanted and folders.run_of(f"{run}/{name}") == run
    monkeypatch.chdir(run / "checkpoints")
    for here, step in ((".", "30"), (".@20", "20"), ("step-000010", "10"), ("../checkpoints/step-000010", "10")):
        assert folders.find(here).samefile(f"step-0000{step}") and folders.run_of(here).samefile(run), here


POINTERS = {  # 39, 40, 41 of the list of bad inputs
    "missing": (None, r"no checkpoint in .*run: wanted .*latest; it has the steps 10, 20, 30: --load .*run@STEP"),
    "empty": ("", r"latest holds '', which names no checkpoint; give --load .*run@ and 10, 20, 30"),
    "parent": ("../../elsewhere " + "0" * 64 + "\n", "latest holds '../../elsewhere"),
    "absolute": ("/etc/passwd\n", "latest holds '/etc/passwd"),
    "no end of line": ("step-000030 " + "0" * 64, "which names no checkpoint"),
    "another hash": ("step-000030 " + "0" * 64 + "\n", "latest names step-000030, whose SHA256SUMS is missing or not"),
    "not there": ("step-000031 " + "0" * 64 + "\n", "latest names step-000031, whose SHA256SUMS is missing or not"),
    "bytes": ("\xff\0", "which names no checkpoint"),
}


@pytest.mark.bad_input(39, 40, 41)
@pytest.mark.parametrize("case", POINTERS)
def test_a_pointer_that_leads_nowhere_is_refused(run: Path, case: str):
    text, message = POINTERS[case]
    pointer = run / "checkpoints" / "latest"
    pointer.unlink()
    if text is not None:
        pointer.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        folders.find(run)


def test_a_file_or_a_folder_of_runs_in_place_of_a_run_is_told(run: Path):
    with pytest.raises(UserError, match=r"it holds runs, give one of them: --load .*run$"):
        folders.find(run.parent)
    with pytest.raises(UserError, match=r"that is a file, give the folder of a run"):
        folders.find(run / "checkpoints" / "step-000010" / "SHA256SUMS")


def test_a_pointer_of_any_bytes_is_refused_and_nothing_worse(run: Path):
    @given(st.binary(max_size=100) | st.from_regex(r"step-[0-9]+ [0-9a-f]{64}\n", fullmatch=True).map(str.encode))
    def refused(data: bytes) -> None:
        (run / "checkpoints" / "latest").write_bytes(data)
        with pytest.raises(UserError, match="latest"):
            folders.find(run)

    refused()


def test_a_pipe_in_place_of_the_pointer_is_not_waited_for(run: Path):
    (run / "checkpoints" / "latest").unlink()
    os.mkfifo(run / "checkpoints" / "latest")
    with pytest.raises(UserError, match="no checkpoint in"):
        folders.find(run)


@given(st.text())
def test_find_says_no_and_nothing_worse(name: str):
    for path in (name, f"/nowhere/{name}", f"/nowhere@{name}"):
        try:
            assert folders.find(path)
        except UserError as error:
            assert "--load" in str(error)


@settings(max_examples=60)  # each makes several folders
@given(
    steps=st.sets(st.integers(1, 40), min_size=1, max_size=6),
    losses=st.lists(st.none() | st.sampled_from([1.0, 2.0, 3.0]), min_size=40, max_size=40),
    last=st.none() | st.integers(1, 5),
    every=st.none() | st.integers(1, 10),
    best=st.booleans(),
    which=st.integers(0, 7),
)
def test_what_is_kept_is_what_a_plain_model_keeps(steps, losses, last, every, best, which):
    ordered = sorted(steps)
    newest = ordered[which % len(ordered)]  # not the last one where the run has gone back
    older = [s for s in ordered if s <= newest]
    kept = set(ordered) if last is None else set(ordered) - set(older[:-last])
    if every is not None:
        kept |= {s for s in ordered if s % every == 0}
    measured = [(losses[s - 1], s) for s in ordered if losses[s - 1] is not None]
    if best and measured:
        kept.add(min(measured)[1])
    with TemporaryDirectory() as name:
        run = Path(name)
        for step in ordered:
            write_checkpoint(run, step, {}, validation_loss=losses[step - 1])
        config = CheckpointConfig(keep_last=last, keep_every=every, keep_best=best)
        dropped = folders.drop_old(folders.folder_of(run, newest), config)
        assert {folders.step_of(p) for p in folders.checkpoints_of(run)} == kept
        assert {folders.step_of(p) for p in dropped} == set(ordered) - kept
        assert not list((run / "checkpoints").glob("*.tmp"))


def test_the_best_is_one_that_can_be_read(run: Path):
    (run / "checkpoints" / "step-000020" / "state.json").write_text("{}")
    assert folders.find(f"{run}@best").name == "step-000030"
    shutil.rmtree(run / "checkpoints" / "step-000030")
    with pytest.raises(
        UserError, match=r"no checkpoint of .* has a validation loss; .* --load .*run@ and one of 10, 20"
    ):
        folders.find(f"{run}@best")


HOLD = """
import sys
from functools import partial
from pathlib import Path
from megagpt.checkpoint.folders import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_of_two_writers_one_is_refused_until_the_other_dies(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        for _ in range(2):  # being refused takes nothing from the holder
            with (
                pytest.raises(UserError, match=rf"by another run \(process {holder.pid} on .+\); wait for it, stop it"),
                folders.locked(tmp_path),
            ):
                pass
        holder.kill()
    with folders.locked(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"lock: cannot be written \(Is a directory\); give another --save"):
        folders.locked(tmp_path).__enter__()


class Crash(BaseException):
    """The power is off: no `except Exception` and no `except OSError` sees it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Raise Crash in place of the file operation of that number, counted from 0."""
    left = [number]

    def patched(operation: Callable[..., object]) -> Callable[..., object]:
        def run_or_crash(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return operation(*args, **kwargs)

        return run_or_crash

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, patched(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", patched(lambda descriptor: None))  # the kernel lives on: no need to wait


def attempt(action: Callable[[], object], at: int | None) -> bool:
    """Do it, with a crash at an operation; whether it came to the end."""
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 10**6 if at is None else at)
        try:
            action()
        except Crash:
            return False
        return True


@pytest.mark.parametrize(
    ("step", "mended"), [(10, False), (10, True), (20, False)], ids=["again", "again, mended", "the next step"]
)
def test_a_crash_at_any_point_of_two_commits_leaves_a_whole_checkpoint(tmp_path: Path, step: int, mended: bool):
    made = [write_checkpoint(tmp_path / "made", s, TINY, n_files=1, lr=s / 100) for s in (10, 11, 12, 13)]
    hashes = [sha256_of(folder / "SHA256SUMS") for folder in made]
    first = second = n_crashes = 0
    while True:
        run = tmp_path / f"{first}-{second}"
        folders.point_to(shutil.copytree(made[0], run / "checkpoints" / "step-000010"))
        final, outcomes = folders.folder_of(run, step), []
        for number, at in ((1, first), (2, second), (3, None)):
            temporary = final.with_name(f"{final.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # as a save that makes room does
            shutil.copytree(made[number], temporary)
            outcomes.append(attempt(partial(folders.commit, temporary, final), at))
            digest = check_latest(run, hashes)
            if mended:
                folders.mend(run)
                assert check_latest(run, [digest]) == digest
                assert not [*run.glob("checkpoints/*.tmp"), *run.glob("checkpoints/*.replaced")]
        assert outcomes[2] and folders.pointed(run) == final and not final.with_name(f"{final.name}.replaced").exists()
        shutil.rmtree(run)
        n_crashes += outcomes[:2].count(False)
        if not outcomes[1]:
            second += 1
        elif not outcomes[0]:
            first, second = first + 1, 0
        else:
            break
    assert n_crashes > 30, n_crashes


def check_latest(run: Path, known: list[str]) -> str:
    """That `latest` names a whole checkpoint, one of these by the hash of its SHA256SUMS; which."""
    found = folders.pointed(run)
    assert damage_of(found) == []
    digest = sha256_of(found / "SHA256SUMS")
    assert digest in known
    return digest


def test_mending_needs_no_pointer(run: Path):
    os.replace(run / "checkpoints" / "step-000020", run / "checkpoints" / "step-000020.replaced")
    (run / "checkpoints" / "latest").unlink()
    folders.mend(run)
    assert [folders.step_of(p) for p in folders.checkpoints_of(run)] == [10, 20, 30]


def test_a_crash_while_a_checkpoint_is_deleted_leaves_none_that_looks_whole(tmp_path: Path):
    for at in range(100):
        folder = write_checkpoint(tmp_path / f"{at}", 10, TINY, n_files=1)
        done = attempt(lambda folder=folder: folders.remove(folder), at)
        assert not folder.exists() or (at == 0 and damage_of(folder) == [])
        folders.mend(tmp_path / f"{at}")
        assert list(folder.parent.glob("*.tmp")) == []
        if done:
            break
    assert at >= 5


def move_and_link_back(folder: Path, elsewhere: Path) -> Path:
    """What is done where a disk is full; the place where it lies now."""
    elsewhere.mkdir(exist_ok=True)
    moved = folder.rename(elsewhere / folder.name)
    folder.symlink_to(moved)
    return moved


def test_a_checkpoint_that_was_moved_and_linked_back_is_read_and_only_its_link_deleted(tmp_path: Path):
    run = tmp_path / "run"
    for step in (10, 20, 30):
        write_checkpoint(run, step, TINY)
    moved = move_and_link_back(folders.folder_of(run, 10), tmp_path / "elsewhere")
    assert folders.find(f"{run}@10") == folders.folder_of(run, 10) and damage_of(folders.find(f"{run}@10")) == []
    assert folders.drop_old(folders.folder_of(run, 30), CheckpointConfig(keep_last=2)) == [folders.folder_of(run, 10)]
    assert [folders.step_of(p) for p in folders.checkpoints_of(run)] == [20, 30] and damage_of(moved) == []
    folders.mend(run)
    moved = move_and_link_back(folders.folder_of(run, 30), tmp_path / "elsewhere")
    again = write_checkpoint(tmp_path / "new", 30, TINY).rename(run / "checkpoints" / "step-000030.tmp")
    folders.commit(again, folders.folder_of(run, 30))
    assert not folders.folder_of(run, 30).is_symlink() and folders.pointed(run) == folders.folder_of(run, 30)
    assert damage_of(moved) == []
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000020", "step-000030"]


def test_a_link_that_a_crash_left_bricks_nothing(tmp_path: Path):
    write_checkpoint(tmp_path / "run", 10, TINY)
    for name in ("step-000005.deleted.tmp", "step-000020.tmp"):
        (tmp_path / "run" / "checkpoints" / name).symlink_to(tmp_path)
    folders.mend(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-000010"]


def test_a_lock_that_is_a_link_is_unlinked_and_a_pipe_refused(tmp_path: Path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with folders.locked(tmp_path):
        assert (tmp_path / "precious").read_text() == "text" and not (tmp_path / "lock").is_symlink()
    (tmp_path / "lock").unlink()
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(UserError, match=r"lock: cannot be written \(not a regular file\)"):
        folders.locked(tmp_path).__enter__()


def test_no_reason_is_none():
    assert os_reason(OSError("Cannot call rmtree on a symbolic link")) == "Cannot call rmtree on a symbolic link"
    assert os_reason(OSError()) == "OSError"


FOREIGN: dict[str, str] = {
    "latest_checkpointed_iteration.txt": "a checkpoint of Megatron-LM",
    "iter_0000100/mp_rank_00/model_optim_rng.pt": "a checkpoint of Megatron-LM",
    "iter_0000100/__0_0.distcp": "a distributed checkpoint of Megatron-LM",
    "global_step10/layer_00-model_00-model_states.pt": "pipelines (GPT-NeoX's)",
    "global_step10/mp_rank_00_model_states.pt": "a checkpoint of DeepSpeed; the zero_to_fp32.py in it",
    "mp_rank_00_model_states.pt": "one step of a checkpoint of DeepSpeed",
    "ckpt.pt": "a checkpoint of nanoGPT",
    "consolidated.00.pth": "its maker's own files",
    "model-q4.gguf": "llama.cpp",
    "adapter_config.json": "an adapter (LoRA)",
    "config.json": "a folder of Hugging Face transformers; import it",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_wrote_is_called_by_its_name(tmp_path: Path, name: str):
    (tmp_path / "other" / name).parent.mkdir(parents=True)
    (tmp_path / "other" / name).write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=re.escape(FOREIGN[name])) as refused:
        folders.find(tmp_path / "other")
    assert str(refused.value).startswith(f"{tmp_path}/other is ") and "\n" not in str(refused.value)


def test_a_text_is_the_old_one_or_the_new_one(tmp_path: Path):
    path = tmp_path / "text"
    for at in range(5):
        path.write_text("old")
        done = attempt(lambda: replace_text(path, "new"), at)
        assert path.read_text() == "new" if done else path.read_text() in ("old", "new")
    assert done


def test_a_text_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "text").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(tmp_path / "text", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["text"] and (tmp_path / "text").read_text() == "old"


def test_a_run_loaded_from_itself_on_its_first_start_is_told_of_auto_resume(tmp_path):
    save = str(tmp_path / "ck")
    for load in (save, f"{save}@latest", f"{save}/"):
        with pytest.raises(UserError, match=f"--load {load} has no checkpoint yet; --save {save} --auto-resume"):
            folders.require_begun(CheckpointConfig(save=save, load=load))
    folders.require_begun(CheckpointConfig(save=save, load=str(tmp_path / "other")))
    folders.folder_of(tmp_path / "ck", 3).mkdir(parents=True)
    folders.require_begun(CheckpointConfig(save=save, load=save))


def test_a_name_that_no_folder_has_is_told(monkeypatch: pytest.MonkeyPatch):
    """From Python 3.13 on, looking into a folder with a NUL in its name raises ValueError."""

    def glob(path: Path, pattern: str) -> list[Path]:
        raise ValueError("embedded null byte")

    monkeypatch.setattr(Path, "glob", glob)
    assert folders.checkpoints_of(Path("a\0b")) == []
    for name in ("a\0b", "a\0b@latest", "a\0b@best", "a\0b@3"):
        with pytest.raises(UserError, match="no checkpoint"):
            folders.find(name)
