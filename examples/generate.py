#!/usr/bin/env python3
"""Let a trained model write: a run of ours, or a folder of transformers.

    python examples/generate.py --load runs/a --prompt "def main():"
    python examples/generate.py --load runs/a --prompts prompts.txt --json
    python examples/generate.py --load runs/a --interactive
    torchrun --nproc-per-node 4 examples/generate.py --load runs/a --pp 2

Several processes share a large model: by --pp stages, --dp replicas that share out the prompts, and tensor
parallelism for the rest. docs/generation.md says how tokens are drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megagpt.errors import ArgumentParser, UserError, home_expanded, run_cli
from megagpt.files import os_reason
from megagpt.generate import Completion, Sampling, complete
from megagpt.generate.complete import Prompt, request_of
from megagpt.generate.flags import add_load_flags, open_from
from megagpt.generate.limits import ROWS, described, limits_for
from megagpt.generate.trained import Trained


def main() -> None:
    """Print the prompts and their continuations."""
    a = parser().parse_args()
    sampling, prompts = sampling_of(a), prompts_of(a)
    with open_from(a) as trained:
        say(trained, f"model: {trained.folder}, {trained.step} steps")
        if not a.interactive:
            return write(trained, prompts, sampling, a)
        if trained.mesh.world_size > 1:
            raise UserError("got --interactive", "wanted one process", "use examples/serve.py with several")
        for prompt in typed():
            try:
                write(trained, [prompt], sampling, a)
            except UserError as error:  # of this prompt: the next one may do
                say(trained, f"error: {error}")


def parser() -> ArgumentParser:
    """The flags."""
    default, flags = Sampling(), ArgumentParser(description=__doc__)
    add = flags.add_argument
    add_load_flags(flags)
    what = flags.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="def ", help='text to go on from (default: "def ")')
    what.add_argument("--prompt-ids", type=int, nargs="+", metavar="ID", help="the same as token ids")
    what.add_argument(
        "--prompts", type=home_expanded, metavar="FILE", help='a line each: text or JSON (ids, {"prompt"})'
    )
    what.add_argument("--interactive", action="store_true", help="ask for prompts, a line each, until the input ends")
    add("--json", action="store_true", help="print JSON lines: prompt, sample, text, tokens, finish, logprobs")
    add("--batch", type=int, default=ROWS, help=f"texts that are written at once (default: {ROWS})")
    add("--n-tokens", type=int, default=default.n_tokens, help=f"to write at most (default: {default.n_tokens})")
    add("--n-samples", type=int, default=1, help="texts a prompt (default: 1)")
    add("--temperature", type=float, default=default.temperature, help="0 takes the likeliest each time (default: 0.8)")
    add("--top-k", type=int, default=default.top_k, help="among the k likeliest; 0: among all (default: 50)")
    add("--top-p", type=float, default=1.0, help="among the likeliest with this probability together (default: 1)")
    add("--min-p", type=float, default=0.0, help="among those with this share of the likeliest's (default: 0)")
    add("--repetition-penalty", type=float, default=1.0, help="divides the logits of what was there (default: 1)")
    add("--presence-penalty", type=float, default=0.0, help="taken off what was written (default: 0)")
    add("--frequency-penalty", type=float, default=0.0, help="the same, for each time (default: 0)")
    add("--logit-bias", nargs="+", default=[], metavar="ID=X", help="add X to the logit of a token")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end a text before any of these")
    add("--slide", action="store_true", help="where the context is full, go on with its last half")
    add("--logprobs", type=int, metavar="K", help="with --json: log-probabilities, and those of the K likeliest tokens")
    add("--prompt-logprobs", action="store_true", help="those of the prompt too")
    add("--seed", type=int, default=0, help="of the draws; prompt i has seed + i (default: 0)")
    return flags


def sampling_of(a: argparse.Namespace) -> Sampling:
    """What the flags ask for."""
    if (a.logprobs is not None or a.prompt_logprobs) and not a.json:
        raise UserError("got --logprobs or --prompt-logprobs", "which only --json prints", "add --json")
    same = ("n_tokens", "n_samples", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "slide")
    same += ("presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs")
    bias = dict(_bias(text) for text in a.logit_bias)
    return Sampling(**{name: getattr(a, name) for name in same}, stop=tuple(a.stop), logit_bias=bias)


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise UserError(f"--logit-bias got {text!r}", "wanted ID=X", "try 50256=-100") from None


def prompts_of(a: argparse.Namespace) -> list[Prompt]:
    """What is to be gone on from."""
    if a.prompt_ids:
        return [a.prompt_ids]
    if a.prompts is None:
        return [a.prompt]
    try:
        lines = Path(a.prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = os_reason(error) if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--prompts {a.prompts}: cannot be read as text ({why}); give another file") from None
    found = [_prompt(line) for line in lines if line.strip()]
    if not found:
        raise UserError(f"--prompts {a.prompts}", "holds no prompt", "write one a line")
    return found


def _prompt(line: str) -> Prompt:
    """A line as it stands, unless it is JSON: a text, a list of ids, or an object with one of them under "prompt"."""
    try:
        value = json.loads(line)
    except ValueError:
        return line
    if isinstance(value, dict):
        value = value.get("prompt")
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    return value if isinstance(value, str) else line


def typed() -> Iterator[str]:
    """The lines of standard input."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.removesuffix("\n")


def write(trained: Trained, prompts: Sequence[Prompt], sampling: Sampling, a: argparse.Namespace) -> None:
    """One text as it comes; several, or JSON, once they are whole."""
    if a.prompts or a.n_samples > 1 or a.json:
        write_many(trained, prompts, sampling, a.batch, a.json)
    else:
        write_one(trained, prompts[0], sampling)


def write_one(trained: Trained, prompt: Prompt, sampling: Sampling) -> None:
    """Print a text as it comes."""
    speaks, as_text = trained.mesh.rank == 0, trained.tokenizer is not None
    request = request_of(prompt, sampling, trained.tokenizer, trained.bounds)
    request.check(trained.config.model.vocab, trained.config.model.seq_len)
    limits = limits_for(trained.stage, [request])
    say(trained, described(trained.stage, limits))

    def show(text: str) -> None:
        if speaks:
            print(text, end="", flush=True)

    show(prompt if isinstance(prompt, str) else " ".join(map(str, prompt)))
    ((text,),) = complete(
        trained.stage,
        trained.tokenizer,
        [prompt],
        sampling,
        limits=limits,
        show=lambda _, piece: show(piece.text if as_text else "".join(f" {token}" for token in piece.tokens)),
        bounds=trained.bounds,
    )
    show("\n")
    if text.finish == "context":
        say(trained, f"note: the context of {trained.config.model.seq_len:,} tokens is full; --slide goes on")


def write_many(trained: Trained, prompts: Sequence[Prompt], sampling: Sampling, batch: int, as_json: bool) -> None:
    """Print all texts, in the order of their prompts."""
    requests = [request_of(prompt, sampling, trained.tokenizer, trained.bounds) for prompt in prompts]
    limits = limits_for(trained.stage, requests, batch)
    say(trained, described(trained.stage, limits))
    with Progress(
        *Progress.get_default_columns(), console=Console(stderr=True), disable=trained.mesh.rank > 0, transient=True
    ) as bar:
        n_mine = len(range(trained.mesh.data.rank, len(prompts), trained.mesh.data.size))
        task = bar.add_task("tokens", total=n_mine * sampling.n_samples * sampling.n_tokens)
        texts = complete(
            trained.stage,
            trained.tokenizer,
            prompts,
            sampling,
            limits=limits,
            show=lambda _, piece: bar.advance(task, len(piece.tokens)),
            bounds=trained.bounds,
        )
    if trained.mesh.rank == 0:
        for prompt, samples in zip(prompts, texts, strict=True):
            for i, text in enumerate(samples):
                print(
                    json_line(prompt, i, text) if as_json else shown(prompt, text, trained.tokenizer is not None) + "\n"
                )


def json_line(prompt: Prompt, sample: int, text: Completion) -> str:
    """All that is known of a text; log-probabilities where they were asked for."""
    whole = {"prompt": prompt, "sample": sample, **asdict(text)}
    kept = {key: value for key, value in whole.items() if value or not key.endswith("logprobs")}
    return json.dumps(kept, ensure_ascii=False)


def shown(prompt: Prompt, text: Completion, as_text: bool) -> str:
    """A prompt and what follows it: text, or ids."""
    begin = prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) + " "
    return begin + (text.text if as_text else " ".join(map(str, text.tokens)))


def say(trained: Trained, line: str) -> None:
    """Beside the text: on standard error, once."""
    if trained.mesh.rank == 0:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(main)
