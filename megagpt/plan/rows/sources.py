"""What the engine of each source does, as features: from its paper, README, or configuration at that commit. No torch.

Features only: no rate and no factor stands here. Where a source does not say, what its engine did by default then.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megagpt.plan.job import Engine

# Megatron-LM 2021 (Narayanan et al. 2021, section 4): fused softmax, scores kept, dropout, gradients reduced after the
# backward pass in the weights' 16 bits, sends cut over the tensor axis (section 4.1).
MEGATRON_2021 = Engine(flash=False, grad_bytes=2, scatter_p2p=True, dropout=True, fused_wgrad=True)
# Megatron-DeepSpeed: the same kernels, DeepSpeed's pipeline, ZeRO-3 by parameters; gradients are added up by autograd,
# bf16's in 32 bits (BLOOM's chronicles, "BF16Optimizer").
MEGATRON_DEEPSPEED = Engine(flash=False, grad_bytes=2, scatter_p2p=False, dropout=True, gathers=12)
# NeMo with Transformer Engine: userbuffers hide the tensor axis, the distributed optimizer overlaps both directions.
NEMO = Engine(
    overlap_tp=True, overlap_grads=True, overlap_params=True, overlap_p2p=True, scatter_p2p=True, grad_bytes=2,
    fused_wgrad=True,
)  # fmt: skip
# The same in the launcher's 23.08: no flash attention yet (use_flash_attention is not set), dropout as GPT-3's configs.
NEMO_2023 = replace(NEMO, flash=False, dropout=True)
# Composer and FSDP: flash attention (llm-foundry attn_impl), norms and activations as PyTorch's eager kernels under
# autocast, gathers run ahead, gradients in 16 bits.
FSDP = Engine(grad_bytes=2, overlap_grads=True, overlap_params=True, fused=False)
# torchtitan, fms-fsdp: FSDP with torch.compile.
FSDP_COMPILED = Engine(grad_bytes=4, overlap_grads=True, overlap_params=True)
# MaxText and PaxML: XLA compiles the whole step.
XLA = Engine(grad_bytes=4, overlap_grads=True, overlap_params=True, overlap_tp=True)
# nanotron scripts/scaling_benchmarks.py: REDUCE_SCATTER mode with tp_linear_async_communication, gradients accumulated
# and reduced in 32 bits from hooks, stages by cumulative cost (get_block_compute_costs).
NANOTRON = Engine(overlap_tp=True, overlap_grads=True, async_tp=True, stages="passing", fused=False)


@dataclass(frozen=True)
class Source:
    """key: stands in the source's words.  network, gpus_per_node: where it says.  layout: what rows leave out."""

    key: str
    label: str
    engine: Engine
    network: str | None = None
    gpus_per_node: int | None = None
    layout: dict[str, Any] = field(default_factory=dict)


SURVEY = (
    Source("Narayanan et al. 2021", "Megatron 2021", MEGATRON_2021, layout={"recompute": "full"}),
    Source("cases_jan2021", "Megatron 2021", MEGATRON_2021, layout={"recompute": "full"}),
    Source("images/tables.tex", "Megatron 2020", MEGATRON_2021, layout={"recompute": "full"}),
    Source("Shoeybi et al. 2019", "Megatron 2019", MEGATRON_2021, layout={"recompute": "full"}),
    Source("Smith et al. 2022", "MT-NLG", MEGATRON_DEEPSPEED, layout={"recompute": "full"}),
    Source("Korthikanti et al. 2022", "Korthikanti", MEGATRON_2021, layout={"recompute": "full"}),
    Source("tr11-176B-ml", "BLOOM", MEGATRON_DEEPSPEED, "infiniband-edr-4", 8, {"recompute": "full"}),
    Source("bigscience", "BigScience V100", MEGATRON_DEEPSPEED, "infiniband-edr-4", 4),
    Source("llm-foundry", "MosaicML", FSDP),
    Source("model_table", "Megatron-Core", NEMO, layout={"sequence_parallel": True}),
    Source("NVIDIA/Megatron-LM", "Megatron-Core", NEMO, layout={"sequence_parallel": True}),
    Source("Megatron-Bridge", "Megatron-Core", NEMO, layout={"sequence_parallel": True}),
    Source("torchtitan", "torchtitan", FSDP_COMPILED, layout={"sequence_parallel": True}),
    Source("nanotron", "nanotron, survey", NANOTRON, "ethernet-3200", layout={"sequence_parallel": True}),
    Source("flash-attention", "FlashAttention", Engine(grad_bytes=2, overlap_grads=True)),
    Source("deepspeed-azure", "DeepSpeed Azure", MEGATRON_DEEPSPEED, layout={"recompute": "full"}),
    Source("metaseq", "OPT", Engine(flash=False, grad_bytes=2, overlap_grads=True, overlap_params=True, dropout=True)),
    Source("Black et al. 2022", "GPT-NeoX", MEGATRON_DEEPSPEED, layout={"recompute": "full"}),
)


def source_of(words: str) -> Source | None:
    """The first entry of SURVEY whose key stands in these words."""
    return next((source for source in SURVEY if source.key in words), None)
