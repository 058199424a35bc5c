"""The C simulation of a project: compile it, run its top function, and see the tensors in between."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.hls.types import Tensor
from hmq_fpga.deploy.parity import ParityError
from hmq_fpga.deploy.toolchain import GXX, ToolFailed
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Shape

STACK_BYTES = 96 << 20  # what Linux leaves a stack to grow to, less what is there
_GIVEN = Path(__file__).with_name("layers_given.h")
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Library:
    """A compiled project, its weights read.

    Attributes:
        handle: the loaded library.
        top: name of its top function.
        ports: shapes of the outputs, in the order of the arguments.
    """

    handle: ctypes.CDLL
    top: str
    ports: Sequence[Shape]

    def call(self, inputs: Sequence[Values], outputs: Sequence[Values]) -> None:
        """Run the top function on one sample: its inputs, and where each port's values go."""
        self.handle[f"{self.top}_double"](*(array.ctypes for array in (*inputs, *outputs)))

    def predict(self, inputs: Sequence[Values]) -> list[Values]:
        """Each port's values `(batch, *shape)` for the inputs, each `(batch, *input shape)`."""
        values = [np.zeros((len(inputs[0]), *shape)) for shape in self.ports]
        for i, sample in enumerate(zip(*inputs, strict=True)):
            self.call(sample, [value[i] for value in values])
        return values

    def trace(
        self, inputs: Sequence[Values], tensors: Sequence[Tensor], given: Mapping[str, Values] | None = None
    ) -> dict[str, Values]:
        """The values of tensors by op name, each `(batch, *shape)`.

        Args:
            inputs: values `(batch, *input shape)`.
            tensors: that `add_hooks` was given.
            given: values `(batch, *shape)`, contiguous, of some of them by op name, that are read in the place of what
                was made.
        """
        given = given or {}
        observed = {t.op: t for t in tensors}
        values = {t.op: np.zeros((len(inputs[0]), *t.shape)) for t in tensors}
        outputs = [np.zeros(shape) for shape in self.ports]
        storage = (_TraceData * len(observed))()
        self.handle.allocate_trace_storage(ctypes.c_size_t(8))
        for i, sample in enumerate(zip(*inputs, strict=True)):
            for op, array in given.items():
                self.handle.give(op.encode(), array[i].ctypes)
            self.call(sample, outputs)
            self.handle.collect_trace_output(storage)
            for entry in storage:
                tensor = observed[entry.name.decode()]
                data = ctypes.cast(entry.data, ctypes.POINTER(ctypes.c_double))
                values[tensor.op][i] = np.ctypeslib.as_array(data, tensor.shape)
        for op in given:
            self.handle.give(op.encode(), None)
        self.handle.free_trace_storage()
        return values


def compile_library(folder: Path, top: str, stamp: str, inputs: Sequence[Shape], ports: Sequence[Shape]) -> Library:
    """Compile a project by its own `build_lib.sh`, load the library and let it read its weights.

    Args:
        folder: the project; it may be gone afterwards.
        top: name of the top function.
        stamp: what the script puts into the library's name.
        inputs: shapes of the inputs.
        ports: shapes of the outputs.

    Raises:
        ToolMissing: without a C++ compiler.
        ToolFailed: when the compiler fails, with its first errors.
        ParityError: when the weights of simulation and synthesis differ, or a stream is not read to its end.
    """
    for text in sorted((folder / "firmware" / "weights").glob("*.txt")):
        if f"{{{text.read_text()}}};" not in text.with_suffix(".h").read_text():
            raise ParityError(f"{text} differs from {text.stem}.h: what is simulated is not what is synthesized")
    return load_library(build_library(folder, top, stamp), top, inputs, ports)


def build_library(folder: Path, top: str, stamp: str) -> Path:
    """Compile a project by its own `build_lib.sh`; the path of the library.

    Raises:
        ToolMissing: without a C++ compiler.
        ToolFailed: when the compiler fails, with its first errors.
    """
    compiler = GXX.require()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "g++").symlink_to(compiler)  # the script's name for the compiler
        environment = {**os.environ, "PATH": f"{scratch}{os.pathsep}{os.environ['PATH']}"}
        build = subprocess.run(
            ["bash", "build_lib.sh"],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    if build.returncode:
        lines = build.stderr.splitlines()
        errors = [line for line in lines if "error" in line] or lines[-1:]
        raise ToolFailed(f"{folder}: the C simulation does not compile: {' '.join(errors[:3])}")
    return folder / "firmware" / f"{top}-{stamp}.so"


def load_library(built: Path, top: str, inputs: Sequence[Shape], ports: Sequence[Shape]) -> Library:
    """Load a library and let it read the weights that lie where it was built.

    Raises:
        ParityError: when a stream is not read to its end.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # From a path of its own: the loader would take an older library of the same path for this one
        path = shutil.copy(built, scratch)
        _deepen_stack()
        library = Library(ctypes.CDLL(str(path)), top, ports)
    library.handle[f"{top}_double"].restype = None
    with _no_leftovers():  # the weights are read at the first call
        library.call([np.zeros(shape) for shape in inputs], [np.zeros(shape) for shape in ports])
    return library


def add_hooks(folder: Path, top: str, tensors: Sequence[Tensor], inputs: Sequence[str]) -> None:
    """Let a project save tensors, each after the call that makes it, and those of the inputs before all.

    Where its types are AMD's, those of other ops can then be given; see `takes_layers`.

    Raises:
        InvalidInput: when the files are not those that were written.
    """
    firmware = folder / "firmware" / f"{top}.cpp"
    code, storage, gives = firmware.read_text(), "", takes_layers(folder)
    for tensor in tensors:
        size, typedef = int(np.prod(tensor.shape)), tensor.typedefs["result"]
        made = f", {tensor.variable}" if tensor.op not in inputs else "// hls-fpga-machine-learning insert layers"
        end = re.search(rf"{made}\b.*", code)
        if end is None:
            raise InvalidInput(f"{firmware}: no call makes {tensor.variable}: write the project again")
        hook = f'\n    nnet::save_layer_output<{typedef}>({tensor.variable}, "{tensor.op}", {size});'
        if gives and tensor.op not in inputs:
            hook += f'\n    given::put({tensor.variable}, "{tensor.op}", {size});'
        code = code[: end.end()] + hook + code[end.end() :]
        storage += f'\n    nnet::trace_outputs->insert({{"{tensor.op}", malloc({size} * element_size)}});'
    if gives:
        shutil.copy(_GIVEN, firmware.parent)
        code = f'#include "{_GIVEN.name}"\n{code}'
    firmware.write_text(code)
    edit(folder / f"{top}_bridge.cpp", {"trace_type_size = element_size;": rf"\g<0>{storage}"})


def takes_layers(folder: Path) -> bool:
    """Whether tensors in between can be given to a project, once it has hooks."""
    return (folder / "firmware" / "ap_types").is_dir()


def edit(path: Path, patterns: Mapping[str, str]) -> None:
    """Replace patterns in a file.

    Raises:
        InvalidInput: where one is not there.
    """
    text = path.read_text()
    for pattern, replacement in patterns.items():
        text, count = re.subn(pattern, replacement, text)
        if not count:
            raise InvalidInput(f"{path}: has no {pattern!r}: write the project again, with hls4ml 1.3.0")
    path.write_text(text)


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

    _fields_: ClassVar[list[Any]] = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p)]
