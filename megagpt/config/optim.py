"""The optimizer, its schedule, clipping, and what is added to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megagpt.config.checks import fraction, not_negative, positive
from megagpt.config.values import Short
from megagpt.errors import require
from megagpt.optim import OPTIMIZERS

if TYPE_CHECKING:
    OptimizerName = str
else:  # flags and YAML files offer what is listed there
    OptimizerName = Literal[*OPTIMIZERS]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, clipping, and what is added to the loss."""

    optimizer: Short[OptimizerName] = "adamw"
    """AdamW; Adam (decay within the gradient); Adafactor, or with whole second moments (PaLM); Lion; Muon, with AdamW
    for what is no matrix of a block."""
    lr: Short[float] = 2e-3
    """Peak learning rate; Adafactor takes it times the root mean square of a tensor's weights."""
    schedule: Short[Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"]] = "cosine"
    """How the rate falls after warm-up and hold: to min_lr_fraction by a cosine or a line, with 1 / sqrt(step), not at
    all, or (warm-up, stable, decay) by a line in the last decay_fraction of the run."""
    min_lr_fraction: float = 0.1
    """The rate ends at this share of the peak."""
    warmup_steps: Short[int] = 20
    """Steps of linear warm-up."""
    warmup_tokens: Short[int | None] = None
    """Tokens of linear warm-up, in place of steps."""
    warmup_from: float = 0.0
    """Learning rate that the warm-up begins at."""
    hold_steps: int = 0
    """Steps at the peak between warm-up and decay."""
    decay_steps: int | None = None
    """Step at which the decay ends; default train.train_steps."""
    decay_tokens: int | None = None
    """Tokens after which the decay ends, in place of decay_steps."""
    decay_fraction: float = 0.1
    """Share of the run that wsd decays in."""
    beta1: float = 0.9
    """Decay rate of the first moment (Adam, adafactor_unfactored, Lion), or momentum (Muon)."""
    beta2: float = 0.95
    """Decay rate of the second moment (Adam); of the momentum (Lion)."""
    beta2_power: float = 0.8
    """Adafactor: the second moment decays by 1 - step^-this."""
    eps: float = 1e-8
    """Adam's epsilon; the least root of a second moment that Adafactor divides by."""
    weight_decay: Short[float] = 0.1
    """Decay of weights, decoupled but for adam; none on biases and norms."""
    weight_decay_times: Literal["lr", "lr_squared"] = "lr"
    """A step shrinks weights by weight_decay times this (PaLM: lr squared)."""
    clip: Short[float] = 1.0
    """Clip gradients to this global norm; 0 turns clipping off."""
    z_loss: float = 0.0
    """Add this times log(Z)^2 to the loss of a token, Z its softmax's denominator (PaLM: 1e-4)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay a step; default none."""

    def __post_init__(self) -> None:
        positive("optim", self, "lr", "eps", "decay_steps", "warmup_tokens", "decay_tokens", "beta2_power")
        fraction("optim", self, "beta1", "beta2", "label_smoothing")
        not_negative("optim", self, "weight_decay", "clip", "z_loss", "warmup_steps", "warmup_from", "hold_steps")
        self._check_schedule()
        for name in ("min_lr_fraction", "decay_fraction"):
            key, value = f"optim.{name}", getattr(self, name)
            require(0 <= value <= 1, f"{key}={value}", "must be between 0 and 1", "0.1 is usual", key)
        OPTIMIZERS[self.optimizer].check(self)
        if self.ema_decay is not None:
            fraction("optim", self, "ema_decay")

    def _check_schedule(self) -> None:
        """What would be ignored, or leave nothing to decay in."""
        steps, tokens = self.decay_steps, self.decay_tokens
        ends = f"optim.decay_steps={steps}, decay_tokens={tokens}"
        of_end = ("optim.decay_steps", "optim.decay_tokens")
        require(None in (steps, tokens), ends, "both end the decay", "give one of them", *of_end)
        no_end = self.schedule in ("constant", "inverse_sqrt")
        got = f"optim.schedule={self.schedule} with {ends}"
        ok, remedy = not no_end or steps is tokens is None, "drop it, or decay by a line"
        require(ok, got, "would not look at that end", remedy, "optim.schedule", *of_end)
        warm = self.warmup_tokens
        require(
            warm is None or tokens is None or warm < tokens,
            f"optim.warmup_tokens={warm}",
            f"is not below decay_tokens={tokens}",
            "shorten the warm-up",
            *("optim.warmup_tokens", "optim.decay_tokens"),
        )
        starts = self.warmup_steps + self.hold_steps > 0 or warm is not None
        require(
            self.schedule != "inverse_sqrt" or starts,
            "optim.schedule=inverse_sqrt without warm-up",
            "has no step to begin at",
            "give --optim.hold-steps (PaLM: 10000) or --warmup-steps",
            *("optim.schedule", "optim.warmup_steps", "optim.hold_steps"),
        )
        got = f"optim.warmup_from={self.warmup_from}"
        keys = ("optim.warmup_from", "optim.lr")
        require(self.warmup_from <= self.lr, got, f"is above lr={self.lr}", "a warm-up rises; lower it", *keys)
