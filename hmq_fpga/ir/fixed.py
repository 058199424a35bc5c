"""Fixed-point formats: the only rounding and the only saturation in the package.

A number is an integer *code* times a power-of-two *step*. Rounding is half to even and overflow
saturates, which is what `torch.round`, QKeras and `AP_RND_CONV, AP_SAT` do as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.ir.errors import InvalidInput

Codes = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

MAX_WIDTH = 62  # codes, and differences of two codes, stay within int64
MAX_FRAC = 256  # keeps 2**frac and its inverse normal float64 numbers


@dataclass(frozen=True, order=True)
class Fixed:
    """A fixed-point format: `value = code * 2**-frac`.

    Attributes:
        signed: two's complement if true, else codes start at zero.
        width: total number of bits, sign included, 1 … 62.
        frac: number of fractional bits; negative when the step exceeds one, larger than `width`
            when every value is small (this is `ap_fixed<width, width - frac>`).
    """

    signed: bool
    width: int
    frac: int

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MAX_WIDTH:
            raise InvalidInput(f"bit-width {self.width} is outside 1 … {MAX_WIDTH}")
        if abs(self.frac) > MAX_FRAC:
            raise InvalidInput(f"step 2**{-self.frac} is outside 2**±{MAX_FRAC}")

    @classmethod
    def from_threshold(cls, *, signed: bool, bits: int, threshold_log2: int) -> Fixed:
        """The format of a scheme (threshold `t = 2**threshold_log2`, bit-width `bits`).

        Signed: step `2**(m + 1 - b)`, range `[-t, t - step]`. Unsigned: step `2**(m - b)`, range
        `[0, t - step]`. This replaces Eq. 2–3 of the HMQ paper, whose signed range `[-(t - step), t]`
        does not fit two's complement. A signed tensor of one bit has the levels `{0, t}` (the paper's
        levels for b = 1), which is an unsigned format with step `t`.
        """
        if signed and bits == 1:
            return cls(signed=False, width=1, frac=-threshold_log2)
        return cls(signed=signed, width=bits, frac=bits - signed - threshold_log2)

    @classmethod
    def enclosing(cls, lo: int, hi: int, frac: int) -> Fixed:
        """The narrowest format with fraction `frac` that holds all codes from `lo` to `hi`."""
        if lo > hi:
            raise InvalidInput(f"empty code range {lo} … {hi}")
        if lo >= 0:
            return cls(signed=False, width=max(1, int(hi).bit_length()), frac=frac)
        return cls(signed=True, width=1 + max(int(~lo).bit_length(), int(max(hi, 0)).bit_length()), frac=frac)

    def narrowed(self, width: int) -> Fixed:
        """The format of another width, with the same threshold and sign."""
        return Fixed(signed=self.signed, width=width, frac=self.frac + width - self.width)

    def with_threshold(self, threshold_log2: int) -> Fixed:
        """The format of another threshold, with the same width and sign."""
        return Fixed.from_threshold(signed=self.signed, bits=self.width, threshold_log2=threshold_log2)

    @property
    def step(self) -> float:
        """Distance of two neighbouring values, `2**-frac`."""
        return 2.0**-self.frac

    @property
    def lo(self) -> int:
        """Smallest code."""
        return -(1 << (self.width - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        """Largest code."""
        return (1 << (self.width - self.signed)) - 1

    @property
    def integer(self) -> int:
        """Integer bits as `ap_fixed` counts them: the sign bit included, possibly negative."""
        return self.width - self.frac

    @property
    def threshold_log2(self) -> int:
        """`m` of the threshold `t = 2**m`; also the `integer` argument of QKeras quantizers."""
        return self.width - self.signed - self.frac

    def encode(self, values: npt.ArrayLike) -> Codes:
        """Round real values to codes, half to even, saturating; infinities saturate.

        Raises:
            InvalidInput: where a value is NaN.
        """
        with np.errstate(over="ignore"):  # what overflows to infinity saturates below
            scaled = np.asarray(values, dtype=np.float64) * 2.0**self.frac
        if np.isnan(scaled).any():
            raise InvalidInput("NaN cannot be quantized: clean the data or the weights first")
        # ±2**62 is exact in float64 and beyond every format: the clip to `lo`, `hi` is done on integers
        return self._saturate(np.clip(np.rint(scaled), -(2.0**62), 2.0**62).astype(np.int64))

    def decode(self, codes: npt.ArrayLike) -> Reals:
        """Codes to real values, exact while codes fit the 53 bits of float64."""
        return np.asarray(codes, dtype=np.int64).astype(np.float64) * self.step

    def requantize(self, codes: npt.ArrayLike, frac: int) -> Codes:
        """Codes with fraction `frac` to codes of this format, in integers only.

        Equal to `encode(decode(codes))` wherever that is exact.
        """
        x = np.asarray(codes, dtype=np.int64)
        shift = frac - self.frac
        if shift <= 0:  # a finer or equal grid: nothing to round; clip first so that the shift cannot wrap
            up = min(-shift, MAX_WIDTH)
            return self._saturate(np.clip(x, (self.lo >> up) - 1, (self.hi >> up) + 1) << up)
        if shift > MAX_WIDTH:  # below half a step: everything rounds to zero
            return self._saturate(np.zeros_like(x))
        floor = x >> shift
        past_half = (x - (floor << shift)) - (1 << (shift - 1))
        round_up = (past_half > 0) | ((past_half == 0) & ((floor & 1) == 1))
        return self._saturate(floor + round_up)

    def contains(self, codes: npt.ArrayLike) -> bool:
        """Whether every code is one of this format's."""
        x = np.asarray(codes)
        return x.size == 0 or bool(x.min() >= self.lo and x.max() <= self.hi)

    def _saturate(self, codes: Codes) -> Codes:
        return np.clip(codes, self.lo, self.hi)

    def to_json(self) -> dict[str, Any]:
        """`{"signed", "width", "frac"}`."""
        return {"signed": self.signed, "width": self.width, "frac": self.frac}

    @classmethod
    def from_json(cls, data: object) -> Fixed:
        """Inverse of `to_json`; raises `InvalidInput` for anything else."""
        match data:
            case {"signed": bool(signed), "width": int(width), "frac": int(frac), **rest} if not rest:
                if bool not in (type(width), type(frac)):
                    return cls(signed=signed, width=width, frac=frac)
        raise InvalidInput(f"not a fixed-point format: {data!r}")

    def __str__(self) -> str:
        """The Vivado/Vitis HLS type."""
        kind = "ap_fixed" if self.signed else "ap_ufixed"
        return f"{kind}<{self.width},{self.integer},AP_RND_CONV,AP_SAT>"
