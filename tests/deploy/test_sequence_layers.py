"""Products, gates, softmax, attention and recurrence: every back end computes the reference's integers."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.parity import check
from hmq_fpga.deploy.qkeras.model import QKerasSimulator
from hmq_fpga.deploy.rtl.project import RtlProject
from hmq_fpga.ir import reference
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.search.reading import instrument
from hmq_fpga.study.data import channels_last
from tests import outside
from tests.models import randomly_formatted
from tests.sequences import MODELS, Everything

SOFTMAX = MODELS["a softmax inside"]


def frozen(model, shape, seed=0):
    """Its network with formats that leave something to see, and samples; PyTorch and the reference agree on them."""
    torch.manual_seed(seed)
    quantized = randomly_formatted(instrument(model(), shape), seed, bits=(6, 8), thresholds=(0, 1))
    net = freeze(quantized)
    x = 2 * torch.randn(50, *shape, generator=torch.Generator().manual_seed(seed))
    samples = channels_last(x.numpy())
    assert_array_equal(run_codes(quantized, x, net.output_format), reference.run(net, samples))
    return net, samples


@pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS)
def test_pytorch_qkeras_and_the_traced_network_compute_the_same(model, shape, tmp_path):
    net, samples = frozen(model, shape)
    simulators = [RtlProject.create(net, tmp_path / "rtl").interpreter()]
    if outside.has_qkeras():
        simulators.append(QKerasSimulator(net))
    check(net, simulators, samples).raise_for_mismatch()
    assert len(np.unique(reference.run(net, samples), axis=0)) > 25, "the network should tell its inputs apart"


@pytest.mark.parametrize(("model", "shape", "io_type"), [(Everything, (2, 2), "io_parallel"), (*SOFTMAX, "io_stream")])
def test_hls4ml_computes_the_same(model, shape, io_type, tmp_path):
    net, samples = frozen(model, shape)
    project = HlsProject.create(net, tmp_path / "hls", io_type=io_type)
    check(net, [project], samples).raise_for_mismatch()
    assert len(np.unique(reference.run(net, samples), axis=0)) > 25
