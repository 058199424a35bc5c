import io
from urllib.error import URLError

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.layers import parted
from hmq_fpga.study import data
from hmq_fpga.study.data import Dataset
from hmq_fpga.study.tasks import training_task
from tests import outside

CLASSES = np.arange(60) % 3
RNG = np.random.default_rng(3)


def arrays(**changes):
    """Contents of a good file: 60 training and 30 test samples of 4 features."""
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.normal(size=(60, 4)),
        "y_train": CLASSES,
        "x_test": rng.normal(size=(30, 4)),
        "y_test": CLASSES[:30],
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


@pytest.fixture
def file(tmp_path):
    """Writes arrays to a file."""

    def write(name="mine.npz", **changes):
        np.savez(tmp_path / name, **arrays(**changes))
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def no_default_folder(monkeypatch):
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)


def with_value(value):
    x = arrays()["x_train"]
    x[7, 1] = x[8, 2] = value
    return x


def test_users_file(file):
    dataset = data.load_npz(file())
    assert dataset.x_train.dtype == dataset.x_val.dtype == dataset.x_test.dtype == np.float32
    assert dataset.y_train.dtype == dataset.y_val.dtype == dataset.y_test.dtype == np.int64
    assert (dataset.x_train.shape, dataset.x_val.shape, dataset.x_test.shape) == ((51, 4), (9, 4), (30, 4))
    assert_array_equal(dataset.x_test, arrays()["x_test"].astype(np.float32))
    assert_array_equal(np.bincount(dataset.y_val), [3, 3, 3])  # stratified


def test_validation_is_split_off_the_training_data(file):
    dataset = data.load_npz(file())
    together = np.concatenate([dataset.x_train, dataset.x_val])
    labels = np.concatenate([dataset.y_train, dataset.y_val])
    original = arrays()["x_train"].astype(np.float32)
    order, back = (np.lexsort(x.T) for x in (together, original))
    assert_array_equal(together[order], original[back])
    assert_array_equal(labels[order], CLASSES[back])


def test_the_same_file_gives_the_same_data(file):
    first, second = data.load_npz(file("a.npz")), data.load_npz(file("b.npz"))
    assert_array_equal(first.x_val, second.x_val)
    assert first.digest == second.digest
    x = arrays()["x_test"]
    x[-1, -1] += 1
    assert data.load_npz(file("c.npz", x_test=x)).digest != first.digest
    assert data.load_npz(file("d.npz", y_test=CLASSES[:30][::-1])).digest != first.digest


def test_digest_sees_shapes(file):
    flat = data.load_npz(file())
    assert data.as_images(flat, (1, 2, 2)).digest != flat.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_test": None}, "has no x_test, y_test; needs x_train, y_train, x_test, y_test"),
        ({"y_train": CLASSES[:59]}, "x_train has 60 samples and y_train 59 labels"),
        ({"x_test": np.zeros((29, 4))}, "x_test has 29 samples and y_test 30 labels"),
        ({"x_test": np.zeros((30, 5))}, r"samples of x_train are \(4,\), those of x_test \(5,\)"),
        ({"x_train": with_value(np.nan)}, "x_train: 2 values are NaN or infinite"),
        ({"x_train": with_value(-np.inf)}, "x_train: 2 values are NaN or infinite"),
        ({"x_train": with_value(1e300)}, "x_train: 2 values are NaN or infinite as float32"),
        ({"x_train": np.full((60, 4), "a")}, "x_train holds <U1; samples are numbers"),
        ({"x_train": np.zeros((60, 4), complex)}, "x_train holds complex128; samples are numbers"),
        ({"x_train": np.zeros((60, 4), object)}, "cannot be read as an .npz file"),
        ({"x_train": np.zeros(60)}, r"x_train has the shape \(60,\)"),
        ({"x_train": np.zeros((60, 0))}, r"x_train has the shape \(60, 0\)"),
        ({"x_test": np.zeros((0, 4)), "y_test": CLASSES[:0]}, r"x_test has the shape \(0, 4\)"),
        ({"y_train": CLASSES.astype(float)}, "y_train is float64 .*one integer class per sample"),
        ({"y_train": 2 * np.eye(3, dtype=int)[CLASSES]}, r"y_train is int64 of shape \(n, 3\)"),
        ({"y_train": CLASSES - 1}, "y_train holds the label -1; classes are counted from 0"),
        ({"y_train": np.arange(60)}, "too few training samples"),
        ({"x_train": np.zeros((4, 4)), "y_train": np.array([0, 0, 1, 1])}, "too few training samples"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(file, changes, message):
    with pytest.raises(InvalidInput, match=rf"mine\.npz: .*{message}"):
        data.load_npz(file(**changes))


def test_what_is_no_archive_is_named(tmp_path, file):
    with pytest.raises(InvalidInput, match=r"none\.npz: no such file"):
        data.load_npz(tmp_path / "none.npz")
    with pytest.raises(InvalidInput, match="is a folder"):
        data.load_npz(tmp_path)
    np.save(tmp_path / "single.npy", CLASSES)
    with pytest.raises(InvalidInput, match=r"single\.npy: holds a single array"):
        data.load_npz(tmp_path / "single.npy")
    whole = file().read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InvalidInput, match=r"bad\.npz: cannot be read as an \.npz file"):
            data.load_npz(tmp_path / "bad.npz")


def test_images_get_a_channel(file):
    x = np.arange(60 * 6, dtype=np.uint8).reshape(60, 3, 2)
    dataset = data.load_npz(file(x_train=x, x_test=x[:30]))
    assert dataset.x_train.shape == (51, 1, 3, 2)
    assert_array_equal(dataset.x_test[:, 0], x[:30])
    with_channels = data.load_npz(file(x_train=x[:, None], x_test=x[:30, None]))
    assert with_channels.digest == dataset.digest


def several(**changes):
    """Contents of a file for a model that reads features and an image."""
    x = {"features": RNG.normal(size=(60, 3)), "images": RNG.normal(size=(60, 2, 4, 5))}
    stored = {"x_train_0": x["features"], "x_train_1": x["images"], "x_train": None, "x_test": None}
    stored |= {"x_test_0": x["features"][:30], "x_test_1": x["images"][:30]}
    return stored | changes


def test_several_inputs_stand_in_a_row(file):
    stored = several()
    dataset = data.load_npz(file(**stored))
    assert dataset.input_shapes == ((3,), (2, 4, 5))
    assert dataset.x_train.shape == (51, 43)
    expected = np.concatenate([stored["x_test_0"], np.moveaxis(stored["x_test_1"], 1, -1).reshape(30, -1)], 1)
    assert_array_equal(dataset.x_test, expected.astype(np.float32))
    features, images = parted(torch.from_numpy(dataset.x_test), dataset.input_shapes)
    assert_array_equal(features, stored["x_test_0"].astype(np.float32))
    assert_array_equal(images, stored["x_test_1"].astype(np.float32))
    task = training_task(dataset, 16)
    assert task.input_shape == ((3,), (2, 4, 5))
    flat = {"x_train_1": stored["x_train_1"].reshape(60, 40), "x_test_1": stored["x_test_1"].reshape(30, 40)}
    assert data.load_npz(file("flat.npz", **stored | flat)).digest != dataset.digest
    assert data.load_npz(file("one.npz", **several(x_train_1=None, x_test_1=None))).input_shapes == ()


def test_two_dimensions_of_several_inputs_are_images_or_sequences(file):
    x = RNG.normal(size=(60, 4, 5))
    path = file(**several(x_train_1=x, x_test_1=x[:30]))
    assert data.load_npz(path).input_shapes == ((3,), (1, 4, 5))
    assert data.load_npz(path, sequences=True).input_shapes == ((3,), (4, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train_0": np.zeros((59, 3))}, "x_train_0 … have 59, 60 samples: give all inputs of each"),
        ({"x_test_1": None}, r"samples of x_train are|inputs of x_train are"),
        ({"x_test_1": np.zeros((30, 2, 4, 6))}, r"inputs of x_train are \[\(3,\), \(2, 4, 5\)\], those of x_test"),
        ({"x_train_1": None, "x_train_2": np.zeros((60, 3))}, "has no x_train_1"),
        ({"x_train_1": np.full((60, 3), np.nan)}, "x_train_1: 180 values are NaN"),
    ],
)
def test_what_is_wrong_with_several_inputs_is_named(file, changes, message):
    with pytest.raises(InvalidInput, match=rf"mine\.npz: .*{message}"):
        data.load_npz(file(**several(**changes)))


def test_named_sets_have_one_input(tmp_path):
    contents = arrays(**several())
    np.savez(tmp_path / "pendigits.npz", **contents)
    with pytest.raises(InvalidInput, match="samples of 2 inputs, the task takes one"):
        data.load("pendigits", tmp_path)


def test_channels_last():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    last = data.channels_last(x)
    assert last.shape == (2, 4, 5, 3)
    assert last.flags.c_contiguous
    assert last[1, 2, 3, 0] == x[1, 0, 2, 3]
    flat = x.reshape(2, -1)
    assert_array_equal(data.channels_last(flat), flat)


def test_as_images_wants_the_right_number_of_values(file):
    with pytest.raises(InvalidInput, match=r"samples have the shape \(4,\), the task takes \(1, 3, 3\)"):
        data.as_images(data.load_npz(file()), (1, 3, 3))


def test_digits():
    dataset = data.load("digits")
    assert (len(dataset.x_train) + len(dataset.x_val), len(dataset.x_test)) == (1257, 540)
    assert dataset.x_train.shape[1:] == (64,)
    assert (dataset.x_train.min(), dataset.x_train.max()) == (0, 1)
    raw, labels = load_digits(return_X_y=True)
    everything = np.concatenate([dataset.x_train, dataset.x_val, dataset.x_test]) * 16
    assert_array_equal(np.unique(everything, axis=0), np.unique(raw, axis=0))
    share = np.bincount(dataset.y_test) / np.bincount(labels)
    assert np.all(abs(share - 0.3) < 0.01)
    images = data.as_images(dataset, (1, 8, 8))
    assert_array_equal(images.x_val.reshape(-1, 64), dataset.x_val)


def pendigits_file(folder, scale=1.0):
    x = np.random.default_rng(1).integers(0, 101, (60, 16)).astype(np.float32) * np.float32(scale)
    np.savez(folder / "pendigits.npz", x_train=x, y_train=CLASSES, x_test=x[:30], y_test=CLASSES[:30])
    return x


@pytest.mark.parametrize("how", ["file", "folder", "variable"])
def test_named_set_is_found(how, tmp_path, monkeypatch):
    x = pendigits_file(tmp_path)
    if how == "variable":
        monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    path = {"file": tmp_path / "pendigits.npz", "folder": tmp_path, "variable": None}[how]
    assert_array_equal(data.load("pendigits", path).x_test, x[:30] / 128)


def test_scaled_values_are_taken_as_they_are(tmp_path):
    x = pendigits_file(tmp_path, scale=8 / 128)
    assert_array_equal(data.load("pendigits", tmp_path).x_test, x[:30])


def test_mnist_file_is_scaled_exactly(tmp_path):
    x = np.random.default_rng(1).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=CLASSES, x_test=x[:30], y_test=CLASSES[:30])
    dataset = data.load("mnist", tmp_path)
    assert dataset.x_train.shape == (51, 1, 28, 28)
    assert_array_equal(dataset.x_test[:, 0] * 256, x[:30])


def test_named_set_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match=r"pendigits\.npz: no such file; --data takes"):
        data.load("pendigits", tmp_path)
    with pytest.raises(InvalidInput, match=r"other\.npz: no such file"):
        data.load("digits", tmp_path / "other.npz")
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(InvalidInput, match=r"HMQ_FPGA_DATA=.*nowhere: no such folder"):
        data.load("pendigits")
    assert data.load("digits").x_train.shape[1:] == (64,)  # needs no folder


def test_wrong_data_for_a_named_set(tmp_path):
    np.savez(tmp_path / "pendigits.npz", **arrays())
    with pytest.raises(InvalidInput, match=r"samples have the shape \(4,\), the task takes \(16,\)"):
        data.load("pendigits", tmp_path)


def openml(monkeypatch, x, y):
    """In place of the download; returns what it was asked for."""
    asked = []

    def fetch(name, **settings):
        asked.append((name, settings))
        return Bunch(data=x, target=y.astype(str).astype(object))

    monkeypatch.setattr(data, "fetch_openml", fetch)
    return asked


def test_download_of_pendigits(monkeypatch):
    x = np.random.default_rng(0).integers(0, 101, (200, 16)).astype(float)
    y = np.arange(200) % 10
    asked = openml(monkeypatch, x, y)
    dataset = data.load("pendigits")
    assert asked == [("pendigits", {"version": 1, "as_frame": False, "parser": "liac-arff"})]
    assert (len(dataset.x_train) + len(dataset.x_val), len(dataset.x_test)) == (140, 60)
    assert_array_equal(np.bincount(dataset.y_test), np.full(10, 6))
    rows = {tuple(row): label for row, label in zip(x / 128, y, strict=True)}
    assert [rows[tuple(row)] for row in dataset.x_test.astype(float)] == dataset.y_test.tolist()


def test_download_of_mnist_keeps_its_order(monkeypatch):
    n = 70_000
    x = np.zeros((n, 784), np.uint8)
    x[:, 0], x[:, 1], x[:, 2] = np.arange(n) % 256, np.arange(n) // 256 % 256, np.arange(n) // 65536
    asked = openml(monkeypatch, x, np.arange(n) % 10)
    dataset = data.load("mnist")
    assert asked[0][0] == "mnist_784"
    assert dataset.x_test.shape == (10_000, 1, 28, 28)
    numbers = dataset.x_test[:, 0, 0, :3] * 256 @ np.array([1, 256, 65536], np.float32)
    assert_array_equal(numbers, np.arange(60_000, 70_000))
    assert_array_equal(dataset.y_test, np.arange(60_000, 70_000) % 10)


@pytest.mark.parametrize("error", [URLError("no\nnetwork"), ConnectionResetError("reset"), ValueError("not found")])
def test_no_network_is_one_line_with_the_remedy(monkeypatch, error):
    def fetch(*_, **__):
        raise error

    monkeypatch.setattr(data, "fetch_openml", fetch)
    with pytest.raises(InvalidInput, match=r"'mnist': .*OpenML.*mnist\.npz.*--data or HMQ_FPGA_DATA") as caught:
        data.load("mnist")
    assert "\n" not in str(caught.value)


def test_jpeg_streams_are_images_channels_first(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (60, 4, 4, 3), np.uint8), 8, 1), 8, 2)
    streams = []
    for image in smooth:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "jpeg", quality=95)
        streams.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, streams)])
    file = {"jpg": np.frombuffer(b"".join(streams), np.uint8), "off": offsets, "y": CLASSES}
    np.savez(tmp_path / "cifar10_jpeg.npz", **{f"{key}_{s}": v for key, v in file.items() for s in ("train", "test")})
    dataset = data.load("cifar10_jpeg", tmp_path)
    assert dataset.x_test.shape == (60, 3, 32, 32)
    assert np.abs(dataset.x_test - np.moveaxis(smooth, -1, 1) / 256).mean() < 0.1


def test_a_set_without_a_source_needs_a_file():
    with pytest.raises(InvalidInput, match=r"'fsdd_mfcc': has no source.*fsdd_mfcc\.npz.*--data or HMQ_FPGA_DATA"):
        data.load("fsdd_mfcc")


def test_real_targets_and_reconstruction(file):
    targets = {f"y_{split}": arrays()[f"x_{split}"][:, :2] for split in ("train", "test")}
    dataset = data.load_npz(file(**targets))
    assert dataset.kind == "values"
    assert dataset.classes_test is None
    assert dataset.y_val.shape == (9, 2)
    assert_array_equal(dataset.x_train[:, :2], dataset.y_train)
    mirror = data.reconstruction(data.load_npz(file()))
    assert_array_equal(mirror.y_test, mirror.x_test)
    with pytest.raises(InvalidInput, match="y_train and y_test differ"):
        data.load_npz(file(y_train=targets["y_train"]))
    with pytest.raises(InvalidInput, match="y_train: 1 values are NaN"):
        data.load_npz(file(y_train=with_value(np.nan)[:, 1:2], y_test=targets["y_test"][:, :1]))


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "largest"),
    [
        ("pendigits", (16,), (7694, 3298), 100 / 128),
        ("letter", (16,), (14_000, 6000), 15 / 16),
        ("mnist", (1, 28, 28), (60_000, 10_000), 255 / 256),
        ("fashion_mnist", (1, 28, 28), (60_000, 10_000), 255 / 256),
        ("cifar10_jpeg", (3, 32, 32), (50_000, 10_000), 255 / 256),
        ("magic", (10,), (13_314, 5706), None),
        ("fsdd_mfcc", (1, 49, 10), (2700, 300), None),
    ],
)
def test_real_data(name, shape, sizes, largest):
    dataset = data.load(name, outside.data(f"{name}.npz"))
    assert isinstance(dataset, Dataset)
    assert dataset.x_test.shape[1:] == shape
    assert (len(dataset.x_train) + len(dataset.x_val), len(dataset.x_test)) == sizes
    if largest is None:  # standardized
        assert abs(dataset.x_train.mean()) < 0.01
        assert abs(dataset.x_train.std() - 1) < 0.01
    else:
        assert (dataset.x_train.min(), dataset.x_train.max()) == (0, np.float32(largest))
    assert len(np.unique(dataset.y_val)) == {"letter": 26, "magic": 2}.get(name, 10)
