"""Speed and quality as numbers: tokens/s, FLOP/s, MFU, perplexity, bits per byte, time left. Pure functions.

MFU (Chowdhery et al. 2022, PaLM, appendix B) counts the FLOPs that the model needs, not those that
recomputation adds. Peaks are dense: data sheets that quote structured sparsity are halved.
"""

from __future__ import annotations

import math
from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""The number format of the matrix products. tf32 is fp32 with torch.backends' `allow_tf32`."""

# Peak TFLOP/s by a part of the name that the driver reports; of the parts that fit, the longest counts.
# From NVIDIA's data sheets of each product.
_PEAK_TFLOPS: dict[str, dict[Precision, float]] = {
    "V100-SXM": {"fp32": 15.7, "fp16": 125.0},
    "V100-PCIE": {"fp32": 14.0, "fp16": 112.0},
    "T4": {"fp32": 8.1, "fp16": 65.0},
    "A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0},
    "A10G": {"fp32": 35.0, "tf32": 35.0, "bf16": 70.0, "fp16": 70.0},
    "A30": {"fp32": 10.3, "tf32": 82.0, "bf16": 165.0, "fp16": 165.0},
    "A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0},
    "L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "L40": {"fp32": 90.5, "tf32": 90.5, "bf16": 181.0, "fp16": 181.0},
    "L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0},
    "H100": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4},
    "H100 PCIe": {"fp32": 51.0, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0},
    "H100 NVL": {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5},
    "H200": {"fp32": 67.0, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4},
    "H200 NVL": {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5},
}


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense peak FLOP/s of a device, by the name its driver reports; None where none is known (every CPU)."""
    names = [name for name in _PEAK_TFLOPS if name.lower() in device_name.lower()]
    if not names:
        return None
    tflops = _PEAK_TFLOPS[max(names, key=len)].get(precision)
    return None if tflops is None else tflops * 1e12


def tokens_per_s(tokens: int, time_s: float) -> float:
    """Tokens of all processes in a second."""
    return tokens / time_s


def model_flops_per_s(tokens_per_s: float, flops_per_token: float) -> float:
    """FLOP/s, forward and backward, that the model needs at this speed; recomputation is not counted."""
    return tokens_per_s * flops_per_token


def mfu(flops_per_s: float, peak_flops: float, n_devices: int) -> float:
    """Model FLOPs utilisation: the share of the peak of all devices, 0 to 1."""
    return flops_per_s / (peak_flops * n_devices)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; inf where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, n_tokens: int, n_bytes: float) -> float:
    """Bits that the model spends on a byte of text: comparable across tokenizers.

    loss is the mean over n_tokens, in nats; n_bytes is the UTF-8 length of the text that they stand for.
    Source: Gao et al. 2020 (The Pile), section 3.1.
    """
    return loss * n_tokens / n_bytes / math.log(2)


def time_left_s(tokens_left: int, tokens_per_s: float) -> float:
    """Seconds until the last token, at this speed."""
    return tokens_left / tokens_per_s
