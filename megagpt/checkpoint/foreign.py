"""What a file or folder is that holds weights in a form that we do not read: told by names alone, nothing is opened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_HF = "save it as a folder of Hugging Face transformers, and import that: tools/checkpoint.py import"
_IMPORT = "import it: tools/checkpoint.py import"

# In this order: the first of which one is there. A name, or a pattern of names; what that is; what to do.
_SIGNS = (
    ("latest_checkpointed_iteration.txt", "a checkpoint of Megatron-LM",
     f"its tools/checkpoint/convert.py writes it for transformers; {_HF}"),
    ("iter_*/mp_rank_*", "a checkpoint of Megatron-LM",
     f"its tools/checkpoint/convert.py writes it for transformers; {_HF}"),
    ("mp_rank_*/model_optim_rng.pt", "one iteration of a checkpoint of Megatron-LM",
     f"its tools/checkpoint/convert.py writes it for transformers; {_HF}"),
    ("iter_*/*.distcp", "a distributed checkpoint of Megatron-LM", f"convert it with Megatron-Bridge; {_HF}"),
    ("*.nemo", "a checkpoint of NeMo", f"NeMo exports it; {_HF}"),
    ("global_step*/layer_*-model_*-model_states.pt", "a checkpoint of DeepSpeed's pipelines (GPT-NeoX's)",
     f"GPT-NeoX's tools/ckpts/convert_neox_to_hf.py writes it for transformers; {_HF}"),
    ("layer_*-model_*-model_states.pt", "one step of a checkpoint of DeepSpeed's pipelines (GPT-NeoX's)",
     f"GPT-NeoX's tools/ckpts/convert_neox_to_hf.py writes it for transformers; {_HF}"),
    ("global_step*/*model_states.pt", "a checkpoint of DeepSpeed",
     f"the zero_to_fp32.py in it gathers the weights for the program that wrote it; {_HF}"),
    ("*model_states.pt", "one step of a checkpoint of DeepSpeed",
     f"the zero_to_fp32.py beside it gathers the weights for the program that wrote it; {_HF}"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed",
     f"that script gathers the weights for the program that wrote it; {_HF}"),
    ("adapter_config.json", "an adapter (LoRA) without the model that it changes",
     "give it beside that: --load BASE --adapter DIR, or tools/checkpoint.py import DIR --base RUN"),
    ("config.json", "a folder of Hugging Face transformers", _IMPORT),
    ("consolidated.*", "a model in its maker's own files (LLaMA's or Mistral's)",
     "fetch the one for transformers, a folder with config.json and model.safetensors"),
    ("*.gguf", "a model of llama.cpp", "fetch the one that it was made from, for transformers"),
    ("lit_model.pth", "a checkpoint of LitGPT", f"its convert_from_litgpt writes it for transformers; {_HF}"),
    ("ckpt.pt", "a checkpoint of nanoGPT, which is a pickle",
     f"load it there, copy its weights into GPT2LMHeadModel; {_HF}"),
    ("*.distcp", "a checkpoint of torch.distributed.checkpoint", f"load it in the program that wrote it; {_HF}"),
    ("*.ckpt", "a checkpoint of PyTorch Lightning, which is a pickle", f"load it in the program that wrote it; {_HF}"),
    ("*.pt", "a pickle of PyTorch, which can run code when it is read",
     f"load it in the program that wrote it; {_HF}"),
    ("*.pth", "a pickle of PyTorch, which can run code when it is read",
     f"load it in the program that wrote it; {_HF}"),
)  # fmt: skip
_RUN = ("checkpoints/step-*", "a run of megagpt", "give it as --load")
_STEP = ("SHA256SUMS", "a checkpoint of megagpt", "give it as --load")


def what_is(path: Path, importing: bool = False) -> str | None:
    """ "PATH is …; do …" for what is known, else None.

    importing: for who wants a folder of transformers, rather than a run of ours.
    """
    for pattern, what, remedy in ((_RUN, _STEP) if importing else ()) + _SIGNS:
        if (remedy is _IMPORT and importing) or not any(_found(path, pattern)):
            continue
        return f"{path} is {what}; {remedy}"
    return None


def _found(path: Path, pattern: str) -> Iterator[Path]:
    """The file itself, or what lies in the folder under such a name."""
    try:
        if path.is_dir():
            yield from path.glob(pattern)
        elif path.is_file() and path.match(pattern):
            yield path
    except OSError:  # no right to look: whoever wants to read it says so
        return
