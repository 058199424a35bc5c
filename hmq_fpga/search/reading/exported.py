"""The user's module as PyTorch itself exports it."""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import Shape
from hmq_fpga.search.layers import UserTable, unwrapped

BATCH = 2  # of the example inputs
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Exported:
    """An exported module.

    Attributes:
        program: what PyTorch made of it; operations are PyTorch's own, parameters and buffers are inputs.
        module: a copy of the user's module in evaluation mode, without wrappers.
        examples: a batch of inputs, in the order of the program.
        keywords: names of the inputs where the module takes them by keyword; else empty.
    """

    program: ExportedProgram
    module: nn.Module
    examples: tuple[Tensor, ...]
    keywords: tuple[str, ...]

    def run(self, examples: Sequence[Tensor]) -> Any:
        """What the module itself returns for a batch of inputs."""
        return _call(self.module, examples, self.keywords)

    @property
    def constants(self) -> dict[str, Tensor]:
        """Values of parameters, buffers and other constants, by the name of their input."""
        signature = self.program.graph_signature
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        held = {**self.program.state_dict, **self.program.constants}
        return {name: held[target] for name, target in targets.items()}


def export(model: nn.Module, shapes: Sequence[Shape] | Mapping[str, Shape], *, signed: bool) -> Exported:
    """Export a copy of a module in evaluation mode, for batches of any size.

    Raises:
        InvalidInput: when it cannot be copied or exported, holds NaN, or does not take inputs of these shapes.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidInput("model: a ScriptModule cannot be read: give the module that was scripted")
    if lazy := [name or "model" for name, part in model.named_modules() if is_lazy(part)]:
        raise InvalidInput(f"model: {lazy[0]!r} does not know its sizes yet; call the model once on a batch of inputs")
    try:
        module = _copied(unwrapped(model)).float().eval()
    except Exception as error:  # of the user's __deepcopy__
        raise InvalidInput(f"model: {type(model).__name__} cannot be copied: {_first_line(error)}") from error
    keywords = tuple(shapes) if isinstance(shapes, Mapping) else ()
    sizes = list(shapes.values() if isinstance(shapes, Mapping) else shapes)
    if wrong := [shape for shape in sizes if not 1 <= len(shape) <= 3]:
        raise InvalidInput(
            f"model: samples of shape {wrong[0]}, hardware takes (features,), (channels, length) or "
            "(channels, height, width); give them in such a shape and reshape them in forward"
        )
    random = torch.Generator().manual_seed(0)
    examples = tuple(torch.randn(BATCH, *shape, generator=random) for shape in sizes)
    examples = examples if signed else tuple(x.abs() for x in examples)
    try:
        with torch.no_grad():
            _call(module, examples, keywords)
    except IndexError:
        pass  # of a row that is looked up by a number, of which the operation tells
    except (Exception, SystemExit) as error:  # of the user's forward
        shown = " and ".join(map(str, sizes))
        raise InvalidInput(
            f"model: does not accept an input of shape {shown}{_place(error)}: {_first_line(error)}"
        ) from error
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise InvalidInput(f"model: {name} holds NaN or infinity; train it again or load another checkpoint")
    arguments = ((), dict(zip(keywords, examples, strict=True))) if keywords else (examples, None)
    batch = {0: Dim.AUTO}
    dynamic: Any = dict.fromkeys(keywords, batch) if keywords else _each_argument(module, batch, len(examples))
    try:
        with _quiet(), torch.no_grad(), _tables_read(module):
            program = torch.export.export(module, *arguments, strict=False, dynamic_shapes=dynamic)
    except (Exception, SystemExit) as error:  # it runs the user's forward: anything can come out of it
        reason = _first_line(error)
        if "not a known type" in reason:
            reason = "forward must return a tensor, or a tuple, list or dictionary of such"
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # late: it brings sympy

        if isinstance(error, GuardOnDataDependentSymNode):
            reason = "which operations it runs depends on the values of its input; hardware always runs the same ones"
        kind = type(model).__name__
        raise InvalidInput(f"model: torch.export cannot read {kind}{_place(error)}: {reason}") from error
    return Exported(program, module, examples, keywords)


def is_lazy(module: nn.Module) -> bool:
    """Whether a layer learns its sizes from its first inputs, and has seen none."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _each_argument(module: nn.Module, setting: Any, count: int) -> tuple[Any, ...]:
    """A setting for each of `forward`'s arguments, those of `*args` in a tuple of their own."""
    bound = inspect.signature(module.forward).bind(*(setting for _ in range(count)))
    return tuple(bound.arguments.values())


def place(node: fx.Node) -> str:
    """Where in the user's code an operation stands, such as ` in net.py:12`; empty where it is in no file of theirs."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    for line in reversed(lines):
        if line.startswith('File "') and _TORCH not in line and '"<' not in line:
            file, _, rest = line[6:].partition('", line ')
            if not file.startswith("torch/") and Path(file).is_file():  # a notebook's cell is none
                return f" in {Path(file).name}:{rest.partition(',')[0]}"
    return ""


def _call(module: nn.Module, examples: Sequence[Tensor], keywords: Sequence[str]) -> Any:
    return module(**dict(zip(keywords, examples, strict=True))) if keywords else module(*examples)


def _copied(module: nn.Module) -> nn.Module:
    """A copy without wrappers inside, and with weights that hooks compute before each call computed once for all."""
    computed = [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    copied = copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in computed})
    for part in list(copied.modules()):
        for name, child in part.named_children():
            setattr(part, name, unwrapped(child))
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
                hook.remove(part)
                del part._forward_pre_hooks[key]
    return copied


def _place(error: BaseException) -> str:
    """The last place in the user's code that an error came through."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if _TORCH not in f.filename and f.filename != __file__
    ]
    frames = [frame for frame in frames if Path(frame.filename).is_file()]
    return f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """What PyTorch prints of an export that fails stands in the error as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with redirect_stderr(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _tables_read(module: nn.Module) -> Iterator[None]:
    """A user's table is one operation, whatever its function is made of."""
    tables = [part for part in module.modules() if isinstance(part, UserTable)]
    for table in tables:
        table.is_read = True
    try:
        yield
    finally:
        for table in tables:
            table.is_read = False


def output_names(program: ExportedProgram) -> list[str]:
    """Keys of a returned dictionary, empty for anything else."""
    spec = program.call_spec.out_spec
    return [str(key) for key in spec.context] if spec is not None and spec.type is dict else []
