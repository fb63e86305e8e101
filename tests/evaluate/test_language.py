"""Perplexities and bits per byte, beside transformers in float64 and lm-eval's own; what is counted, of what text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megagpt.config import DataConfig
from megagpt.data.indexed.dataset import IndexedWriter
from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.errors import UserError
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.language import dataset_task, strided, text_task, windows
from megagpt.evaluate.run import Result, run_task, shots_of
from megagpt.evaluate.task import Task
from megagpt.evaluate.tasks import ALL, lm1b, ptb, wikipedia_bytes, wikitext
from megagpt.generate.trained import load_trained, open_trained
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks

SEQ_LEN, END = 16, ByteTokenizer().eod
PAGES = (
    " \n = Robert Boulter = \n \n Robert Boulter is an English film , television and actor ( born 1 @.@ 5 ) . \n"
    ' = = Career = = \n \n He said : " a naïve café " . \n \n = Du Fu = \n \n Du Fu \'s poems ; 8 @-@ year \n \n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A GPT-2 of transformers' random weights, large enough to prefer something, which reads bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel  # two seconds, which no rank needs

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=SEQ_LEN, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=END
    )
    made = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("data")
    (made / "wikitext-2").mkdir()
    (made / "wikitext-2" / "wiki.test.raw").write_text(PAGES)
    (made / "a.txt").write_text(PAGES)
    return made


def found(folder: Path, task: Task, data: Path) -> Result:
    try:
        with open_trained(folder, tokenizer=DataConfig(tokenizer="bytes")) as trained:
            return run_task(task, Answers(trained), data)
    finally:
        if dist.is_initialized():  # what is refused leaves it
            dist.destroy_process_group()


@torch.no_grad()
def guide(folder: Path, ids: Sequence[int], stride: int) -> tuple[float, int]:
    """Loss of all tokens and their number, as in transformers' guide to perplexity: windows move on by `stride`, what
    an earlier one has scored is masked; what follows one token more than the context holds has a row of logits too.
    """
    from transformers import GPT2LMHeadModel  # likewise

    model, text = GPT2LMHeadModel.from_pretrained(folder).double(), torch.tensor([[END, *ids]])
    total, n_tokens, scored = 0.0, 0, 1  # the first token has nothing before it
    for begin in range(0, text.shape[1], stride):
        end = min(begin + SEQ_LEN + 1, text.shape[1])
        logprobs = model(text[:, begin : end - 1]).logits[0].log_softmax(-1)
        labels = text[0, begin + 1 : end]
        each = logprobs.gather(-1, labels[:, None])[scored - begin - 1 :]
        total, n_tokens, scored = total - float(each.sum()), n_tokens + len(each), end
        if end == text.shape[1]:
            return total, n_tokens
    raise AssertionError


@pytest.mark.parametrize("stride", [1, 5, SEQ_LEN])
def test_a_stream_has_the_loss_of_the_guide(folder: Path, tmp_path: Path, stride: int):
    text = PAGES.encode()[: SEQ_LEN + 5 * SEQ_LEN].decode()  # so many that the last window is a whole one
    (tmp_path / "a.txt").write_text(text)
    result = found(folder, text_task(tmp_path / "a.txt", stride=stride), tmp_path)
    (record,), (nats, n_tokens) = result.records, guide(folder, list(text.encode()), stride)
    assert record["n_tokens"] == len(record["logprobs"]) == n_tokens == len(text.encode())
    assert -record["logprob"] == pytest.approx(nats, rel=1e-6)
    assert result.figures == pytest.approx(
        {
            "ppl": math.exp(nats / n_tokens),
            "word_ppl": math.exp(nats / len(text.split())),
            "bits_per_byte": nats / math.log(2) / n_tokens,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 6, 7, 8, 13, 14, 15, 30])
def test_windows_score_each_token_once_after_what_precedes_it(n: int, stride: int | None):
    ids, some = list(range(1, n + 1)), list(windows(range(1, n + 1), 7, stride, before=0))
    assert [token for _, scored in some for token in scored] == ids
    for i, (context, scored) in enumerate(some):
        text = [*context, *scored]
        assert text == list(range(text[0], text[0] + len(text)))  # nothing is lost between
        assert len(text) == min(8, n + 1) and len(scored) <= (7 if i == 0 else stride or 7)


def test_wikitext_counts_before_and_after_its_detokeniser(folder: Path, data: Path):
    result = found(folder, ALL["wikitext2"], data)
    first, second = result.records
    assert first["text"].startswith(" = Robert Boulter =\n\nRobert Boulter is an English film, television and")
    assert "(born 1.5)" in first["text"] and '"a naïve café"' in first["text"]
    assert second["text"] == " = Du Fu =\n\nDu Fu's poems; 8-year\n\n"
    original = PAGES[PAGES.index(" = Du Fu") :]
    assert first["n_bytes"] + second["n_bytes"] == len(PAGES.encode()) - 3  # without the first line, and one line end
    assert (second["n_words"], second["n_bytes"]) == (len(original.split()) + 2, len(original.encode()))
    assert (second["n_words_after"], second["n_bytes_after"]) == (8 + 2, len(second["text"].encode()))
    nats = -(first["logprob"] + second["logprob"])
    for name, key in (("word_ppl", "n_words"), ("word_ppl_after", "n_words_after")):
        assert math.log(result.figures[name]) == pytest.approx(nats / (first[key] + second[key]))
    for name, key in (("bits_per_byte", "n_bytes"), ("bits_per_byte_after", "n_bytes_after")):
        assert result.figures[name] * math.log(2) == pytest.approx(nats / (first[key] + second[key]))
    (whole,) = wikitext.stream([data / "wikitext-2" / "wiki.test.raw"])
    assert whole.text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is")


def with_its_tokenizer(folder: Path, data: Path) -> tuple[dict[str, float], list[float]]:
    """On a rank: figures, and the log-probability of each article."""
    result = run_task(ALL["wikitext2"], Answers(load_trained(folder, build_mesh("cpu", pp=1, dp=1, tp=1))), data)
    return result.figures, [record["logprob"] for record in result.records]


def test_wikitext_is_that_of_lm_eval(data: Path, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm_eval is missing, which is heavy: pip install 'megagpt[eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    from tests.evaluate.test_harness import SEQ_LEN as N_PLACES
    from tests.evaluate.test_harness import build, write_tokenizer

    build("gpt2", write_tokenizer(tmp_path, begins=False)).save_pretrained(tmp_path)
    ((figures, logprobs),) = run_ranks(with_its_tokenizer, 1, tmp_path, data)
    pages = [passage.original for passage in wikitext.articles([data / "wikitext-2" / "wiki.test.raw"])]
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", max_length=N_PLACES, dtype="float32")
    asked = [
        Instance("loglikelihood_rolling", {}, (wikitext_detokenizer({"page": page}),), i)
        for i, page in enumerate(pages)
    ]
    sums = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert logprobs == pytest.approx(sums, abs=1e-3)
    counted = [process_results({"page": page}, [found]) for page, found in zip(pages, sums, strict=True)]

    def per(metric: str) -> float:
        return -sum(one[metric][0] for one in counted) / sum(one[metric][1] for one in counted)

    assert figures["word_ppl"] == pytest.approx(math.exp(per("word_perplexity")), rel=1e-4)
    assert 2 ** figures["bits_per_byte"] == pytest.approx(math.exp(per("byte_perplexity")), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(per("bits_per_byte") / math.log(2), rel=1e-4)


def on_a_rank(folder: Path, data: Path, tp: int, pp: int, dp: int) -> dict[str, float]:
    mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp)
    trained = load_trained(folder, mesh, tokenizer=DataConfig(tokenizer="bytes"))
    return run_task(strided(ALL["wikitext2"], 5), Answers(trained), data).figures


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 2, 1), (1, 1, 2)], ids=str)
def test_layouts_find_the_same(folder: Path, data: Path, tp: int, pp: int, dp: int):
    alone = found(folder, strided(ALL["wikitext2"], 5), data).figures
    for figures in run_ranks(on_a_rank, tp * pp * dp, folder, data, tp, pp, dp):
        assert figures == pytest.approx(alone, rel=1e-5)


def test_a_stride_stands_in_the_protocol_and_fits_the_context(folder: Path, data: Path):
    assert "do not overlap" in ALL["wikitext2"].protocol
    assert "each scoring its last 512 tokens" in strided(ALL["wikitext2"], 512).protocol
    assert strided(ALL["piqa"], 512) is ALL["piqa"]
    assert shots_of(ALL["wikitext2"], 5) == 0 and shots_of(ALL["piqa"], 5) == 5
    with pytest.raises(UserError, match="got --stride 17"):
        found(folder, text_task(data / "a.txt", stride=17), data)


def write_dataset(prefix: Path, texts: Sequence[str]) -> Path:
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document(np.array([*text.encode(), END]))
        writer.finish()
    return prefix


def test_a_dataset_is_a_stream_or_documents(folder: Path, tmp_path: Path):
    texts = ["one two", "naïve café, three", "four", "five"]
    prefix = write_dataset(tmp_path / "set", texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    whole = found(folder, dataset_task(prefix, stride=3), tmp_path)
    ids = [token for text in texts for token in (*text.encode(), END)]
    assert whole.records[0]["tokens"].tolist() == ids and whole.records[0]["n_bytes"] == n_bytes
    each = found(folder, dataset_task(prefix, documents=True), tmp_path)
    assert [len(record["logprobs"]) for record in each.records] == [len(text.encode()) + 1 for text in texts]
    assert [record["n_context"][0] for record in each.records] == [1] * 4
    shares = replace(DataConfig().split, shares=(0.5, 0.25, 0.25))
    part = found(folder, dataset_task(prefix, "test", shares=shares), tmp_path)
    assert part.records[0]["tokens"].tolist() == [*b"five", END]
    with pytest.raises(UserError, match="got the split tset"):
        dataset_task(prefix, "tset")


def test_lines_of_json_are_texts_of_their_own(folder: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": ""}\n{"text": "three"}\n')
    result = found(folder, text_task(tmp_path / "a.jsonl"), tmp_path)
    assert [(r["text"], r["n_words"], r["n_context"][0]) for r in result.records] == [
        ("one two", 2, 1),
        ("three", 1, 1),
    ]


def test_benchmarks_of_words_count_ends_and_the_text_of_the_file(folder: Path, tmp_path: Path):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" it was n't <unk> \n $ N million for N years \n")
    (record,) = found(folder, ALL["ptb"], tmp_path).records
    assert record["text"] == "it wasn't <unk>\n$1 million for 1 years\n" == ptb.detokenised(record["text"])
    assert (record["n_words"], record["n_words_after"], record["n_bytes"]) == (10 + 2, 8 + 2, 45)
    (tmp_path / "news").write_text('" I do n\'t , " he said ( 5 % ) .\n\nYes .\n')
    first, second = lm1b.read([tmp_path / "news"])
    assert (first.text, second.text) == ('"I don\'t," he said (5%).\n', "Yes.\n") and second.original == "Yes .\n"


def test_the_last_bytes_begin_with_a_whole_character(tmp_path: Path):
    path = tmp_path / "enwik8"
    path.write_bytes("abcdé12".encode())
    assert wikipedia_bytes.last_bytes(path, 8, 3) == "12" and wikipedia_bytes.last_bytes(path, 8, 4) == "é12"
    with pytest.raises(UserError, match="has 8 bytes wanted 100,000,000; get it anew"):
        wikipedia_bytes.last_bytes(path)
