"""The architectures of transformers that we know: one is a file here, and a line of ARCHITECTURES."""

from megagpt.hf.architecture import Architecture
from megagpt.hf.architectures.bloom import BLOOM
from megagpt.hf.architectures.falcon import FALCON
from megagpt.hf.architectures.gpt2 import GPT2
from megagpt.hf.architectures.gpt_bigcode import GPT_BIGCODE
from megagpt.hf.architectures.gpt_neox import GPT_NEOX
from megagpt.hf.architectures.gptj import GPTJ
from megagpt.hf.architectures.llama import LLAMA, MISTRAL
from megagpt.hf.architectures.mpt import MPT
from megagpt.hf.architectures.openai_gpt import OPENAI_GPT

ARCHITECTURES: dict[str, Architecture] = {
    known.name: known for known in (GPT2, OPENAI_GPT, GPT_NEOX, GPTJ, BLOOM, MPT, LLAMA, MISTRAL, FALCON, GPT_BIGCODE)
}
"""By model_type; of several that fit a configuration, the first is taken."""
