"""What a run says of its data and its schedule before the first step, so that nothing goes wrong without a word."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from megagpt.checkpoint.state import State
from megagpt.cli import read_config
from megagpt.config import LogConfig, RunConfig
from megagpt.config.values import DataPath
from megagpt.data.indexed.blend import Samples, build_splits, parts_of, sources
from megagpt.data.indexed.coverage import times_read
from megagpt.data.indexed.index_builder import Epochs, plan_epochs
from megagpt.data.indexed.meta import losses
from megagpt.data.indexed.samples import GPTSamples
from megagpt.data.tokenizers.same import same_ids
from megagpt.data.tokenizers.tokenizer import Tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.schedule import Schedule

if TYPE_CHECKING:
    from megagpt.train.run import Run

_WORTH_A_WORD = 1.1  # times, of a learning rate
_LEAST_SHARE = 0.005  # of the tokens


def remarks(run: Run, schedule: Schedule, resumed: State | None) -> Iterator[str]:
    """Lines for the log. resumed: what the run goes on from."""
    yield from _of_the_data(run)
    yield from schedule.remarks()
    if resumed is None:
        return
    before = read_config(resumed.config, f"{run.resume_from}")
    yield from _of_another_tokenizer(run, resumed, before)
    yield from _of_other_data(run, resumed, before)
    if resumed.step and not run.config.debug.overfit_one_batch:
        yield from _of_another_rate(run.config, schedule, before, resumed.step)
        yield from _of_another_order(run, schedule, before, resumed.step)


def _of_the_data(run: Run) -> Iterator[str]:
    for dataset in sources(_samples(run)):
        yield from (f"{dataset.prefix}: {found}" for found in losses(dataset.meta))
    yield from _of_short_datasets(run)
    log, split = run.config.log, run.config.data.split
    if run.valid_samples is not None or not log.eval_steps:
        return
    if split.shares[1] > 0:
        n_documents = sum(map(len, sources(_samples(run))))
        yield (
            f"no validation: split {split} of {n_documents} documents leaves it none, and documents "
            "are not cut; preprocess the text in more documents, or give --split"
        )
    elif log.eval_interval != LogConfig().eval_interval:
        yield (
            f"no validation: split {split} has no share for it, so that --eval-interval {log.eval_interval} does "
            "nothing; give --split a second share"
        )


def _samples(run: Run) -> Samples:
    assert isinstance(run.train_samples, Samples)  # of text, as all that is said here
    return run.train_samples


def _of_short_datasets(run: Run) -> Iterator[str]:
    """Of a blend: what is read over and over, or not at all."""
    for split, samples in (("training", _samples(run)), ("validation", run.valid_samples)):
        if not isinstance(samples, Samples):
            continue
        for part in parts_of(samples):
            if part.n_tokens <= part.seq_len:
                yield (
                    f"{part.dataset.prefix}: its {split} share has {part.n_tokens} tokens, less than a sample "
                    f"({part.seq_len + 1}): it is read {part.epochs.n_epochs} times over"
                )
        read = {str(dataset.prefix) for dataset in sources(samples)}
        for prefix in run.config.data.data_path.prefixes:
            if prefix not in read:
                yield f"{prefix}: its {split} share is shorter than a sample, and is left out"


def _of_another_tokenizer(run: Run, resumed: State, before: RunConfig) -> Iterator[str]:
    known: Tokenizer | None = None
    with suppress(UserError):  # its files are gone, or the data that names them
        known = tokenizer_of_run(before.data)
    known_hash = resumed.data.get("tokenizer_sha256") or (known.sha256 if known else None)
    if run.tokenizer is None or known_hash in (None, run.tokenizer.sha256):
        return
    if known is not None and known.sha256 == known_hash and same_ids(known, run.tokenizer):
        return
    name = f"{known.kind}, {known.vocab_size:,} tokens" if known else f"SHA-256 {known_hash[:16]}…"
    yield (
        f"another tokenizer: the weights know the ids of one ({name}), the data has those of another "
        f"({run.tokenizer.kind}, {run.tokenizer.vocab_size:,} tokens), where they mean other text; preprocess the text "
        f"with the tokenizer of the weights{_named(known)}"
    )


def _named(tokenizer: Tokenizer | None) -> str:
    return f" ({', '.join(map(str, tokenizer.files))})" if tokenizer and tokenizer.files else ""


def _of_other_data(run: Run, resumed: State, before: RunConfig) -> Iterator[str]:
    was, now = resumed.data, run.data_identity
    if "index_sha256" not in was or "index_sha256" not in now:
        return  # imported weights, which were trained elsewhere
    paths = [DataPath.parse(data.get("data_path", [])) for data in (was, now)]
    splits = [data.get("split") for data in (was, now)]
    if was["index_sha256"] != now["index_sha256"]:
        yield f"other data: --data-path was {paths[0]} and is {paths[1]}"
    elif paths[0].weights != paths[1].weights:
        yield f"another blend: --data-path was {paths[0]} and is {paths[1]}; samples come in another order"
    if splits[0] != splits[1]:
        yield (
            f"another split: --split was {splits[0]} and is {splits[1]}; text that was held out may be trained on now, "
            "and samples come in another order"
        )


def _of_another_rate(config: RunConfig, schedule: Schedule, before: RunConfig, step: int) -> Iterator[str]:
    was, now = Schedule(before).learning_rate(step), schedule.learning_rate(step)
    if before.optim != config.optim or max(was, now) <= _WORTH_A_WORD * min(was, now):
        return
    times = f", {now / was:.2g} times as much" if was else ""
    steps = before.train.train_steps
    yield (
        f"another learning rate: {now:.3g} at step {step + 1}, which was going to have {was:.3g}{times}; with "
        f"--train-steps {config.train.train_steps} in place of {steps} the decay is stretched: "
        f"--optim.decay-steps {steps} keeps it"
    )


def _of_another_order(run: Run, schedule: Schedule, before: RunConfig, step: int) -> Iterator[str]:
    """Samples are shuffled over all epochs that a run will have, as Megatron does: another number, another order."""
    n_before = Schedule(before).samples_before(before.train.train_steps)
    if n_before == schedule.samples_before(schedule.train_steps) or before.data.split != run.config.data.split:
        return
    was = _order(run, n_before)
    if _orders(was) == _orders(_samples(run)):
        return
    done, end = schedule.samples_before(step), schedule.samples_before(schedule.train_steps)
    both = times_read([(was, range(done)), (_samples(run), range(done, end))])
    in_one_go = times_read([(_samples(run), range(end))])
    remedy = "begin a run with the --train-steps that it will have in the end"
    if (last := _last_step_of_order(was, schedule)) > step:
        remedy = f"--train-steps {last} is the last that keeps the order; or {remedy}"
    n_epochs, _ = max(_orders(_samples(run)))
    steps = f"{schedule.train_steps} in place of {before.train.train_steps}"
    yield (
        f"another order of the samples: with --train-steps {steps} all {n_epochs} epochs are shuffled anew. Of the "
        f"tokens {_shares(both)} are read, where in one go it would be {_shares(in_one_go)} (estimated); {remedy}"
    )


def _order(run: Run, n_samples: int) -> Samples:
    """The training samples as they are in a run of so many."""
    config, datasets = run.config, sources(_samples(run))
    counts = (n_samples, 0, 0)
    samples, _, _ = build_splits(
        datasets, config.data.data_path.weights, config.data.split, config.model.seq_len, config.train.seed, counts
    )
    assert samples is not None  # as little as one is enough for that
    return samples


def _orders(samples: Samples) -> list[tuple[int, int]]:
    """What the order of each dataset follows from."""
    return [_shuffled(part.epochs) for part in parts_of(samples)]


def _shuffled(epochs: Epochs) -> tuple[int, int]:
    """Epochs, and how many of them are shuffled together; both grow with the number of samples."""
    return epochs.n_epochs, epochs.n_epochs_together


def _last_step_of_order(samples: Samples, schedule: Schedule) -> int:
    """The largest number of steps for which the order is that of these samples; 0 for a blend, which has several."""
    if not isinstance(samples, GPTSamples):
        return 0

    def is_other(n_steps: int) -> bool:
        n_samples = schedule.samples_before(n_steps)
        return _shuffled(plan_epochs(samples.n_tokens, n_samples, samples.seq_len)) > _shuffled(samples.epochs)

    return bisect_left(range(schedule.train_steps), True, key=is_other) - 1


def _shares(times: np.ndarray) -> str:
    words = ["never", "once", "twice"]
    found = [(words[n] if n < len(words) else f"{n} times", share) for n, share in enumerate(times.tolist())]
    return ", ".join(f"{share:.0%} {word}" for word, share in found if share >= _LEAST_SHARE)
