"""A checkpoint as a folder of Hugging Face transformers, which is not finished unless its model computes the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint.chunks import write_chunks
from megagpt.checkpoint.pieces import WEIGHT, Reader
from megagpt.checkpoint.rewrite import new_folder
from megagpt.checkpoint.state import NAME, read_state
from megagpt.cli import read_config
from megagpt.config import DataConfig, ModelConfig, RunConfig
from megagpt.data.tokenizer import Tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.kernels import Kernels
from megagpt.model.gpt import GPT
from megagpt.model.hf import hf_config, lazy_to_hf_gpt2
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.embedding import gather_logits
from megagpt.parallel.parameter import part_of

# Share of the largest logit. Sums in another order differ by 3e-6 after a few layers (tests/tolerances.py), by about
# the root of the number of layers more in deep models; a tensor that is missing, transposed or permuted by 1e-1.
ALLOWED = 1e-4
_SAMPLE = (2, 128)  # sequences, tokens


@dataclass(frozen=True)
class Exported:
    """worst: the largest difference of logits, as a share of the largest. note: what is missing, None for nothing."""

    worst: float
    note: str | None


def export(source: Path, out: Path) -> Exported:
    """Write config.json, model.safetensors, and what files the tokenizer has.

    Memory: one tensor while writing; then, one after the other, our model and transformers' in fp32.
    Raises UserError, and leaves nothing, where the architecture has no place in transformers, the logits of a sample
    differ by more than ALLOWED of the largest, or `out` exists.
    """
    config = read_config(read_state(source).config, f"{source / NAME}")
    tokenizer, note = _tokenizer(config.data)
    theirs = {**hf_config(config.model), **_special_ids(tokenizer), "torch_dtype": "float32"}
    with new_folder(out) as folder:
        with Reader(source) as reader:
            lazy = lazy_to_hf_gpt2(lambda name: torch.from_numpy(reader.read(WEIGHT, name)), config.model)

            def values(name: str) -> Iterable[np.ndarray]:
                yield lazy[name].get().numpy()

            shapes = {name: tensor.shape for name, tensor in lazy.items()}
            write_chunks(folder / "model.safetensors", shapes, values, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_tokenizer(folder, tokenizer, config)
        return Exported(_compare(source, folder, config.model), note)


def _tokenizer(data: DataConfig) -> tuple[Tokenizer | None, str | None]:
    """The run's tokenizer, or why there will be none: weights are of use without."""
    try:
        tokenizer = tokenizer_of_run(data)
    except UserError as error:
        return None, f"without a tokenizer: {error}"
    files = tokenizer.files if tokenizer else ()
    return tokenizer, None if files else "without a tokenizer: the run's has no files"


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """As GPT-2 has it: one token that begins and ends texts."""
    end = tokenizer.eod if tokenizer else None
    return {"bos_token_id": end, "eos_token_id": end}


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | None, config: RunConfig) -> None:
    """The tokenizer's files under the names that transformers looks for; nothing where it has none (bytes)."""
    if tokenizer is None:
        return
    names = {"gpt2": ("vocab.json", "merges.txt"), "hf": ("tokenizer.json",), "sentencepiece": ("tokenizer.model",)}
    for path, name in zip(tokenizer.files, names.get(tokenizer.kind, ()), strict=True):
        shutil.copyfile(path, folder / name)
    classes = {"gpt2": "GPT2Tokenizer", "hf": "PreTrainedTokenizerFast"}  # sentencepiece: GPT-2 has no class for it
    if tokenizer.kind in classes:
        settings = {"tokenizer_class": classes[tokenizer.kind], "model_max_length": config.model.seq_len}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _compare(source: Path, folder: Path, config: ModelConfig) -> float:
    generator = torch.Generator().manual_seed(0)
    n_sequences, n_tokens = _SAMPLE
    tokens_BT = torch.randint(config.vocab, (n_sequences, min(n_tokens, config.seq_len)), generator=generator)
    ours_BTV, theirs_BTV = _our_logits(source, config, tokens_BT), _their_logits(folder, tokens_BT)
    if ours_BTV.shape != theirs_BTV.shape:
        raise UserError(
            f"transformers' logits are {tuple(theirs_BTV.shape)}, ours {tuple(ours_BTV.shape)}: not exported"
        )
    worst = float((ours_BTV - theirs_BTV).abs().max() / ours_BTV.abs().max())
    if not worst <= ALLOWED:  # true for NaN too
        raise UserError(
            f"the logits of transformers' model differ by {worst:.1e} of the largest, allowed {ALLOWED:.0e}: not "
            f"exported; is {source} whole, and transformers a version that was tested (constraints.txt)?"
        )
    return worst


def _our_logits(source: Path, config: ModelConfig, tokens_BT: Tensor) -> Tensor:
    model = GPT(config, SINGLE, kernels=Kernels.parse("reference"))
    with Reader(source) as reader:
        for name, parameter in model.named_parameters():
            part_of(parameter).unpadded(parameter).copy_(torch.from_numpy(reader.read(WEIGHT, name)))
    return gather_logits(model.eval()(tokens_BT), config.vocab, SINGLE)


def _their_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    try:
        import transformers  # an extra, and seconds to load
    except ImportError:
        raise UserError(
            "transformers is not installed, which the export is compared with: pip install megagpt[hf]"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()(tokens_BT).logits
