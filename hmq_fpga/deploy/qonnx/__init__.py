"""QONNX: an optional exporter and simulator."""
