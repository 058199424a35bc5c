"""QNet to an hls4ml project on disk.

Every type is set here from the network: left to itself hls4ml 1.3.0 infers types of its own, and removes an activation
after a layer whose result type is `auto`. What was written is read back from `firmware/defines.h` and compared with the
network. No file depends on where the project is.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import yaml

from hmq_fpga.deploy.hls import csim
from hmq_fpga.deploy.hls.layers import layer_list, layer_names, ports
from hmq_fpga.deploy.hls.lower import Lowered, View, lowered, makers
from hmq_fpga.deploy.hls.settings import ADDERS, AMD, check_settings
from hmq_fpga.deploy.hls.types import Tensor, Types, expected_types, inner_roles, precisions, read_types
from hmq_fpga.deploy.parity import to_codes
from hmq_fpga.deploy.settings import DEFAULT_PART, Hardware, HlsBackend, IoType, LayerSettings, Strategy
from hmq_fpga.deploy.toolchain import GXX, ToolFailed
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.files import check_path, replacing
from hmq_fpga.ir.fixed import Codes, Fixed
from hmq_fpga.ir.network import QNet, joined_shape, split_row
from hmq_fpga.ir.ops import Flatten, Linear, Op, Scale, Shape, TensorType, joined

RECORD = "hmq_fpga.json"
_CONSTANTS = ("weight", "bias")
_OF_PARTS = ("Vitis", "Vivado")  # backends that the default part is for; another takes hls4ml's, or its board's
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class HlsProject:
    """An hls4ml project on disk; as a simulator it is compiled once, at its first use, from what is on disk.

    Attributes:
        folder: the project.
        top: name of the top function and of the files.
        digest: of the network that it was made from.
        tensors: in network order, the inputs first.
        inputs: ops whose tensors the top function takes, in the order of its arguments.
        outputs: ops whose tensors the top function puts out, in the order of its arguments.
        reuse_factors: of the layers with weights; hls4ml takes the nearest that divides a layer's work.
    """

    folder: Path
    top: str
    digest: str
    tensors: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reuse_factors: Mapping[str, int]
    name: ClassVar[str] = "csim"

    @classmethod
    def create(
        cls,
        net: QNet,
        folder: Path,
        *,
        backend: HlsBackend = "Vitis",
        io_type: IoType = "io_parallel",
        part: str = DEFAULT_PART,
        clock_ns: float = 5.0,
        reuse_factor: int = 1,
        strategy: Strategy = "Latency",
        layers: Mapping[str, LayerSettings] | None = None,
        project_name: str = "myproject",
    ) -> HlsProject:
        """Convert a network by hls4ml; an existing folder is replaced once the new one is complete.

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
            ToolFailed: when hls4ml fails, drops or adds a layer or changes a type, naming the layer.
        """
        hardware = Hardware(
            backend=backend,
            io_type=io_type,
            part=part,
            clock_ns=clock_ns,
            reuse_factor=reuse_factor,
            strategy=strategy,
            layers=layers or {},
        )
        return cls.of(net, folder, hardware, project_name)

    @classmethod
    def of(cls, net: QNet, folder: Path, hardware: Hardware, project_name: str = "myproject") -> HlsProject:
        """See `create`."""
        if not re.fullmatch(r"[A-Za-z]\w*", project_name):
            raise InvalidInput(f"project name {project_name!r}: letters, digits and underscores, a letter first")
        check_path(folder)
        check_settings(net, hardware)
        GXX.require()
        made = lowered(net, hardware.io_type)
        with replacing(folder) as new:
            graph = _convert(made.net, hardware, new, project_name)
            held = _tensors(made.net, graph)
            project = cls(
                folder=new,
                top=project_name,
                digest=net.digest,
                tensors=_held(net, made, held),
                inputs=tuple(op.name for op in net.inputs),
                outputs=net.outputs,
                reuse_factors=_reuse_factors(made.net, graph, hardware.layers),
            )
            _write(graph, project)
            expected = expected_types(made.net, least_bits=1 if hardware.backend in AMD else 2)
            _compare(expected, replace(project, tensors=tuple(held.values())).types())
        return replace(project, folder=folder)

    @classmethod
    def load(cls, folder: Path) -> HlsProject:
        """The project that `create` wrote to `folder`; needs no hls4ml.

        Raises:
            InvalidInput: when there is none.
        """
        try:
            data = json.loads((folder / RECORD).read_text())
            tensors = tuple(
                Tensor(**{**t, "shape": tuple(t["shape"]), "format": Fixed.from_json(t["format"])})
                for t in data["tensors"]
            )
            inputs = tuple(data.get("inputs", [tensors[0].op]))
            outputs = tuple(data.get("outputs", [tensors[-1].op]))
            return cls(
                folder=folder,
                top=data["top"],
                digest=data["digest"],
                tensors=tensors,
                inputs=inputs,
                outputs=outputs,
                reuse_factors=data.get("reuse_factors", {}),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{folder}: not an hls4ml project of this package: {error}") from error

    def types(self) -> Types:
        """The C++ types that `firmware/defines.h` gives to each op, by role; see `expected_types`."""
        return read_types((self.folder / "firmware" / "defines.h").read_text(), self.tensors)

    def compile(self) -> None:
        """Compile what is on disk, unless this object already has.

        Raises:
            ToolMissing: without a C++ compiler.
            ToolFailed: when the compiler fails, with its first errors.
            ParityError: when the weights of C simulation and synthesis differ, or a stream is not read to its end.
        """
        _ = self._library

    def predict(self, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes `(batch, *output_shape)` for real inputs `(batch, *input_shape)`, channels last."""
        return self.run(self._library, x)

    def run(self, library: csim.Library, x: npt.NDArray[np.float32]) -> Codes:
        """Output codes as `predict` gives them, by a library of this project or of one with the same ports."""
        return self.output_codes(library.predict(self._samples(x)))

    def build(self) -> Path:
        """Compile what is on disk; the path of the library. Its weights are read where it was built, at its first run.

        Raises:
            ToolMissing: without a C++ compiler.
            ToolFailed: when the compiler fails, with its first errors.
        """
        return csim.build_library(self.folder, self.top, _stamp(self.digest))

    def library(self, built: Path) -> csim.Library:
        """Load what `build` made, anew each time."""
        shapes = ([tensor.shape for tensor in self._named(names)] for names in (self.inputs, self.outputs))
        return csim.load_library(built, self.top, *shapes)

    @cached_property
    def ports(self) -> tuple[Tensor, ...]:
        """The tensors that the top function puts out."""
        return self._named(self.outputs)

    @property
    def input_shape(self) -> Shape:
        """Of one sample: the input's, or that of all inputs in a row."""
        return joined_shape([tensor.shape for tensor in self._named(self.inputs)])

    def _named(self, ops: Sequence[str]) -> tuple[Tensor, ...]:
        tensors = {t.op: t for t in self.tensors}
        return tuple(tensors[name] for name in ops)

    def output_codes(self, values: Sequence[npt.NDArray[np.float64]]) -> Codes:
        """Real values of each port, `(batch, *shape)`, as the network's output codes `(batch, *output shape)`.

        Raises:
            ParityError: when a value is not on its tensor's grid.
        """
        codes = [to_codes(value, port.format, port.op) for port, value in zip(self.ports, values, strict=True)]
        return joined([TensorType(port.shape, port.format) for port in self.ports], codes)

    @property
    def _output_frac(self) -> int:
        return max(port.format.frac for port in self.ports)

    def trace(self, x: npt.NDArray[np.float32]) -> dict[str, Codes]:
        """Codes of every tensor by op name, from a copy of the project that hls4ml's own hooks are added to."""
        values = self._hooked_library.trace(self._samples(x), self._observed)
        for tensor in self.tensors:  # a tensor in another's variable, as after a flatten
            if tensor.op not in values:
                values[tensor.op] = values[self._first(tensor.variable).op].reshape(len(x), *tensor.shape)
        return {t.op: to_codes(values[t.op], t.format, t.op) for t in self.tensors}

    def takes(self, codes: Mapping[str, Codes]) -> dict[str, Codes]:
        """Those of the tensors in variables of their own; none where the types are not AMD's."""
        taken = [t.op for t in self._observed] if csim.takes_layers(self.folder) else []
        return {name: codes[name] for name in taken if name in codes}

    def layers(self, given: Mapping[str, Codes]) -> dict[str, Codes]:
        """What each op makes of given codes of its sources, by the copy of the project that `trace` runs."""
        return self.run_layers(self._hooked_library, given)

    def run_layers(self, library: csim.Library, given: Mapping[str, Codes]) -> dict[str, Codes]:
        """Codes as `layers` gives them, by a library of this project with hooks, or of one with the same tensors."""
        formats = {t.op: t.format for t in self._observed}
        values = {name: np.ascontiguousarray(formats[name].decode(codes)) for name, codes in given.items()}
        inputs = [values.pop(name) for name in self.inputs]
        made = library.trace(inputs, self._observed, values)
        return {name: to_codes(made[name], format, name) for name, format in formats.items()}

    def hooked(self, folder: Path) -> HlsProject:
        """A copy of the project, in a folder that is not there yet, whose library `trace` and `run_layers` can use."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.so", "*_prj", "tb_data"))
        csim.add_hooks(folder, self.top, self._observed, self.inputs)
        script = folder / "build_lib.sh"
        script.write_text(script.read_text().replace("-O3", "-O0"))  # compiled once, run little
        return replace(self, folder=folder)

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

    def _samples(self, x: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float64]]:
        """Real inputs, each by itself."""
        if x.shape[1:] != self.input_shape or not np.isfinite(x).all():
            raise InvalidInput(
                f"input of shape {x.shape[1:]}: the project takes finite values of shape {self.input_shape}"
            )
        shapes = {tensor.op: tensor.shape for tensor in self._named(self.inputs)}
        parts = split_row(np.ascontiguousarray(x, np.float32).astype(np.float64), shapes)
        return [np.ascontiguousarray(part) for part in parts.values()]

    def _first(self, variable: str) -> Tensor:
        return next(t for t in self.tensors if t.variable == variable)

    @property
    def _observed(self) -> list[Tensor]:
        """The tensors, one for each C++ variable."""
        return [t for t in self.tensors if self._first(t.variable) is t]

    @cached_property
    def _library(self) -> csim.Library:
        return self._compiled(self.folder)

    @cached_property
    def _hooked_library(self) -> csim.Library:
        with tempfile.TemporaryDirectory() as scratch:
            return self._compiled(self.hooked(Path(scratch) / "project").folder)

    def _compiled(self, folder: Path) -> csim.Library:
        """This project, or a copy of it, compiled."""
        shapes = ([tensor.shape for tensor in self._named(names)] for names in (self.inputs, self.outputs))
        return csim.compile_library(folder, self.top, _stamp(self.digest), *shapes)


def _convert(net: QNet, hardware: Hardware, folder: Path, project_name: str) -> Any:
    """hls4ml's graph of a lowered network.

    Raises:
        ToolFailed: with what hls4ml says against it.
    """
    names = layer_names(net)
    configured: dict[str, dict[str, Any]] = {names[op]: {"Precision": kinds} for op, kinds in precisions(net).items()}
    for op, settings in hardware.layers.items():
        given = {"ReuseFactor": settings.reuse_factor, "Strategy": settings.strategy}
        configured[names[op]] |= {key: value for key, value in given.items() if value is not None}
    listed, put_in, put_out = layer_list(net), [names[op.name] for op in net.inputs], [names[op] for op in ports(net)]
    with _logged():
        from hls4ml.model.graph import ModelGraph
        from hls4ml.utils.config import create_config

        from hmq_fpga.deploy.hls import gather

        gather.register()
        config = create_config(
            output_dir=str(folder),
            project_name=project_name,
            backend=hardware.backend,
            io_type=hardware.io_type,
            part=hardware.part if hardware.backend in _OF_PARTS or hardware.part != DEFAULT_PART else None,
            clock_period=hardware.clock_ns,
        )
        chosen = {"ReuseFactor": hardware.reuse_factor, "Strategy": hardware.strategy}
        model = {"Precision": "fixed<16,6>", **chosen, "BitExact": False}
        config["HLSConfig"] = {"Model": model, "LayerName": configured}
        try:
            return ModelGraph.from_layer_list(config, listed, put_in, put_out)
        except Exception as error:  # from hls4ml anything may come
            raise ToolFailed(f"hls4ml cannot convert this network: {type(error).__name__}: {error}") from error


def _tensors(net: QNet, graph: Any) -> dict[str, Tensor]:
    """Where hls4ml's graph holds the tensors of a lowered network, by op.

    Raises:
        ToolFailed: when a layer is not there or is nobody's, naming it.
    """
    names, made_by = layer_names(net), makers(net)
    _check_layers(graph, set(names.values()))
    tensors: dict[str, Tensor] = {}
    for op in net.ops:
        if made_by[op.name] != op.name or isinstance(op, Flatten | View):  # nothing to compute: the source's variable
            source = tensors[op.reads[0]]
            variable, typedefs = source.variable, {"result": source.typedefs["result"]}
        elif (node := graph.graph.get(names[op.name])) is None:
            raise ToolFailed(f"hls4ml dropped layer {op.name!r}")
        else:
            variable, typedefs = node.get_output_variable().name, _typedefs(net, op, node)
        tensors[op.name] = Tensor(
            op=op.name, variable=variable, shape=net.shapes[op.name], format=net.formats[op.name], typedefs=typedefs
        )
    return tensors


def _held(net: QNet, made: Lowered, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Where the project holds the tensors of the network that was lowered."""
    held = {op.name: tensors[made.held[op.name]] for op in net.ops}
    return tuple(
        replace(
            tensor,
            op=op,
            shape=net.shapes[op],
            format=net.formats[op],
            typedefs=tensor.typedefs if tensor.op == op else {"result": tensor.typedefs["result"]},
        )
        for op, tensor in held.items()
    )


def _typedefs(net: QNet, op: Op, node: Any) -> dict[str, str]:
    """Names of an op's types in the code, by role."""
    names = {"result": node.get_output_variable().type.name}
    if isinstance(op, Linear) and node.get_attr("strategy") == ADDERS:
        return names  # its constants are shifts and additions
    for role in inner_roles(net, op):
        weight = "scale" if isinstance(op, Scale) and role == "weight" else role
        names[role] = node.get_weights(weight).type.name if role in _CONSTANTS else node.get_attr(f"{role}_t").name
    return names


def _check_layers(graph: Any, known: set[str]) -> None:
    """Every layer is an op's, but for copies of streams, which keep the type."""
    for name, node in graph.graph.items():
        if name in known:
            continue
        source, result = node.get_input_variable().type.precision, node.get_output_variable().type.precision
        if node.class_name != "Clone" or source != result:
            raise ToolFailed(f"hls4ml added layer {name!r}, {source} to {result}")


def _reuse_factors(net: QNet, graph: Any, layers: Mapping[str, LayerSettings]) -> dict[str, int]:
    """The reuse factors of the layers with weights, by op.

    Raises:
        InvalidInput: when one that was asked for does not divide the layer's work.
    """
    names, made_by = layer_names(net), makers(net)
    ops = [op.name for op in net.linears if made_by[op.name] == op.name]
    factors = {name: int(graph.graph[names[name]].get_attr("reuse_factor")) for name in ops}
    for name, settings in layers.items():
        if settings.reuse_factor is not None and settings.reuse_factor != factors.get(name, settings.reuse_factor):
            raise InvalidInput(
                f"layer {name!r} cannot have the reuse factor {settings.reuse_factor}: it must divide the "
                f"layer's work; the nearest is {factors[name]}"
            )
    return factors


def _write(graph: Any, project: HlsProject) -> None:
    """Write hls4ml's project, free of paths, times and random names."""
    config = graph.config.config
    config["Stamp"] = _stamp(project.digest)
    writer = copy.copy(graph.config.backend.writer)
    writer.write_yml = lambda _: None  # it would import Keras, and write where the project is
    with _logged():
        writer.write_hls(graph)
    (project.folder / "hls4ml_config.yml").write_text(yaml.dump({**config, "OutputDir": "."}))
    _edit(project.folder, project.top, graph.config.backend.name)
    record = {
        "top": project.top,
        "digest": project.digest,
        "inputs": project.inputs,
        "outputs": project.outputs,
        "reuse_factors": project.reuse_factors,
        "tensors": [asdict(t) for t in project.tensors],
    }
    (project.folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _edit(folder: Path, top: str, backend: str) -> None:
    """Change what hls4ml writes where that is in the way."""
    # An assertion that fails would end this process, and `ap_fixed` asserts a bit that it then does not use
    script = {"-fPIC": "-fPIC -DNDEBUG"}
    # Both files at once
    script |= {r"-o \$\{PROJECT\}\.o\n": r"-o ${PROJECT}.o &\n", r"-o \$\{PROJECT\}_bridge\.o\n": r"\g<0>wait $!\n"}
    quoted = r"""$(sed 's/["\\\\?]/\\\\&/g' <<< "${BASEDIR}/firmware/weights")"""  # as the text of a C++ string
    if backend in AMD:
        script |= {r"\$\{BASEDIR\}/firmware/weights": quoted}
        # hls4ml gives this header the guard of its counterpart for images, and a network may need both
        header = folder / "firmware" / "nnet_utils" / "nnet_sepconv1d_latency.h"
        csim.edit(header, {"NNET_SEPARABLE_CONV2D_LATENCY_H_": "NNET_SEPARABLE_CONV1D_LATENCY_H_"})
    elif backend == "Catapult":  # where the weights are is written into the code
        csim.edit(folder / f"{top}_bridge.cpp", {'(s_weights_dir = )".*"': r"\g<1>WEIGHTS_DIR"})
        places = rf"""BASEDIR="$(cd "$(dirname "$0")" && pwd)"\nWEIGHTS_DIR="\\"{quoted}\\""\n"""
        script |= {
            "LIB_STAMP=.*\n": rf"\g<0>{places}",
            r"-c \$\{PROJECT\}_bridge": r'-D WEIGHTS_DIR="${WEIGHTS_DIR}" \g<0>',
        }
    csim.edit(folder / "build_lib.sh", script)
    # The testbench writes results with 6 digits: too few to tell codes apart
    csim.edit(folder / f"{top}_test.cpp", {r"std::ofstream fout\(.*": r"\g<0>\n    fout.precision(17);"})


def _stamp(digest: str) -> str:
    """What tells the library's name from others', random in hls4ml; a letter first, lest YAML reads a number."""
    return f"q{digest[:7]}"


def _compare(expected: Types, actual: Types) -> None:
    for op, roles in expected.items():
        for role, kind in roles.items():
            if role in actual[op] and actual[op][role] != kind:
                raise ToolFailed(f"hls4ml made the {role} of layer {op!r} {actual[op][role]} instead of {kind}")


def _write_rows(path: Path, values: npt.NDArray[np.floating[Any]]) -> None:
    """One sample per line, each number with all its digits."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    path.write_text("".join(" ".join(map(repr, row)) + "\n" for row in rows.tolist()))


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Send what hls4ml prints to the log."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.debug("%s", line)
