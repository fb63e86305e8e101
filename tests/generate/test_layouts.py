"""The engine beside transformers' `generate`, for each architecture of theirs, in several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.generate import Completion, Sampling, complete
from megagpt.generate.trained import load_trained
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from tests.hf.hf_cases import CASES, theirs
from tests.tolerances import assert_close

PROMPTS = [[3, 14, 15, 92, 65], [35], [89, 79, 3, 23, 84, 62, 64, 33], [5, 0]]
N_TOKENS = 8
EVERYTHING = CASES["gpt2"].config.vocab  # log-probabilities of all tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Of each case, as transformers writes it."""
    base = tmp_path_factory.mktemp("hf")
    for name, case in CASES.items():
        theirs(case, noise=0.3).save_pretrained(base / name)
    return {name: base / name for name in CASES}


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, list[tuple[list[int], torch.Tensor]]]:
    """What transformers writes to each prompt, and the log-probabilities of all tokens at each place."""
    return {name: [_theirs(_load(folder), prompt) for prompt in PROMPTS] for name, folder in folders.items()}


def _load(folder: Path) -> Any:
    import transformers  # two seconds, which no rank needs

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _theirs(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    prompt_1T = torch.tensor([prompt])
    settings = {"max_new_tokens": N_TOKENS, "min_new_tokens": N_TOKENS, "do_sample": False}
    text_1T = model.generate(prompt_1T, **settings, output_logits=True, return_dict_in_generate=True)
    logits_TV = torch.cat([model(prompt_1T).logits[0, :-1], *text_1T.logits])
    return text_1T.sequences[0, len(prompt) :].tolist(), logits_TV.log_softmax(-1).detach()


def _write(folders: dict[str, Path], tp: int, pp: int, dp: int, n_rows: int) -> dict[str, list[list[Completion]]]:
    """On a rank: the texts of each model."""
    mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp)
    sampling = Sampling(n_tokens=N_TOKENS, temperature=0, logprobs=EVERYTHING, prompt_logprobs=True)
    return {
        name: complete(load_trained(folder, mesh), PROMPTS, sampling, n_rows=n_rows) for name, folder in folders.items()
    }


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "n_rows"),
    [(1, 1, 1, 4), (1, 1, 1, 1), (2, 1, 1, 3), (1, 2, 1, 4), (1, 2, 1, 2), (2, 2, 1, 3), (1, 1, 2, 2)],
    ids=lambda n: str(n),
)
def test_greedy_tokens_and_all_probabilities_are_those_of_transformers(folders, expected, tp, pp, dp, n_rows):
    fits = {name: f for name, f in folders.items() if CASES[name].config.n_heads % tp == 0}
    for found in run_ranks(_write, tp * pp * dp, fits, tp, pp, dp, n_rows):
        for name, texts in found.items():
            for i, ((text,), (tokens, logprobs_TV)) in enumerate(zip(texts, expected[name], strict=True)):
                what = f"{name}, prompt {i}"
                assert text.tokens == tokens and text.finish == "length", what
                assert text.prompt[0].logprob is None and [p.token for p in text.prompt] == PROMPTS[i], what
                places = text.prompt[1:] + text.logprobs
                ours_TV = torch.tensor([[p for _, p in sorted(place.likeliest)] for place in places])
                assert_close(ours_TV, logprobs_TV, what)
