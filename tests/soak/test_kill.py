"""kill -9 of a rank, and the run goes on as if nothing had been: to the last bit of losses, weights and moments.

12 cycles of kill and restart, through the fork server, our own relaunch and torchrun, whose chains are the slow ones.
`make soak` runs 200.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from random import SystemRandom

import pytest

from megagpt.processes.local import warm_up
from tests.soak.case import Layout, command_line, make_dataset
from tests.soak.chain import Chain, Cycle, Reference, make_reference, run_chain
from tests.soak.kill import Aim, strike
from tests.soak.ranks import start
from tests.soak.trace import Trace, differences, read_differences, reads_of, trace_of

pytestmark = pytest.mark.timeout(600)  # real launchers on a busy machine
AT_ONCE = 3  # most of the time the survivors of a kill wait for each other
PP2, TP2_BF16 = Layout(pp=2), Layout(tp=2, precision="bf16")

CHAINS = {
    f"{chain.layout}-{chain.way}": chain
    for chain in (  # those with an even number begin with a kill while saving
        Chain(0, PP2, "program", True, 1, 0),
        Chain(2, TP2_BF16, "torchrun", False, 1, 0),
        Chain(4, Layout(pp=2, tp=2), "fork", True, 3, 0),
        Chain(1, PP2, "fork", False, 3, 0),
        Chain(3, TP2_BF16, "fork", True, 2, 0),
        Chain(5, Layout(dp=2, precision="bf16"), "fork", False, 2, 0),
    )
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs."""
    warm_up()
    return tmp_path_factory.mktemp("kill")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> str:
    """What all train on."""
    return make_dataset(folder)


@pytest.fixture(scope="module")
def reference(folder: Path, dataset: str) -> Callable[[Layout], Reference]:
    """An uninterrupted run in a layout."""
    return cache(lambda layout: make_reference(layout, dataset, folder / f"reference-{layout}"))


@pytest.fixture(scope="module")
def cycles(
    request: pytest.FixtureRequest, folder: Path, dataset: str, reference: Callable[[Layout], Reference]
) -> Iterator[dict[str, Future[list[Cycle]]]]:
    """All chains that are wanted, under way side by side."""
    seed, wanted = SystemRandom().randrange(1 << 30), {item.name for item in request.session.items}
    chains = {name: chain for name, chain in CHAINS.items() if f"{GOES_ON}[{name}]" in wanted}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(
                run_chain, dataclasses.replace(chain, seed=seed), reference(chain.layout), dataset, folder / name
            )
            for name, chain in chains.items()
        }


def marks_of(chain: Chain) -> tuple[pytest.MarkDecorator, ...]:
    """A launcher imports torch anew at each start; and each layout has a run of its own to compare with."""
    return () if chain.way == "fork" and chain.layout in (PP2, TP2_BF16) else (pytest.mark.slow,)


def test_there_are_12_cycles_over_all_axes_and_both_precisions():
    assert sum(chain.n_kills for chain in CHAINS.values()) == 12
    layouts = [chain.layout for chain in CHAINS.values()]
    assert {(layout.pp, layout.tp, layout.dp) for layout in layouts} == {(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)}
    assert {layout.precision for layout in layouts} == {"fp32", "bf16"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks_of(chain)) for n, chain in CHAINS.items()])
def test_a_killed_run_goes_on_bit_for_bit(name: str, cycles: dict[str, Future[list[Cycle]]]):
    done = cycles[name].result()
    assert len(done) == CHAINS[name].n_kills, done
    assert not [cycle for cycle in done if cycle.problems], done


GOES_ON = test_a_killed_run_goes_on_bit_for_bit.__name__


@pytest.fixture(scope="module")
def killed(folder: Path, dataset: str) -> Path:
    """A run that was killed between steps 7 and 9, with a checkpoint of step 6."""
    run = folder / "killed" / "run"
    run.parent.mkdir()
    job = start("fork", 2, command_line(PP2, dataset, run), run.parent / "first")
    assert strike(job, run, Aim(rank=1, after_s=0.0, step=7))
    assert job.wait(60.0)
    return run


FOUND_BY = {
    None: (),
    "one_step_off": ("sample", "metrics", "step-"),
    "dropout_keyed_anew": ("metrics", "step-"),
    "moment_not_restored": ("metrics", "step-"),
    "one_bit_of_one_weight": ("step-",),
    "other_samples": ("sample", "metrics", "step-"),
}


@pytest.mark.parametrize("plant", FOUND_BY)
def test_a_planted_defect_of_the_resume_is_found(plant, killed, reference, dataset, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    job = start("fork", 2, command_line(PP2, dataset, run), tmp_path / "again", plant)
    assert job.wait(60.0) == [0, 0], list(tmp_path.glob("*.out"))
    found = differences(reference(PP2).kept, trace_of(run))
    found += read_differences(reference(PP2).reads, reads_of(tmp_path / "again", 2), skipped=6 / 15, all_of_it=True)
    for word in FOUND_BY[plant]:
        assert [line for line in found if word in line], (word, found)
    assert bool(found) == (plant is not None), found


def test_a_run_killed_when_all_was_saved_has_nothing_to_do_but_to_clear_up(reference, folder, dataset, tmp_path):
    kept = reference(PP2).kept
    run = shutil.copytree(folder / f"reference-{PP2}" / "run", tmp_path / "run")  # with all its checkpoints
    (run / "checkpoints" / "step-000003.deleted.tmp").mkdir()
    job = start("fork", 2, command_line(PP2, dataset, run), tmp_path / "again")
    assert job.wait(60.0) == [0, 0]
    assert "nothing to do: " in (tmp_path / "again-rank-0.out").read_text()
    assert differences(kept, trace_of(run)) == []


CHANGES: dict[str, Callable[[Trace], Trace]] = {
    "a bit of a loss": lambda t: dataclasses.replace(t, losses=t.losses | {"step 5 loss": "0x1.0000000000001p+1"}),
    "a row too many": lambda t: dataclasses.replace(t, losses=t.losses | {"step 16 loss": "0x1.0p+1"}),
    "a row missing": lambda t: dataclasses.replace(t, losses={k: v for k, v in t.losses.items() if k != "step 5 loss"}),
    "a tensor": lambda t: dataclasses.replace(t, checkpoints={**t.checkpoints, "step-000015": {"weight of a": "00"}}),
    "no checkpoint": lambda t: dataclasses.replace(t, checkpoints={}),
    "a leftover": lambda t: dataclasses.replace(t, leftovers=["step-000009.tmp"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_comparison_sees(what: str):
    trace = Trace({"step 5 loss": "0x1.0p+1"}, {"step-000015": {"weight of a": "ff"}}, [])
    assert differences(trace, trace) == []
    assert len(differences(trace, CHANGES[what](trace))) == 1


READS = [["0 aa", "1 bb", "2 cc", "3 dd"]]


@pytest.mark.parametrize(
    ("got", "finished", "ok"),
    [
        (["2 cc", "3 dd"], True, True),
        (["2 cc"], True, False),
        (["2 cc"], False, True),
        ([], False, True),
        (["1 bb", "2 cc"], False, False),
        (["2 cc", "3 ee"], False, False),
        (["2 cc", "3 dd", "4 ee"], False, False),
    ],
)
def test_the_comparison_of_samples_sees(got: list[str], finished: bool, ok: bool):
    assert (read_differences(READS, [got], skipped=0.5, all_of_it=finished) == []) == ok
