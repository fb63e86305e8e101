"""metrics.py against published figures, each with where it comes from."""

from __future__ import annotations

import math

import pytest

from megagpt import metrics

# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: model, parameters, layers, width, sequence,
# device, tokens/s of one GPU, TFLOP/s of one GPU, MFU in percent.
LLM_FOUNDRY = [
    ("MPT 30b", 29975214080, 48, 7168, 2048, "NVIDIA H100 80GB HBM3", 2308, 434, 43.92),
    ("MPT 7b", 6658859008, 32, 4096, 2048, "NVIDIA H100 80GB HBM3", 10119, 436, 44.15),
    ("MPT 7b", 6918905856, 32, 4096, 65536, "NVIDIA H100 80GB HBM3", 1956, 282, 28.59),
    ("MPT 125m", 125311488, 12, 768, 2048, "NVIDIA A100-SXM4-40GB", 123936, 121, 38.86),
]


@pytest.mark.parametrize("row", LLM_FOUNDRY, ids=lambda row: f"{row[0]} T={row[4]}")
def test_mfu_of_llm_foundry(row):
    _, parameters, layers, width, seq_len, device, speed, tflops, mfu_percent = row
    # 6 FLOPs a parameter and 12 a layer, channel and position (PaLM, appendix B): what that table counts.
    flops_per_token = 6 * parameters + 12 * layers * width * seq_len
    flops = metrics.model_flops_per_s(metrics.tokens_per_s(speed * 8, 1.0), flops_per_token)
    peak = metrics.peak_flops(device, "bf16")
    assert peak is not None
    assert flops / 8 / 1e12 == pytest.approx(tflops, abs=1.0)  # printed without decimals, truncated
    assert 100 * metrics.mfu(flops, peak, n_devices=8) == pytest.approx(mfu_percent, abs=0.05)


@pytest.mark.parametrize(
    ("parameters", "tokens", "devices", "tflops", "days"),
    [(175e9, 300e9, 1024, 140, 34), (1008e9, 450e9, 3072, 163, 84)],
)
def test_training_days_of_narayanan_2021(parameters, tokens, devices, tflops, days):
    """Efficient Large-Scale Language Model Training on GPU Clusters, section 5.1: 8 FLOPs with recompute."""
    left = metrics.time_left_s(round(tokens), devices * tflops * 1e12 / (8 * parameters))
    assert left / 86400 == pytest.approx(days, abs=0.5)


def test_bits_per_byte_of_lm_evaluation_harness():
    """WikiText as EleutherAI/lm-evaluation-harness prints it, by word and by byte."""
    # Issue 806, Llama-2-7b.
    word_perplexity, byte_perplexity, bits = 8.792073612124492, 1.5015845643537054, 0.5864857250704371
    assert metrics.bits_per_byte(math.log(byte_perplexity), 1, 1) == pytest.approx(bits, rel=1e-12)
    assert metrics.perplexity(bits * math.log(2)) == pytest.approx(byte_perplexity, rel=1e-12)
    # The words in a byte of that text follow; with them issue 1471's Mistral-7B-Instruct-v0.2
    words, n_bytes = round(1e9 * math.log(byte_perplexity) / math.log(word_perplexity)), 10**9
    assert metrics.bits_per_byte(math.log(9.8183), words, n_bytes) == pytest.approx(0.6163, abs=5e-5)


def test_a_uniform_guess_costs_the_bits_it_must():
    assert metrics.bits_per_byte(math.log(256), n_tokens=1000, n_bytes=1000) == pytest.approx(8)
    assert metrics.bits_per_byte(math.log(50257), n_tokens=1, n_bytes=4) == pytest.approx(15.617 / 4, rel=1e-4)


def test_perplexity():
    assert metrics.perplexity(math.log(50257)) == pytest.approx(50257)
    assert metrics.perplexity(1e6) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA A10", "bf16", 125),  # not an A100
        ("NVIDIA A10G", "fp16", 70),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
    ],
)
def test_peaks_by_the_names_that_drivers_report(name, precision, tflops):
    assert metrics.peak_flops(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"), [("Intel Xeon", "fp32"), ("cpu", "bf16"), ("Tesla V100-SXM2-32GB", "bf16")]
)
def test_an_unknown_peak_is_none(name, precision):
    assert metrics.peak_flops(name, precision) is None
