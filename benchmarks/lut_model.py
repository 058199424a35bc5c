"""Fit the coefficients of `hmq_fpga.ir.logic` to traced networks, and test them on others.

    python benchmarks/lut_model.py --drawn 160 --trained build/estimates/*

Some networks are drawn at random: multilayer perceptrons and convolutional networks, each layer with its own weight
and activation bits and its own share of zeros; every other one is left out of the fit. Others are trained, those of
finished sweeps: of these the fit sees the ones of seed 0. Takes minutes.
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.trace import SIZE_LIMIT, size_estimate
from hmq_fpga.ir import logic
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, Flatten, Input, MaxPool, Op, Quantize

FITTED_SEED = 0  # of trained networks
MLPS = [(16, 64, 32, 32, 10), (16, 32, 16, 5), (64, 32, 10), (30, 20, 3), (196, 16, 10)]


def draw(rng: np.random.Generator) -> QNet:
    """A network with the value ranges that training leaves: activations reach and pass their thresholds."""
    ops: list[Op] = []

    def linear(kind: type[Dense] | type[Conv], shape: tuple[int, ...], **fields: object) -> None:
        format_ = Fixed.from_threshold(signed=True, bits=int(rng.integers(2, 7)), threshold_log2=0)
        spread = format_.hi * 2.0 ** rng.uniform(-1.5, 0)
        codes = np.clip(np.rint(rng.normal(scale=max(spread, 0.6), size=shape)), format_.lo, format_.hi)
        weight = codes.astype(np.int64) * (rng.random(shape) < rng.uniform(0.2, 1))
        scale = float(np.abs(weight).sum() / shape[-1]) * QNet(tuple(ops)).formats[ops[-1].name].hi / 8
        bias = rng.normal(scale=scale, size=shape[-1]).astype(np.int64)
        ops.append(
            kind(name=f"l{len(ops)}", source=ops[-1].name, weight=weight, weight_format=format_, bias=bias, **fields)
        )

    def activation() -> None:
        sums = QNet(tuple(ops)).formats[ops[-1].name]
        bits = int(rng.integers(2, 9))
        threshold_log2 = sums.threshold_log2 - int(rng.integers(0, 4))
        format_ = Fixed.from_threshold(signed=False, bits=bits, threshold_log2=threshold_log2)
        ops.append(Quantize(name=f"q{len(ops)}", source=ops[-1].name, format=format_))

    input_format = Fixed(signed=False, width=int(rng.integers(3, 9)), frac=0)
    if rng.random() < 0.35:
        channels = int(rng.integers(1, 3))
        ops.append(Input(name="x", shape=(10, 10, channels), format=input_format))
        padding = ((0, 0), (0, 0)) if rng.random() < 0.5 else ((1, 1), (1, 1))
        linear(Conv, (3, 3, channels, 6), stride=(1, 1) if rng.random() < 0.7 else (2, 2), padding=padding)
        activation()
        if rng.random() < 0.5:
            ops.append(MaxPool(name="pool", source=ops[-1].name, window=(2, 2), stride=(2, 2)))
        linear(Conv, (2, 2, 6, 8), stride=(1, 1), padding=((0, 0), (0, 0)))
        activation()
        ops.append(Flatten(name="flat", source=ops[-1].name))
        linear(Dense, (QNet(tuple(ops)).shapes["flat"][0], 10))
        return QNet(tuple(ops))
    sizes = MLPS[rng.integers(len(MLPS))]
    ops.append(Input(name="x", shape=sizes[:1], format=input_format))
    for n, m in pairwise(sizes):
        if len(ops) > 1:
            activation()
        linear(Dense, (n, m))
    return QNet(tuple(ops))


def errors(actual: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Ratio predicted / actual: median, 5th and 95th percentile, spread of its logarithm; and R²."""
    ratio = predicted / actual
    low, median, high = np.percentile(ratio, [5, 50, 95])
    residual = np.sum((predicted - actual) ** 2) / np.sum((actual - actual.mean()) ** 2)
    figures = {
        "networks": len(ratio),
        "median": median,
        "p5": low,
        "p95": high,
        "spread": np.log(ratio).std(),
        "r2": 1 - residual,
    }
    return {"networks": len(ratio), **{key: round(float(value), 4) for key, value in figures.items()}}


def main() -> None:
    """Trace, fit, test, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawn", type=int, default=160)
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="folders of sweeps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    networks: list[QNet] = []
    traced: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(networks) < arguments.drawn:
            net = draw(rng)
            if size_estimate(net) > SIZE_LIMIT / 5:
                continue
            try:
                traced.append(RtlProject.create(net, Path(folder) / "rtl").lut)
            except InvalidInput:  # too wide, or its output is constant
                continue
            networks.append(net)
    fitted = [i % 2 == 0 for i in range(len(networks))]
    for file in sorted(file for sweep in arguments.trained for file in sweep.glob("*/rtl/rtl.json")):
        run = file.parents[1]
        networks.append(QNet.load(run / "qnet"))
        stages = {entry["stage"]: entry for entry in json.loads((run / "resources.json").read_text())}
        traced.append(stages["trace"]["lut"])
        fitted.append(json.loads((run / "run.json").read_text())["seed"] == FITTED_SEED)
    actual = np.array(traced)
    seen = np.array(fitted)
    drawn = np.arange(len(networks)) < arguments.drawn

    def predict(fit: np.ndarray) -> np.ndarray:
        return np.array([logic.luts(net, fit) for net in networks])

    share = np.where(drawn, 1 / max(np.sum(seen & drawn), 1), 1 / max(np.sum(seen & ~drawn), 1)) ** 0.5  # alike in sum
    found = least_squares(lambda fit: (share * np.log(predict(fit) / actual))[seen], logic.FIT).x
    report: dict[str, object] = {"luts": [int(actual.min()), int(np.median(actual)), int(actual.max())]}
    report["fit"] = np.round(found, 4).tolist()
    for name, fit in (("found", found), ("current", np.array(logic.FIT))):
        predicted = predict(fit)
        for kind, group in (("drawn", drawn), ("trained", ~drawn)):
            if (held_out := group & ~seen).any():
                report[f"{name}, {kind}"] = errors(actual[held_out], predicted[held_out])
    print(json.dumps(report, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
