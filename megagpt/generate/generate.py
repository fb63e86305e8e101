"""`generate`: open a model, write, close it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megagpt.generate.complete import Prompt, complete
from megagpt.generate.limits import Limits
from megagpt.generate.request import Completion, Sampling
from megagpt.generate.trained import Weights, open_trained

DEFAULT = Sampling()


def generate(
    load: str | Path,
    prompts: Sequence[Prompt],
    sampling: Sampling = DEFAULT,
    *,
    limits: Limits | None = None,
    weights: Weights = "last",
    pp: int = 1,
    dp: int = 1,
    precision: str = "fp32",
    adapter: str | Path | None = None,
) -> list[list[Completion]]:
    """Open a model, let it go on from each prompt, and close it: by prompt, its samples.

        generate("runs/a", ["def main():"], Sampling(n_tokens=40, temperature=0))[0][0].text

    load: a run, RUN@best, RUN@STEP, a checkpoint, or a folder of transformers.  limits: as in `complete`.  Prompt i is
    drawn with seed + i.  Other arguments are those of `open_trained`.
    Under torchrun or deepspeed each process calls this alike, and gets all texts.
    Raises UserError where the model or a prompt is none.
    """
    with open_trained(load, weights=weights, pp=pp, dp=dp, precision=precision, adapter=adapter) as trained:
        return complete(trained.stage, trained.tokenizer, prompts, sampling, limits=limits, bounds=trained.bounds)
