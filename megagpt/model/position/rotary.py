"""Rotary positions: queries and keys turned by angles that grow with the position.

How frequencies are changed to reach further than was trained is a class of Scaling below, and a line of SCALINGS.

Shapes: R pairs that are turned, rotary_width / 2.
Source: Su et al. 2021 (RoFormer), section 3.4.2; Wang & Komatsuzaki 2021 (a part of the width, GPT-J's pairs of
neighbours).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from megagpt.errors import require
from megagpt.model.position.kind import Position

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import ModelConfig


class Rotary(Position):
    """Of the width of a head the first rotary_width elements are turned."""

    settings = ("rotary_",)
    ops = ("rotary",)

    def __init__(self, model: ModelConfig, layer: int = 0) -> None:
        super().__init__(model, layer)
        # Computed from the configuration and never stored: a model in 16 bits would round buffers.
        self.tables: dict[tuple, tuple[int, Tensor, Tensor]] = {}

    def check(self) -> None:
        model, turned = self.model, self.model.rotary_width
        require(
            turned % 2 == 0 and turned > 0 and model.rotary_fraction <= 1,
            f"model.position={model.position} with heads of width {model.head_width}, "
            f"rotary_fraction={model.rotary_fraction}",
            f"must turn pairs of numbers within a head, not {turned} of {model.head_width}",
            "set d_head to an even number, rotary_fraction to at most 1",
            *("model.position", "model.rotary_fraction", "model.d_head"),
        )
        scaling_of(model).check()

    def turn(self, x_BTGXK: Tensor, positions_BT: Tensor | None, n_turned: int | None, kernels: str) -> Tensor:
        import torch  # computes: what is declared is read without torch

        from megagpt.ops.rotary import rotary  # likewise

        cos_SR, sin_SR = self._tables_like(x_BTGXK, positions_BT)
        if positions_BT is None:
            cos_SR, sin_SR = cos_SR[: x_BTGXK.shape[1]], sin_SR[: x_BTGXK.shape[1]]
        elif isinstance(scaling_of(self.model), Dynamic):
            positions_BT = torch.arange(positions_BT.numel(), device=positions_BT.device).view_as(positions_BT)
        return rotary(
            x_BTGXK,
            cos_SR,
            sin_SR,
            positions_BT=positions_BT,
            n_rotated_heads=n_turned,
            interleaved=self.model.rotary_interleaved,
            kernels=kernels,
        )

    def _tables_like(self, x_BTGXK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        import torch  # likewise

        from megagpt.ops.rotary import rotary_tables  # likewise

        scaling, dtype = scaling_of(self.model), torch.float64 if x_BTGXK.dtype == torch.float64 else torch.float32
        if positions_BT is not None and isinstance(scaling, Dynamic):  # a row for each token, in place of each position
            angle_SR = scaling.angles(positions_BT).flatten(0, 1)
            return angle_SR.cos().to(dtype), angle_SR.sin().to(dtype)
        length = scaling.length(x_BTGXK.shape[1])
        made_for, *tables = self.tables.get((x_BTGXK.device, dtype), (None,))
        if made_for != length:
            frequency_R, magnitude = scaling.frequencies(length), scaling.magnitude
            tables = rotary_tables(self.model.seq_len, frequency_R, magnitude, device=x_BTGXK.device, dtype=dtype)
            self.tables[x_BTGXK.device, dtype] = (length, *tables)
        cos_SR, sin_SR = tables
        return cos_SR, sin_SR


class Scaling:
    """Divide positions by the factor.  Source: Chen et al. 2023, section 2.3.

    settings: the fields of the model that it reads, beside base and factor.
    """

    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def check(self) -> None:
        """Raises UserError for settings that do not fit together."""

    @property
    def original_len(self) -> int:
        """Tokens of context before the frequencies were changed: rotary_original_len, resolved."""
        return self.model.rotary_original_len or max(1, round(self.model.seq_len / self.model.rotary_factor))

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied with while they are turned."""
        return 1.0

    def length(self, n_positions: int) -> int:
        """The length that the frequencies of so many positions are made for: one for all, for most kinds."""
        return self.model.seq_len

    def frequencies(self, length: int) -> Tensor:
        """Radians a token of each pair.  Shapes: → (R) float64."""
        return self._unscaled() / self.model.rotary_factor

    def _unscaled(self, base: float | None = None) -> Tensor:
        from megagpt.ops.rotary import rotary_frequencies  # computes: what is declared is read without torch

        return rotary_frequencies(self.model.rotary_width, base or self.model.rotary_base)


class NTK(Scaling):
    """Raise the base, so that the slowest pair is slower by the factor, and the fastest stays.

    Source: bloc97 2023, "NTK-aware scaled RoPE"; Peng et al. 2023 (YaRN), section 3.1, equation 16.
    """

    def frequencies(self, length: int) -> Tensor:
        return self._unscaled(self.base)

    @property
    def base(self) -> float:
        """The raised base."""
        return raised_base(self.model.rotary_base, self.model.rotary_factor, self.model.rotary_width)


class Dynamic(Scaling):
    """Raise the base by as much as the sequence at hand is longer than the original context; at most that: unchanged.

    While a text is written, its length is that of so far: keys in the cache keep the angles that they were turned by.

    Source: emozilla 2023, "Dynamically scaled RoPE"; transformers' rope_type "dynamic".
    """

    settings = ("rotary_original_len",)

    def length(self, n_positions: int) -> int:
        return max(n_positions, self.original_len)

    def frequencies(self, length: int) -> Tensor:
        return self._unscaled(raised_base(self.model.rotary_base, self._reach(length), self.model.rotary_width))

    def angles(self, positions_BT: Tensor) -> Tensor:
        """Radians of each pair, each text by its own length, which ends at its last position.

        Shapes: → (B, T, R) float64, on the device of positions_BT, which is not waited for.
        """
        import torch  # computes: what is declared is read without torch

        width = self.model.rotary_width
        reach_B = self._reach((positions_BT.amax(1) + 1).clamp(min=self.original_len).double())
        base_B = self.model.rotary_base * reach_B ** (width / (width - 2) if width > 2 else 0.0)  # as raised_base
        part_R = torch.arange(0, width, 2, dtype=torch.float64, device=positions_BT.device) / width
        return positions_BT[:, :, None] * (base_B[:, None] ** -part_R)[:, None]

    def _reach(self, length: Any) -> Any:
        """How far the base is raised for a length, or for each of several."""
        factor = self.model.rotary_factor
        return factor * length / self.original_len - (factor - 1)


class YaRN(Scaling):
    """Divide the frequencies of pairs that turn seldom within the original context, leave those that turn often.

    In between, over pairs from rotary_beta_fast to rotary_beta_slow turns, both are mixed. Queries and keys grow by
    rotary_attention_factor.  Source: Peng et al. 2023 (YaRN), sections 3.2 to 3.4.
    """

    settings = (
        "rotary_original_len",
        "rotary_beta_fast",
        "rotary_beta_slow",
        "rotary_truncate",
        "rotary_attention_factor",
    )

    def check(self) -> None:
        model = self.model
        require(
            model.rotary_beta_fast >= model.rotary_beta_slow and model.rotary_base > 1,
            f"model.rotary_beta_fast={model.rotary_beta_fast}, rotary_beta_slow={model.rotary_beta_slow} with "
            f"rotary_base={model.rotary_base}",
            "must be turns, the fast ones more than the slow ones, and a base above 1",
            "leave them at 32, 1 and 10000",
            *("model.rotary_beta_fast", "model.rotary_beta_slow", "model.rotary_base"),
        )

    @property
    def magnitude(self) -> float:
        given = self.model.rotary_attention_factor
        return yarn_magnitude(self.model.rotary_factor) if given is None else given

    def frequencies(self, length: int) -> Tensor:
        import torch  # likewise

        low, high = self._pair(self.model.rotary_beta_fast), self._pair(self.model.rotary_beta_slow)
        if self.model.rotary_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.model.rotary_width - 1)
        width = high - low if high != low else 0.001
        plain_R = self._unscaled()
        divided_R = ((torch.arange(len(plain_R), dtype=torch.float64) - low) / width).clamp(0, 1)
        return plain_R / self.model.rotary_factor * divided_R + plain_R * (1 - divided_R)

    def _pair(self, turns: float) -> float:
        """The pair that turns so often within the original context, as a fraction of their number."""
        wavelength = self.original_len / (turns * 2 * math.pi)
        return self.model.rotary_width * math.log(wavelength) / (2 * math.log(self.model.rotary_base))


class Llama3(Scaling):
    """Divide the frequencies whose wavelength is long beside the original context, leave the short ones, mix between.

    Source: Grattafiori et al. 2024 (Llama 3), section 3.4.1; transformers' rope_type "llama3".
    """

    settings = ("rotary_original_len", "rotary_low_freq_factor", "rotary_high_freq_factor")

    def check(self) -> None:
        low, high = self.model.rotary_low_freq_factor, self.model.rotary_high_freq_factor
        require(
            low < high,
            f"model.rotary_low_freq_factor={low} with rotary_high_freq_factor={high}",
            "must be the smaller of the two",
            "leave them at 1 and 4",
            *("model.rotary_low_freq_factor", "model.rotary_high_freq_factor"),
        )

    def frequencies(self, length: int) -> Tensor:
        low, high = self.model.rotary_low_freq_factor, self.model.rotary_high_freq_factor
        plain_R = self._unscaled()
        waves_R = self.original_len * plain_R / (2 * math.pi)  # within the original context
        kept_R = ((waves_R - low) / (high - low)).clamp(0, 1)
        return plain_R / self.model.rotary_factor * (1 - kept_R) + plain_R * kept_R


SCALINGS: dict[str, type[Scaling]] = {
    "linear": Scaling,
    "ntk": NTK,
    "dynamic": Dynamic,
    "yarn": YaRN,
    "llama3": Llama3,
}


def scaling_of(model: ModelConfig) -> Scaling:
    """The kind that a model has."""
    return SCALINGS[model.rotary_scaling](model)


def raised_base(base: float, factor: float, d_rotary: int) -> float:
    """The base whose longest wavelength is factor times that of `base`, and whose shortest one is the same."""
    return base * factor ** (d_rotary / (d_rotary - 2)) if d_rotary > 2 else base  # a single pair knows no base


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys with.  Source: Peng et al. 2023, section 3.4, equation 22."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
