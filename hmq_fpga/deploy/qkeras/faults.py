"""Faults of a QKeras model: of its constants, its quantizers and its windows."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hmq_fpga.deploy.audit.fault import Fault, Meaning, with_op
from hmq_fpga.deploy.qkeras.model import MODEL, QKerasSimulator, load
from hmq_fpga.deploy.qkeras.names import layer_name
from hmq_fpga.deploy.qkeras.versions import custom_objects, quiet
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Dense, Quantize

_QUANTIZER = re.compile(r"(quantized_(?:bits|relu)\()(\d+),(-?\d+)")
_WINDOWS = ("strides", "pool_size", "padding")


def model_faults(net: QNet, folder: Path, rng: np.random.Generator) -> Iterator[Fault]:
    """Faults of the model in a folder, without end."""
    model = load(folder / MODEL)
    with quiet():
        config = model.get_config()
    while True:
        if fault := _code(net, model, rng):
            yield fault
        for kind in (_quantizer, _window):
            if fault := kind(net, model, copy.deepcopy(config), rng):
                yield fault


def _code(net: QNet, model: Any, rng: np.random.Generator) -> Fault | None:
    dense = [op for op in net.linears if isinstance(op, Dense)]
    op = dense[rng.integers(len(dense))] if dense else None
    if op is None:
        return None
    field, place = ("weight", 0) if rng.random() < 0.7 else ("bias", 1)
    format = op.weight_format if field == "weight" else net.bias_format(op)
    values: Codes = getattr(op, field).copy()
    at = int(rng.integers(values.size))
    was = int(values.flat[at])
    now = was - 1 if was > format.lo else was + 1
    if not format.lo <= now <= format.hi:
        return None
    values.flat[at] = now
    index = list(map(int, np.unravel_index(at, values.shape)))
    weights = model.get_layer(op.name).get_weights()
    changed = [*weights]
    changed[place] = format.decode(values).reshape(weights[place].shape)

    @contextmanager
    def simulator() -> Iterator[QKerasSimulator]:
        layer = model.get_layer(op.name)
        layer.set_weights(changed)
        try:
            yield QKerasSimulator(net, model)
        finally:
            layer.set_weights(weights)

    return Fault(
        backend="qkeras",
        kind=f"code of a {field}",
        where=op.name,
        change=f"code {index} from {was} to {now}",
        simulator=simulator,
        meaning=Meaning(net=with_op(net, op, **{field: values})),
    )


def _quantizer(net: QNet, model: Any, config: Any, rng: np.random.Generator) -> Fault | None:
    quantizers = [op for op in net.ops if isinstance(op, Quantize)]
    if not quantizers:
        return None
    op = quantizers[rng.integers(len(quantizers))]
    layer = next(layer for layer in config["layers"] if layer["name"] == layer_name(op))
    was = layer["config"].get("activation")
    if not isinstance(was, str) or not (match := _QUANTIZER.search(was)):
        return None
    bits, integer = int(match[2]), int(match[3])
    kind, (bits, integer) = (
        ("width", (bits - 1, integer)),
        ("width", (bits + 1, integer)),
        ("integer part", (bits, integer - 1)),
        ("integer part", (bits, integer + 1)),
    )[rng.integers(4)]
    if bits < 2:
        return None
    layer["config"]["activation"] = now = _QUANTIZER.sub(rf"\g<1>{bits},{integer}", was)
    format = Fixed.from_threshold(signed=op.format.signed, bits=bits, threshold_log2=integer)
    return _rebuilt(net, model, config, kind, op.name, f"{was} to {now}", Meaning(net=with_op(net, op, format=format)))


def _window(net: QNet, model: Any, config: Any, rng: np.random.Generator) -> Fault | None:
    layers = [layer for layer in config["layers"] if any(name in layer["config"] for name in _WINDOWS)]
    if not layers:
        return None
    layer = layers[rng.integers(len(layers))]
    names = [name for name in _WINDOWS if name in layer["config"]]
    name = names[rng.integers(len(names))]
    was = layer["config"][name]
    if name == "padding":
        now: Any = "valid" if was == "same" else "same"
    else:
        now = (*was[:-1], was[-1] + 1 if was[-1] == 1 else was[-1] - 1)
    layer["config"][name] = now
    return _rebuilt(net, model, config, name, layer["name"], f"{was} to {now}", None)


def _rebuilt(net: QNet, model: Any, config: Any, kind: str, where: str, change: str, meaning: Meaning | None) -> Fault:
    @contextmanager
    def simulator() -> Iterator[QKerasSimulator]:
        with quiet():
            made = type(model).from_config(config, custom_objects=custom_objects())
            made.set_weights(model.get_weights())
        yield QKerasSimulator(net, made)

    return Fault(backend="qkeras", kind=kind, where=where, change=change, simulator=simulator, meaning=meaning)
