import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.study import data
from hmq_fpga.study.scales import Normalization, check_scales

RNG = np.random.default_rng(0)


def samples(*scales, n=200):
    return (RNG.normal(size=(n, len(scales))) * scales).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (samples(1, 1e-6, 1e6), r"feature 0 \(-.*\), feature 1 \(-.*\) would not vary in any 8-bit .* feature 2 \(-"),
        (samples(1e6, 1e-6), r"feature 1 \(-.*e-06 … .*e-06\) would .* beside feature 0 \(.*e\+06.*: add --normalize"),
        (np.abs(samples(1e6, *[1e-6] * 9)), r"feature 1 .*, feature 2 .*, feature 3 \(.*\) and 6 more would"),
        (samples(1, 1e12).reshape(-1, 2, 1, 1).repeat(3, 2), "channel 0 .* beside channel 1"),
    ],
)
def test_features_that_no_format_tells_apart_are_named(x, message):
    with pytest.raises(InvalidInput, match=message) as caught:
        check_scales(x, bits=8)
    assert "\n" not in str(caught.value)
    check_scales(Normalization.of(x)(x), bits=8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_other_features_are_left_alone(bits):
    check_scales(data.load("digits").x_train, bits=bits)
    check_scales(np.zeros((5, 3), np.float32), bits=bits)
    constant = samples(1, 1, 1)
    constant[:, 1] = 1e9
    check_scales(constant[:, :1], bits=bits)
    check_scales(Normalization.of(constant)(constant), bits=bits)


@pytest.mark.parametrize("bits", [2, 4])
def test_faint_pixels_are_no_fault_of_the_data(bits):
    """Of images standardized as a whole, such as MNIST's."""
    x = RNG.integers(0, 256, (200, 16)).astype(np.float32)
    x[:, 3] = x[:, 3] > 250
    check_scales((x / 255 - np.float32(0.1307)) / np.float32(0.3081), bits=bits)


def test_age_and_income_are_told_apart_by_eight_bits():
    x = np.abs(samples(30, 3e4))
    check_scales(x, bits=8)


@pytest.mark.parametrize("octaves", [4, 20])
def test_one_outlier_is_no_scale(octaves):
    x = RNG.random((1000, 8)).astype(np.float32)
    expected = Normalization.of(x)
    x[17, 3] = 2.0**octaves
    check_scales(x, bits=8)
    found = Normalization.of(x)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-2)
    np.testing.assert_allclose(found.deviation, expected.deviation, rtol=1e-2)
    check_scales(found(x), bits=8)
    with pytest.raises(InvalidInput, match=r"feature 0 .* would not vary .* beside feature 3 .* add --normalize"):
        check_scales(x * np.where(np.arange(8) == 3, np.float32(2**20), 1), bits=8)


def test_normalized_to_mean_zero_and_deviation_one():
    x = samples(1e-6, 1e6, 0) + np.float32([1e-6, 5e6, 0.1])
    found = Normalization.of(x)(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, :2].mean(0, np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(found[:, :2].std(0, dtype=np.float64), 1, atol=1e-6)
    assert_array_equal(found[:, 2], 0)  # only shifted
    shifted = x[:1] + np.float32([0, 0, 1])
    assert Normalization.of(x)(shifted)[0, 2] == pytest.approx(1)


def test_images_are_normalized_by_channel():
    x = (RNG.normal(size=(50, 2, 3, 4)) * [[[1.0]], [[100.0]]] + 7).astype(np.float32)
    normalization = Normalization.of(x)
    assert normalization.mean.shape == (2, 1, 1)
    found = normalization(x)
    np.testing.assert_allclose(found.std((0, 2, 3)), 1, atol=1e-5)
    assert np.ptp(found.mean(0)) > 0.1  # single pixels are not


def test_several_inputs_are_scaled_one_by_one():
    """Features beside an image of two channels, which stands in a row with its channels last."""
    features, images = samples(1e5, 1), samples(*[1] * 12).reshape(-1, 2, 2, 3) * np.float32([1, 1e-9])[:, None, None]
    x = np.concatenate([features, np.moveaxis(images, 1, -1).reshape(len(images), -1)], 1)
    shapes = ((2,), (2, 2, 3))
    with pytest.raises(InvalidInput, match=r"channel 1 of input 1 .* beside feature 0 of input 0"):
        check_scales(x, bits=8, shapes=shapes)
    normalization = Normalization.of(x, shapes)
    found = normalization(x)
    assert_array_equal(found[:, :2], Normalization.of(features)(features))
    expected = np.moveaxis(Normalization.of(images)(images), 1, -1).reshape(len(images), -1)
    assert_array_equal(found[:, 2:], expected)
    check_scales(found, bits=8, shapes=shapes)


def test_what_is_stored_is_exact(tmp_path):
    x = samples(1e-30, 1, 1e30)
    normalization = Normalization.of(x)
    normalization.save(tmp_path)
    again = Normalization.load(tmp_path)
    assert_array_equal(again.mean, normalization.mean)
    assert_array_equal(again.deviation, normalization.deviation)
    assert_array_equal(again(x), normalization(x))
    (tmp_path / "normalization.json").write_text(json.dumps({"mean": [0]}))
    with pytest.raises(InvalidInput, match=r"normalization\.json: cannot be read"):
        Normalization.load(tmp_path)


def test_only_training_data_decide():
    digits = data.load("digits")
    normalization = Normalization.of(digits.x_train)
    found = normalization.apply(digits)
    assert_array_equal(found.x_test, normalization(digits.x_test))
    assert abs(found.x_test.mean(0)).max() > 1e-3
    assert_array_equal(found.y_test, digits.y_test)
    with pytest.raises(InvalidInput, match=r"samples have the shape \(1, 8, 8\), those normalized before"):
        normalization.apply(data.as_images(digits, (1, 8, 8)))
