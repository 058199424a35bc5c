"""QNet to an hls4ml project, and the project's C simulation.

Every type is set here from the network. Left to itself hls4ml 1.3.0 truncates the input to 16 bits, derives other
weight types from QKeras's quantizers, and removes a `quantized_bits` activation after a layer whose result type is
`auto`. What was written is read back from `firmware/defines.h` and compared with the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, assert_never, get_args

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.parity import ParityError, to_codes
from hmq_fpga.deploy.qkeras.model import layer_name, quiet, to_qkeras
from hmq_fpga.deploy.toolchain import GXX
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import (
    Add,
    AvgPool,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Input,
    LeakyRelu,
    Linear,
    MaxPool,
    Op,
    Outputs,
    Pad,
    QNet,
    Quantize,
    Scale,
    Shape,
    Upsample,
    kernel_of,
    sources_of,
)

Backend = Literal["Vitis", "Vivado"]
IoType = Literal["io_parallel", "io_stream"]
Strategy = Literal["Latency", "Resource", "distributed_arithmetic"]
Types = dict[str, dict[str, str]]  # C++ type by op name and role: result, and weight, bias, accum of a linear op

_ADDERS = "distributed_arithmetic"
RECORD = "hmq_fpga.json"
STACK_BYTES = 96 << 20  # what Linux leaves a stack to grow to, less what is there
DEFAULT_PART = "xcvu13p-flga2577-2-e"
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """What one layer does differently from the project; None is the project's.

    Attributes:
        reuse_factor: multiplications per multiplier.
        strategy: hls4ml's for matrix products; `distributed_arithmetic` needs da4ml and a reuse factor of 1.
    """

    reuse_factor: int | None = None
    strategy: Strategy | None = None


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """How the project holds one op's tensor.

    Attributes:
        op: the QNet's op that makes it.
        variable: the C++ variable.
        shape: without the batch.
        format: of its codes.
        typedefs: names in `firmware/defines.h` by role: `result`, and `weight`, `bias`, `accum` of a linear op (which
            has only its result's where its constants are shifts and additions in the code).
    """

    op: str
    variable: str
    shape: Shape
    format: Fixed
    typedefs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class HlsProject:
    """An hls4ml project on disk; as a simulator it is compiled once, at its first use, from what is on disk.

    Attributes:
        folder: the project.
        top: name of the top function and of the files.
        digest: of the network that it was made from.
        tensors: in network order, the input first.
        outputs: ops whose tensors the top function puts out, in the order of its arguments.
        reuse_factors: of the layers with weights; hls4ml takes the nearest that divides a layer's work.
    """

    folder: Path
    top: str
    digest: str
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    reuse_factors: Mapping[str, int]
    name: ClassVar[str] = "csim"

    @classmethod
    def create(
        cls,
        net: QNet,
        folder: Path,
        *,
        backend: Backend = "Vitis",
        io_type: IoType = "io_parallel",
        part: str = DEFAULT_PART,
        clock_ns: float = 5.0,
        reuse_factor: int = 1,
        strategy: Strategy = "Latency",
        layers: Mapping[str, LayerSettings] | None = None,
        project_name: str = "myproject",
    ) -> HlsProject:
        """Convert a network by QKeras and hls4ml; an existing folder is replaced once the new one is complete.

        Args:
            net: the network.
            folder: where the project goes.
            backend: whose C++ to write.
            io_type: arrays or streams between layers.
            part: FPGA part.
            clock_ns: clock period in ns.
            reuse_factor: multiplications per multiplier, or what is nearest to it in a layer.
            strategy: hls4ml's for matrix products.
            layers: reuse factor and strategy of single linear ops, by name.
            project_name: name of the top function.

        Raises:
            ToolMissing: without a C++ compiler, before anything is written.
            InvalidInput: for an option or a network that cannot be converted.
            RuntimeError: when hls4ml dropped or added a layer or changed a type, naming the layer.
        """
        if not re.fullmatch(r"[A-Za-z]\w*", project_name):
            raise InvalidInput(f"project name {project_name!r}: letters, digits and underscores, a letter first")
        check_settings(
            net, backend=backend, io_type=io_type, reuse_factor=reuse_factor, strategy=strategy, layers=layers or {}
        )
        GXX.require()
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            graph = _convert(
                net,
                layers or {},
                model={"Precision": "fixed<16,6>", "ReuseFactor": reuse_factor, "Strategy": strategy},
                output_dir=str(new),
                project_name=project_name,
                backend=backend,
                io_type=io_type,
                part=part,
                clock_period=clock_ns,
            )
            _check_layers(net, graph)
            factors = {op.name: int(graph.graph[op.name].get_attr("reuse_factor")) for op in net.linears}
            for name, settings in (layers or {}).items():
                if settings.reuse_factor not in (None, factors[name]):
                    raise InvalidInput(
                        f"layer {name!r} cannot have the reuse factor {settings.reuse_factor}: it must divide the "
                        f"layer's work; the nearest is {factors[name]}"
                    )
            project = cls(
                folder=new,
                top=project_name,
                digest=net.digest,
                tensors=_tensors(net, graph),
                outputs=tuple(op.name for op in net.outputs),
                reuse_factors=factors,
            )
            _write(graph, project)
            _compare(expected_types(net), project.types())
            new.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return replace(project, folder=folder)

    @classmethod
    def load(cls, folder: Path) -> HlsProject:
        """The project that `create` wrote to `folder`; needs neither TensorFlow nor hls4ml.

        Raises:
            InvalidInput: when there is none.
        """
        try:
            data = json.loads((folder / RECORD).read_text())
            tensors = tuple(
                Tensor(**{**t, "shape": tuple(t["shape"]), "format": Fixed.from_json(t["format"])})
                for t in data["tensors"]
            )
            outputs = tuple(data.get("outputs", [tensors[-1].op]))
            return cls(
                folder=folder,
                top=data["top"],
                digest=data["digest"],
                tensors=tensors,
                outputs=outputs,
                reuse_factors=data.get("reuse_factors", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{folder}: not an hls4ml project of this package: {error}") from error

    def types(self) -> Types:
        """The C++ types that `firmware/defines.h` gives to each op, by role; see `expected_types`."""
        text = (self.folder / "firmware" / "defines.h").read_text()
        typedefs = {name: _plain_type(kind) for kind, name in re.findall(r"typedef (.*) (\w+);", text)}
        return {t.op: {role: typedefs[name] for role, name in t.typedefs.items()} for t in self.tensors}

    def compile(self) -> None:
        """Compile what is on disk, unless this object already has.

        Raises:
            ToolMissing: without a C++ compiler.
            RuntimeError: when the compiler fails, with its first errors.
            ParityError: when the weights of C simulation and synthesis differ.
        """
        _ = self._library

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output shape)` for real inputs `(batch, *input shape)`, channels last."""
        samples, values = self._samples(x), [np.zeros((len(x), *port.shape)) for port in self.ports]
        with _no_leftovers():
            for i, sample in enumerate(samples[:1]):
                self._call(sample, *(value[i] for value in values))
        for i, sample in enumerate(samples):
            self._call(sample, *(value[i] for value in values))
        return self.output_codes(values)

    @cached_property
    def ports(self) -> tuple[Tensor, ...]:
        """The tensors that the top function puts out."""
        tensors = {t.op: t for t in self.tensors}
        return tuple(tensors[name] for name in self.outputs)

    def output_codes(self, values: Sequence[npt.NDArray[np.float64]]) -> Codes:
        """Real values of each port, `(batch, *shape)`, as the network's output codes `(batch, *output shape)`.

        Raises:
            ParityError: when a value is not on its tensor's grid.
        """
        codes = [
            to_codes(value, port.format, port.op) << self._output_frac - port.format.frac
            for port, value in zip(self.ports, values, strict=True)
        ]
        return codes[0] if len(codes) == 1 else np.concatenate([code.reshape(len(code), -1) for code in codes], 1)

    @property
    def _output_frac(self) -> int:
        return max(port.format.frac for port in self.ports)

    def trace(self, x: npt.NDArray[np.float32]) -> dict[str, Codes]:
        """Codes of every tensor by op name, from a copy of the project that hls4ml's own hooks are added to."""
        library = self._traced_library
        values = {t.op: np.zeros((len(x), *t.shape)) for t in self.tensors}
        storage = (_TraceData * len(self._observed))()
        library.allocate_trace_storage(ctypes.c_size_t(8))
        for i, sample in enumerate(self._samples(x)):
            self._call(sample, *(values[port.op][i] for port in self.ports), library=library)
            library.collect_trace_output(storage)
            for entry in storage:
                tensor = self._observed[entry.name.decode()]
                data = ctypes.cast(entry.data, ctypes.POINTER(ctypes.c_double))
                values[tensor.op][i] = np.ctypeslib.as_array(data, tensor.shape)
        library.free_trace_storage()
        for tensor in self.tensors:  # a tensor in another's variable, as after a flatten
            if tensor.op not in self._observed:
                values[tensor.op] = values[self._first(tensor.variable).op].reshape(len(x), *tensor.shape)
        return {t.op: to_codes(values[t.op], t.format, t.op) for t in self.tensors}

    def write_tb_data(self, x: npt.NDArray[np.float32], codes: Codes) -> None:
        """Give the vendor's C simulation the same samples: inputs, and the outputs to expect.

        Args:
            x: real inputs `(batch, *input shape)`.
            codes: output codes `(batch, *output shape)` of the reference.
        """
        folder = self.folder / "tb_data"
        folder.mkdir(exist_ok=True)
        _write_rows(folder / "tb_input_features.dat", np.asarray(x, np.float32))
        _write_rows(folder / "tb_output_predictions.dat", codes * 2.0**-self._output_frac)

    def _samples(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        shape = self.tensors[0].shape
        if x.shape[1:] != shape or not np.isfinite(x).all():
            raise InvalidInput(f"input of shape {x.shape[1:]}: the project takes finite values of shape {shape}")
        return np.ascontiguousarray(x, np.float32).astype(np.float64)

    def _call(self, *arrays: npt.NDArray[np.float64], library: ctypes.CDLL | None = None) -> None:
        """Run the top function on one sample: its input, and where each port's values go."""
        (library or self._library)[f"{self.top}_double"](*(array.ctypes for array in arrays))

    def _first(self, variable: str) -> Tensor:
        return next(t for t in self.tensors if t.variable == variable)

    @cached_property
    def _observed(self) -> dict[str, Tensor]:
        """The tensors by op name, one for each C++ variable."""
        return {t.op: t for t in self.tensors if self._first(t.variable) is t}

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return self._compiled(self.folder)

    @cached_property
    def _traced_library(self) -> ctypes.CDLL:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "project"
            shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("*.so", "*_prj"))
            self._add_hooks(copy)
            return self._compiled(copy)

    def _compiled(self, folder: Path) -> ctypes.CDLL:
        """Compile this project, or a copy of it, by its own `build_lib.sh` and load the library."""
        compiler = GXX.require()
        for text in sorted((folder / "firmware" / "weights").glob("*.txt")):
            if f"{{{text.read_text()}}};" not in text.with_suffix(".h").read_text():
                raise ParityError(f"{text} differs from {text.stem}.h: what is simulated is not what is synthesized")
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "g++").symlink_to(compiler)  # the script's name for the compiler
            environment = {**os.environ, "PATH": f"{scratch}{os.pathsep}{os.environ['PATH']}"}
            build = subprocess.run(
                ["bash", "build_lib.sh"], cwd=folder, env=environment, capture_output=True, text=True
            )
            if build.returncode:
                errors = [line for line in build.stderr.splitlines() if "error" in line]
                raise RuntimeError(f"{folder}: the C simulation does not compile: {' '.join(errors[:3])}")
            # From a path of its own: the loader would take an older library of the same path for this one
            built = folder / "firmware" / f"{self.top}-{_stamp(self.digest)}.so"
            _deepen_stack()
            library = ctypes.CDLL(str(shutil.copy(built, scratch)))
        library[f"{self.top}_double"].restype = None
        return library

    def _add_hooks(self, folder: Path) -> None:
        """Let the copy in `folder` save each tensor after the call that makes it, and the input before the first."""
        firmware = folder / "firmware" / f"{self.top}.cpp"
        code, storage = firmware.read_text(), ""
        for tensor in self._observed.values():
            size, typedef = int(np.prod(tensor.shape)), tensor.typedefs["result"]
            made = "// hls-fpga-machine-learning insert layers" if tensor is self.tensors[0] else f", {tensor.variable}"
            end = re.search(rf"{made}\b.*", code)
            assert end, f"no call makes {tensor.variable}"
            hook = f'\n    nnet::save_layer_output<{typedef}>({tensor.variable}, "{tensor.op}", {size});'
            code = code[: end.end()] + hook + code[end.end() :]
            storage += f'\n    nnet::trace_outputs->insert({{"{tensor.op}", malloc({size} * element_size)}});'
        firmware.write_text(code)
        _replace(folder / f"{self.top}_bridge.cpp", {"trace_type_size = element_size;": rf"\g<0>{storage}"})
        _replace(folder / "build_lib.sh", {"BASEDIR=.*": f'BASEDIR="{self.folder.resolve()}"'})  # of the weights


def expected_types(net: QNet) -> Types:
    """The C++ type of every op's result, and of the weight, bias and accumulator of a linear op.

    Activations and the input round half to even and saturate. Constants need no rounding, accumulators and
    linear results are exact, and whatever only moves values keeps its source's type.

    A linear result is wider than its accumulator only where it is far below the next quantizer's step, as when all
    weights are zero: `ap_fixed` reads the bit half a step below, and fails an assertion where that is none of its own.
    """
    types: Types = {}
    for op in net.ops:
        match op:
            case Input() | Quantize():
                types[op.name] = {"result": str(op.format)}
            case MaxPool() | Pad() | Upsample() | Flatten():
                types[op.name] = {"result": types[op.source]["result"]}
            case Dense() | Conv() | DepthwiseConv() | Scale() | AvgPool() | LeakyRelu() | Add() | Concat():
                exact = net.formats[op.name]
                result = replace(exact, width=max(exact.width, exact.frac - _next_frac(net, op)))
                types[op.name] = {"result": _exact_type(result), **_inner_types(net, op)}
            case Outputs():  # its sources' ports
                pass
            case _:
                assert_never(op)
    return types


def _layers(net: QNet) -> list[Op]:
    """The ops that hardware computes."""
    return [op for op in net.ops if not isinstance(op, Outputs)]


def _inner_types(net: QNet, op: Op) -> dict[str, str]:
    """The types inside an op, by role."""
    exact = net.formats[op.name]
    match op:
        case Dense() | Conv() | DepthwiseConv() | Scale():
            constants = {"weight": _exact_type(op.weight_format), "bias": _exact_type(net.bias_format(op))}
            return constants if isinstance(op, Scale) else {**constants, "accum": _exact_type(exact)}
        case AvgPool():  # the sum, before it is divided
            return {"accum": _exact_type(replace(exact, width=exact.width + exact.frac - net.formats[op.source].frac))}
        case LeakyRelu():
            return {"param": _exact_type(Fixed(signed=False, width=1, frac=op.shift))}
        case _:
            return {}


def _next_frac(net: QNet, op: Op) -> int:
    """Fraction of the coarsest quantizer that reads an op's tensor, directly or after it was moved; else its own."""
    fracs = [net.formats[op.name].frac]
    for reader in net.ops:
        if op.name in sources_of(reader):
            if isinstance(reader, Quantize):
                fracs.append(reader.format.frac)
            elif isinstance(reader, MaxPool | Pad | Upsample | Flatten):
                fracs.append(_next_frac(net, reader))
    return min(fracs)


def check_settings(
    net: QNet,
    *,
    backend: Backend,
    io_type: IoType,
    reuse_factor: int,
    strategy: Strategy,
    layers: Mapping[str, LayerSettings],
) -> None:
    """Raise `InvalidInput` where a project cannot be made of a network with these settings of `HlsProject.create`.

    Only its ops count, not its numbers: one that is not trained yet will do.
    """
    strategies = [strategy, *(s.strategy for s in layers.values() if s.strategy)]
    for value, choices in ((backend, Backend), (io_type, IoType), *((s, Strategy) for s in strategies)):
        if value not in get_args(choices):
            raise InvalidInput(f"{value!r} is none of {', '.join(get_args(choices))}")
    if unknown := sorted(set(layers) - {op.name for op in net.linears}):
        names = ", ".join(op.name for op in net.linears)
        raise InvalidInput(f"layer {unknown[0]!r} has no reuse factor or strategy; these layers have: {names}")
    if io_type == "io_stream":
        _check_streams(net)
    _check_adders(net, strategy, reuse_factor, layers)


def _check_streams(net: QNet) -> None:
    """Refuse what hls4ml's streams compute wrongly, or refuse by an assertion in the generated code."""
    flattened = {op.name for op in net.ops if isinstance(op, Flatten) and len(net.shapes[op.source]) > 1}
    for op in net.ops:
        match op:
            case MaxPool() | AvgPool() if op.stride != op.window:
                fault = f"pool windows of {op.window} at a stride of {op.stride}"
            case Conv() if len(op.stride) == 2 and op.weight.shape[0] == 1 < min(op.weight.shape[1], op.stride[0]):
                fault = f"convolve by {kernel_of(op)} at a stride of {op.stride}"  # all rows get through
            case _ if not isinstance(op, Dense) and flattened.intersection(sources_of(op)):
                fault = "feed a flattened image to anything but a dense layer"
            case _:
                continue
        raise InvalidInput(f"op {op.name!r}: hls4ml's io_stream cannot {fault}: use io_parallel")


def _check_adders(net: QNet, strategy: Strategy, reuse_factor: int, layers: Mapping[str, LayerSettings]) -> None:
    """Refuse distributed arithmetic where it is not installed, and where hls4ml has none."""
    for op in net.linears:
        own = layers.get(op.name, LayerSettings())
        if (own.strategy or strategy) != _ADDERS or isinstance(op, Scale):
            continue
        if find_spec("da4ml") is None:
            raise InvalidInput(f"strategy {_ADDERS!r} needs da4ml, which is not installed: pip install 'hmq-fpga[da]'")
        if (own.reuse_factor or reuse_factor) != 1:
            raise InvalidInput(f"op {op.name!r}: {_ADDERS} has no multipliers to reuse: set its reuse factor to 1")
        if isinstance(op, DepthwiseConv):
            raise InvalidInput(f"op {op.name!r}: hls4ml has no {_ADDERS} of depthwise convolutions: set its strategy")


def _exact_type(format: Fixed) -> str:
    return f"{'ap_fixed' if format.signed else 'ap_ufixed'}<{format.width},{format.integer}>"


def _plain_type(text: str) -> str:
    """A type of `defines.h` without the array of a stream around it and without its count of saturation bits."""
    match = re.search(r"(ap_u?(?:fixed|int)<\w+(?:,-?\d+)?)((?:,AP_\w+)*)(?:,0)?>", text)
    return f"{match[1]}{match[2]}>" if match else text


def _precisions(net: QNet) -> dict[str, dict[str, str]]:
    """The types in hls4ml's configuration, of every layer that the Keras model may become."""
    types = expected_types(net)
    layers: dict[str, dict[str, str]] = {}
    for op in _layers(net):
        result = {"result": types[op.name]["result"]}
        layers[layer_name(op)] = types[op.name]
        match op:
            case Input():
                layers[f"{op.name}_values"] = result
            case Dense() | Conv() | DepthwiseConv():
                # The activation that hls4ml splits off. With one of the two types unset it drops the next quantizer.
                layers[f"{op.name}_linear"] = result
            case Scale():
                layers[op.name] = {"scale" if role == "weight" else role: t for role, t in types[op.name].items()}
            case MaxPool():
                layers[op.name] = {**result, "accum": result["result"]}
            case _:
                pass
    return {name: dict(types) for name, types in layers.items()}


@dataclass(frozen=True)
class _KerasView:
    """What hls4ml reads of a Keras model, without the quantizers of constants.

    The constants are on their grids already, and hls4ml derives their types from the quantizers wrongly
    (`quantized_bits(4,4)` becomes `int<4>`, an unsigned one signed) and past any type that is configured.
    """

    model: Any

    def to_json(self) -> str:
        architecture = json.loads(self.model.to_json())
        for layer in architecture["config"]["layers"]:
            for quantizer in ("kernel_quantizer", "depthwise_quantizer", "bias_quantizer"):
                layer["config"].pop(quantizer, None)
        return json.dumps(architecture)

    def get_layer(self, name: str) -> Any:
        return self.model.get_layer(name)


def _convert(net: QNet, layers: Mapping[str, LayerSettings], model: dict[str, Any], **options: Any) -> Any:
    """hls4ml's graph of the network's QKeras model."""
    with _logged():
        keras_model = to_qkeras(net)
        from hls4ml.converters import convert_from_keras_model

        configured: dict[str, dict[str, Any]] = {name: {"Precision": p} for name, p in _precisions(net).items()}
        for name, settings in layers.items():
            given = {"ReuseFactor": settings.reuse_factor, "Strategy": settings.strategy}
            configured[name] |= {key: value for key, value in given.items() if value is not None}
        hls_config = {"Model": model, "LayerName": configured}
        return convert_from_keras_model(_KerasView(keras_model), hls_config=hls_config, bit_exact=False, **options)


def _tensors(net: QNet, graph: Any) -> tuple[Tensor, ...]:
    """Where hls4ml's graph holds the tensors.

    Raises:
        RuntimeError: when a layer is not there, naming it.
    """
    tensors: dict[str, Tensor] = {}
    for op in _layers(net):
        node = graph.graph.get(f"{op.name}_values" if isinstance(op, Input) else op.name)
        format = net.formats[op.name]
        moved = isinstance(op, Flatten) or (isinstance(op, Quantize) and format == net.formats[op.source])
        if moved and (node is None or isinstance(op, Flatten)):  # nothing to compute: the source's variable
            (name,) = sources_of(op)
            source = tensors[name]
            variable, typedefs = source.variable, {"result": source.typedefs["result"]}
        elif node is None:
            raise RuntimeError(f"hls4ml dropped layer {op.name!r}")
        else:
            variable, typedefs = node.get_output_variable().name, {"result": node.get_output_variable().type.name}
            inner = {"accum", "param"} & _inner_types(net, op).keys()
            if isinstance(op, Linear) and node.get_attr("strategy") == _ADDERS:
                inner = set()
            elif isinstance(op, Linear):
                weight = "scale" if isinstance(op, Scale) else "weight"
                typedefs |= {"weight": node.get_weights(weight).type.name, "bias": node.get_weights("bias").type.name}
            typedefs |= {role: node.get_attr(f"{role}_t").name for role in inner}
        tensors[op.name] = Tensor(
            op=op.name, variable=variable, shape=net.shapes[op.name], format=format, typedefs=typedefs
        )
    return tuple(tensors.values())


def _check_layers(net: QNet, graph: Any) -> None:
    """Every layer is an op's, but for zero padding and copies of streams, which keep the type."""
    known = {op.name for op in _layers(net)} | {f"{net.input.name}_values"}
    for name, node in graph.graph.items():
        if name in known:
            continue
        source, result = node.get_input_variable().type.precision, node.get_output_variable().type.precision
        if node.class_name not in ("ZeroPadding1D", "ZeroPadding2D", "Clone") or source != result:
            raise RuntimeError(f"hls4ml added layer {name!r}, {source} to {result}")


def _write(graph: Any, project: HlsProject) -> None:
    """Write hls4ml's project, free of paths, times and random names."""
    config = graph.config.config
    del config["KerasModel"]  # hls4ml would save a second copy of the Keras model
    with _logged():
        graph.write()
    stamp = {f"'?{config['Stamp']}'?": _stamp(project.digest)}  # YAML quotes one that it might read as a number
    # An assertion that fails would end this process, and `ap_fixed` asserts a bit that it then does not use
    _replace(project.folder / "build_lib.sh", {**stamp, "-fPIC": "-fPIC -DNDEBUG"})
    _replace(project.folder / "hls4ml_config.yml", {**stamp, re.escape(config["OutputDir"]): "."})
    # The testbench writes results with 6 digits: too few to tell codes apart
    _replace(project.folder / f"{project.top}_test.cpp", {r"std::ofstream fout\(.*": r"\g<0>\n    fout.precision(17);"})
    record = {
        "top": project.top,
        "digest": project.digest,
        "outputs": project.outputs,
        "reuse_factors": project.reuse_factors,
        "tensors": [asdict(t) for t in project.tensors],
    }
    (project.folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _stamp(digest: str) -> str:
    """What tells the library's name from others', random in hls4ml; a letter first, lest YAML reads a number."""
    return f"q{digest[:7]}"


def _compare(expected: Types, actual: Types) -> None:
    for op, roles in expected.items():
        for role, kind in roles.items():
            if role in actual[op] and actual[op][role] != kind:
                raise RuntimeError(f"hls4ml made the {role} of layer {op!r} {actual[op][role]} instead of {kind}")


@contextlib.contextmanager
def _no_leftovers() -> Iterator[None]:
    """Fail where a stream is not read to its end: C simulation only prints that, hardware would hang.

    Raises:
        ParityError: with what was printed.
    """
    stdout = os.dup(1)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        if lines := [line for line in printed.read().decode().splitlines() if "leftover data" in line]:
            raise ParityError(f"C simulation: {lines[0]}")


def _deepen_stack() -> None:
    """Let the stack of this process hold all products of a layer, where hls4ml's C++ has them.

    Two million take the usual 8 MiB, and beyond it the process would end without a word.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


class _TraceData(ctypes.Structure):
    """hls4ml's `trace_data`."""

    _fields_: ClassVar = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p)]


def _replace(path: Path, patterns: Mapping[str, str]) -> None:
    text = path.read_text()
    for pattern, replacement in patterns.items():
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path}: no {pattern}"
    path.write_text(text)


def _write_rows(path: Path, values: npt.NDArray[np.floating[Any]]) -> None:
    """One sample per line, each number with all its digits."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    path.write_text("".join(" ".join(map(repr, row)) + "\n" for row in rows.tolist()))


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Send what hls4ml prints to the log."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), quiet():
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.debug("%s", line)
