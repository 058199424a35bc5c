"""Hypothesis strategies for formats and small networks."""

import numpy as np
from hypothesis import strategies as st

from hmq_fpga.ir.fixed import Codes, Fixed, Reals
from hmq_fpga.ir.network import Conv2d, Dense, Flatten, Input, MaxPool2d, Op, QNet, Quantize

BITS = st.integers(1, 8)
THRESHOLDS_LOG2 = st.integers(-10, 6)
EITHER = st.booleans()
FEATURES = st.tuples(st.integers(1, 8))
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def formats(draw, *, signed=EITHER, bits=BITS, thresholds_log2=THRESHOLDS_LOG2) -> Fixed:
    """Formats that a scheme may hold."""
    return Fixed.from_threshold(signed=draw(signed), bits=draw(bits), threshold_log2=draw(thresholds_log2))


@st.composite
def qnets(draw, *, images=EITHER, bits=BITS, thresholds_log2=THRESHOLDS_LOG2) -> QNet:
    """Networks as a search leaves them: every linear op but the last is followed by its activation's quantizer."""

    def format_(signed: bool | None = None) -> Fixed:
        sign = EITHER if signed is None else st.just(signed)
        return draw(formats(signed=sign, bits=bits, thresholds_log2=thresholds_log2))

    rng = np.random.default_rng(draw(SEEDS))
    image = draw(images)
    shape = draw(st.tuples(st.integers(2, 6), st.integers(2, 6), st.integers(1, 3)) if image else FEATURES)
    ops: list[Op] = [Input(name="x", shape=shape, format=format_())]

    def shapes() -> tuple[int, ...]:
        return QNet(tuple(ops)).shapes[ops[-1].name]

    if image:
        for i in range(draw(st.integers(1, 2))):
            ops.append(_conv(draw, rng, f"conv{i}", ops[-1].name, shapes(), format_(signed=True)))
            ops.append(Quantize(name=f"conv{i}_q", source=ops[-1].name, format=format_()))
            if draw(st.booleans()):
                window = tuple(draw(st.integers(1, min(n, 3))) for n in shapes()[:2])
                stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
                ops.append(MaxPool2d(name=f"pool{i}", source=ops[-1].name, window=window, stride=stride))
        ops.append(Flatten(name="flat", source=ops[-1].name))
    layers = draw(st.integers(1, 3))
    for i in range(layers):
        n, m = shapes()[0], draw(st.integers(1, 8))
        weight_format = format_(signed=True)
        ops.append(
            Dense(
                name=f"dense{i}",
                source=ops[-1].name,
                weight=_codes(rng, weight_format, (n, m)),
                weight_format=weight_format,
                bias=_biases(rng, m),
            )
        )
        if i < layers - 1:
            ops.append(Quantize(name=f"dense{i}_q", source=ops[-1].name, format=format_()))
    return QNet(tuple(ops))


def _conv(draw, rng: np.random.Generator, name: str, source: str, shape: tuple[int, ...], format_: Fixed) -> Conv2d:
    height, width, channels = shape
    kernel = draw(st.integers(1, min(height, 3))), draw(st.integers(1, min(width, 3)))
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    outputs = draw(st.integers(1, 4))
    return Conv2d(
        name=name,
        source=source,
        weight=_codes(rng, format_, (*kernel, channels, outputs)),
        weight_format=format_,
        bias=_biases(rng, outputs),
        stride=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.tuples(pads, pads)),
    )


def _codes(rng: np.random.Generator, format_: Fixed, shape: tuple[int, ...]) -> Codes:
    """Codes of a format, a quarter of them zero and the end levels frequent."""
    codes = rng.integers(format_.lo, format_.hi, shape, endpoint=True)
    kind = rng.integers(0, 8, shape)
    return np.select([kind < 2, kind == 2, kind == 3], [0, format_.lo, format_.hi], codes)


def _biases(rng: np.random.Generator, outputs: int) -> Codes:
    """Biases on the accumulator's grid, from none to as large as 16-bit products."""
    largest = rng.choice([0, 3, 200, 20_000])
    return rng.integers(-largest, largest, outputs, endpoint=True)


def inputs(net: QNet, samples: int, seed: int) -> Reals:
    """Inputs `(samples, *input shape)`, channels last: on the grid, half-way between codes, and beyond the range."""
    rng = np.random.default_rng(seed)
    format_ = net.input.format
    shape = (samples, *net.input.shape)
    halves = rng.integers(4 * format_.lo - 4, 4 * format_.hi + 4, shape, endpoint=True) / 2
    anywhere = rng.normal(scale=format_.hi + 1, size=shape)
    return np.where(rng.integers(0, 2, shape) == 0, halves, anywhere) * format_.step
