"""Loading: a whole checkpoint that a run may go on from, into a run of any layout; or its weights into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megagpt.checkpoint import folders
from megagpt.checkpoint.integrity import bad_numbers_in, damage_to, read_tables
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import State, read_state
from megagpt.checkpoint.strict import STRICT, Allowed, require_same_names
from megagpt.config import RunConfig, plain
from megagpt.config.values import BatchSteps
from megagpt.errors import UserError
from megagpt.inventory.parameter import AVERAGE, WEIGHT
from megagpt.optim.segments import place_of
from megagpt.parallel.parameter import Named, Part
from megagpt.processes.agree import RankError, together
from megagpt.schedule import Schedule

if TYPE_CHECKING:
    from megagpt.train.step.masters import Masters


def find_whole(
    path: str | Path,
    fallback: bool,
    say: Callable[[str], None],
    *,
    newest_will_do: bool = False,
    keys: Iterable[str] | None = None,
) -> Path:
    """The checkpoint that --load means, after every byte of it was compared with its hash; the ranks share the work.

    fallback: where it is damaged, take the newest whole one before it. newest_will_do: where the run's `latest` means
    none, as a crash before the first time it is written leaves it, begin with the newest. keys: look at the tensors of
    these only.
    Comm: collective over all ranks.  Raises a RankError that names what is damaged, and what is whole.
    """
    first = together(lambda: first_of(path, newest_will_do))
    wrong = shared_damage_of(first, keys)
    if not wrong:
        return first
    for older in folders.older_than(first):
        if not shared_damage_of(older, keys):
            if fallback:
                say(f"note: {wrong[0]}; going back to {older} (--load-fallback)")
                return older
            step, run = folders.step_of(older), older.parent.parent
            raise RankError(
                f"{wrong[0]}{_more(wrong)}; step {step} is whole: --load {run}@{step}, or add --load-fallback",
                speaks=dist.get_rank() == 0,
            )
    raise RankError(f"{wrong[0]}{_more(wrong)}; no checkpoint before it is whole", speaks=dist.get_rank() == 0)


def shared_damage_of(folder: Path, keys: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, the same list on every rank; empty where all is as it was written, and numbers.

    Comm: one all-gather of the findings: each rank reads its share of the files.
    """
    try:
        hashes = read_tables(folder)
    except UserError as error:
        found = [str(error)]
    else:
        names = [n for n in sorted(hashes) if keys is None or n.split("-")[0] in set(keys)]
        found = _damage_or_bad_numbers(folder, names[dist.get_rank() :: dist.get_world_size()], hashes)
    ranks: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    return sorted({finding for rank in ranks for finding in rank})


def _damage_or_bad_numbers(folder: Path, names: list[str], hashes: dict[str, str]) -> list[str]:
    if found := damage_to(folder, names, hashes):
        return found
    try:
        with Reader(folder) as reader:
            return bad_numbers_in(reader, names)
    except UserError as error:
        return [str(error)]


def read_part(reader: Reader, key: str, name: str, part: Part) -> torch.Tensor:
    """This rank's part of a logical tensor, fp32, without padding.

    Raises UserError where the checkpoint has none of that name and shape.
    """
    if reader.shape(key, name) != part.shape:
        raise UserError(
            f"{reader.folder}: {name} has shape {reader.shape(key, name)}, this model wants {part.shape}; "
            "it is of another architecture"
        )
    start, shape = [0] * len(part.shape), list(part.shape)
    if part.dim is not None:
        start[part.dim], shape[part.dim] = part.start, part.length
    return torch.from_numpy(reader.read(key, name, tuple(start), tuple(shape)))


def load_masters(
    masters: Masters, config: RunConfig, folder: Path, say: Callable[[str], None] = lambda line: None
) -> State:
    """Read the tensors of a checkpoint into a run, whatever layout wrote them; returns the rest of what it knows.

    say: told of tensors that only one of them has, where the configuration allows that.
    Memory: one tensor of this rank at a time, beside the run's own.
    Comm: collective over all ranks.  Raises a RankError where the architectures differ, or a file cannot be read.
    """
    allowed = Allowed(config.checkpoint.allow_missing, config.checkpoint.allow_unused)
    wanted = _names_of_all_stages(masters)

    def read_all() -> State:
        state = read_state(folder)
        check_resumable(config, state, folder)
        with Reader(folder) as reader:
            # An average that was not kept begins with the weights, moments of imported ones with zeros.
            sources = {key: WEIGHT if key == AVERAGE and key not in reader.index else key for key in wanted}
            sources = {key: source for key, source in sources.items() if source in reader.index or state.step > 0}
            for key in sorted(reader.index.keys() - sources.values()):
                if key == AVERAGE and not allowed.unused:
                    raise UserError(
                        f"{folder} keeps an average of the weights, and this run none; keep it with --optim.ema-decay, "
                        "or drop it with --allow-unused"
                    )
                require_same_names(folder, key, reader.index[key], (), allowed, say)
            for key, source in sources.items():
                held = reader.index.get(source, {})
                require_same_names(folder, source, held, wanted[key], allowed, say)
                for named in masters.kept.get(key, ()):
                    if named.name in held:
                        values = read_part(reader, source, named.name, place_of(named, key))
                        masters.write(named, key, values.to(masters.device))
        return state

    return together(read_all)


def load_weights(
    parameters: Sequence[Named],
    folder: Path,
    key: str = WEIGHT,
    allowed: Allowed = STRICT,
    say: Callable[[str], None] = lambda line: None,
    names: Iterable[str] | None = None,
) -> None:
    """Read the weights of a model that no engine holds (evaluation, generation), or their average (key "ema").

    names: of all parameters of the model, where these are a stage's.

    allowed: tensors that only one of them may have. say: told which these are.
    Comm: none.  Raises UserError where the checkpoint has none, or others than the model.
    """
    with Reader(folder) as reader:
        if key == AVERAGE and key not in reader.index:
            raise UserError(
                f"{folder} has no average of the weights: its run had no --optim.ema-decay; use --weights last"
            )
        held = reader.index.get(key, {})
        names = (named.name for named in parameters) if names is None else names
        require_same_names(folder, key, held, names, allowed, say)
        for named in parameters:
            if named.name in held:
                named.part.unpadded(named.parameter.data).copy_(read_part(reader, key, named.name, named.part))


def _names_of_all_stages(masters: Masters) -> dict[str, set[str]]:
    """The parameters that the run keeps something of, by key.  Comm: an all-gather of names over the pipeline."""
    pipe, mine = masters.mesh.pipe, {key: [n.name for n in named] for key, named in masters.kept.items()}
    stages = [mine] * pipe.size
    if pipe.size > 1:
        dist.all_gather_object(stages, mine, group=pipe.group)
    names: dict[str, set[str]] = {}
    for stage in stages:
        for key, found in stage.items():
            names.setdefault(key, set()).update(found)
    return names


def check_resumable(config: RunConfig, state: State, folder: Path) -> None:
    """What a run that goes on must keep: the architecture, the optimizer, and what the samples' order follows from.

    Dropout, layout, precision, learning rate and the number of steps may change, and batches that are still to come.
    Weights that no sample was consumed for (imported ones) keep the architecture alone.
    """
    if state.origin and state.step > 0:
        raise UserError(
            f"{folder} is a {state.origin}: weights without the optimizer's moments, to evaluate, generate and export; "
            "to go on training, load one that a run saved"
        )
    was, now = state.config.get("finetune", {}).get("task"), config.finetune.task
    if was != now:
        raise UserError(
            f"{folder} is of a run of finetune.task={was}, and this one is of {now}",
            remedy=f"begin anew with its weights: --base {folder}" if now else "go on with examples/finetune_gpt.py",
            keys=["finetune.task"],
        )
    names = ["model", "lora.rank" if config.lora.rank is None else "lora"]
    if state.samples > 0:
        names += ["train.seed", "finetune.pack"]
    if state.step > 0:
        names += ["optim.optimizer"]  # what it keeps of a weight
    require_same_settings(config, state, folder, names)
    if state.samples > 0:
        _check_position(config, state, folder)


_FREE = {("lora", "base")}


def require_same_settings(config: RunConfig, state: State, folder: Path, names: Iterable[str]) -> None:
    """Raise UserError unless a checkpoint was made with the settings of this run: of whole sections, or of keys.

    Dropout may differ, and where a base lies.
    """
    settings, defaults = plain(config), plain(RunConfig())
    fixed: dict[str, object] = {}
    for name in names:
        section, _, key = name.partition(".")
        keys = [key] if key else [k for k in settings[section] if "dropout" not in k and (section, k) not in _FREE]
        fixed |= {f"{section}.{k}": settings[section][k] for k in keys}
    for name, ours in fixed.items():
        section, key = name.split(".")
        theirs = state.config.get(section, {}).get(key, defaults[section][key])  # an older one lacks newer settings
        if theirs != ours:
            raise UserError(
                f"{folder} was trained with {name}={theirs}, this run wants {ours}; "
                f"take the settings of that run: --config {folder.parent.parent / 'config.yaml'}"
            )


def _check_position(config: RunConfig, state: State, folder: Path) -> None:
    """The next step must read on where that run stopped: no sample twice, and none left out."""
    schedule = Schedule(config)
    ours = schedule.samples_before(state.step), schedule.tokens_before(state.step)
    if ours != (state.samples, state.tokens):
        raise UserError(
            f"{folder} has read {state.samples:,} samples, {state.tokens:,} tokens in {state.step:,} steps, this run "
            f"would have read {ours[0]:,} samples, {ours[1]:,} tokens; keep train.global_batch_size, its ramp and that "
            f"of seq_len{_other_batch(config, state)}"
        )


def _other_batch(config: RunConfig, state: State) -> str:
    """', or change the batch from here on: …', where that would read on: a batch of one size that has grown."""
    was, now = state.config.get("train", {}).get("global_batch_size"), config.train.global_batch_size
    steps = f"{was}@1,{now}@{state.step + 1}"
    plain_batch = {"batch_ramp_start": None, "batch_ramp_tokens": None, "batch_ramp_increment": None}
    try:
        train = replace(config.train, batch_steps=BatchSteps.parse(steps), **plain_batch)
    except UserError:  # it shrinks
        return ""
    schedule = Schedule(replace(config, train=train))
    reads_on = (schedule.samples_before(state.step), schedule.tokens_before(state.step)) == (
        state.samples,
        state.tokens,
    )
    return f", or change the batch from here on: --train.batch-steps {steps}" if reads_on else ""


def first_of(path: str | Path, newest_will_do: bool) -> Path:
    """The checkpoint that --load means, whole or not.  newest_will_do: see `find_whole`.  Raises UserError."""
    try:
        return folders.find(path)
    except UserError:
        newest = folders.checkpoints_of(folders.run_of(path))[-1:]
        if not newest_will_do or not newest:
            raise
        return newest[0]


def _more(findings: list[str]) -> str:
    return f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
