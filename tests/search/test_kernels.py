import math
import subprocess
import sys

import pytest
import torch

from hmq_fpga.search import kernels

GRIDS = [(0.21, -1.3, 1.09, -math.inf), (0.21, 0.0, 1.09, 0.0), (0.25, -math.inf, math.inf, -math.inf)]
SIZES = [0, 1, kernels.BLOCK, kernels.BLOCK + 1, 3 * kernels.PART + 5]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_loops_are_the_plain_operations(grid, n, threads, monkeypatch):
    """However the work is split: values and what passes exactly, sums within their rounding."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, grad = torch.randn(2, n, generator=torch.Generator().manual_seed(0)).unbind()
    *ends, floor = grid
    torch.testing.assert_close(kernels.quantize(x, *ends), kernels._plain_quantize(x, *ends), rtol=0, atol=0)
    passed, sums = kernels.gradients(x, grad, *ends, floor)
    expected_passed, expected_sums = kernels._plain_gradients(x, grad, *ends, floor)
    torch.testing.assert_close(passed, expected_passed, rtol=0, atol=0)
    assert sums == pytest.approx(expected_sums, rel=1e-4, abs=1e-3)
    spent, again = kernels.gradients(x, grad.clone(), *ends, floor, spend=True)
    torch.testing.assert_close(spent, expected_passed, rtol=0, atol=0)
    assert again == pytest.approx(sums, rel=1e-6, abs=1e-6)


def in_order(*dims: int) -> torch.Tensor:
    """`(4, 3, 5, 6)`, with dimensions in this order in memory."""
    return torch.randn([(4, 3, 5, 6)[d] for d in dims]).permute([dims.index(d) for d in range(4)])


LAYOUTS = {
    "contiguous": lambda: in_order(0, 1, 2, 3),
    "channels last": lambda: in_order(0, 2, 3, 1),
    "batch last": lambda: in_order(1, 2, 3, 0),
    "gaps": lambda: torch.randn(4, 3, 5, 12)[..., ::2],
    "part": lambda: in_order(0, 2, 3, 1)[2:],
    "one value": lambda: torch.randn(()).expand(4, 3, 5, 6),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, grad_layout):
    x, grad = LAYOUTS[layout](), LAYOUTS[grad_layout]()
    x, grad = x[: len(grad)], grad[: len(x)]
    y, (passed, sums) = kernels.quantize(x, *GRIDS[0][:3]), kernels.gradients(x, grad, *GRIDS[0])
    expected_passed, expected_sums = kernels._plain_gradients(x, grad, *GRIDS[0])
    assert (y == kernels._plain_quantize(x, *GRIDS[0][:3])).all()
    assert (passed == expected_passed).all()
    assert sums == pytest.approx(expected_sums, rel=1e-4, abs=1e-3)
    if layout in ("contiguous", "channels last"):
        assert y.stride() == passed.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_magnitudes_are_counted(layout, dtype):
    x = LAYOUTS[layout]().to(dtype)
    x = torch.where(x > 1, 0.0, x).to(x.dtype) if layout == "gaps" else x
    expected = [0] * kernels.MAGNITUDES
    for value in x.abs().flatten().tolist():
        expected[math.ceil(math.log2(value)) + 127 if value else 0] += 1
    assert kernels.magnitudes(x).tolist() == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_magnitudes_of_many_values_and_of_the_last_ones(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = torch.randn(SIZES[-1], generator=torch.Generator().manual_seed(0)).mul_(1e3).exp2_()  # zeros and infinities too
    x[:6] = torch.tensor([math.nan, -math.inf, 2.0**127, 1.5 * 2.0**127, 2.0**-126, -0.0])
    found = kernels.magnitudes(x)
    assert found.tolist() == torch.bincount(kernels._plain_magnitudes(x), minlength=kernels.MAGNITUDES).tolist()
    assert (found.sum(), found[256]) == (len(x), 1)
    assert kernels.magnitudes(x[:0]).sum() == 0


def test_not_a_number_stays_one():
    assert kernels.quantize(torch.tensor([math.nan, math.inf]), 0.5, -1.0, 0.5).isnan().tolist() == [True, False]


def test_a_machine_without_any_folder_to_write():
    program = (
        "import torch, numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "from hmq_fpga.search import kernels\n"
        "print(kernels.quantize(torch.tensor([0.3, 7.0]), 0.5, -1.0, 0.5).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[0.5, 0.5]\n"
