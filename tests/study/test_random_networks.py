import pytest

from tests.random_networks import compare


@pytest.mark.parametrize("io_type", ["io_parallel", "io_stream"])
@pytest.mark.parametrize("number", range(1000, 1004))
def test_everything_computes_the_same(number, io_type):
    assert compare(number, io_type) > 2
