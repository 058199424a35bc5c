"""One bit-width for all weights and one for all activations: what people do by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.calibrate import least_error_formats, max_thresholds_log2, scheme_of
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.methods.widths import Widths
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, History, Listener, Task

Rule = Literal["least_error", "maximum"]


@dataclass(frozen=True, kw_only=True)
class UniformOptions:
    """Options of `uniform`.

    Attributes:
        threshold: `least_error`, the power of two of least squared quantization error; `maximum`, the least
            power of two that clips nothing.
        widths: one for all weights, which is no option here.
    """

    widths: ClassVar[Widths] = "uniform"
    threshold: Rule = "least_error"

    def __post_init__(self) -> None:
        if self.threshold not in get_args(Rule):
            raise InvalidInput(f"threshold {self.threshold!r}: choose from {', '.join(get_args(Rule))}")


def uniform(
    model: QModel,
    task: Task,
    budget: Budget,  # noqa: ARG001
    target: Target,
    options: UniformOptions,
    *,
    seed: int,  # noqa: ARG001
    listener: Listener,
    checkpoint: Checkpoint | None,  # noqa: ARG001
) -> tuple[QModel, Scheme, History]:
    """The widest single bit-width that meets the bounds on weights, and the widest that meets R_a; no training.

    The actual R_w is 32 over a whole number, so it may exceed the target by more than a search's would.

    Raises:
        InvalidInput: when the target has bit-widths of single tensors.
    """
    weight_bits = target.uniform_bits(model)
    activation_bits = min(target.activation_bits(model).values())
    limits = max_thresholds_log2(model, task)
    bits = {site.name: weight_bits if site.kind == "weight" else activation_bits for site in model.sites}
    if options.threshold == "maximum":
        formats = {
            s.name: Fixed.from_threshold(signed=s.signed, bits=bits[s.name], threshold_log2=limits[s.name])
            for s in model.sites
        }
    else:
        formats = least_error_formats(model, task, bits, limits)
    listener(1, 1, {})
    scheme = scheme_of(model, formats, {"method": "uniform", "threshold": options.threshold})
    model.set_scheme(scheme)
    return model, scheme, {}
