"""A checkpoint as a folder of Hugging Face transformers, which is not finished unless its model computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint.adapters import Adapters, base_of, lora_of, read_adapters
from megagpt.checkpoint.chunks import write_chunks
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.rewrite import new_folder
from megagpt.checkpoint.state import NAME, State, read_state
from megagpt.checkpoint.strict import STRICT, Allowed, require_same_names
from megagpt.cli import read_config
from megagpt.config import DataConfig, ModelConfig
from megagpt.config.kernels import Kernels
from megagpt.data.tokenizers.kept import tokenizer_of_checkpoint
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.hf import hf_config, lazy_to_hf
from megagpt.hf.export_tokenizer import transformers, write_tokenizer
from megagpt.hf.tokenizer_folder import special_ids
from megagpt.inventory.layers import canonical
from megagpt.inventory.parameter import WEIGHT
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.embedding import gather_logits
from megagpt.parallel.parameter import give_memory, part_of

# Share of the largest logit. Sums in another order differ by 3e-6 after a few layers in fp32 (tests/tolerances.py), a
# tensor that is missing, transposed or permuted by 1e-1. Weights that blow round-off up, as untrained large ones do,
# are in between: how far our own fp32 logits lie from our float64 ones says how far theirs may.
ALLOWED = 1e-4
ALLOWED_ROUND_OFF = 10.0  # times ours: transformers computes some angles and sums in another way
MOST_ROUND_OFF = 1e-2  # weights that blow it up further allow no statement
_SAMPLE = (2, 128)  # sequences, tokens


@dataclass(frozen=True)
class Exported:
    """architecture: which of transformers it is. worst: the largest difference of logits, as a share of the largest.
    note: what is missing, None for nothing.
    """

    architecture: str
    worst: float
    note: str | None


def export(
    source: Path,
    out: Path,
    architecture: str | None = None,
    *,
    tokenizer: DataConfig | None = None,
    without_tokenizer: bool = False,
    allowed: Allowed = STRICT,
) -> Exported:
    """Write config.json, model.safetensors, and the tokenizer's files. Adapters are merged into their base.

    architecture: a model_type of transformers; None takes the first that computes what ours does.
    tokenizer: names it where the run folder has none. allowed: unused tensors of the checkpoint are left.
    Memory: one tensor while writing; then, one after the other, our model and transformers'.
    Raises UserError, and leaves nothing, where the architecture has no place in transformers, the logits of a sample
    differ by more than round-off, the run had a tokenizer that transformers cannot read, or `out` exists.
    """
    at = read_state(source)
    config = read_config(at.config, f"{source / NAME}")
    if config.model.n_classes:
        what, wanted = (
            f"{source} is a classifier of {config.finetune.task}",
            "which a language model's folder cannot hold",
        )
        raise UserError(what, wanted, "export the run that it was made from; its answers are in RUN/predictions")
    adapters = read_adapters(source) if lora_of(at, source) else None
    weights = base_of(source) if adapters else source
    ours = None if without_tokenizer else _tokenizer(source, at, config.data, tokenizer)
    hf = {**hf_config(config.model, architecture), **special_ids(ours), "torch_dtype": "float32"}
    with new_folder(out) as folder:
        with Reader(weights) as reader:
            held, wanted = reader.index.get(WEIGHT, {}), canonical(config.model)
            allowed, offered = Allowed(unused=allowed.unused), Allowed(unused=True)
            require_same_names(weights, WEIGHT, held, wanted, allowed, offered=offered)
            read = partial(_read, reader, adapters)
            lazy = lazy_to_hf(read, config.model, hf["model_type"])

            def values(name: str) -> Iterable[np.ndarray]:
                yield lazy[name].get().numpy()

            shapes = {name: tensor.shape for name, tensor in lazy.items()}
            write_chunks(folder / "model.safetensors", shapes, values, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if ours is not None:
            write_tokenizer(folder, ours, config.model.seq_len)
        note = None if ours is not None or without_tokenizer else "without a tokenizer: the run has none"
        return Exported(hf["model_type"], _compare(weights, adapters, folder, config.model), note)


def _tokenizer(source: Path, at: State, data: DataConfig, given: DataConfig | None) -> Tokenizer | None:
    try:
        return tokenizer_of_checkpoint(source.parent.parent, data, at.data.get("tokenizer_sha256"), given)
    except UserError as error:
        raise UserError(f"{error}; or export the weights alone: --without-tokenizer") from None


def _read(reader: Reader, adapters: Adapters | None, name: str) -> Tensor:
    weight = torch.from_numpy(reader.read(WEIGHT, name))
    return weight if adapters is None else adapters.merged(name, weight)


@torch.no_grad()
def _compare(source: Path, adapters: Adapters | None, folder: Path, config: ModelConfig) -> float:
    """The largest difference of logits, relative to the largest logit.  Raises UserError where it is too large."""
    generator = torch.Generator().manual_seed(0)
    n_sequences, n_tokens = _SAMPLE
    tokens_BT = torch.randint(config.vocab, (n_sequences, min(n_tokens, config.seq_len)), generator=generator)
    ours_BTV = _our_logits(source, adapters, config, tokens_BT, torch.float32)
    theirs_BTV = _their_logits(folder, tokens_BT)
    worst = _difference(theirs_BTV, ours_BTV)
    if worst <= ALLOWED:  # false for NaN too
        return worst
    exact_BTV = _our_logits(source, adapters, config, tokens_BT, torch.float64)
    round_off = _difference(ours_BTV, exact_BTV)
    if round_off <= MOST_ROUND_OFF and _difference(theirs_BTV, exact_BTV) <= ALLOWED_ROUND_OFF * round_off:
        return worst
    raise UserError(
        f"the logits of transformers' model differ by {worst:.1e} of the largest, ours in fp32 from those in float64 "
        f"by {round_off:.1e}: not exported; is {source} whole, and transformers a version that was tested "
        "(constraints.txt)?"
    )


def _difference(a_BTV: Tensor, b_BTV: Tensor) -> float:
    return float((a_BTV.double() - b_BTV.double()).abs().max() / b_BTV.abs().max())


def _our_logits(
    source: Path, adapters: Adapters | None, config: ModelConfig, tokens_BT: Tensor, dtype: torch.dtype
) -> Tensor:
    model = GPT(config, SINGLE, kernels=Kernels.parse("reference"), empty=True)
    with Reader(source) as reader:
        for name, parameter in model.named_parameters():
            give_memory(parameter)
            part_of(parameter).unpadded(parameter).copy_(_read(reader, adapters, name))
    return gather_logits(model.to(dtype).eval()(tokens_BT), config.vocab, SINGLE)


def _their_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    model = transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()(tokens_BT).logits
