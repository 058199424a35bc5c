"""What hls4ml's own Keras conversion needs beside a QKeras model to keep its integers."""

from __future__ import annotations

from typing import Any

from hmq_fpga.deploy.hls.types import precisions
from hmq_fpga.deploy.qkeras.names import check_distinct, layer_name, mixes_channels, values_name
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Conv, Dense, DepthwiseConv, Gather, Input, Maximum, Minimum, Multiply, Subtract, Table


def hls4ml_config(net: QNet) -> dict[str, Any]:
    """The `hls_config` with which `hls4ml.converters.convert_from_keras_model` gives a network's exact integers.

    hls4ml 1.3.0 reads models of Keras 2, thus of Python below 3.12:

        model = hmq_fpga.load_qkeras("model.keras")
        config = json.loads(Path("hls4ml_config.json").read_text())
        project = hls4ml.converters.convert_from_keras_model(model, hls_config=config, backend="Vitis")

    Every layer's types are given, also of those that hls4ml splits off. The quantizers of constants are set to null,
    with a warning of hls4ml's for each: it would derive types from them wrongly (`quantized_bits(4,4)` becomes
    `int<4>`, an unsigned one signed), past any type that is given; the constants are on their grids already.

    Raises:
        InvalidInput: where hls4ml, to which upper and lower case are one, could not tell two layers apart; for several
            inputs, and for ops that its conversion does not read, or not exactly.
    """
    for op in net.ops:
        if isinstance(op, Gather | Table | Subtract | Maximum | Minimum | Multiply) or len(set(op.reads)) < len(
            op.reads
        ):
            raise InvalidInput(f"op {op.name!r}: hls4ml's Keras conversion is not known to keep a {type(op).__name__}")
    layers: dict[str, Any] = {}
    split_off: list[str] = []
    for op, types in zip(net.ops, precisions(net).values(), strict=True):
        layers[layer_name(op)] = {"Precision": types}
        result = {"Precision": {"result": types["result"]}}
        match op:
            case Input():
                layers[values_name(op)] = result
            case Dense() | Conv() | DepthwiseConv():
                depthwise = isinstance(op, DepthwiseConv) and not mixes_channels(op)
                weight = "depthwise_quantizer" if depthwise else "weight_quantizer"
                layers[op.name] |= {weight: None, "bias_quantizer": None}
                # The activation that hls4ml splits off. With one of the two types unset it drops the next quantizer.
                split_off.append(f"{op.name}_linear")
                layers[split_off[-1]] = result
            case _:
                pass
    names = [*map(layer_name, net.ops), values_name(net.input), *split_off]
    check_distinct([name.lower() for name in names], "hls4ml")
    return {"Model": {"Precision": "fixed<16,6>", "ReuseFactor": 1, "Strategy": "Latency"}, "LayerName": layers}
