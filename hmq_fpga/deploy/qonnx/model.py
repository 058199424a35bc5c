"""QNet to QONNX: a graph of ONNX's operations between `Quant` nodes, which the package qonnx runs.

Shapes are those of the network, channels last, with a batch in front; convolutions and pooling, whose channels are
first in ONNX, stand between transpositions. What is quantized has the scale `2**-frac` and the zero point 0 and is
rounded half to even (`ROUND`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.differences import settings, values
from hmq_fpga.deploy.parity import to_codes
from hmq_fpga.deploy.qonnx.config import hls4ml_config
from hmq_fpga.deploy.qonnx.graph import Graph, Names
from hmq_fpga.deploy.toolchain import ToolMissing
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Linear, Op

if TYPE_CHECKING:
    from onnx import ModelProto

MODEL, CONFIG = "model.onnx", "hls4ml_config.json"
BATCH = 1024  # samples at a time
_BITS = 24  # of the significand of float32, which qonnx computes in
_EXPONENTS = range(-126, 128)  # of its normal numbers


def missing() -> str | None:
    """One line where qonnx is not installed: what is left out, and how to get it. Imports nothing."""
    if all(find_spec(name) for name in ("onnx", "qonnx")):
        return None
    return "qonnx is not installed, so its model and its simulation are left out: pip install 'hmq-fpga[qonnx]'"


def to_qonnx(net: QNet) -> ModelProto:
    """The QONNX model of a network: real inputs `(1, *input shape)` to real outputs `(1, *shape)`, channels last.

    An input's real values are called `<op>_values`; an op's tensor has its name. The batch is the first
    dimension of every tensor that is no constant, and may be set to another number (see `with_batch`).

    Raises:
        ToolMissing: where qonnx is not installed.
        InvalidInput: where float32, in which qonnx computes, cannot hold a sum or a step exactly; names the op.
    """
    if line := missing():
        raise ToolMissing(line)
    check_float32(net)
    return Graph(net).made()


def check_float32(net: QNet) -> None:
    """Raise `InvalidInput` where float32 cannot hold every partial sum and every value of a network exactly."""
    for op in net.ops:
        format_, bits = net.formats[op.name], _significant_bits(net, op)
        if bits > _BITS:
            raise InvalidInput(f"op {op.name!r}: its sums need {bits} bits, and qonnx's float32 is exact up to {_BITS}")
        if -format_.frac not in _EXPONENTS or format_.integer not in _EXPONENTS:
            raise InvalidInput(f"op {op.name!r}: float32, in which qonnx computes, has no values of {format_}")


def _significant_bits(net: QNet, op: Op) -> int:
    """Bits of the largest number that the float computation of an op meets."""
    if isinstance(op, Linear):
        return max(net.partial_sum_bits(op), op.weight_format.width, net.bias_format(op).width)
    return net.formats[op.name].width


def export(net: QNet, folder: Path) -> str | None:
    """Write a network's `model.onnx`, and beside it `hls4ml_config.json` for hls4ml's own conversion.

    See `hls4ml_config` for how to go on from there; for a network that it refuses there is none.

    Returns:
        one line on why there is no such configuration; None where there is.

    Raises:
        ToolMissing: see `to_qonnx`.
        InvalidInput: likewise.
    """
    model = to_qonnx(net)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(model.SerializeToString(deterministic=True))
    try:
        config = hls4ml_config(net)
    except InvalidInput as refused:
        return str(refused)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return None


def model_differences(net: QNet, folder: Path) -> list[str]:
    """One line for each node, connection, attribute and constant of `model.onnx` in `folder` that is not the network's.

    Raises:
        ToolMissing: where qonnx is not installed.
        InvalidInput: where there is no readable model.
    """
    (expected, wanted), (actual, found) = map(_content, (to_qonnx(net), _read(folder / MODEL)))
    shown = f"{folder.name}/{MODEL}"
    lines = [f"{shown}: {line}" for line in settings(expected, actual)]
    return lines or [line for name in wanted for line in values(f"{shown}: {name}", wanted[name], found[name])]


def _read(path: Path) -> ModelProto:
    if line := missing():
        raise ToolMissing(line)
    import onnx

    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # from a damaged file anything may come
        raise InvalidInput(f"{path}: not an ONNX model: {str(error).splitlines()[0]}") from error
    return model


def _content(model: ModelProto) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """A model's graph without its constants, nodes by name of what they make; and its constants by name."""
    from google.protobuf.json_format import MessageToDict
    from onnx.numpy_helper import to_array

    graph = MessageToDict(model.graph)
    constants = {constant.name: to_array(constant) for constant in model.graph.initializer}
    nodes = {", ".join(node["output"]): node for node in graph["node"]}
    return {**graph, "node": nodes, "initializer": {name: str(v.dtype) for name, v in constants.items()}}, constants


def with_batch(model: ModelProto, batch: int) -> ModelProto:
    """A copy of a model for another number of samples at once."""
    from onnx import ModelProto

    changed = ModelProto()
    changed.CopyFrom(model)
    constants = {constant.name for constant in changed.graph.initializer} | {""}
    for node in changed.graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
    for value in (*changed.graph.input, *changed.graph.value_info, *changed.graph.output):
        if value.name not in constants:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    return changed


def with_given(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy of a model in which whatever reads some tensors reads as many further inputs in their place."""
    from onnx import ModelProto

    changed = ModelProto()
    changed.CopyFrom(model)
    shapes = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    for name in names:
        value = changed.graph.input.add()
        value.CopyFrom(shapes[name])
        value.name = f"{name}_given"
    for node in changed.graph.node:
        for place, name in enumerate(node.input):
            if name in names:
                node.input[place] = f"{name}_given"
    return changed


@dataclass(frozen=True, eq=False)
class QonnxSimulator:
    """A network's QONNX model, run by qonnx: the one given, such as a loaded one, or a fresh one."""

    net: QNet
    given: ModelProto | None = None
    name: ClassVar[str] = "qonnx"

    @classmethod
    def load(cls, net: QNet, folder: Path) -> QonnxSimulator:
        """The model that `export` wrote to `folder`, as a simulator of the network that it was made from.

        Raises:
            ToolMissing: where qonnx is not installed.
            InvalidInput: when there is none, or it has not the network's inputs and outputs.
        """
        path = folder / MODEL
        model = _read(path)
        values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
        shapes = {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)[1:] for value in values}
        names = Names.of(net).tensors
        for op in net.ops:
            if shapes.get(names[op.name]) != net.shapes[op.name]:
                raise InvalidInput(f"{path}: not of this network, it has no such tensor as {op.name!r}")
        return cls(net, model)

    @cached_property
    def model(self) -> ModelProto:
        """The ONNX model, of one sample."""
        return self.given if self.given is not None else to_qonnx(self.net)

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`."""
        return self.net.join(self._run(x, self.net.outputs))

    def trace(self, x: npt.NDArray[np.float32]) -> dict[str, Codes]:
        """Codes of every tensor by op name, for real inputs `(batch, *input shape)`."""
        return self._run(x, [op.name for op in self.net.ops])

    def takes(self, codes: Mapping[str, Codes]) -> Mapping[str, Codes]:
        """All: whatever reads a tensor can read another one."""
        return codes

    def layers(self, given: Mapping[str, Codes]) -> dict[str, Codes]:
        """What the nodes of each op make of given codes of its sources."""
        called, inputs = Names.of(self.net).tensors, [op.name for op in self.net.inputs]
        values = {name: self.net.formats[name].decode(codes).astype(np.float32) for name, codes in given.items()}
        parts = [values.pop(name) for name in inputs]
        model = with_given(self.model, [called[name] for name in values])
        return self._executed(model, [*parts, *values.values()], [op.name for op in self.net.ops])

    def _run(self, x: npt.NDArray[np.float32], names: Sequence[str]) -> dict[str, Codes]:
        return self._executed(self.model, [*self.net.split_inputs(x).values()], names)

    def _executed(
        self, model: ModelProto, parts: Sequence[npt.NDArray[np.float32]], names: Sequence[str]
    ) -> dict[str, Codes]:
        """Codes of tensors, for values `(batch, *shape)` of a model's inputs in their order."""
        inputs = {value.name: part for value, part in zip(model.graph.input, parts, strict=True)}
        size = min(BATCH, len(parts[0]))
        wrapped = _wrapped(with_batch(model, size))
        found: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
        called = Names.of(self.net).tensors
        for start in range(0, len(parts[0]), size):
            first = min(start, len(parts[0]) - size)  # the last ones overlap with those before
            tensors = _executed(wrapped, {name: part[first : first + size] for name, part in inputs.items()})
            for name in names:
                found[name].append(tensors[called[name]][start - first :])
        return {name: to_codes(np.concatenate(found[name]), self.net.formats[name], name) for name in names}


def _wrapped(model: ModelProto) -> Any:
    import onnxruntime
    from qonnx.core.modelwrapper import ModelWrapper

    onnxruntime.set_default_logger_severity(
        3
    )  # qonnx has it run convolutions of the first version, which it says each time
    return ModelWrapper(model)


def _executed(model: Any, inputs: Mapping[str, npt.NDArray[np.float32]]) -> Mapping[str, npt.NDArray[np.float32]]:
    """Every tensor of a model, by name."""
    from qonnx.core.onnx_exec import execute_onnx

    with np.errstate(over="ignore"):  # what overflows to infinity saturates
        tensors: Mapping[str, npt.NDArray[np.float32]] = execute_onnx(model, inputs, return_full_exec_context=True)
    return tensors
