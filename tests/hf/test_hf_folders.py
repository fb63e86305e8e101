"""Hugging Face folders, both ways: transformers' own files come back to the bit, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from megagpt.checkpoint.folders import find
from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import read_state
from megagpt.checkpoint.strict import Allowed
from megagpt.cli import read_config
from megagpt.config import DataConfig, ParallelConfig, RunConfig, TrainConfig, plain
from megagpt.data.tokenizers.tokenizer import tokenizer_of_run
from megagpt.errors import UserError
from megagpt.generate import Sampling, generate
from megagpt.hf import export_folder as hf_export
from megagpt.hf import import_folder as hf_import
from megagpt.hf.export_folder import export
from megagpt.hf.import_folder import import_model
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import part_of
from megagpt.processes.local import run_ranks
from tests.checkpoint.written_checkpoint import MODEL, gpt2_tensors, write_checkpoint
from tests.hf.hf_cases import CASES, theirs
from tests.hf.load import from_hf
from tests.logical import Parts, assemble
from tests.parity.rank import start_engine


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", 30)


def hf_folder(folder: Path, **save: object) -> transformers.GPT2LMHeadModel:
    """A random GPT-2 as transformers itself saves it; biases and gains too, that initialisation leaves at 0 and 1."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=37)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(folder, **save)  # pyright: ignore[reportArgumentType]
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_folder_comes_back_and_writes_the_same_text(name: str, tmp_path: Path):
    """Theirs → a checkpoint → theirs, to the bit; and all three choose the same tokens."""
    case = CASES[name]
    model = theirs(case, noise=0.3)
    model.save_pretrained(tmp_path / "hf")
    folder = import_model(tmp_path / "hf", tmp_path / "run")
    assert folder == tmp_path / "run" / "checkpoints" / "step-000000" and damage_of(folder) == []
    done = export(folder, tmp_path / "back", case.architecture)
    assert done.architecture == case.architecture and done.worst < 1e-4
    assert done.note == "without a tokenizer: the run has none"
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert expected.keys() == found.keys()
    for tensor, values in expected.items():
        assert values.tobytes() == found[tensor].tobytes(), tensor
    back: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(model)
    prompts, n_tokens = torch.randint(0, case.config.vocab, (6, 8)), case.config.seq_len - 8
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    texts = [m.generate(prompts, **settings)[:, 8:].tolist() for m in (model, back)]
    written = generate(folder, prompts.tolist(), Sampling(n_tokens=n_tokens, temperature=0))
    ours = [sample.tokens for (sample,) in written]
    assert texts == [ours, ours]
    assert len({token for text in ours for token in text}) > 2  # not one token for ever


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_shards_and_other_number_formats_are_imported(tmp_path: Path, name: str):
    model = theirs(CASES[name]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    expected = from_hf({n: t.float() for n, t in model.state_dict().items()}, CASES[name].config)
    for folder in ("whole", "shards"):
        with Reader(import_model(tmp_path / folder, tmp_path / f"from-{folder}")) as reader:
            assert reader.index["weight"].keys() == expected.keys()
            for tensor, values in expected.items():
                np.testing.assert_array_equal(reader.read("weight", tensor), values.numpy(), tensor)


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon new"])
def test_few_tensors_are_in_memory_at_a_time(tmp_path: Path, name: str, monkeypatch):
    """Both ways: what one of ours is made of, and that one itself; never the model."""
    theirs(replace(CASES[name], config=replace(CASES[name].config, n_layers=12))).save_pretrained(tmp_path / "hf")
    alive: set[int] = set()
    most = 0

    def watched(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watching(*arguments: Any) -> Tensor:
            nonlocal most
            tensor = read(*arguments)
            alive.add(id(tensor))
            weakref.finalize(tensor, alive.discard, id(tensor))
            most = max(most, len(alive))
            return tensor

        return watching

    monkeypatch.setattr(hf_import, "read_tensor", watched(hf_import.read_tensor))
    monkeypatch.setattr(hf_export, "_read", watched(hf_export._read))
    folder = import_model(tmp_path / "hf", tmp_path / "run")
    monkeypatch.setattr(hf_export, "_compare", lambda *_: 0.0)  # which holds the model
    export(folder, tmp_path / "back")
    assert 1 <= most <= 4


def spoil(folder: Path, case: str) -> None:
    """Make an HF folder into one that cannot be imported."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    match case:
        case "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        case "nothing":
            (folder / "model.safetensors").unlink()
        case "another kind":
            (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
        case "text":
            (folder / "config.json").write_text(json.dumps(config | {"n_layer": "2"}))
        case "no JSON":
            (folder / "config.json").write_text("{")
        case "layers":
            (folder / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
        case "nan":
            tensors["transformer.ln_f.bias"][0] = np.nan
            save_file(tensors, folder / "model.safetensors")
        case "shape":
            tensors["transformer.wpe.weight"] = np.zeros((9, 16), np.float32)
            save_file(tensors, folder / "model.safetensors")
        case "truncated":
            (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
        case "map":
            (folder / "model.safetensors").unlink()
            places = dict.fromkeys(tensors, "../model.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        case "stale map":
            (folder / "model.safetensors").rename(folder / "all.safetensors")
            places = dict.fromkeys(list(tensors)[1:], "all.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        case "unknown":
            save_file(
                {**tensors, "transformer.h.0.gate": tensors["transformer.ln_f.bias"]}, folder / "model.safetensors"
            )
        case "elsewhere":
            (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))


REFUSED = {
    "pickle": ("pytorch_model.bin is a pickle, which can run code", "save_pretrained"),
    "nothing": ("has neither model.safetensors nor model.safetensors.index.json",),
    "another kind": ("config.json: ", "model_type='t5', wanted one of gpt2, openai-gpt"),
    "text": ("config.json: config.json has a value of another type",),
    "no JSON": ("config.json: cannot be read as JSON",),
    "layers": ("the weights have no transformer.h.2.ln_1.weight",),
    "nan": ("model.safetensors: transformer.ln_f.bias holds a NaN or Inf",),
    "shape": ("transformer.wpe.weight has shape (9, 16), wanted (8, 16)",),
    "truncated": ("model.safetensors: cannot be read",),
    "stale map": ("all.safetensors: the file says that it has ", "model.safetensors.index.json does not"),
    "unknown": ("the weights hold transformer.h.0.gate, not in a gpt2 of 2 layers", "--allow-unused"),
    "elsewhere": ("transformers_weights='other.safetensors', wanted None",),
    "map": ("lies in '../model.safetensors', wanted a .safetensors file beside it",),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_and_leaves_nothing(tmp_path: Path, case: str):
    hf_folder(tmp_path / "hf")
    spoil(tmp_path / "hf", case)
    with pytest.raises(UserError) as refused:
        import_model(tmp_path / "hf", tmp_path / "run")
    for words in REFUSED[case]:
        assert words in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_that_computes_something_else_is_refused(run: Path, tmp_path: Path, monkeypatch):
    def swapped(*arguments):
        lazy = hf_export_lazy(*arguments)
        a, b = "transformer.h.0.ln_1.bias", "transformer.h.0.ln_2.bias"
        return lazy | {a: lazy[b], b: lazy[a]}

    hf_export_lazy = hf_export.lazy_to_hf
    monkeypatch.setattr(hf_export, "lazy_to_hf", swapped)
    with pytest.raises(UserError, match=r"the logits of transformers' model differ by .* not exported"):
        export(find(run), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_round_off_of_our_own_decides_where_fp32_differs(run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hf_export, "ALLOWED", 0.0)
    assert export(find(run), tmp_path / "hf").worst < 1e-5
    monkeypatch.setattr(hf_export, "ALLOWED_ROUND_OFF", 0.0)
    with pytest.raises(UserError, match=r"ours in fp32 from those in float64 by .*e-0[678]: not exported"):
        export(find(run), tmp_path / "hf-2")


def test_architectures_without_a_place_in_transformers_are_refused(tmp_path: Path):
    config = plain(RunConfig(model=replace(MODEL, position="alibi")))
    write_checkpoint(tmp_path / "run", config=config)
    with pytest.raises(UserError, match=r"the nearest is gpt2: it has model.position=learned, not alibi"):
        export(find(tmp_path / "run"), tmp_path / "hf")
    with pytest.raises(UserError, match=r"cannot be a gpt2 of transformers: it has model.position=learned"):
        export(find(tmp_path / "run"), tmp_path / "hf", "gpt2")
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a byte-level BPE of 293 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=293, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    tokenizer.model.save(str(folder))
    return folder


def test_the_tokenizer_travels_with_the_weights(tmp_path: Path, gpt2_tokenizer: Path):
    files = shutil.copytree(gpt2_tokenizer, tmp_path / "tokenizer")
    data = DataConfig(tokenizer="gpt2", vocab_file=str(files / "vocab.json"), merge_file=str(files / "merges.txt"))
    model = replace(MODEL, vocab_size=293)
    tensors = {"weight": gpt2_tensors(model)}
    write_checkpoint(tmp_path / "run", 0, tensors, config=plain(RunConfig(model=model, data=data)))
    done = export(find(tmp_path / "run"), tmp_path / "hf")
    assert done.note is None
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = tokenizer_of_run(data)
    text = "def test(): return {'a': 1}\n"
    assert ours is not None and theirs(text)["input_ids"] == ours.encode(text)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == ours.eod
    import_model(tmp_path / "hf", tmp_path / "back")
    at = read_state(tmp_path / "back" / "checkpoints" / "step-000000")
    again = tokenizer_of_run(read_config(at.config, "state").data)
    assert again is not None and again.sha256 == ours.sha256 and again.files[0].is_relative_to(tmp_path / "back")
    (files / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"vocab.json: cannot be read .*; or export the weights alone: --without-token"):
        export(find(tmp_path / "run"), tmp_path / "hf-2")
    assert export(find(tmp_path / "run"), tmp_path / "hf-2", without_tokenizer=True).note is None
    assert sorted(path.name for path in (tmp_path / "hf-2").iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def sentencepiece_data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A SentencePiece model of 600 tokens."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    SentencePieceTrainer.train(
        input=__file__, model_prefix=str(prefix), model_type="bpe", vocab_size=600, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return DataConfig(tokenizer="sentencepiece", tokenizer_model=f"{prefix}.model")


def test_a_sentencepiece_tokenizer_gives_the_same_ids_there(tmp_path: Path, sentencepiece_data: DataConfig):
    model = replace(MODEL, vocab_size=600)
    config = plain(RunConfig(model=model, data=sentencepiece_data))
    write_checkpoint(tmp_path / "run", 0, {"weight": gpt2_tensors(model)}, config=config)
    done = export(find(tmp_path / "run"), tmp_path / "hf")
    assert done.note is None
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours, text = tokenizer_of_run(sentencepiece_data), Path(__file__).read_text(encoding="utf-8")
    assert ours is not None and theirs(text)["input_ids"] == ours.encode(text)
    import_model(tmp_path / "hf", tmp_path / "back")
    at = read_state(tmp_path / "back" / "checkpoints" / "step-000000")
    assert at.config["data"]["tokenizer"] == "sentencepiece"


@pytest.mark.parametrize("name", ["gpt1", "llama", "mistral", "bigcode"])
def test_tokenizers_of_other_architectures(
    tmp_path: Path, name: str, gpt2_tokenizer: Path, sentencepiece_data: DataConfig
):
    """Which class reads the files depends on the architecture too."""
    gpt2 = DataConfig(
        tokenizer="gpt2",
        vocab_file=str(gpt2_tokenizer / "vocab.json"),
        merge_file=str(gpt2_tokenizer / "merges.txt"),
    )
    for number, (data, vocab_size) in enumerate(((gpt2, 293), (sentencepiece_data, 600))):
        model = replace(CASES[name].config, vocab_size=vocab_size)
        tensors = {n: part_of(p).unpadded(p).detach().numpy() for n, p in GPT(model, SINGLE).named_parameters()}
        config = plain(RunConfig(model=model, data=data))
        write_checkpoint(tmp_path / f"run-{number}", 0, {"weight": tensors}, config=config)
        assert export(find(tmp_path / f"run-{number}"), tmp_path / f"hf-{number}").note is None


def test_a_chat_model_comes_back_with_its_added_tokens_and_its_ends(tmp_path: Path, gpt2_tokenizer: Path):
    """Beside vocab.json and merges.txt, which know nothing of them."""
    source = shutil.copytree(gpt2_tokenizer, tmp_path / "hf")
    tokenizer = Tokenizer(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[PAD]"])
    tokenizer.save(str(source / "tokenizer.json"))
    named = {"eos_token": "<|im_end|>", "pad_token": "[PAD]", "chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, n_positions=8, vocab_size=296, bos_token_id=0, eos_token_id=[294, 0]
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(source)
    folder = import_model(source, tmp_path / "run")
    assert export(folder, tmp_path / "back").note is None
    theirs, back = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    text = "<|im_start|>user\n  37.8<|im_end|>[PAD]<|endoftext|>"
    assert theirs(text)["input_ids"] == back(text)["input_ids"] == tokenizer.encode(text).ids
    assert (back.eos_token_id, back.pad_token_id, back.chat_template) == (294, 295, "{{ messages }}")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, [294, 0])


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def shards_alone(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (adapter, "an adapter (LoRA), which is a change of another model"),
        (shards_alone, "has 1 shards (model-00001-of-00002.safetensors …) and no model.safetensors.index.json"),
        (pointer, "model.safetensors: a pointer of Git LFS in place of the file"),
        (shutil.rmtree, "is no folder"),
        (no_config, "config.json: cannot be read (No such file or directory); give the folder of a whole model"),
    ],
)
def test_other_folders_are_called_what_they_are(tmp_path: Path, spoil: Callable[[Path], object], words: str):
    hf_folder(tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(UserError) as refused:
        import_model(tmp_path / "hf", tmp_path / "run")
    assert words in str(refused.value) and not (tmp_path / "run").exists()


def test_two_sets_of_weights_are_told_apart_as_transformers_does(tmp_path: Path):
    """save_pretrained of a small model into the folder of a large one leaves the index of that."""
    hf_folder(tmp_path / "hf", max_shard_size="5KB")
    model = hf_folder(tmp_path / "hf-2")
    shutil.copy(tmp_path / "hf-2" / "model.safetensors", tmp_path / "hf")
    said: list[str] = []
    folder = import_model(tmp_path / "hf", tmp_path / "run", said.append)
    taken = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(taken.transformer.wte.weight, model.transformer.wte.weight)
    with Reader(folder) as reader:
        np.testing.assert_array_equal(
            reader.read("weight", "embedding.tokens.weight"), model.transformer.wte.weight.detach().numpy()
        )
    assert len(said) == 1 and "as transformers does, and not the weights that model.safetensors.index.json" in said[0]


def test_tensors_that_are_not_taken_are_named(tmp_path: Path):
    hf_folder(tmp_path / "hf")
    spoil(tmp_path / "hf", "unknown")
    said: list[str] = []
    folder = import_model(tmp_path / "hf", tmp_path / "run", said.append, allow_unused=True)
    assert damage_of(folder) == [] and len(said) == 1 and "transformer.h.0.gate left" in said[0]


def test_an_export_drops_no_tensor_without_a_word(tmp_path: Path):
    tensors = gpt2_tensors()
    tensors["blocks.0.gate"] = np.ones(3, np.float32)
    source = write_checkpoint(tmp_path / "run", 1, {"weight": tensors})
    with pytest.raises(
        UserError, match=r"holds, and this model has no place for, weight of blocks.0.gate: .*--allow-un"
    ):
        export(source, tmp_path / "hf")
    assert export(source, tmp_path / "hf", allowed=Allowed(unused=True)).worst < 1e-5


def start_from(config: RunConfig, run: Path) -> tuple[Parts, bool]:
    """This rank's weights, and whether a moment is there, of an engine that begins with an imported model."""
    engine = start_engine(config, 1)
    at = engine.load(find(run))
    assert at.step == 0
    weights: Parts = {}
    moments = False
    for n in engine.parameters:
        weight = engine.masters.read(n, "weight").float().clone()
        if n.owned:  # a tied one is on two stages
            weights[n.name] = (n.part, weight)
        moments = moments or bool(engine.masters.read(n, "exp_avg").any())
    engine.close()
    return weights, moments


@pytest.mark.parametrize(("name", "tp"), [("gpt2", 1), ("llama", 2)])
def test_training_begins_with_imported_weights_and_no_moments(tmp_path: Path, name: str, tp: int):
    theirs(CASES[name]).save_pretrained(tmp_path / "hf")
    folder = import_model(tmp_path / "hf", tmp_path / "run")
    train = TrainConfig(seed=7, micro_batch_size=1, global_batch_size=2)
    model = read_config(read_state(folder).config, "state").model
    config = RunConfig(model=model, parallel=ParallelConfig(tp=tp, pp=2), train=train)
    ranks = run_ranks(start_from, 2 * tp, config, tmp_path / "run")
    assert not any(moments for _, moments in ranks)
    held = assemble(weights for weights, _ in ranks)
    with Reader(folder) as reader:
        assert held.keys() == reader.index["weight"].keys()
        for tensor, values in held.items():
            np.testing.assert_array_equal(values.numpy(), reader.read("weight", tensor), tensor)
