"""Kinds and names of the layers of a Keras model."""

from __future__ import annotations

from collections.abc import Iterable

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.ops import DepthwiseConv, Input, Op


def layer_name(op: Op) -> str:
    """Name of the Keras layer that makes an op's tensor: the op's, or `<input>_quantizer` after `<input>_values`.

    (hls4ml reserves the name `input`.)
    """
    return f"{op.name}_quantizer" if isinstance(op, Input) else op.name


def values_name(op: Input) -> str:
    """Name of the Keras layer that takes an input."""
    return f"{op.name}_values"


def padding_name(op: Op) -> str:
    """Name of the Keras layer that pads for a convolution, where Keras has no name for its padding."""
    return f"{op.name}_padding"


def mixes_channels(op: DepthwiseConv) -> bool:
    """Whether a convolution with zeros between the channels stands for it: TensorFlow has it with one stride only."""
    return len(set(op.stride)) > 1


def check_distinct(names: Iterable[str], program: str) -> None:
    """Refuse layers of one name, as an op `fc_padding` beside the padding of a convolution `fc`.

    Raises:
        InvalidInput: naming it.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidInput(f"op {name!r}: {program} would have two layers of this name: rename one of the ops")
        seen.add(name)
