"""A layer of hls4ml's that moves values, by its extension API; its C++ is in `nnet_gather.h`.

Imports hls4ml.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hls4ml.backends import get_backend
from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
from hls4ml.model.layers import Layer, register_layer

from hmq_fpga.deploy.hls.settings import AMD
from hmq_fpga.ir.fixed import Codes

CLASS = "HmqGather"
_HEADER = Path(__file__).with_name("nnet_gather.h")


class HmqGather(Layer):  # type: ignore[misc]
    """Values of its source by `gather_index`, of the result's shape; where that is -1, the code `gather_fill`."""

    def initialize(self) -> None:
        """Declare the result."""
        self.add_output_variable(list(self.get_attr("gather_index").shape))


class _Config(LayerConfigTemplate):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(HmqGather)

    def format(self, node: Any) -> str:
        index, source = node.get_attr("gather_index"), node.get_input_variable().shape
        streams = node.model.config.get_config_value("IOType") == "io_stream"
        places = {"pack": index // source[-1], "place": index % source[-1]} if streams else {"place": index}
        tables = "".join(_table(name, np.where(index < 0, -1, values)) for name, values in places.items())
        return (
            f"struct config{node.index} : nnet::gather_config {{\n"
            f"    static const unsigned n_in = {int(np.prod(source))};\n"
            f"    static const unsigned n_out = {index.size};\n"
            f"    static const long long fill = {node.get_attr('gather_fill')};\n"
            f"{tables}}};\n"
        )


class _Call(FunctionCallTemplate):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(HmqGather, include_header=[f"nnet_utils/{_HEADER.name}", "nnet_utils/nnet_stream.h"])

    def format(self, node: Any) -> str:
        params = self._default_function_params(node)
        index = node.get_attr("gather_index")
        streams = node.model.config.get_config_value("IOType") == "io_stream"
        if streams and index.shape == tuple(node.get_input_variable().shape) and _is_in_order(index):
            call = f"repack_stream<{{input_t}}, {{output_t}}, {index.size}>"
        else:
            call = "gather<{input_t}, {output_t}, {config}>"
        return f"nnet::{call}({{input}}, {{output}});".format(**params)


def _is_in_order(index: Codes) -> bool:
    return bool(np.array_equal(index.ravel(), np.arange(index.size)))


def _table(name: str, values: Codes) -> str:
    """A function in C++ that looks constants up."""
    text = ", ".join(map(str, values.ravel().tolist()))
    return (
        f"    static int {name}(unsigned i) {{\n"
        "        #pragma HLS INLINE\n"
        f"        static const int values[{values.size}] = {{{text}}};\n"
        "        return values[i];\n"
        "    }\n"
    )


@cache
def register() -> None:
    """Make the layer known to hls4ml, once."""
    register_layer(CLASS, HmqGather)
    for name in AMD:
        backend = get_backend(name)
        backend.register_source(_HEADER)
        for template in (_Config, _Call):
            backend.register_template(template)
