from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import MAX_FRAC, MAX_WIDTH, Fixed
from tests.strategies import formats

ANY_FORMAT = st.builds(
    Fixed, signed=st.booleans(), width=st.integers(1, MAX_WIDTH), frac=st.integers(-MAX_FRAC, MAX_FRAC)
)
EXACT = st.integers(-(2**53), 2**53)  # codes that float64 holds
FRACS = st.integers(-70, 70)
REALS = st.floats(allow_nan=False)


def exact(value: float | Fraction, format_: Fixed) -> int:
    """The code by rational arithmetic: Python rounds a Fraction half to even."""
    return min(max(round(Fraction(value) * Fraction(2) ** format_.frac), format_.lo), format_.hi)


@given(ANY_FORMAT, st.lists(EXACT, min_size=1), FRACS)
def test_requantize_is_encode_of_decode(format_: Fixed, codes: list[int], frac: int) -> None:
    values = Fixed(signed=True, width=55, frac=frac).decode(codes)
    assert_array_equal(format_.requantize(codes, frac), format_.encode(values))


@given(ANY_FORMAT, st.integers(-(2**62) + 1, 2**62 - 1), FRACS)
def test_requantize_is_exact_for_all_codes(format_: Fixed, code: int, frac: int) -> None:
    assert format_.requantize(code, frac) == exact(Fraction(code) / Fraction(2) ** frac, format_)


@given(ANY_FORMAT, st.integers(-(2**62) + 1, 2**62 - 1), st.integers(-MAX_WIDTH - 3, MAX_WIDTH + 3))
def test_requantize_is_exact_near_the_format(format_: Fixed, code: int, shift: int) -> None:
    frac = format_.frac + shift
    assert format_.requantize(code, frac) == exact(Fraction(code) / Fraction(2) ** frac, format_)


@given(ANY_FORMAT, REALS.filter(np.isfinite))
def test_encode_rounds_half_to_even_and_saturates(format_: Fixed, value: float) -> None:
    assume(abs(value) < 2.0**500 and (value == 0 or abs(value) > 2.0**-500))  # where scaling is exact
    assert format_.encode(value) == exact(value, format_)


@given(formats(), st.data())
def test_every_code_survives_decoding(format_: Fixed, data: st.DataObject) -> None:
    code = data.draw(st.integers(format_.lo, format_.hi))
    assert format_.encode(format_.decode(code)) == code
    assert format_.requantize(code, format_.frac) == code


@given(ANY_FORMAT, st.lists(REALS, min_size=1))
def test_encoding_twice_changes_nothing(format_: Fixed, values: list[float]) -> None:
    assume(format_.width <= 53)
    once = format_.encode(values)
    assert_array_equal(format_.encode(format_.decode(once)), once)
    assert_array_equal(format_.requantize(once, format_.frac), once)


@given(ANY_FORMAT, st.lists(REALS, min_size=2))
def test_encode_is_monotone(format_: Fixed, values: list[float]) -> None:
    assert (np.diff(format_.encode(sorted(values))) >= 0).all()


@given(ANY_FORMAT, st.lists(EXACT, min_size=2), FRACS)
def test_requantize_is_monotone(format_: Fixed, codes: list[int], frac: int) -> None:
    assert (np.diff(format_.requantize(sorted(codes), frac)) >= 0).all()


@given(ANY_FORMAT, st.lists(REALS, min_size=1))
def test_encode_stays_in_range(format_: Fixed, values: list[float]) -> None:
    assert format_.contains(format_.encode(values))


@given(ANY_FORMAT)
def test_extremes_saturate(format_: Fixed) -> None:
    huge = np.finfo(np.float64).max
    codes = format_.encode([-np.inf, -huge, huge, np.inf])
    at_most = exact(huge, format_)  # the coarsest and widest formats hold even these
    assert_array_equal(codes, [format_.lo, exact(-huge, format_), at_most, format_.hi])


def test_ties_go_to_the_even_code() -> None:
    format_ = Fixed(signed=True, width=4, frac=1)
    values = [-1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75]
    assert_array_equal(format_.encode(values), [-2, -2, 0, 0, 2, 2, 4])
    assert_array_equal(format_.requantize([-5, -3, -1, 1, 3, 5, 7], 2), [-2, -2, 0, 0, 2, 2, 4])


def test_nan_is_refused() -> None:
    with pytest.raises(InvalidInput, match="NaN"):
        Fixed(signed=True, width=4, frac=1).encode([0.0, np.nan])


@given(st.data(), st.integers(-(2**60), 2**60), st.integers(-20, 20))
def test_enclosing_is_the_narrowest(data: st.DataObject, lo: int, frac: int) -> None:
    hi = data.draw(st.integers(lo, 2**60))
    format_ = Fixed.enclosing(lo, hi, frac)
    assert format_.contains([lo, hi])
    assert format_.frac == frac
    assert format_.signed == (lo < 0)
    if format_.width > 1:
        assert not Fixed(signed=format_.signed, width=format_.width - 1, frac=frac).contains([lo, hi])


def test_enclosing_an_empty_range_is_refused() -> None:
    with pytest.raises(InvalidInput, match="empty code range"):
        Fixed.enclosing(1, 0, 0)


@given(st.booleans(), st.integers(2, 16), st.integers(-10, 10))
def test_formats_of_a_threshold(signed: bool, bits: int, m: int) -> None:
    format_ = Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=m)
    t = 2.0**m
    assert format_.step == 2.0 ** (m + 1 - bits if signed else m - bits)
    assert format_.decode(format_.lo) == (-t if signed else 0)
    assert format_.decode(format_.hi) == t - format_.step
    assert format_.threshold_log2 == m
    kind, integer = ("ap_fixed", m + 1) if signed else ("ap_ufixed", m)
    assert str(format_) == f"{kind}<{bits},{integer},AP_RND_CONV,AP_SAT>"


@pytest.mark.parametrize("m", [-10, -1, 0, 3])
def test_one_bit_has_the_levels_zero_and_t(m: int) -> None:
    signed = Fixed.from_threshold(signed=True, bits=1, threshold_log2=m)
    assert_array_equal(signed.decode([signed.lo, signed.hi]), [0, 2.0**m])
    assert str(signed) == f"ap_ufixed<1,{m + 1},AP_RND_CONV,AP_SAT>"
    unsigned = Fixed.from_threshold(signed=False, bits=1, threshold_log2=m)
    assert_array_equal(unsigned.decode([unsigned.lo, unsigned.hi]), [0, 2.0 ** (m - 1)])


def test_clip_differs_from_the_papers_by_one_level_at_each_end() -> None:
    """HMQ's Eq. 2 clips signed values to [-(t - step), t], two's complement holds [-t, t - step]."""
    bits, t = 4, 2.0
    ours = Fixed.from_threshold(signed=True, bits=bits, threshold_log2=1)
    step = 2 * t / 2**bits
    papers_codes = np.clip(np.rint(np.array([-3.0, 3.0]) / step), -(2 ** (bits - 1) - 1), 2 ** (bits - 1))
    assert_array_equal(papers_codes * step, [-(t - step), t])
    assert_array_equal(ours.decode(ours.encode([-3.0, 3.0])), [-t, t - step])
    unsigned = Fixed.from_threshold(signed=False, bits=bits, threshold_log2=1)
    assert unsigned.decode(unsigned.encode(3.0)) == t - unsigned.step  # Eq. 3 has t, a 17th level of 4 bits


@given(ANY_FORMAT)
def test_json_round_trip(format_: Fixed) -> None:
    assert Fixed.from_json(format_.to_json()) == format_


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"signed": True, "width": 4},
        {"signed": True, "width": 4, "frac": 1.0},
        {"signed": 1, "width": 4, "frac": 1},
        {"signed": True, "width": True, "frac": 1},
        {"signed": True, "width": 4, "frac": 1, "round": "half up"},
        {"signed": True, "width": 0, "frac": 1},
        {"signed": True, "width": 63, "frac": 1},
        {"signed": True, "width": 8, "frac": 10**9},
    ],
)
def test_malformed_json_is_refused(data: object) -> None:
    with pytest.raises(InvalidInput):
        Fixed.from_json(data)
