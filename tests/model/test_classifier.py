"""The classifier on a text's last token: its loss by hand, both orders of a pair, a number in place of classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megagpt.config import ModelConfig
from megagpt.finetune.glue import Glue
from megagpt.finetune.rows import PackedRows
from megagpt.model.gpt import GPT
from megagpt.model.loss import LossTerms
from megagpt.parallel.axis import SINGLE
from tests.finetune.examples import READING, write_glue
from tests.tolerances import assert_close

MODEL = ModelConfig(n_layers=2, d_model=24, n_heads=4, seq_len=48, vocab_size=257, init_std=0.3, n_classes=2)


def batch_of(task: str, path, answers: bool = True, swapped: bool = False):
    read = Glue(task).read(write_glue(path / "a.tsv", task, 6), READING)
    if swapped:
        found = [replace(example, documents=example.documents[::-1]) for example in read.found]
        read = replace(read, found=found)
    return PackedRows(
        read,
        [[0], [1, 2], [3], [4], [5]] if len(read.found[0].documents) == 1 else [[i] for i in range(6)],
        48,
        asks=True,
    ).micro_batch(range(5), range(5)), read


def run(model: GPT, batch, terms: LossTerms) -> torch.Tensor:
    return model(*batch.inputs[:2], batch.targets, terms, positions_BT=batch.positions_BT)


def test_the_loss_is_that_of_each_texts_last_token(tmp_path):
    batch, read = batch_of("SST-2", tmp_path)
    model = GPT(MODEL, SINGLE)
    found = run(model, batch, LossTerms())
    losses = []
    for example in read.found[:6]:
        (document,) = example.documents
        ids = torch.from_numpy(document.ids[:-1]).long()[None]
        seen = []
        model.head.norm.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))  # pyright: ignore
        model(ids, positions_BT=torch.arange(ids.shape[1])[None])
        scores_C = seen[0][0, -1] @ model.head.classifier.weight.T + model.head.classifier.bias  # pyright: ignore
        losses.append(F.cross_entropy(scores_C, torch.tensor(int(example.answer))))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_the_loss_of_the_text_moves_the_gradient_and_is_not_shown(tmp_path):
    batch, _ = batch_of("SST-2", tmp_path)
    gradients = {}
    for weight in (0.0, 0.5, 1.0):
        model = GPT(MODEL, SINGLE)
        loss = run(model, batch, LossTerms(language=weight))
        loss.backward()
        gradients[weight] = (loss.item(), model.embedding.tokens.weight.grad)
    assert gradients[0.0][0] == gradients[0.5][0]
    difference = gradients[1.0][1] - gradients[0.0][1]
    assert difference.abs().max() > 1e-3
    assert_close(gradients[0.5][1] - gradients[0.0][1], difference / 2, "half of it")


def test_the_order_of_a_similar_pair_means_nothing(tmp_path):
    scores = []
    for swapped in (False, True):
        batch, _ = batch_of("MRPC", tmp_path, swapped=swapped)
        model = GPT(MODEL, SINGLE)
        model.head.on_answers = lambda _ids, found: scores.append(found)
        run(model, batch, LossTerms())
    assert_close(scores[0], scores[1], "scores")
    assert scores[0].abs().max() > 1e-2


def test_a_number_is_off_by_its_square(tmp_path):
    batch, read = batch_of("STS-B", tmp_path)
    model = GPT(replace(MODEL, n_classes=1), SINGLE)
    found: dict[int, float] = {}
    model.head.on_answers = lambda ids, scores: found.update(zip(ids.tolist(), scores[:, 0].tolist(), strict=True))
    loss = run(model, batch, LossTerms())
    squares = [(found[i] - example.answer) ** 2 for i, example in enumerate(read.found[:5])]
    assert loss.item() == pytest.approx(sum(squares) / 5, rel=1e-5)


def test_delimiters_have_vectors_of_their_own():
    model = GPT(MODEL, SINGLE)
    x_BTD = model.embedding._embedded(torch.tensor([[3, 257, 259, 256]]))
    wanted = [model.embedding.tokens.weight[3], *model.embedding.delimiters[[0, 2]], model.embedding.tokens.weight[256]]
    assert torch.equal(x_BTD[0], torch.stack(wanted))
