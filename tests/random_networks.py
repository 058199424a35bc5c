"""Random PyTorch models from end to end: evaluation, reference, QKeras, QONNX, C simulation and traced RTL agree.

The tests compare a few; `python -m tests.random_networks 300` compares as many as one likes, half of them with streams.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.parity import ParityError, check
from hmq_fpga.deploy.qkeras.model import QKerasSimulator
from hmq_fpga.deploy.qkeras.reader import from_qkeras
from hmq_fpga.deploy.qonnx.model import QonnxSimulator, to_qonnx
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.deploy.rtl.trace import NotUnrolled
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.study.data import channels_last
from tests import outside
from tests.models import Drawn, quantized_models

DRAWS = 8  # of which the largest is taken
SAMPLES = 40


def drawn(number: int) -> Drawn:
    """The same model for the same number."""
    models: list[Drawn] = []

    @seed(number)
    @settings(
        max_examples=DRAWS,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(quantized_models())
    def collect(model):
        models.append(model)

    collect()
    return max(models, key=lambda drawn: len(drawn.model.nodes))


def compare(number: int, io_type: str) -> int:
    """Compare one model's codes, raising where one differs; the number of its layers."""
    model = drawn(number).model
    net = freeze(model)
    scale = 2.0 ** (number % 7 - 3)  # up to far beyond the range
    x = torch.randn(SAMPLES, *model.input_shape, generator=torch.Generator().manual_seed(number)) * scale
    samples = channels_last(x.numpy())
    np.testing.assert_array_equal(run_codes(model, x, net.output_format), reference.run(net, samples))
    with tempfile.TemporaryDirectory() as folder:
        simulators = [HlsProject.create(net, Path(folder) / "hls", io_type=io_type)]
        try:
            simulators.append(QonnxSimulator(net, to_qonnx(net)))
        except InvalidInput as refused:
            assert "float32 is exact up to 24" in str(refused)
        if outside.has_qkeras():
            simulators.append(QKerasSimulator(net))
            again = from_qkeras(simulators[-1].model)
            np.testing.assert_array_equal(reference.run(again, samples), reference.run(net, samples))
        try:
            simulators.append(RtlProject.create(net, Path(folder) / "rtl").interpreter())
        except NotUnrolled as refused:
            assert re.search("same for every input|bits exceed the", str(refused))
        check(net, simulators, samples).raise_for_mismatch()
    return len(net.ops)


def main() -> int:
    """Compare as many models as the command line says, from the number on that it names second."""
    count, failed, ops = int(sys.argv[1]), 0, 0
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    warnings.simplefilter("ignore")
    for number in range(first, first + count):
        try:
            ops += compare(number, ("io_parallel", "io_stream")[number % 2])
        except (AssertionError, ParityError, RuntimeError, ValueError) as error:  # noqa: PERF203
            failed += 1
            print(f"network {number}: {type(error).__name__}: {error}", flush=True)  # noqa: T201
    print(f"{count} networks of {ops} ops in all, {SAMPLES} samples each: {failed} failed")  # noqa: T201
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
