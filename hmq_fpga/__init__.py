"""From a PyTorch model to a bit-exact hls4ml project, by HMQ mixed-precision quantization.

The public names, in the order of the road: data and training, instrumentation, search, fine-tuning, the integer
network, its back ends, and the proof that they agree. Each is imported on first use, so that neither torch nor
TensorFlow loads before it is needed.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "load_data": "hmq_fpga.study.data:load",
    "load_npz": "hmq_fpga.study.data:load_npz",
    "take_data": "hmq_fpga.study.sources:take",
    "DataOptions": "hmq_fpga.study.sources:Options",
    "channels_last": "hmq_fpga.study.data:channels_last",
    "training_task": "hmq_fpga.study.tasks:training_task",
    "Task": "hmq_fpga.search.train:Task",
    "Budget": "hmq_fpga.search.train:Budget",
    "fit": "hmq_fpga.search.train:fit",
    "instrument": "hmq_fpga.search.reading:instrument",
    "HMQ": "hmq_fpga.search.quantizers:HMQ",
    "table": "hmq_fpga.search.layers:table",
    "describe": "hmq_fpga.search.describe:describe",
    "Target": "hmq_fpga.search.target:Target",
    "find_scheme": "hmq_fpga.search.methods:find_scheme",
    "HmqSearch": "hmq_fpga.search.methods.hmq:HmqSearch",
    "Checkpoint": "hmq_fpga.search.checkpoint:Checkpoint",
    "finetune": "hmq_fpga.search.train:finetune",
    "range_notes": "hmq_fpga.search.ranges:range_notes",
    "pruning": "hmq_fpga.study.budgets:pruning",
    "freeze": "hmq_fpga.search.freeze:freeze",
    "Fixed": "hmq_fpga.ir.fixed:Fixed",
    "Scheme": "hmq_fpga.ir.scheme:Scheme",
    "QNet": "hmq_fpga.ir.network:QNet",
    "run_reference": "hmq_fpga.ir.reference:run",
    "without_dead": "hmq_fpga.ir.dead:without_dead",
    "to_qkeras": "hmq_fpga.deploy.qkeras.model:to_qkeras",
    "load_qkeras": "hmq_fpga.deploy.qkeras.model:load",
    "from_qkeras": "hmq_fpga.deploy.qkeras.reader:from_qkeras",
    "QKerasSimulator": "hmq_fpga.deploy.qkeras.model:QKerasSimulator",
    "to_qonnx": "hmq_fpga.deploy.qonnx.model:to_qonnx",
    "QonnxSimulator": "hmq_fpga.deploy.qonnx.model:QonnxSimulator",
    "HlsProject": "hmq_fpga.deploy.hls.project:HlsProject",
    "RtlProject": "hmq_fpga.deploy.rtl.project:RtlProject",
    "check": "hmq_fpga.deploy.parity:check",
    "pack": "hmq_fpga.deploy.vendor.pack:pack",
    "collect": "hmq_fpga.deploy.vendor.pack:collect",
    "RunConfig": "hmq_fpga.study.run.config:RunConfig",
    "run": "hmq_fpga.study.run.pipeline:run",
    "SweepConfig": "hmq_fpga.study.sweep.grid:SweepConfig",
    "sweep": "hmq_fpga.study.sweep.grid:sweep",
    "diff": "hmq_fpga.study.run.diff:diff",
    "InvalidInput": "hmq_fpga.ir.errors:InvalidInput",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
