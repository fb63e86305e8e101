"""The table of an architecture, written out tensor by tensor for one configuration.

Shapes: D model, H heads, G key/value heads, K head width, F MLP, V vocabulary, T context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.hf.architecture import Architecture
from megagpt.hf.layouts import QKV, ours_of, parts_of_ours

Shape = tuple[int, ...]
Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    """Logical tensors of ours (name → shape), those of theirs with the same contents, and the way between.

    The two changes are exact inverses. A tensor that needs none is passed on, not copied.
    """

    ours: dict[str, Shape]
    theirs: tuple[str, ...]
    to_ours: Change
    to_theirs: Change

    def their_shapes(self) -> list[Shape]:
        """Of each of theirs."""
        ours = [torch.empty(shape, device="meta") for shape in self.ours.values()]
        return [tuple(tensor.shape) for tensor in self.to_theirs(ours)]


def rules(table: Architecture, config: ModelConfig) -> Iterator[Rule]:
    """All tensors of the model, block by block within a module."""
    for module, theirs in table.modules(config).items():
        if _absent(module, config):
            continue
        names = (theirs,) if isinstance(theirs, str) else theirs
        for i in range(config.n_layers if "{}" in module else 1):
            yield from _of_module(table, config, module.format(i), tuple(name.format(i) for name in names))


def _absent(module: str, config: ModelConfig) -> bool:
    return (module == "head.tokens" and config.tied_embeddings) or (
        module == "blocks.{}.norm_2" and config.block == "parallel"
    )


def _of_module(table: Architecture, config: ModelConfig, ours: str, theirs: tuple[str, ...]) -> Iterator[Rule]:
    """The rules of its weight and its bias; or its only one, where the module is a parameter itself."""
    if ours == "head.bias":
        yield Rule({ours: (config.vocab,)}, theirs, _same, _same)
    elif ours == "embedding.positions":
        yield Rule({ours: (config.seq_len, config.d_model)}, (f"{theirs[0]}.weight",), _same, _same)
    else:
        in_block = ours.startswith("blocks.")
        for leaf, shapes in _shapes(ours, config).items():
            names = tuple(f"{name}.{leaf}" for name in theirs)
            turned = table.transposed and in_block and len(next(iter(shapes.values()))) == 2
            if ours.endswith("attention.qkv"):
                yield _qkv_rule(table.qkv, config, shapes, names, turned)
            elif len(theirs) == 2:
                yield Rule(shapes, names, _stack, _unstack)
            else:
                change = _turn if turned else _same
                yield Rule(shapes, names, change, change)


def _shapes(module: str, config: ModelConfig) -> dict[str, dict[str, Shape]]:
    """Leaf → name → logical shape; queries are apart from keys and values where heads share these."""
    D, F, V = config.d_model, config.ff_width, config.vocab
    inner, kv = config.n_heads * config.head_width, 2 * config.kv_heads * config.head_width
    kind = module.split(".", 2)[-1] if module.startswith("blocks.") else module
    packs = (2,) if config.gated else ()
    norm = ("norm", (D,), ())
    part, rows, columns = {
        "embedding.tokens": (None, (V,), (D,)),
        "head.tokens": (None, (V,), (D,)),
        "attention.qkv": ("attention", (inner + kv,), (D,)),
        "attention.out": ("attention", (D,), (inner,)),
        "mlp.up": ("mlp", (*packs, F), (D,)),
        "mlp.down": ("mlp", (D,), (F,)),
    }.get(kind, norm)
    biased = {
        "attention": config.bias_attention,
        "mlp": config.bias_mlp,
        "norm": config.bias_norm and config.norm == "layernorm",
        None: False,
    }[part]
    named = {module: rows}
    if kind == "attention.qkv" and config.grouped:
        stem = module.removesuffix("qkv")
        named = {f"{stem}q": (inner,), f"{stem}kv": (kv,)}
    leaves = {"weight": columns} | ({"bias": ()} if biased else {})
    return {leaf: {f"{name}.{leaf}": (*rows, *rest) for name, rows in named.items()} for leaf, rest in leaves.items()}


def _qkv_rule(qkv: QKV, config: ModelConfig, shapes: dict[str, Shape], names: tuple[str, ...], turned: bool) -> Rule:
    turn = _turn if turned else _same

    def to_ours(theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return ours_of(qkv.take(turn(theirs), config))

    def to_theirs(ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return turn(qkv.give(parts_of_ours(ours, config)))

    return Rule(shapes, names, to_ours, to_theirs)


def _same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def _turn(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.t().contiguous() for tensor in tensors]


def _stack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.stack(tuple(tensors))]


def _unstack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [part.contiguous() for part in tensors[0].unbind()]
