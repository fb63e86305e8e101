"""AdamW over the parameters that decay and those that do not."""

from __future__ import annotations

import importlib.util

import torch

from megagpt.config import OptimConfig
from megagpt.engine.named import Named


def build_optimizer(parameters: list[Named], config: OptimConfig) -> tuple[torch.optim.Optimizer, str]:
    """AdamW with decoupled decay on matrices and none on biases and norms; also which implementation it is, and why.

    The rate starts at 0 and is set before every step, so that nothing moves before the schedule says so.
    """
    matrices = [n.parameter for n in parameters if _decays(n)]
    vectors = [n.parameter for n in parameters if not _decays(n)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    settings = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
    on_gpu = parameters[0].parameter.is_cuda or torch.cuda.is_available()
    # NVIDIA's apex has apex.optimizers; the package called apex on the registry is another project.
    if on_gpu and importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]  # built from source

        return FusedAdam(groups, adam_w_mode=True, **settings), "apex FusedAdam"
    reason = "apex is not installed" if on_gpu else "no GPU for apex"
    return torch.optim.AdamW(groups, fused=True, **settings), f"torch AdamW, fused ({reason})"


def _decays(named: Named) -> bool:
    return len(named.part.shape) >= 2 and not named.name.endswith("bias")  # a gated MLP's bias is (2, F)
