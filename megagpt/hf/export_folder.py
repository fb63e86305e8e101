"""A checkpoint as a folder of Hugging Face transformers, which is not finished unless its model computes the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint.chunks import write_chunks
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.rewrite import new_folder
from megagpt.checkpoint.state import NAME, read_state
from megagpt.cli import read_config
from megagpt.config import DataConfig, ModelConfig
from megagpt.config.kernels import Kernels
from megagpt.data.tokenizers.same import SAMPLE
from megagpt.data.tokenizers.tokenizer import Tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.hf import hf_config, lazy_to_hf
from megagpt.hf.tokenizer_folder import special_ids
from megagpt.inventory.parameter import WEIGHT
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.embedding import gather_logits
from megagpt.parallel.parameter import part_of

# Share of the largest logit. Sums in another order differ by 3e-6 after a few layers in fp32 (tests/tolerances.py), a
# tensor that is missing, transposed or permuted by 1e-1. Weights that blow round-off up, as untrained large ones do,
# are in between: how far our own fp32 logits lie from our float64 ones says how far theirs may.
ALLOWED = 1e-4
ALLOWED_ROUND_OFF = 10.0  # times ours: transformers computes some angles and sums in another way
MOST_ROUND_OFF = 1e-2  # weights that blow it up further allow no statement
_SAMPLE = (2, 128)  # sequences, tokens

_ONE_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Exported:
    """architecture: which of transformers it is. worst: the largest difference of logits, as a share of the largest.
    note: what is missing, None for nothing.
    """

    architecture: str
    worst: float
    note: str | None


def export(source: Path, out: Path, architecture: str | None = None) -> Exported:
    """Write config.json, model.safetensors, and what files the tokenizer has.

    architecture: a model_type of transformers; None takes the first that computes what ours does.
    Memory: one tensor while writing; then, one after the other, our model and transformers'.
    Raises UserError, and leaves nothing, where the architecture has no place in transformers, the logits of a sample
    differ by more than round-off, or `out` exists.
    """
    config = read_config(read_state(source).config, f"{source / NAME}")
    tokenizer, note = _tokenizer(config.data)
    hf = {**hf_config(config.model, architecture), **special_ids(tokenizer), "torch_dtype": "float32"}
    with new_folder(out) as folder:
        with Reader(source) as reader:
            read = partial(_read, reader)
            lazy = lazy_to_hf(read, config.model, hf["model_type"])

            def values(name: str) -> Iterable[np.ndarray]:
                yield lazy[name].get().numpy()

            shapes = {name: tensor.shape for name, tensor in lazy.items()}
            write_chunks(folder / "model.safetensors", shapes, values, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if tokenizer:
            note = _write_tokenizer(folder, tokenizer, config.model.seq_len)
        return Exported(hf["model_type"], _compare(source, folder, config.model), note)


def _tokenizer(data: DataConfig) -> tuple[Tokenizer | None, str | None]:
    """The run's tokenizer, or why there will be none: weights are of use without."""
    try:
        tokenizer = tokenizer_of_run(data)
    except UserError as error:
        return None, f"without a tokenizer: {error}"
    if tokenizer is None or not tokenizer.transformers_settings:
        return None, "without a tokenizer: the run's has no files"
    return tokenizer, None


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_len: int) -> str | None:
    """The tokenizer's files under the names that transformers looks for; why there are none where it reads others."""
    settings = {**tokenizer.transformers_settings, "model_max_length": seq_len}
    written = [folder / name for name in (*(option.name for option in tokenizer.options), "tokenizer_config.json")]
    for path, copy in zip(tokenizer.files, written, strict=False):
        shutil.copyfile(path, copy)
    written[-1].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    try:
        if tokenizer.kind == "gpt2":  # for architectures that transformers gives no reader of its two files
            written.append(folder / _ONE_FILE)
            _transformers().GPT2Tokenizer.from_pretrained(folder).backend_tokenizer.save(str(written[-1]))
        theirs: Any = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        same = theirs(SAMPLE, add_special_tokens=False)["input_ids"] == tokenizer.encode(SAMPLE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # what it raises for files of another kind
        same = False
    if same:
        return None
    for path in written:
        path.unlink(missing_ok=True)
    return "without a tokenizer: transformers reads its files as another one"


def _read(reader: Reader, name: str) -> Tensor:
    return torch.from_numpy(reader.read(WEIGHT, name))


@torch.no_grad()
def _compare(source: Path, folder: Path, config: ModelConfig) -> float:
    """The largest difference of logits, relative to the largest logit.  Raises UserError where it is too large."""
    generator = torch.Generator().manual_seed(0)
    n_sequences, n_tokens = _SAMPLE
    tokens_BT = torch.randint(config.vocab, (n_sequences, min(n_tokens, config.seq_len)), generator=generator)
    ours_BTV, theirs_BTV = _our_logits(source, config, tokens_BT, torch.float32), _their_logits(folder, tokens_BT)
    worst = _difference(theirs_BTV, ours_BTV)
    if worst <= ALLOWED:  # false for NaN too
        return worst
    exact_BTV = _our_logits(source, config, tokens_BT, torch.float64)
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


def _our_logits(source: Path, config: ModelConfig, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
    model = GPT(config, SINGLE, kernels=Kernels.parse("reference"))
    with Reader(source) as reader:
        for name, parameter in model.named_parameters():
            part_of(parameter).unpadded(parameter).copy_(_read(reader, name))
    return gather_logits(model.to(dtype).eval()(tokens_BT), config.vocab, SINGLE)


def _their_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    model = _transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()(tokens_BT).logits


def _transformers() -> Any:
    """The library, quiet."""
    try:
        import transformers  # an extra, and seconds to load
    except ImportError:
        raise UserError(
            "transformers is not installed, which the export is compared with: pip install megagpt[hf]"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
