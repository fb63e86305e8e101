"""Flags and keys of Megatron-LM, GPT-NeoX, DeepSpeed, transformers, nanoGPT: what each is here, told at once."""

from __future__ import annotations

import shlex

import pytest

from megagpt.cli import parse_run_config
from megagpt.cli.flags import all_flags, as_flag
from megagpt.cli.peers import ABSENT, BY_ITSELF, CHOICES, SAME, SWITCHES
from megagpt.cli.translate import COMPUTED, look_up, plain_name
from megagpt.errors import UserError, nearest

# (typed by a user of) -> what it is here, with what else is typed.
TRANSLATED = {
    "--num-layers 24": "--n-layers 24",
    "--kv-channels 64": "--model.d-head 64",
    "--num-query-groups 4": "--n-kv-heads 4",
    "--attention-dropout 0.1": "--model.dropout-attention 0.1",
    "--hidden-dropout 0.1": "--model.dropout-embedding 0.1 --model.dropout-residual 0.1",
    "--swiglu": "--model.activation swiglu",
    "--swiglu --hidden-size 1024": "--model.activation swiglu --model.d-ff 2688 --d-model 1024",
    "--swiglu --hidden-size 1024 --ffn-hidden-size 2048": "--model.activation swiglu --d-model 1024 --model.d-ff 2048",
    "--disable-bias-linear": "--model.no-bias-attention --model.no-bias-mlp",
    "--untie-embeddings-and-output-weights": "--model.no-tied-embeddings",
    "--normalization RMSNorm": "--model.norm rmsnorm",
    "--position-embedding-type rope": "--model.position rotary",
    "--position-embedding-type relative": "--model.position t5",
    "--window-size 127,0": "--model.attention window:128",
    "--sliding-window 4096": "--model.attention window:4096",
    "--train-iters 500 --lr-warmup-fraction .01": "--train-steps 500 --warmup-steps 5",
    "--lr-decay-iters 300 --train-iters 500 --lr-warmup-fraction .1":
        "--optim.decay-steps 300 --train-steps 500 --warmup-steps 30",
    "--lr 3e-4 --min-lr 3e-5": "--optim.min-lr-fraction 0.1",
    "--lr-decay-style cosine --lr 1e-3 --min-lr 1e-4": "--schedule cosine --optim.min-lr-fraction 0.1",
    "--lr-scheduler-type linear": "--schedule linear --optim.min-lr-fraction 0",
    "--train-samples 6400 --global-batch-size 64": "--train-steps 100",
    "--seq-length 100 --lr-warmup-samples 50": "--seq-len 100 --warmup-tokens 5000",
    "--seq-length 100 --rampup-batch-size 16 8 1000":
        "--seq-len 100 --train.batch-ramp-start 16 --train.batch-ramp-increment 8 --train.batch-ramp-tokens 100000",
    "--bf16": "--precision bf16",
    "--bf16 True": "--precision bf16",
    "--dtype=bfloat16": "--precision bf16",
    "--recompute-granularity full": "--recompute",
    "--distributed-timeout-minutes 10": "--faults.progress-timeout-s 600",
    "--ckpt-step 300 --load runs/a": "--load runs/a@300",
    "--data-parallel-sharding-strategy optim_grads_params": "--zero-stage 3",
    "--tokenizer-type Llama2Tokenizer": "--tokenizer sentencepiece",
    "--tokenizer-type HFTokenizer --vocab-file t.json": "--tokenizer hf --tokenizer-model t.json",
    "--learning_rate 1e-4 --max_steps 100": "--lr 1e-4 --train-steps 100",
    "--optim adamw_torch": "--optimizer adamw",
    "--output_dir out --per_device_train_batch_size 4": "--save out --micro-batch-size 4",
    "--resume_from_checkpoint True": "--auto-resume",
    "--block_size=64 --n_embd=128 --batch_size=12 --gradient_accumulation_steps=5":
        "--seq-len 64 --d-model 128 --micro-batch-size 12 --global-batch-size 60",
    "--dropout=0.2": "--model.dropout-embedding 0.2 --model.dropout-attention 0.2 --model.dropout-residual 0.2",
    "--bias=False": "--model.no-bias-attention --model.no-bias-mlp --model.no-bias-norm",
    "--pipe-parallel-size 4 --model-parallel-size 2": "--pp 4 --tp 2",
    "--activation swiglu --intermediate-size 33024": "--model.activation swiglu --model.d-ff 11008",
    "--intermediate-size 11008": "--model.d-ff 11008",
    "--gpt-j-residual --gpt-j-tied true": "--model.block parallel --model.block parallel",
    "--no-position-embedding": "--model.position none",
    "--use-rope-scaling":
        "--model.rotary-scaling llama3 --model.rotary-factor 8 --model.rotary-original-len 8192",
    "--optimizer adam --train-iters 100": "--train-steps 100 --optimizer adamw",
    "--eval-steps 50 --output-dir a": "--save a --eval-interval 50",
}  # fmt: skip
TOLD = {
    "--use-flash-attn": "leave it out: kernels are fused",
    "--num-experts 8": "not here: no mixture of experts",
    "--moe-router-topk 2": "not here: no mixture of experts",
    "--context-parallel-size 1": "leave it out: there is none",
    "--num-train-epochs 1": "instead: --train-steps ends a run",
    "--loss-scale 0": "leave it out",
    "--min-loss-scale 1": "instead: --deepspeed-config takes a JSON",
    "--context-parallel-size 2": "not here: no sequence or context parallelism",
    "--use-rope-scaling --rope-scaling-factor 32": "--model.rotary-factor 32 --model.rotary-original-len 8192",
    "--rope-scaling-factor 32 --use-rope-scaling": "leave it out: --use-rope-scaling has it",
    "--no-position-embedding --use-rotary-position-embeddings": "leave it out: rotary positions",
    "--gradient-accumulation-steps 8 --per-device-train-batch-size 4": "--global-batch-size: 32 x data parallel",
    "--lr-decay-style exponential": "there is no exponential here",
    "--min-lr 1e-5": "--optim.min-lr-fraction is its share of --lr",
    "--nproc-per-node 8": "it belongs to the launcher",
}


def said(line: str) -> UserError:
    with pytest.raises(UserError) as caught:
        parse_run_config(shlex.split(line))
    return caught.value


@pytest.mark.parametrize("line", TRANSLATED)
def test_a_name_of_a_peer_is_translated_with_its_value(line: str):
    error = said(line)
    whole = str(error) if not error.lines else error.lines[-1]
    assert whole.endswith((f"here it is {TRANSLATED[line]}", f"in one: {TRANSLATED[line]}")) or (
        f"here it is {TRANSLATED[line]} (" in whole
    )


@pytest.mark.parametrize("line", TOLD)
def test_what_is_not_here_is_told_why(line: str):
    error = said(line)
    assert TOLD[line] in "\n".join([str(error), *error.lines])


def test_all_unknown_flags_are_told_at_once():
    error = said("--num-layers 2 --tp 1 2 --foo 3 --hidden-size 8 --data-path 0.5 A 0.5 B --bar")
    assert str(error).startswith("5 flags are unknown")
    assert [line.split("  ")[1].strip() for line in error.lines[:-1]] == [
        "--num-layers 2", "2", "--foo 3", "--hidden-size 8", "--bar",
    ]  # fmt: skip
    assert error.lines[-1].endswith(": --n-layers 2 --d-model 8")
    assert "\n" not in "".join([str(error), *error.lines])


def test_all_unknown_keys_of_a_file_are_told_at_once(tmp_path):
    """GPT-NeoX's nested JSON is YAML too."""
    file = tmp_path / "neox.yml"
    file.write_text(
        '{"pipe_parallel_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95]}},\n'
        '"min_lr": 0.00006, "no_weight_tying": true, "init_method": "small_init", "attention_dropout": 0,\n'
        '"output_layer_init_method": "wang_init", "fp16": {"enabled": true}, "tensorboard_dir": "a", "quux": 1}\n'
    )
    error = said(f"--config {file}")
    assert str(error).startswith(f"{file}: 10 keys are unknown")
    told = [line.strip() for line in error.lines]
    assert "pipe_parallel_size: parallel.pp: 2" in told
    assert "optimizer.type: optim.optimizer: adamw" in told
    assert "optimizer.params.lr: optim.lr: 0.0006" in told
    assert "optimizer.params.betas: optim.beta1: 0.9, optim.beta2: 0.95" in told
    assert "min_lr: optim.min_lr_fraction: 0.1" in told
    assert "no_weight_tying: model.tied_embeddings: false" in told
    assert "init_method: model.init: small" in told
    assert "fp16.enabled: train.precision: fp16" in told
    assert "quux: unknown" in told


@pytest.mark.parametrize("names", [*SWITCHES, *CHOICES], ids=str.split)
def test_what_is_offered_is_taken(names: str):
    words = CHOICES[names][1] if names in CHOICES else [""]
    for word in words:
        advice = look_up(names.split()[0], word, {})
        assert advice and advice.settings
        parse_run_config(shlex.split(" ".join(as_flag(key, value) for key, value in advice.settings.items())))


def test_each_name_stands_once_and_is_none_of_ours():
    tables = [*SAME.values(), *SWITCHES, *CHOICES, *BY_ITSELF.values(), *ABSENT.values(), *COMPUTED]
    names = [name for table in tables for name in table.split()]
    assert sorted(names) == sorted(set(names))
    ours = {plain_name(flag) for flags in all_flags().values() for flag in flags}
    ours -= {"precision"}  # which stands without a section in a file of GPT-NeoX
    assert ours & set(names) == set()
    assert SAME.keys() <= all_flags().keys()
    assert all(name == plain_name(name) for name in names)


NEAR = {"--tpp": "--tp", "--model.n-layer": "--model.n-layers", "--save-interal": "--save-interval",
        "--model.tp": "--tp", "--dropout-residual": "--model.dropout-residual"}  # fmt: skip


def test_a_hint_is_right_or_there_is_none():
    known = [flag for flags in all_flags().values() for flag in flags]
    assert {name: nearest(name, known) for name in NEAR} == NEAR
    for name in ("--out", "--beta3", "--dp", "--val-batch-size", "--log-dir", "--size", "--pt", "--name"):
        assert nearest(name, known) is None, name
