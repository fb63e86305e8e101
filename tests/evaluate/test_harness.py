"""The harness's methods beside its own `hf` backend, on the same weights and requests, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.generate.trained import load_trained
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks

pytest.importorskip("lm_eval", reason="lm_eval is missing, which is heavy: pip install 'megagpt[eval]'")
pytestmark = pytest.mark.timeout(300)

SEQ_LEN = 32
TEXT = "The cat sat on the mat, and the dog lay by the door. One two three four; naïve café, 1 + 1 = 2.\n"
LONG = TEXT * 4
PAIRS = [
    ("The cat", " sat on the mat"),
    ("The cat ", "sat"),
    ("", "One two"),
    ("1 + 1 =", " 2."),
    ("1 + 1 =", " 3."),
    ("1 + 1 =", " 2."),  # twice
    (LONG, " and the dog"),  # its beginning is cut off
    (TEXT[:40], TEXT[40:60]),
    ("naïve", " café"),
]
TEXTS = ["", TEXT, LONG, "One"]
WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("The cat", {"until": ["e"], "max_gen_toks": 8}),
    ("One two three", {"until": [], "max_gen_toks": 5}),
    (LONG, {"until": ["\n"], "max_gen_toks": 7}),
]
Answers = tuple[list[tuple[float, bool]], list[float], list[str]]


def write_tokenizer(folder: Path, begins: bool) -> int:
    """A byte-level BPE of a few merges, which may begin texts with a token; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast  # two seconds, which no rank needs

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end, begin = "<|endoftext|>", "<s>"
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end, begin], initial_alphabet=alphabet)  # type: ignore[call-arg]
    tokenizer.train_from_iterator([LONG], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 1)])  # type: ignore[assignment]
    settings = {"eos_token": end, "bos_token": begin if begins else end, "unk_token": end}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def build(name: str, n_vocab: int) -> Any:
    """A small model of random weights that are large enough to prefer something."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    common = {"vocab_size": n_vocab, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    of_hf = {**common, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**common, n_positions=SEQ_LEN, n_embd=32, n_layer=2, n_head=4))
    if name == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**of_hf, max_position_embeddings=SEQ_LEN))
    return LlamaForCausalLM(LlamaConfig(**of_hf, max_position_embeddings=SEQ_LEN, num_key_value_heads=2))


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama"])
def folder(request, tmp_path_factory) -> Path:
    """A model and its tokenizer, as transformers writes them."""
    made = tmp_path_factory.mktemp(request.param)
    build(request.param, write_tokenizer(made, begins=request.param == "llama")).save_pretrained(made)
    return made


def asked(model: Any) -> Answers:
    """What a model of the harness, ours or its own, answers."""
    from lm_eval.api.instance import Instance  # heavy, and not always there

    def instances(kind: Any, arguments: list) -> list[Instance]:
        return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]

    return (
        model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True),
        model.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS]), disable_tqdm=True),
        model.generate_until(instances("generate_until", WRITTEN), disable_tqdm=True),
    )


@pytest.fixture(scope="module")
def expected(folder: Path) -> Answers:
    from lm_eval.models.huggingface import HFLM  # likewise

    return asked(HFLM(pretrained=str(folder), batch_size=2, device="cpu", max_length=SEQ_LEN, dtype="float32"))


def ask_ours(folder: Path, tp: int, pp: int, dp: int, fault: str) -> Answers:
    """On a rank."""
    from megagpt.evaluate import harness  # without lm_eval there is none

    if fault:
        FAULTS[fault](harness.Harness)
    return asked(harness.Harness(load_trained(folder, build_mesh("cpu", pp=pp, dp=dp, tp=tp))))


def assert_same(found: Answers, expected: Answers) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4) and ours[1] == theirs[1]
    assert found[1] == pytest.approx(expected[1], abs=1e-3)  # sums over a hundred tokens
    assert found[2] == expected[2]


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_answers_are_those_of_the_hf_backend(folder, expected, tp, pp, dp):
    for found in run_ranks(ask_ours, tp * pp * dp, folder, tp, pp, dp, ""):
        assert_same(found, expected)


def off_by_one(kind: Any) -> None:
    """Each token is predicted from those before the last one."""
    score = kind._loglikelihood_tokens
    kind._loglikelihood_tokens = lambda self, requests, *a, **k: score(
        self, [(text, context[:-1] or context, tokens) for text, context, tokens in requests], *a, **k
    )


def beginning_of_text_lost(kind: Any) -> None:
    kind.prefix_token_id = 5


def cut_at_the_end(kind: Any) -> None:
    encode = kind.tok_encode
    kind.tok_encode = lambda self, text, *a, **k: encode(self, text, *a, **k)[:SEQ_LEN]


FAULTS: dict[str, Callable[[Any], None]] = {f.__name__: f for f in (off_by_one, beginning_of_text_lost, cut_at_the_end)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(folder, expected, fault):
    with pytest.raises((AssertionError, RuntimeError)):  # RuntimeError: a rank of ours refused what the fault asked for
        (found,) = run_ranks(ask_ours, 1, folder, 1, 1, 1, fault)
        assert_same(found, expected)
