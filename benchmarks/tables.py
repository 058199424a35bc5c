"""What a table of ours and what hls4ml's own functions make of the same codes, against the float function of these.

    python benchmarks/tables.py

hls4ml's are as it generates them by default: its layers read the same codes, have tables of its default type and size
and give `fixed<16,6>`, its default; ours give values of the same step. Compiled by g++ as every project is. By the
width of the scores its softmax chooses the size of both its tables, so it is also given the same values as
`fixed<16,6>`, for which these are as large as they get by default.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import OrderedDict
from itertools import product
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Fixed, Reals
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Input
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.reading import instrument

READ = Fixed(signed=True, width=8, frac=4)
MADE = Fixed(signed=True, width=16, frac=10)  # hls4ml's default
SHARES = Fixed(signed=False, width=10, frac=10)  # of the same step
BETWEEN = {"exp": (12, 12), "sum": (12, 8), "reciprocal": (12, 12)}  # of our softmax: widths and fractions
FUNCTIONS: dict[str, nn.Module] = {
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "selu": nn.SELU(),
    "elu": nn.ELU(),
}
SCORES = {"3 scores": (3, Fixed(signed=True, width=6, frac=2)), "10 scores": (10, READ)}
VECTORS = 100_000  # random ones, where there are too many to take all
HERE = Path(__file__).parent


def main() -> None:
    """Measure all and write the table and the figure."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    curves = {name: _function(name, function) for name, function in FUNCTIONS.items()}
    result = {
        "hls4ml": hls4ml.__version__,
        "functions": {name: _errors(*curve) for name, curve in curves.items()},
        "softmax": {name: _softmax(size, format_) for name, (size, format_) in SCORES.items()},
    }
    (HERE / "tables.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "tables.md").write_text(page(result))
    _draw(curves, result, HERE / "tables.svg")


def _function(name: str, function: nn.Module) -> tuple[Reals, Reals, Reals, Reals]:
    """All codes' values, and what the float function, our table and hls4ml's layer make of them."""
    x = READ.decode(np.arange(READ.lo, READ.hi + 1))[:, None]
    exact = function(torch.from_numpy(x)).numpy()
    net = _quantized(OrderedDict(inner=nn.Linear(1, 1), made=function, last=nn.Linear(1, 1)), {"made": MADE}, READ)
    ours = MADE.decode(reference.run(_between(net, "inner_quant", "made", READ), x))
    kind = {"class_name": "Activation", "activation": name, "n_in": 1}
    if name in ("elu", "selu"):
        kind |= {"class_name": "ELU" if name == "elu" else "Activation", "activ_param": 1.0}
    theirs = _hls4ml(kind, READ, x)
    return x[:, 0], exact[:, 0], ours[:, 0], theirs[:, 0]


def _errors(x: Reals, exact: Reals, *found: Reals) -> dict[str, dict[str, float]]:  # noqa: ARG001
    """Of ours and of hls4ml's, in steps of the result, and how many codes do not get the nearest value."""
    nearest = MADE.decode(MADE.encode(exact))
    return {
        who: {
            "largest_error_steps": float(np.abs(values - exact).max() / MADE.step),
            "mean_error_steps": float(np.abs(values - exact).mean() / MADE.step),
            "codes_not_nearest": int((values != nearest).sum()),
            "codes": len(exact),
        }
        for who, values in zip(("ours", "hls4ml"), found, strict=True)
    }


def _softmax(size: int, read: Fixed) -> dict[str, dict[str, float]]:
    """Decisions and errors on vectors of codes of which one is the largest."""
    if read.width * size <= 18:
        codes = np.array(list(product(range(read.lo, read.hi + 1), repeat=size)))
    else:
        codes = np.random.default_rng(0).integers(read.lo, read.hi, (VECTORS, size), endpoint=True)
    ordered = np.sort(codes, 1)
    x = read.decode(codes[ordered[:, -1] > ordered[:, -2]])
    exact = torch.softmax(torch.from_numpy(x), 1).numpy()
    formats = {f"made_{name}": Fixed(signed=False, width=w, frac=f) for name, (w, f) in BETWEEN.items()}
    layers: OrderedDict[str, nn.Module] = OrderedDict(inner=nn.Linear(size, size), made=nn.Softmax(1))
    net = _quantized(layers, {**formats, "made": SHARES}, read)
    ours = SHARES.decode(reference.run(_between(net, "made_read", "made", read), x))
    layer = {"class_name": "Softmax", "activation": "softmax", "n_in": size, "axis": -1}
    found = {"ours": ours, "hls4ml": _hls4ml(layer, read, x), "hls4ml, scores of 16 bits": _hls4ml(layer, MADE, x)}
    return {who: _decisions(exact, values) for who, values in found.items()}


def _decisions(exact: Reals, found: Reals) -> dict[str, float]:
    rows, best = np.arange(len(exact)), exact.argmax(1)
    top = np.sort(exact, 1)
    told_apart = top[:, -1] - top[:, -2] > MADE.step
    highest = found.max(1)
    shared = (found == highest[:, None]).sum(1) > 1
    wins = found[rows, best] == highest
    return {
        "vectors": len(exact),
        "argmax_agreement": float((found.argmax(1) == best).mean()),
        "flipped": int((~wins).sum()),
        "tied": int((wins & shared).sum()),
        "wrong_beyond_one_step": int(((~wins | shared) & told_apart).sum()),
        "largest_error": float(np.abs(found - exact).max()),
        "largest_sum_error": float(np.abs(found.sum(1) - 1).max()),
    }


def _quantized(layers: OrderedDict[str, nn.Module], chosen: dict[str, Fixed], read: Fixed) -> QNet:
    """A network with these formats; the function in it reads `read`."""
    model = instrument(nn.Sequential(layers), (layers["inner"].in_features,), keep_final=True)  # type: ignore[arg-type]
    model.set_scheme(scheme_of(model, {s.name: chosen.get(s.name, read) for s in model.sites}, {}))
    return freeze(model)


def _between(net: QNet, first: str, last: str, read: Fixed) -> QNet:
    """The part of a network from a quantizer's codes to a tensor."""
    names = [op.name for op in net.ops]
    inside = net.ops[names.index(first) + 1 : names.index(last) + 1]
    return QNet((Input(name=first, shape=net.shapes[first], format=read), *inside))


def _hls4ml(layer: dict[str, Any], read: Fixed, x: Reals) -> Reals:
    """Outputs of a project of one of hls4ml's layers, with its defaults."""
    from hls4ml.model.graph import ModelGraph
    from hls4ml.utils.config import create_config

    with tempfile.TemporaryDirectory() as folder:
        config = create_config(output_dir=folder, project_name="theirs", backend="Vitis", io_type="io_parallel")
        named = {"values": {"Precision": {"result": str(read)}}}
        config["HLSConfig"] = {"Model": {"Precision": "fixed<16,6>", "ReuseFactor": 1}, "LayerName": named}
        layers = [
            {"class_name": "InputLayer", "name": "values", "input_shape": [x.shape[1]], "inputs": []},
            {"name": "made", "inputs": ["values"], "data_format": "channels_last", **layer},
        ]
        graph = ModelGraph.from_layer_list(config, layers, ["values"], ["made"])
        graph.compile()
        found: npt.NDArray[Any] = np.asarray(graph.predict(np.ascontiguousarray(x, np.float32)))
    return found.reshape(len(x), -1).astype(np.float64)


def page(result: dict[str, Any]) -> str:
    """Functions, and softmax."""
    steps = f"in steps of 2^-{MADE.frac}"
    lines = [
        "Made by `python benchmarks/tables.py`: every code of the input, or random vectors by seed 0; any machine.",
        "",
        f"| function of {READ.width}-bit codes | ours: largest error, {steps} | hls4ml: largest, mean | not nearest |",
    ]
    lines += ["|---|---|---|---|"]
    for name, row in result["functions"].items():
        ours, theirs = row["ours"], row["hls4ml"]
        off = [found["codes_not_nearest"] for found in (ours, theirs)]
        lines.append(
            f"| {name} | {ours['largest_error_steps']:.2f} | {theirs['largest_error_steps']:.2f}, "
            f"{theirs['mean_error_steps']:.2f} | ours {off[0]}, hls4ml {off[1]} of {ours['codes']} |"
        )
    lines += ["", "| softmax | | vectors | argmax agrees | flipped | tied | wrong beyond one step | largest error |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, row in result["softmax"].items():
        for who, found in row.items():
            lines.append(
                f"| {name} | {who} | {found['vectors']:,} | {100 * found['argmax_agreement']:.2f} % | "
                f"{found['flipped']:,} | {found['tied']:,} | {found['wrong_beyond_one_step']:,} | "
                f"{found['largest_error']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def _draw(curves: dict[str, tuple[Reals, ...]], result: dict[str, Any], path: Path) -> None:
    """Errors of two functions over their codes, and wrong decisions of the softmax."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {"svg.hashsalt": "tables", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(9.6, 2.8), layout="constrained")
        *panels, decisions = figure.subplots(1, 3)
        for axes, name in zip(panels, ("tanh", "sigmoid"), strict=True):
            x, exact, ours, theirs = curves[name]
            for label, values in (("hls4ml", theirs), ("ours", ours)):
                axes.plot(x, (values - exact) / MADE.step, linewidth=1, label=label)
            axes.set(title=name, xlabel="value of the code", ylabel=f"error in steps of 2^-{MADE.frac}")
            axes.legend(frameon=False)
        names = list(result["softmax"])
        for offset, who in ((-0.27, "hls4ml"), (0.0, "hls4ml, scores of 16 bits"), (0.27, "ours")):
            rows = [result["softmax"][name][who] for name in names]
            share = [100 * row["wrong_beyond_one_step"] / row["vectors"] for row in rows]
            bars = decisions.bar([n + offset for n in range(len(names))], share, 0.25, label=who)
            decisions.bar_label(bars, [f"{value:.2g} %" for value in share])
        decisions.set(title="softmax: no or another winner", ylabel="% of vectors", xticks=range(len(names)))
        decisions.set_xticklabels(names)
        decisions.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
