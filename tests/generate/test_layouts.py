"""The engine in several layouts: for transformers' architectures beside their `generate`, for others beside itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.generate import Completion, Sampling, complete
from megagpt.generate.limits import Limits
from megagpt.generate.stage import Stage, build_stage
from megagpt.generate.trained import load_trained
from megagpt.model.position import POSITIONS
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from tests.hf.hf_cases import CASES, theirs
from tests.tolerances import assert_close

PROMPTS = [[3, 14, 15, 92, 65], [35], [89, 79, 3, 23, 84, 62, 64, 33], [5, 0]]
N_TOKENS = 8
KIND = ModelConfig(n_layers=2, d_model=24, n_heads=4, d_ff=40, seq_len=20, vocab_size=211, init="normal", init_std=0.3)
TEXT_BT = torch.arange(42).view(2, 21)
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


def _texts(stage: Stage, sampling: Sampling, limits: Limits) -> list[list[Completion]]:
    return complete(stage, None, PROMPTS, sampling, limits=limits)


def _write(folders: dict[str, Path], tp: int, pp: int, dp: int, n_rows: int) -> dict[str, list[list[Completion]]]:
    """On a rank: the texts of each model."""
    mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp)
    sampling = Sampling(n_tokens=N_TOKENS, temperature=0, logprobs=EVERYTHING, prompt_logprobs=True)
    limits = Limits(n_rows, 16)
    return {name: _texts(load_trained(f, mesh).stage, sampling, limits) for name, f in folders.items()}


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "n_rows"),
    [(1, 1, 1, 2), (2, 1, 1, 3), (1, 2, 1, 4), (2, 2, 1, 3), (1, 1, 2, 2)],
    ids=lambda n: str(n),
)
def test_greedy_tokens_and_all_probabilities_are_those_of_transformers(folders, expected, tp, pp, dp, n_rows):
    fits = {name: f for name, f in folders.items() if CASES[name].config.n_heads % tp == 0}
    for found in run_ranks(_write, tp * pp * dp, fits, tp, pp, dp, n_rows):
        for name, texts in found.items():
            for i, ((text,), (tokens, logprobs_TV)) in enumerate(zip(texts, expected[name], strict=True)):
                what = f"{name}, prompt {i}"
                assert text.tokens == tokens and text.finish == "length", what
                first, *others = text.prompt_logprobs
                assert first.logprob is None and [p.token for p in text.prompt_logprobs] == PROMPTS[i], what
                places = others + text.logprobs
                ours_TV = torch.tensor([[p for _, p in sorted(place.likeliest)] for place in places])
                assert_close(ours_TV, logprobs_TV, what)


KINDS = {
    **{position: replace(KIND, position=position) for position in POSITIONS},
    "Monarch, BigBird": replace(KIND, mlp="monarch", mlp_blocks=4, attention=("bigbird:3:2:1:1",)),
    "butterfly, strided, T5": replace(KIND, mlp="butterfly", attention=("strided:3",), position="t5"),
    "windows, one key head": replace(KIND, attention=("window:4", "dense"), n_kv_heads=1, position="rotary"),
    "PaLM": replace(KIND, block="parallel", bias_attention=False, bias_mlp=False, position="rotary", n_kv_heads=1),
}


def _write_kinds(tp: int, pp: int) -> dict[str, tuple[float, list[Completion]]]:
    """On a rank: the loss of a text, and what models at their first weights write, which no layout changes."""
    mesh, found = build_mesh("cpu", pp=pp, dp=1, tp=tp), {}
    sampling = Sampling(n_tokens=N_TOKENS, temperature=1.0, top_p=0.9, logprobs=5, prompt_logprobs=True)
    for name, config in KINDS.items():
        stage = build_stage(config, mesh)
        texts = _texts(stage, sampling, Limits(3, 20))
        with torch.no_grad():
            loss = stage.loss(TEXT_BT[:, :-1], TEXT_BT[:, 1:])
        found[name] = loss, [text for (text,) in texts]
    return found


def test_other_kinds_draw_the_same_text_in_every_layout():
    (expected,) = run_ranks(_write_kinds, 1, 1, 1)
    for tp, pp in ((2, 1), (1, 2), (2, 2)):
        for found in run_ranks(_write_kinds, tp * pp, tp, pp):
            for name, (loss, texts) in found.items():
                what = f"{name}, tp {tp}, pp {pp}"
                assert loss == pytest.approx(expected[name][0], rel=1e-5), what
                for ours, theirs_ in zip(texts, expected[name][1], strict=True):
                    assert ours.tokens == theirs_.tokens, what
                    assert_close(_logprobs(ours), _logprobs(theirs_), what)


def _logprobs(text: Completion) -> torch.Tensor:
    return torch.tensor([entry.logprob for entry in (text.prompt_logprobs + text.logprobs)[1:]])
