"""lm-evaluation-harness over the inference engine, in any layout: its tasks, our models.

    python -m megagpt.evaluate.harness run --model megagpt --model_args load=RUN --tasks lambada_openai
    torchrun --nproc-per-node 4 -m megagpt.evaluate.harness run --model megagpt --model_args load=RUN,pp=2 --tasks piqa

Or from Python, with a model that is open: `lm_eval.simple_evaluate(model=Harness(trained), tasks=[…])`. Each process
runs the harness, which asks all of them the same; replicas share the requests out.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import Progress

from megagpt.errors import UserError, home_expanded, run_cli
from megagpt.evaluate.score import Pair, score
from megagpt.generate.complete import answer
from megagpt.generate.request import Request, Sampling
from megagpt.generate.trained import DTYPES, Trained, open_trained

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise UserError(
        f"the harness needs lm_eval ({error})", "which the extra eval brings", "pip install 'megagpt[eval]'"
    ) from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

DEFAULT_WRITTEN = 256  # tokens, where a task does not say: as the harness's own models


@register_model("megagpt")
class Harness(TemplateLM):
    """A model of ours as the harness asks it: log-likelihoods of continuations and of whole texts, and texts.

    Comm: each method is collective over all ranks.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        if trained.tokenizer is None or trained.tokenizer.eod is None:
            raise UserError(
                f"{trained.folder} has no tokenizer with an end of text",
                "which the harness's texts need",
                "give a run or folder that has one",
            )
        self.trained, self.tokens = trained, trained.tokenizer
        self.ends = trained.bounds.ends or (trained.tokenizer.eod,)
        self.speaks = trained.mesh.rank == 0

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From --model_args: load, pp, dp, precision; the model is open until the process ends."""
        layout = {key: value for key, value in arg_dict.items() if key != "load"}
        strange = layout.keys() - {"pp", "dp", "precision"} or layout.get("precision", "fp32") not in DTYPES
        if "load" not in arg_dict or strange:
            raise UserError(
                f"got --model_args {','.join(f'{key}={value}' for key, value in arg_dict.items())}",
                f"wanted load=RUN and perhaps pp=N, dp=N, precision={'|'.join(DTYPES)}",
                "change --model_args",
            )
        stack = ExitStack()
        trained = stack.enter_context(open_trained(home_expanded(str(arg_dict["load"])), **layout))
        atexit.register(stack.close)
        return cls(trained)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """The same, from key=value,key=value."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string))

    @property
    def eot_token_id(self) -> int:
        assert self.tokens.eod is not None
        return self.tokens.eod

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the beginning of a text, where the model knows one, else the end of another."""
        return self.trained.bounds.begin[0] if self.trained.bounds.begin else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that a context holds."""
        return self.trained.config.model.seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.tokens.encode(string)
        return ids if add_special_tokens is False else list(self.trained.bounds.begun(ids))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        with self._progress(disable_tqdm) as bar:
            task = bar.add_task("scoring", total=None)
            found = score(self.trained.stage, pairs, lambda done, total: bar.update(task, completed=done, total=total))
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token once, in windows that see a token before the first, no more."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(("", *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string; a context that leaves no room for them loses its beginning."""
        asked = [self._request(*request.args) for request in requests]
        with self._progress(disable_tqdm) as bar:
            task = bar.add_task("writing", total=-(-len(asked) // self.trained.mesh.data.size))
            texts = answer(
                self.trained.stage,
                self.tokens,
                asked,
                show=lambda _, piece: bar.advance(task, int(piece.finish is not None)),
            )
        return [text.text for (text,) in texts]

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        asked = dict(normalize_gen_kwargs(settings, DEFAULT_WRITTEN))
        n_tokens, until = int(asked["max_gen_toks"]), [stop for stop in asked.get("until") or [] if stop]
        room = self.max_length - n_tokens
        if room < 1:
            raise UserError(
                f"a task wants to write {n_tokens} tokens",
                f"which a context of {self.max_length} does not hold",
                f"--gen_kwargs max_gen_toks={self.max_length // 2}",
            )
        sampling = Sampling(
            n_tokens=n_tokens,
            temperature=float(asked.get("temperature") or 0.0) if asked.get("do_sample") else 0.0,
            top_k=int(asked.get("top_k") or 0),
            top_p=float(asked.get("top_p") or 1.0),
            stop=tuple(until),
        )
        ids = self.tok_encode(context)[-room:] or [self.eot_token_id]
        return Request(tuple(ids), sampling, self.ends)

    def _progress(self, silent: bool) -> Progress:
        console = Console(stderr=True)
        return Progress(*Progress.get_default_columns(), console=console, disable=silent or not self.speaks)


def main() -> None:
    """The harness's own command line; the ranks beside the first one say nothing."""
    from lm_eval.__main__ import cli_evaluate  # its own start: seconds  # pyright: ignore[reportMissingImports]

    speaks = int(os.environ.get("RANK", "0")) == 0
    with open(os.devnull, "w") as nowhere, nullcontext() if speaks else redirect_stdout(nowhere):
        cli_evaluate()


if __name__ == "__main__":
    run_cli(main)
