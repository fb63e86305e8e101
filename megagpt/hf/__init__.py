"""Weights and configurations in the names of Hugging Face `transformers`, both ways, without importing it.

One architecture is one small file of `architectures/`: its table of modules, its keys both ways, and what it cannot
compute. `config.py` chooses among them, `convert.py` walks their tables. Tensors here are logical ones: whole, the
vocabulary unpadded.
"""

from megagpt.hf.config import config_from_hf, hf_config
from megagpt.hf.convert import LazyTensor, lazy_from_hf, lazy_to_hf

__all__ = ["LazyTensor", "config_from_hf", "hf_config", "lazy_from_hf", "lazy_to_hf"]
