"""What a peer's flag or key is here: its name and its value translated, by the tables of peers.py and some arithmetic.

Only a name that we do not know is looked up, when a run has been refused already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from megagpt.cli.peers import ABSENT, BY_ITSELF, CHOICES, SAME, SWITCHES
from megagpt.errors import nearest

Given = Mapping[
    str, str
]  # all that stands beside a name, by plain_name: a value that is translated may depend on others


@dataclass(frozen=True)
class Advice:
    """What to write in place of a peer's name: settings by dotted key, values as text; or, without any, why nothing."""

    settings: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


Rule = Callable[[str, Given], Advice]


def advise(name: str, value: str, given: Given, known: Iterable[str]) -> Advice:
    """What a name that is not ours is here: a peer's, translated; or a slip of the hand; empty where nobody knows.

    name: as it stands there. value: "" where there is none.  given: all that stands there, by `plain_name`.
    known: what there is, as it is typed.
    """
    plain = plain_name(name)
    if found := look_up(plain, value, given):
        return found
    if near := nearest(name, known):
        return Advice(note=f"did you mean {near}?")
    return look_up(plain.rpartition(".")[2], value, given) or Advice()  # under a section of ours, or some other one


def look_up(name: str, value: str, given: Given) -> Advice | None:
    """What the tables say of a plain name."""
    rule = _rules().get(name) or next((rule for form, rule in _patterns() if fnmatchcase(name, form)), None)
    return rule(value, given) if rule else None


def also_means_other(given: Given) -> dict[str, Advice]:
    """Names that we know too, by which the program that the others are of means something else."""
    found = {}
    if given.get("optimizer") == "adam" and any(name in given for name in ("train-iters", "train-samples")):
        found["--optimizer adam"] = Advice({"optim.optimizer": "adamw"}, "Megatron-LM's adam decouples its decay")
    steps = given.get("eval-steps")
    if steps and any(name in given for name in ("output-dir", "per-device-train-batch-size", "max-steps")):
        found[f"--eval-steps {steps}"] = Advice({"log.eval_interval": steps}, "the Trainer's are between evaluations")
    return found


def plain_name(name: str) -> str:
    """--Num_Layers → num-layers."""
    return name.lstrip("-").replace("_", "-").lower()


def _same(key: str, value: str, _: Given) -> Advice:
    return Advice({key: value})


def _switch(means: Mapping[str, str], value: str, _: Given) -> Advice:
    if value.lower() in ("false", "0", "no"):
        turned = {key: {"True": "False", "False": "True"}.get(to, "") for key, to in means.items()}
        return Advice(turned) if all(turned.values()) else Advice(note="leave it out: it is off")
    return Advice(means)


def _choice(key: str, words: Mapping[str, str], value: str, _: Given | None = None) -> Advice:
    if (word := words.get(value.lower())) is not None:
        return Advice({key: word})
    return Advice(note=f"there is no {value or 'such choice'} here; {key} has others, see --help")


def _by_itself(why: str, _: str, __: Given) -> Advice:
    return Advice(note=f"leave it out: {why}")


def _absent(why: str, value: str, _: Given) -> Advice:
    is_elsewhere = why.startswith(("--", "tools/", "examples/"))
    if value.lower() in ("false", "0", "none", "null"):
        return Advice(note="leave it out" if is_elsewhere else "leave it out: there is none")
    if value == "1" and not is_elsewhere:  # of a size, which shares nothing out
        return Advice(note="leave it out: there is none")
    return Advice(note=f"{'instead' if is_elsewhere else 'not here'}: {why}")


def _float(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _number(given: Given, *names: str) -> float | None:
    """The first of these that is there and a number."""
    found = (_float(given[name]) for name in names if name in given)
    return next((number for number in found if number is not None), None)


def _text(value: float) -> str:
    """As it is typed: 0.1, 3000."""
    return f"{value:.0f}" if value == round(value) else f"{value:.6g}"


def _batch(given: Given) -> float | None:
    return _number(given, "global-batch-size", "train-batch-size", "train.global-batch-size")


def _context(given: Given) -> float | None:
    return _number(given, "seq-length", "seq-len", "block-size", "max-seq-length", "model.seq-len")


def _decay_steps(given: Given) -> float | None:
    """Steps until the rate has fallen: those of the whole run, where nothing else is said."""
    names = (
        "lr-decay-iters",
        "decay-steps",
        "optim.decay-steps",
        "train-iters",
        "max-steps",
        "max-iters",
        "train-steps",
    )
    steps, samples, batch = _number(given, *names), _number(given, "lr-decay-samples", "train-samples"), _batch(given)
    return steps if steps is not None or samples is None or batch is None else samples // batch


def _min_lr(value: str, given: Given) -> Advice:
    peak, least = _number(given, "lr", "learning-rate", "optimizer.params.lr", "optim.lr"), _float(value)
    if peak and least is not None:
        return Advice({"optim.min_lr_fraction": _text(least / peak)})
    return Advice(note="--optim.min-lr-fraction is its share of --lr")


def _warmup_share(value: str, given: Given) -> Advice:
    share, steps = _float(value), _decay_steps(given)
    if share is not None and share >= 1:  # Megatron-LM's old --warmup
        return Advice({"optim.warmup_steps": value})
    if share is not None and steps is not None:
        return Advice({"optim.warmup_steps": _text(round(share * steps))})
    return Advice(note="--warmup-steps: that share of the steps")


def _in_tokens(key: str, value: str, given: Given) -> Advice:
    samples, length = _float(value), _context(given)
    if samples is not None and length is not None:
        return Advice({key: _text(samples * length)})
    return Advice(note=f"{key} counts tokens: samples times --seq-len")


def _train_samples(value: str, given: Given) -> Advice:
    samples, batch = _float(value), _batch(given)
    if samples is not None and batch and "rampup-batch-size" not in given:
        return Advice({"train.train_steps": _text(samples // batch)})
    return Advice(note="--train-steps counts steps; tools/plan.py shows the tokens of a run")


def _accumulation(value: str, given: Given) -> Advice:
    micro = _number(
        given, "per-device-train-batch-size", "train-micro-batch-size-per-gpu", "micro-batch-size", "batch-size"
    )
    steps = _float(value)
    if micro is None or steps is None:
        return Advice(note="--global-batch-size: micro-batch size x these x data parallel processes")
    if any(name in given for name in ("block-size", "n-embd", "n-layer", "max-iters")):  # nanoGPT's count all processes
        return Advice({"train.global_batch_size": _text(micro * steps)})
    return Advice(note=f"--global-batch-size: {_text(micro * steps)} x data parallel processes")


def _rampup(value: str, given: Given) -> Advice:
    words, length = value.split(), _context(given)
    if len(words) != 3 or length is None:
        return Advice(note="--train.batch-ramp-start, -increment and -tokens (samples times --seq-len)")
    tokens = _text((_float(words[2]) or 0) * length)
    keys = ("train.batch_ramp_start", "train.batch_ramp_increment", "train.batch_ramp_tokens")
    return Advice(dict(zip(keys, (words[0], words[1], tokens), strict=True)))


def _dropout(value: str, _: Given) -> Advice:
    return Advice({"model.dropout_embedding": value, "model.dropout_residual": value})


def _dropout_everywhere(value: str, _: Given) -> Advice:
    return Advice({f"model.dropout_{name}": value for name in ("embedding", "attention", "residual")})


def _window(extra: int, value: str, _: Given) -> Advice:
    left = _float(value.strip("()[]").split(",")[0])
    return Advice(
        {"model.attention": f"window:{_text(left + extra)}"} if left and left > 0 else {"model.attention": "dense"}
    )


def _intermediate(value: str, given: Given) -> Advice:
    width = _float(value)
    if width and given.get("activation", "") in _GATED_NEOX:  # which it divides by 3, so that parameters stay the same
        multiple = _number(given, "mlp-multiple-of") or 1
        return Advice({"model.d_ff": _text(-(-(width * 2 // 3 // 2) // multiple) * multiple)})
    return Advice({"model.d_ff": value})


_GATED_NEOX = ("swiglu", "geglu", "reglu", "bilinear", "glu")


def _activation(value: str, given: Given) -> Advice:
    if value == "gelu":
        tanh = given.get("bias-gelu-fusion", "").lower() == "true"
        return Advice({"model.activation": "gelu_tanh" if tanh else "gelu"})
    return _choice("model.activation", {name: name for name in ("geglu", "swiglu", "relu")}, value, given)


def _parallel_residual(value: str, given: Given) -> Advice:
    tied = given.get("gpt-j-tied", "").lower() == "true"
    return _switch({"model.block": "parallel" if tied else "parallel_two_norms"}, value, given)


def _init_method(value: str, given: Given) -> Advice:
    pair = given.get("init-method", "normal"), given.get("output-layer-init-method", "scaled_normal")
    ours = {("normal", "scaled_normal"): "gpt2", ("normal", "normal"): "normal", ("small_init", "wang_init"): "small"}
    if pair in ours:
        return Advice({"model.init": ours[pair]})
    return Advice(note=f"there is no {value} here; --model.init has gpt2, normal, small and fan_in")


def _recompute(value: str, _: Given) -> Advice:
    if value == "full":
        return Advice({"parallel.recompute": "True"})
    return Advice(note="leave it out: fused attention keeps no scores; --recompute recomputes whole blocks")


def _minutes(value: str, _: Given) -> Advice:
    minutes = _float(value)
    return (
        Advice({"faults.progress_timeout_s": _text(60 * minutes)})
        if minutes
        else Advice(note="--faults.progress-timeout-s")
    )


def _resume(value: str, _: Given) -> Advice:
    if value.lower() in ("", "true", "latest"):
        return Advice({"checkpoint.auto_resume": "True"}, "with --save RUN")
    return Advice({"checkpoint.load": value})


def _step_of_load(value: str, given: Given) -> Advice:
    return Advice({"checkpoint.load": f"{given.get('load', 'RUN')}@{value}"})


def _init_from(value: str, given: Given) -> Advice:
    if value == "resume":
        return _resume("", given)
    return Advice(note="leave it out; --preset names a model, tools/checkpoint.py import brings its weights")


def _no_position(value: str, given: Given) -> Advice:
    if "use-rotary-position-embeddings" in given or given.get("position-embedding-type") == "rope":
        return Advice(note="leave it out: rotary positions add nothing to the embeddings")
    return _switch({"model.position": "none"}, value, given)


def _rope_scaling(value: str, given: Given) -> Advice:
    """Megatron-LM's is that of Llama 3.1, whose other numbers stand in its rotary_pos_embedding.py."""
    factor = _text(_number(given, "rope-scaling-factor") or 8)
    means = {"model.rotary_scaling": "llama3", "model.rotary_factor": factor, "model.rotary_original_len": "8192"}
    return _switch(means, value, given)


def _rope_scaling_factor(value: str, given: Given) -> Advice:
    if "use-rope-scaling" in given:
        return Advice(note="leave it out: --use-rope-scaling has it")
    return Advice({"model.rotary_factor": value})


def _betas(value: str, _: Given) -> Advice:
    words = value.strip("[]()").replace(",", " ").split()
    return Advice(dict(zip(("optim.beta1", "optim.beta2"), words, strict=False)))


def _wsd_steps(value: str, given: Given) -> Advice:
    steps, whole = _float(value), _decay_steps(given)
    if steps and whole:
        return Advice({"optim.decay_fraction": _text(steps / whole)}, "by a line")
    return Advice(note="--optim.decay-fraction: their share of the run")


def _schedule(value: str, given: Given) -> Advice:
    advice = _choice("optim.schedule", _SCHEDULES, value)
    falls = advice.settings.get("optim.schedule") in ("cosine", "linear", "wsd")
    if not falls or any(name.startswith("min-lr") for name in given):
        return advice
    return Advice({**advice.settings, "optim.min_lr_fraction": "0"}, "which ends at 0 there")


_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse-square-root": "inverse_sqrt",
    "inverse_sqrt": "inverse_sqrt",
    "wsd": "wsd",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
    "warmuplr": "constant",
    "warmupdecaylr": "linear",
    "warmupcosinelr": "cosine",
}


def _tokenizer(value: str, given: Given) -> Advice:
    if value.lower() == "nulltokenizer":
        return Advice(note="leave it out: --vocab-size alone will do")
    advice = _choice("data.tokenizer", _TOKENIZERS, value)
    if value.lower() == "hftokenizer" and "vocab-file" in given:  # where GPT-NeoX has its tokenizer.json
        return Advice({**advice.settings, "data.tokenizer_model": given["vocab-file"]}, "in place of --vocab-file")
    return advice


_TOKENIZERS = {
    "gpt2bpetokenizer": "gpt2",
    "sentencepiecetokenizer": "sentencepiece",
    "gptsentencepiecetokenizer": "sentencepiece",
    "llama2tokenizer": "sentencepiece",
    "spmtokenizer": "sentencepiece",
    "huggingfacetokenizer": "hf",
    "pretrainedfromhf": "hf",
    "hftokenizer": "hf",
}


def _swiglu(_: str, given: Given) -> Advice:
    width = _number(given, "hidden-size", "d-model", "model.d-model")
    if width is None or "ffn-hidden-size" in given:
        return Advice({"model.activation": "swiglu"})
    # Megatron-LM's own width beside this flag.
    return Advice({"model.activation": "swiglu", "model.d_ff": _text(int(4 * width * 2 / 3 / 64) * 64)})


def _deepspeed_file(value: str, _: Given) -> Advice:
    return Advice({"train.deepspeed_config": value}) if value else Advice(note="leave it out")


COMPUTED: dict[str, Rule] = {
    "min-lr": _min_lr,
    "lr-warmup-fraction warmup-ratio warmup-fraction warmup": _warmup_share,
    "lr-warmup-samples": functools.partial(_in_tokens, "optim.warmup_tokens"),
    "lr-decay-samples": functools.partial(_in_tokens, "optim.decay_tokens"),
    "lr-wsd-decay-iters": _wsd_steps,
    "train-samples": _train_samples,
    "rampup-batch-size": _rampup,
    "batch-size": functools.partial(_same, "train.micro_batch_size"),
    "gradient-accumulation-steps": _accumulation,
    "hidden-dropout": _dropout,
    "dropout": _dropout_everywhere,
    "window-size sliding-window-width": functools.partial(_window, 1),
    "sliding-window": functools.partial(_window, 0),
    "intermediate-size": _intermediate,
    "activation": _activation,
    "gpt-j-residual use-parallel-residual": _parallel_residual,
    "init-method output-layer-init-method": _init_method,
    "recompute-granularity recompute-activations": _recompute,
    "lr-decay-style lr-scheduler-type scheduler.type": _schedule,
    "tokenizer-type": _tokenizer,
    "swiglu": _swiglu,
    "distributed-timeout-minutes": _minutes,
    "resume-from-checkpoint resume": _resume,
    "ckpt-step": _step_of_load,
    "init-from": _init_from,
    "no-position-embedding": _no_position,
    "use-rope-scaling": _rope_scaling,
    "rope-scaling-factor": _rope_scaling_factor,
    "betas optimizer.params.betas": _betas,
    "deepspeed": _deepspeed_file,
}


@functools.cache
def _rules() -> dict[str, Rule]:
    """Name → what is said of it."""
    rules: dict[str, Rule] = {}
    for key, names in SAME.items():
        rules |= dict.fromkeys(names.split(), functools.partial(_same, key))
    for names, means in SWITCHES.items():
        rules |= dict.fromkeys(names.split(), functools.partial(_switch, means))
    for names, (key, words) in CHOICES.items():
        rules |= dict.fromkeys(names.split(), functools.partial(_choice, key, words))
    for why, names in BY_ITSELF.items():
        rules |= dict.fromkeys(names.split(), functools.partial(_by_itself, why))
    for why, names in ABSENT.items():
        rules |= dict.fromkeys(names.split(), functools.partial(_absent, why))
    for names, rule in COMPUTED.items():
        rules |= dict.fromkeys(names.split(), rule)
    return rules


@functools.cache
def _patterns() -> list[tuple[str, Rule]]:
    return [(form, rule) for form, rule in _rules().items() if "*" in form]
