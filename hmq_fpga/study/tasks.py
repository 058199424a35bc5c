"""Named tasks: a model, its data and a training budget."""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hmq_fpga.deploy.settings import IoType
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.samples import Loaded, on_device, parts_of
from hmq_fpga.search.train import Budget
from hmq_fpga.search.train import Task as TrainingTask
from hmq_fpga.study import data
from hmq_fpga.study.dataset import Array, Dataset, Split
from hmq_fpga.study.sources import PLAIN, Options, Part, assemble, part_of, take


def _no_file(name: str) -> Callable[..., Any]:
    raise InvalidInput(f"function {name!r}: give it in your own FILE.py, beside the function that makes the model")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that can be run.

    Attributes:
        summary: one line for `hmq-fpga tasks`.
        build: makes the float model.
        load: makes the data, given the user's `--data` or None.
        batch_size: samples per optimizer step.
        budget: optimizer steps and learning rates.
        label_smoothing: share of a class's probability that is spread over all, in training (Szegedy et al., 2016,
            Section 7): without it small networks learn their training data by heart.
        input_noise: of training inputs, in deviations of each input value, see `train.Task`.
        threads: of the training; more than one only slows a small network down.
        io_type: of the hls4ml project; streams where full unrolling is out of proportion.
        parity_samples: of the test split, whose parity is proven; None: all.
        source: text of the user's file that builds the model; empty for a task of ours.
        function: finds a function in that file, by its name.
    """

    summary: str
    build: Callable[[], nn.Module]
    load: Callable[[Path | None], Dataset]
    batch_size: int = 64
    budget: Budget = field(default_factory=Budget)
    label_smoothing: float = 0.1
    input_noise: float = 0.0
    threads: int = 1
    io_type: IoType = "io_parallel"
    parity_samples: int | None = None
    source: str = ""
    function: Callable[[str], Callable[..., Any]] = field(default=_no_file)


def _mlp(*widths: int) -> nn.Module:
    """Dense layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _conv(n: int, m: int, kernel: int | tuple[int, int], *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution with BatchNorm and ReLU; padding keeps the size where the stride is one."""
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = sizes[0] // 2, sizes[1] // 2
    conv = nn.Conv2d(n, m, sizes, stride=stride, padding=padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(m), nn.ReLU()]


def _digits_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _image_cnn(*widths: int) -> nn.Module:
    """28x28 images: a convolution, pooling, two strided convolutions."""
    first, second, third = widths
    return nn.Sequential(
        *_conv(1, first, 3),
        nn.MaxPool2d(2),
        *_conv(first, second, 3, stride=2),
        *_conv(second, third, 3, stride=2),
        nn.Flatten(),
        nn.Linear(16 * third, 10),
    )


def _dscnn() -> nn.Module:
    """A depthwise-separable network for 49x10 cepstral coefficients, after the keyword-spotting DS-CNN."""
    layers = _conv(1, 32, (9, 3), stride=2)
    for _ in range(3):
        layers += [*_conv(32, 32, 3, groups=32), *_conv(32, 32, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class _OverTime(nn.Module):
    """One-dimensional convolutions over the frames of cepstral coefficients, `(1, frames, coefficients)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(10, 24, 5, stride=2)
        self.norm1 = nn.BatchNorm1d(24)
        self.conv2 = nn.Conv1d(24, 24, 3, stride=2)
        self.norm2 = nn.BatchNorm1d(24)
        self.conv3 = nn.Conv1d(24, 32, 3)
        self.norm3 = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, coefficients, frames)` to logits."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x)))
        logits: Tensor = self.head(F.avg_pool1d(x, 8).flatten(1))
        return logits


class _Gated(nn.Module):
    """A GRU over the rows of an image `(1, rows, columns)`, some of them at a step; the last rest is left out."""

    def __init__(self, rows: int, columns: int, hidden: int) -> None:
        super().__init__()
        self.rows = rows
        self.gru = nn.GRU(rows * columns, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, 1, rows, columns)` to logits."""
        steps = x.shape[2] // self.rows
        states, _ = self.gru(x[:, 0, : steps * self.rows].reshape(x.shape[0], steps, -1))
        logits: Tensor = self.head(states[:, -1])
        return logits


def _policy() -> Dataset:
    """States `(x, v, angle, rate)` of a cart with a pole, drawn uniformly, and the force of a saturated feedback."""
    random = np.random.default_rng(0)

    def drawn(samples: int) -> tuple[Array, Array]:
        x = random.uniform(-1, 1, (samples, 4)).astype(np.float32)
        falling = np.sin(1.5 * x[:, 2]) + 0.5 * x[:, 3] * np.cos(1.5 * x[:, 2])
        force = np.tanh(2.5 * falling + 0.5 * x[:, 0] + 0.75 * x[:, 1] * np.abs(x[:, 1]))
        return x, force[:, None].astype(np.float32)

    (x_train, y_train), (x_val, y_val), (x_test, y_test) = (drawn(n) for n in (6000, 1000, 3000))
    return Dataset(x_train=x_train, y_train=y_train, x_val=x_val, y_val=y_val, x_test=x_test, y_test=y_test)


def _tanh_mlp(*widths: int) -> nn.Module:
    """Dense layers of these widths, a tanh after each."""
    return nn.Sequential(*(layer for n, m in pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())))


class _Block(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n, m, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(m)
        self.conv2 = nn.Conv2d(m, m, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(m)
        self.shortcut: nn.Module = nn.Identity()
        if (n, stride) != (m, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(n, m, 1, stride=stride, bias=False), nn.BatchNorm2d(m))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, n, height, width)` to `(batch, m, height / stride, width / stride)`."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _resnet(widths: Sequence[int], blocks: int) -> nn.Module:
    """A residual network for 32x32 images: `blocks` blocks of each width, the size halved between widths."""
    layers = _conv(3, widths[0], 3)
    n = widths[0]
    for m in widths:
        for i in range(blocks):
            layers.append(_Block(n, m, stride=2 if i == 0 and m != widths[0] else 1))
            n = m
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10))


def _frames_last(dataset: Dataset) -> Dataset:
    """`(1, frames, coefficients)` to `(coefficients, frames)`."""
    moved = {name: getattr(dataset, name)[:, 0].swapaxes(1, 2) for name in ("x_train", "x_val", "x_test")}
    return replace(dataset, **moved)


_CORES = os.cpu_count() or 1
TASKS = {
    "digits_mlp": Task(
        summary="64-64-32-32-10 on scikit-learn's 8x8 digits",
        build=lambda: _mlp(64, 64, 32, 32, 10),
        load=lambda path: data.load("digits", path),
        input_noise=0.6,
    ),
    "digits_tiny_cnn": Task(
        summary="two strided convolutions on scikit-learn's 8x8 digits, small enough to unroll",
        build=lambda: nn.Sequential(
            *_conv(1, 4, 3, stride=2), *_conv(4, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 10)
        ),
        load=lambda path: data.as_images(data.load("digits", path), (1, 8, 8)),
        budget=Budget(float_steps=3000, search_steps=1500, finetune_steps=3000),
    ),
    "digits_cnn": Task(
        summary="two convolutions with BatchNorm and pooling on scikit-learn's 8x8 digits",
        build=_digits_cnn,
        load=lambda path: data.as_images(data.load("digits", path), (1, 8, 8)),
    ),
    "pendigits_mlp": Task(
        summary="16-64-32-32-10 on the UCI pen digits",
        build=lambda: _mlp(16, 64, 32, 32, 10),
        load=lambda path: data.load("pendigits", path),
        budget=Budget(float_steps=8000, search_steps=4000, finetune_steps=6000),
    ),
    "pendigits_shallow": Task(
        summary="16-64-10 on the UCI pen digits, for few LUTs",
        build=lambda: _mlp(16, 64, 10),
        load=lambda path: data.load("pendigits", path),
        input_noise=0.2,
        budget=Budget(float_steps=8000, search_steps=4000, finetune_steps=20_000),
    ),
    "mnist14_mlp": Task(
        summary="196-64-10 on MNIST averaged to 14x14, for few LUTs",
        build=lambda: _mlp(196, 64, 10),
        load=lambda path: data.halved(data.load("mnist", path)),
        budget=Budget(float_steps=15_000, search_steps=4000, finetune_steps=60_000),
    ),
    "mnist14_wide": Task(
        summary="196-128-10 on MNIST averaged to 14x14, for twice as many LUTs",
        build=lambda: _mlp(196, 128, 10),
        load=lambda path: data.halved(data.load("mnist", path)),
        budget=Budget(float_steps=15_000, search_steps=4000, finetune_steps=60_000),
    ),
    "mnist_cnn": Task(
        summary="three convolutions with BatchNorm on MNIST",
        build=lambda: _image_cnn(16, 16, 32),
        load=lambda path: data.load("mnist", path),
        batch_size=128,
        threads=_CORES,
        budget=Budget(float_steps=3000, search_steps=1800, finetune_steps=1800, float_learning_rate=5e-3),
        io_type="io_stream",
    ),
    "fashion_cnn": Task(
        summary="three convolutions with BatchNorm on Fashion-MNIST",
        build=lambda: _image_cnn(16, 32, 32),
        load=lambda path: data.load("fashion_mnist", path),
        batch_size=128,
        threads=_CORES,
        budget=Budget(float_steps=4000, search_steps=2000, finetune_steps=3000, float_learning_rate=5e-3),
        io_type="io_stream",
    ),
    "letter_mlp": Task(
        summary="16-128-64-26 on the UCI letters",
        build=lambda: _mlp(16, 128, 64, 26),
        load=lambda path: data.load("letter", path),
        budget=Budget(float_steps=15_000, search_steps=5000, finetune_steps=12_000),
    ),
    "magic_mlp": Task(
        summary="10-64-32-2 on the UCI gamma telescope, features standardized",
        build=lambda: _mlp(10, 64, 32, 2),
        load=lambda path: data.load("magic", path),
        budget=Budget(float_steps=4000, search_steps=3000, finetune_steps=4000, float_learning_rate=5e-3),
    ),
    "jets_mlp": Task(
        summary="16-64-32-32-5 on the jet tagging data of hls4ml's tutorial, features standardized",
        build=lambda: _mlp(16, 64, 32, 32, 5),
        load=lambda path: data.load("jets", path),
        batch_size=1024,
        budget=Budget(float_steps=8000, search_steps=4000, finetune_steps=6000),
    ),
    "dscnn_fsdd": Task(
        summary="depthwise-separable convolutions on spoken digits (49x10 MFCC), 7k parameters",
        build=_dscnn,
        load=lambda path: data.load("fsdd_mfcc", path),
        threads=_CORES,
        budget=Budget(float_steps=1500, search_steps=1000, finetune_steps=1500, float_learning_rate=5e-3),
        io_type="io_stream",
    ),
    "conv1d_fsdd": Task(
        summary="one-dimensional convolutions over the frames of spoken digits",
        build=_OverTime,
        load=lambda path: _frames_last(data.load("fsdd_mfcc", path)),
        budget=Budget(float_steps=2000, search_steps=1500, finetune_steps=2000, float_learning_rate=5e-3),
    ),
    "fsdd_gru": Task(
        summary="a GRU over spoken digits, four frames of ten cepstral coefficients at a step",
        build=lambda: _Gated(4, 10, 24),
        load=lambda path: data.load("fsdd_mfcc", path),
        budget=Budget(float_steps=1500, search_steps=800, finetune_steps=1200, float_learning_rate=5e-3),
    ),
    "mnist_rows_gru": Task(
        summary="a GRU over the rows of MNIST, four at a step",
        build=lambda: _Gated(4, 28, 32),
        load=lambda path: data.load("mnist", path),
        batch_size=128,
        budget=Budget(float_steps=3000, search_steps=1200, finetune_steps=1800, float_learning_rate=5e-3),
    ),
    "tanh_policy": Task(
        summary="4-32-32-1 with tanh that balances a pole: a regression on a saturated feedback",
        build=lambda: _tanh_mlp(4, 32, 32, 1),
        load=lambda path: _policy(),  # noqa: ARG005
        budget=Budget(float_steps=4000, search_steps=2000, finetune_steps=4000),
    ),
    "digits_autoencoder": Task(
        summary="64-32-16-32-64 that reconstructs scikit-learn's digits: a regression",
        build=lambda: _mlp(64, 32, 16, 32, 64),
        load=lambda path: data.reconstruction(data.load("digits", path)),
        budget=Budget(float_steps=4000, search_steps=2000, finetune_steps=4000),
    ),
    "resnet8_cifar": Task(
        summary="the residual network of MLPerf Tiny, 78k parameters, on CIFAR-10 (JPEG)",
        build=lambda: _resnet((16, 32, 64), blocks=1),
        load=lambda path: data.load("cifar10_jpeg", path),
        batch_size=128,
        threads=_CORES,
        budget=Budget(float_steps=4000, search_steps=1500, finetune_steps=1500, float_learning_rate=5e-3),
        io_type="io_stream",
        parity_samples=1000,
    ),
    "resnet20_cifar": Task(
        summary="ResNet-20 of the CIFAR papers, 272k parameters, on CIFAR-10 (JPEG); hours of training",
        build=lambda: _resnet((16, 32, 64), blocks=3),
        load=lambda path: data.load("cifar10_jpeg", path),
        batch_size=128,
        threads=_CORES,
        budget=Budget(float_steps=12_000, search_steps=6000, finetune_steps=4000, float_learning_rate=5e-3),
        io_type="io_stream",
        parity_samples=100,
    ),
    "resnet18_cifar": Task(
        summary="ResNet-18, 11M parameters, on CIFAR-10 (JPEG); hours of training",
        build=lambda: _resnet((64, 128, 256, 512), blocks=2),
        load=lambda path: data.load("cifar10_jpeg", path),
        batch_size=128,
        threads=_CORES,
        budget=Budget(float_steps=12_000, search_steps=6000, finetune_steps=4000, float_learning_rate=2e-3),
        io_type="io_stream",
        parity_samples=10,
    ),
}


_OVER_SEQUENCES = (
    *(nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d),
    *(nn.RNNBase, nn.MultiheadAttention),
)


def over_sequences(model: nn.Module) -> bool:
    """Whether samples of two dimensions are sequences to a model, `(channels, length)`, not images."""
    return any(isinstance(m, _OVER_SEQUENCES) for m in model.modules())


def resolve(name: str, options: Options = PLAIN) -> Task:
    """The named task, or the one of a user's `FILE.py:FUNCTION`, whose function returns the float module.

    A function `data` in the same file makes the data, where no file of them is named; see `sources.take`.

    Args:
        name: of the task.
        options: how the user's own data are to be taken.

    Raises:
        InvalidInput: when there is no such task, file or function, or the function makes no module.
    """
    if name in TASKS:
        return TASKS[name]
    file, separator, function = name.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise InvalidInput(f"unknown task {name!r}; there are {', '.join(TASKS)}, or give FILE.py:FUNCTION")
    own = _imported(Path(file))
    build = _function(own, file, function)

    def made_by(function: Callable[[], object], called: str) -> object:
        try:
            return function()
        except InvalidInput:
            raise
        except Exception as error:  # it is the user's code: anything can come out of it
            path = str(Path(file).absolute())
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            where = f" in line {lines[-1]}" if lines else ""
            raise InvalidInput(f"{called}: fails{where}: {type(error).__name__}: {error}") from error

    def module() -> nn.Module:
        made = made_by(build, name)
        if not isinstance(made, nn.Module):
            raise InvalidInput(f"{name}: must return a torch module, returned {type(made).__name__}")
        return made

    def load(path: Path | None) -> Dataset:
        called = f"{file}:data"
        if path is None and not hasattr(own, "data"):
            raise InvalidInput(
                f"{name}: give the data of your own model with --data FILE.npz, or by a function data() beside it"
            )
        given = made_by(_function(own, file, "data"), called) if path is None else path
        where = called if path is None else str(path)
        return take(given, where, replace(options, sequences=over_sequences(module())))

    return Task(
        summary=name,
        build=module,
        load=load,
        source=Path(file).read_text(),
        function=lambda wanted: _function(own, file, wanted),
    )


def _imported(file: Path) -> ModuleType:
    if not file.is_file():
        raise InvalidInput(f"{file}: no such file; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code: anything can come out of it
        raise InvalidInput(f"{file}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _function(module: ModuleType, file: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        raise InvalidInput(f"{file}: no function {name!r} in it")
    return function


def training_task(
    dataset: object,
    batch_size: int = 64,
    device: str = "cpu",
    *,
    val: object = None,
    options: Options = PLAIN,
    class_weights: Literal["balanced"] | Sequence[float] | None = None,
    **settings: Any,
) -> TrainingTask:
    """The part of a data set that a search may see, on a device: its test split stays behind.

    Args:
        dataset: a `Dataset`; or what `sources.take` takes, or the training split alone: a torch `Dataset` or
            `DataLoader`, arrays `(x, y)` or `(x, y, weights)`, a data frame, or a table.
        batch_size: samples per optimizer step; a `DataLoader` has its own.
        device: of the batches.
        val: the validation split of a training split, likewise; by default a part of that.
        options: how to take the data.
        class_weights: how much the samples of each class count, or `balanced`: every class as much as any other.
        settings: of the `Task`: `custom_loss`, `metric`, `optimizer`, `scheduler`, `label_smoothing`, `input_noise`,
            `output_shapes`.

    Raises:
        InvalidInput: naming what is wrong with the data or the settings.
    """
    if isinstance(dataset, Dataset | str | Path | Mapping) and val is None:
        return _of_dataset(take(dataset, options=options), batch_size, device, class_weights, settings)
    parts: dict[Split, Part] = {"train": part_of(dataset, "train", options)}
    if val is not None:
        parts["val"] = part_of(val, "val", options)
    train = parts["train"]
    if isinstance(train, Loaded):
        batch_size = train.batch_size or batch_size
    return _of_dataset(assemble(parts, "", options), batch_size, device, class_weights, settings)


def _of_dataset(
    dataset: Dataset,
    batch_size: int,
    device: str,
    class_weights: Literal["balanced"] | Sequence[float] | None,
    settings: Mapping[str, Any],
) -> TrainingTask:
    def moved(arrays: Any) -> Any:
        return tree_map(lambda array: torch.from_numpy(array).to(device), arrays)

    return TrainingTask(
        x_train=moved(dataset.x_train),
        y_train=moved(dataset.y_train),
        x_val=moved(dataset.x_val),
        y_val=moved(dataset.y_val),
        w_train=None if dataset.w_train is None else moved(dataset.w_train),
        w_val=None if dataset.w_val is None else moved(dataset.w_val),
        streams={split: on_device(of, device) for split, of in dataset.streams.items() if split != "test"},
        batch_size=dataset.samples("train").batch_size or batch_size,
        input_shapes=dataset.input_shapes,
        class_names=dataset.class_names,
        notes=dataset.notes,
        class_weights=None if class_weights is None else _class_weights(dataset, class_weights, batch_size).to(device),
        **settings,
    )


def _class_weights(dataset: Dataset, wanted: Literal["balanced"] | Sequence[float], batch_size: int) -> Tensor:
    if dataset.kind != "classes":
        raise InvalidInput("class_weights: are for data that have one class a sample")
    if not isinstance(wanted, str):
        weights = torch.tensor([float(weight) for weight in wanted])
        if len(weights) < dataset.classes or not (weights >= 0).all() or not weights.any():
            raise InvalidInput(f"class_weights: {len(weights)} weights for {dataset.classes} classes, none negative")
        return weights
    counts = torch.zeros(dataset.classes)
    for _, y in dataset.samples("train").in_order(batch_size):
        counts += torch.bincount(parts_of(y)[0], minlength=len(counts))
    if not counts.all():
        raise InvalidInput(f"class_weights: class {int(counts.argmin())} has no training sample: give weights")
    return counts.sum() / (len(counts) * counts)
