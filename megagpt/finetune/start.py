"""From the command line of a fine-tuning to running ranks: what it begins with, its examples, and then as pretraining.

The recipe beneath all settings is GPT-1's (Radford et al. 2018, section 4.1).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megagpt.cli import parse_run_config
from megagpt.cli.yaml_file import Values
from megagpt.config import ModelConfig, RunConfig, plain
from megagpt.data.tokenizers.tokenizer import UNBOUND, Tokenizer, tokenizer_of_run
from megagpt.errors import UserError, announce, require
from megagpt.finetune.base import Base, find_base
from megagpt.finetune.completion import Completion, Render
from megagpt.finetune.example import Examples
from megagpt.finetune.glue import GLUE, Glue
from megagpt.finetune.packing import rows_of_epochs
from megagpt.finetune.scores import require_libraries
from megagpt.finetune.task import Reading, Task, text_of
from megagpt.inventory.layers import canonical
from megagpt.optim.depth import require_parts
from megagpt.train.pretrain import before_they_meet, on_ranks, ranks_to_start, run_program
from megagpt.train.step.deepspeed.settings import types_not_taken

DESCRIPTION = """Fine-tune a GPT: on completions, or as a classifier of GLUE's tasks, in any layout.
  python examples/finetune_gpt.py --task completion --base runs/a --train-file pairs.jsonl --valid-file held_out.jsonl
  deepspeed examples/finetune_gpt.py --task SST-2 --base hf/gpt2 --train-file SST-2/train.tsv --valid-file SST-2/dev.tsv

--base is a run or checkpoint of ours, or a folder of transformers; architecture and tokenizer are taken from it.
Files: JSON lines with "prompt" and "completion", or "messages"; for GLUE's tasks the .tsv files that it publishes.
A run has all that pretraining has: layouts, ZeRO, checkpoints, --auto-resume, reports. Of a task the best checkpoint
is kept (RUN@best), its predictions in RUN/predictions, its figures in RUN/result.json; tools/finetuned.py puts those
of several seeds together. docs/finetuning.md has a command for each format.

Every setting has a flag --section.name, the frequent ones a short one too. The same names make a YAML file. Later ones
win: GPT-1's recipe for fine-tuning, the base's architecture, --preset, each --config, flags.
  --preset NAME    the architecture of a published model, where there is no base: {presets}
  --config FILE    read a YAML file; may be given several times"""

RECIPE: Values = {
    "model": {"dropout_embedding": 0.1, "dropout_attention": 0.1, "dropout_residual": 0.1},
    "optim": {
        "lr": 6.25e-5, "schedule": "linear", "min_lr_fraction": 0.0, "warmup_steps": 10, "weight_decay": 0.01,
        "beta2": 0.999,
    },
    "train": {"global_batch_size": 32, "micro_batch_size": 8},
    "finetune": {"epochs": 3},
    "checkpoint": {"save_interval": 100, "keep_last": 1, "keep_best": True},
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """The examples of one file."""

    examples: Examples

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each.  Shapes: int64[examples]."""
        return np.array([example.n_tokens for example in self.examples.found], np.int64)


@dataclass(frozen=True)
class Work:
    """All that a fine-tuning has beside its settings."""

    task: Task
    base: Base | None
    tokenizer: Tokenizer
    train: Found
    valid: Found | None
    test: Found | None


def finetune(argv: Sequence[str]) -> None:
    """The program behind examples/finetune_gpt.py: exits with 0, or with a code of errors.py and one message."""
    run_program(lambda: _finetune(argv))


def _finetune(argv: Sequence[str]) -> None:
    config, base = parse_finetune_config(argv)
    n_ranks = ranks_to_start(config)
    for note in [] if n_ranks else types_not_taken(config):  # the ranks say it
        announce(note)
    config, work = before_they_meet(config, lambda: find_work(config, base))
    on_ranks(n_ranks, "megagpt.finetune.source", lambda source: source.train_on_examples(config, work))


def parse_finetune_config(argv: Sequence[str]) -> tuple[RunConfig, Base | None]:
    """The settings, over the recipe and the base's architecture; and the base.

    Raises UserError where something is missing that a fine-tuning needs, or contradicts the base.
    """
    found: list[Base] = []

    def beneath(sources: Sequence[tuple[str, Values]]) -> list[tuple[str, Values]]:
        def last(key: str) -> str | None:
            return next((v["finetune"][key] for _, v in reversed(sources) if key in v.get("finetune", {})), None)

        recipe = RECIPE
        if any("train_steps" in values.get("train", {}) for _, values in sources):
            recipe = {**RECIPE, "finetune": {}}
        path = last("base")
        if path is None:
            return [("", recipe)]
        found.append(find_base(path))
        model = plain(found[0].model) | RECIPE["model"]
        return [("", {**recipe, "model": model})]

    config = parse_run_config(argv, description=DESCRIPTION, beneath=beneath)
    for key in ("task", "train_file"):
        flag = "--" + key.replace("_", "-")
        require(getattr(config.finetune, key) is not None, flag, "is missing", "see --help", f"finetune.{key}")
    base = found[0] if found else None
    if base is not None:
        _require_same_model(config, base.model)
    is_dynamic = config.model.position == "rotary" and config.model.rotary_scaling == "dynamic"
    got, wanted = "model.rotary_scaling=dynamic", "turns by the length of a row, and a row holds texts of several"
    require(not is_dynamic, got, wanted, "begin with a model of another scaling", "model.rotary_scaling")
    require(
        config.lora.rank is None,
        f"lora.rank={config.lora.rank}",
        "is for pretraining's text so far, and a fine-tuning trains whole weights",
        "leave it out",
        "lora.rank",
    )
    require(
        config.train.seq_len_start is None,
        "train.seq_len_start",
        "cuts samples, and rows of examples are whole",
        "leave it out",
        "train.seq_len_start",
    )
    return config, base


def _require_same_model(config: RunConfig, base: ModelConfig) -> None:
    ours, theirs = plain(config.model), plain(base)
    for name in ours:
        if ours[name] != theirs[name] and "dropout" not in name and name != "n_classes":
            got = f"finetune.base={config.finetune.base} has model.{name}={theirs[name]}"
            raise UserError(f"{got}, and {ours[name]} is asked for; leave that out", keys=[f"model.{name}"])


def find_work(config: RunConfig, base: Base | None) -> tuple[RunConfig, Work]:
    """The settings with what follows from tokenizer, task and examples filled in; and those.

    Raises UserError where a file cannot be read, or holds what the task has no place for.
    """
    tokenizer, bounds = base.tokenizer(config.data) if base else (tokenizer_of_run(config.data), UNBOUND)
    if tokenizer is None:
        raise UserError("no tokenizer is known", remedy="name it: --tokenizer KIND with its files")
    task = _task(config, tokenizer)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    model = dataclasses.replace(config.model, vocab_size=vocab, n_classes=task.n_classes)
    reading = Reading(tokenizer, bounds, vocab, model.seq_len)
    files = config.finetune
    train = Found(task.read(Path(str(files.train_file)), reading))
    valid = Found(task.read(Path(files.valid_file), reading)) if files.valid_file else None
    test = Found(task.read(Path(files.test_file), reading, answered=False)) if files.test_file else None
    config = dataclasses.replace(config, model=model)
    require_parts(list(canonical(model)), files.frozen)
    return _with_steps(config, train), Work(task, base, tokenizer, train, valid, test)


def _with_steps(config: RunConfig, train: Found) -> RunConfig:
    """train_steps from the epochs; without a file to judge by no checkpoint is the best."""
    checkpoint = config.checkpoint
    if config.finetune.valid_file is None:
        checkpoint = dataclasses.replace(checkpoint, keep_best=False)
    if config.finetune.epochs is None:
        return dataclasses.replace(config, checkpoint=checkpoint)
    n_rows = rows_of_epochs(
        train.lengths, config.model.seq_len, config.train.seed, config.finetune.pack, config.finetune.epochs
    )
    steps = -(-n_rows // config.train.global_batch_size)
    return dataclasses.replace(
        config, checkpoint=checkpoint, train=dataclasses.replace(config.train, train_steps=steps)
    )


def _task(config: RunConfig, tokenizer: Tokenizer) -> Task:
    name = config.finetune.task
    if name in GLUE:
        require_libraries()
        return Glue(name)
    return Completion(lambda: _chat_template(config, tokenizer))


def _chat_template(config: RunConfig, tokenizer: Tokenizer) -> Render:
    """The template that is named, else the one beside the tokenizer.  Raises UserError where there is neither."""
    if importlib.util.find_spec("jinja2") is None:
        raise UserError("chat templates need jinja2; run: pip install 'megagpt[finetune]'")
    from megagpt.serve.api_error import ApiError  # of serving, which needs the extra: pairs do without it
    from megagpt.serve.chat import ChatTemplate, template_beside  # likewise

    path = config.finetune.chat_template
    found = template_beside(tokenizer.files)
    if path is not None:
        found = ChatTemplate(text_of(Path(path), "--finetune.chat-template")[0], found.specials if found else {})
    if found is None:
        remedy = "give one: --finetune.chat-template FILE"
        raise UserError("the examples are messages, and the tokenizer brings no chat template", remedy=remedy)
    template = found

    def render(messages: Sequence, answer_follows: bool) -> str:
        try:
            return template.render(messages, answer_follows)
        except ApiError as error:
            raise UserError(str(error)) from None

    return render
