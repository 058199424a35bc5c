"""Small networks, op by op."""

from pathlib import Path

import numpy as np

from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, DepthwiseConv, Flatten, Input, MaxPool, Quantize, Scale
from hmq_fpga.study.run.stages import FORMAT, write_json


def scheme(*, signed: bool, bits: int, m: int) -> Fixed:
    return Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=m)


class Builder:
    """Chains ops with random codes."""

    def __init__(self, shape, format_, seed=0):
        self.ops = [Input(name="input", shape=shape, format=format_)]
        self.rng = np.random.default_rng(seed)

    @property
    def net(self):
        return QNet(tuple(self.ops))

    def _add(self, op, name, **fields):
        self.ops.append(op(name=name, **{"source": self.ops[-1].name, **fields}))
        return self

    def _linear(self, op, name, shape, format_, bias, **fields):
        weight = self.rng.integers(format_.lo, format_.hi, shape, endpoint=True)
        biases = self.rng.integers(-bias, bias, shape[-1], endpoint=True)
        return self._add(op, name, weight=weight, weight_format=format_, bias=biases, **fields)

    def dense(self, name, outputs, format_, *, bias=40, source=None):
        source = source or self.ops[-1].name
        return self._linear(Dense, name, (self._shape(source)[-1], outputs), format_, bias, source=source)

    def conv(self, name, kernel, filters, format_, *, stride=(1, 1), padding=((0, 0), (0, 0)), bias=40):
        shape = (*kernel, self._shape(self.ops[-1].name)[-1], filters)
        return self._linear(Conv, name, shape, format_, bias, stride=stride, padding=padding)

    def depthwise(self, name, kernel, format_, *, stride=(1, 1), padding=((0, 0), (0, 0)), bias=40):
        shape = (*kernel, self._shape(self.ops[-1].name)[-1])
        return self._linear(DepthwiseConv, name, shape, format_, bias, stride=stride, padding=padding)

    def identity(self, name, channels, frac):
        """A scale by one, whose code is `2**frac`."""
        one, none = np.full(channels, 1 << frac), np.zeros(channels, np.int64)
        return self._add(
            Scale, name, weight=one, weight_format=Fixed(signed=True, width=frac + 2, frac=frac), bias=none
        )

    def quantize(self, name, format_, source=None):
        return self._add(Quantize, name, format=format_, source=source or self.ops[-1].name)

    def pool(self, name, window, stride=None):
        return self._add(MaxPool, name, window=window, stride=stride or window)

    def flatten(self, name="flat", source=None):
        return self._add(Flatten, name, source=source or self.ops[-1].name)

    def _shape(self, name):
        """Of a tensor, whether or not others are read yet."""
        ops, wanted = [], name
        for op in reversed(self.ops):
            if op.name == wanted:
                ops, wanted = [op, *ops], getattr(op, "source", None)
        return QNet(tuple(ops)).shapes[name]


def small_mlp() -> QNet:
    """Four inputs and two heads of different grids; some 270 LUTs."""
    rng = np.random.default_rng(0)

    def dense(name, source, shape, bias_of):
        return Dense(
            name=name,
            source=source,
            weight=rng.integers(-8, 8, shape),
            weight_format=Fixed(signed=True, width=4, frac=0),
            bias=rng.integers(-40, 40, bias_of),
        )

    return QNet(
        (
            Input(name="x", shape=(4,), format=Fixed(signed=False, width=4, frac=4)),
            dense("hidden", "x", (4, 6), 6),
            Quantize(name="relu", source="hidden", format=Fixed(signed=False, width=3, frac=3)),
            dense("dense", "relu", (6, 3), 3),
            dense("second", "relu", (6, 2), 2),
            Quantize(name="coarse", source="second", format=Fixed(signed=True, width=4, frac=1)),
        ),
        ("dense", "coarse"),
    )


def run_folder(project: RtlProject, folder: Path, *, latency_cutoff: float = 4.0) -> Path:
    """What a run leaves, as far as tools of open RTL read it."""
    project.net.save(folder / "qnet")
    project.written_again(folder / "rtl", latency_cutoff=latency_cutoff)
    config = {"task": "digits_mlp", "latency_cutoff": latency_cutoff, "rw": 8.0, "method": "hmq", "ra": 4.0, "seed": 0}
    record = {"format": FORMAT, "config": config, "resolved": {"io_type": "io_parallel"}, "stages": {}}
    write_json(folder / "run.json", record)
    return folder
