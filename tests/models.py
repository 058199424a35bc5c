"""Random PyTorch models over everything that is supported, with random schemes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.reading import instrument
from tests.strategies import EITHER, SEEDS

NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d}
PADS = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d}


class Shortcut(nn.Module):
    """The sum of a branch and its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return self.branch(x) + x


class Fork(nn.Module):
    """Branches side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Pair(nn.Module):
    """A function of a branch and its input."""

    def __init__(self, branch: nn.Module, function) -> None:
        super().__init__()
        self.branch, self.function = branch, function

    def forward(self, x):
        return self.function(self.branch(x), x)


class Scaled(nn.Module):
    """Constants, for all values or for each channel."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.register_buffer("shift", shift)

    def forward(self, x):
        return self.shift - x * self.scale


class OverPositions(nn.Module):
    """A dense layer over the last dimension, of an image its columns."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)

    def forward(self, x):
        return x @ self.weight


class TwoInputs(nn.Module):
    """A network, whose features a second input joins."""

    def __init__(self, body: nn.Module, second: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.second, self.head = body, second, head

    def forward(self, x, y):
        return self.head(torch.cat([self.body(x), self.second(y)], 1))


def shuffled(x):
    """Channels from two groups in turn, the last ones left out."""
    channels = x.shape[1] // 2
    return x[:, : 2 * channels].unflatten(1, (2, channels)).transpose(1, 2).flatten(1, 2)


class Squeezed(nn.Module):
    """Channels scaled by a gate of their means, or of all values by softmax."""

    def __init__(self, channels: int, gate) -> None:
        super().__init__()
        self.gate, self.function = nn.Linear(channels, channels), gate

    def forward(self, x):
        gate = self.function(self.gate(x.flatten(2).mean(2) if x.ndim > 2 else x))
        return x * gate.view(*gate.shape, *(1 for _ in x.shape[2:]))


class Stepped(nn.Module):
    """A recurrent layer over the positions of a sequence, channels first."""

    def __init__(self, layer: nn.RNNBase, *, last: bool) -> None:
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, x):
        states, _ = self.layer(x.transpose(1, 2))
        return (states[:, -1:] if self.last else states).transpose(1, 2)


class Attending(nn.Module):
    """Attention of the positions of a sequence to each other, channels first."""

    def __init__(self, channels: int, *, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(channels, 1, batch_first=True), weights

    def forward(self, x):
        x = x.transpose(1, 2)
        return self.attention(x, x, x, need_weights=self.weights)[0].transpose(1, 2)


def layer_normalized(x):
    """Over the channels."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def divided_by_root_mean_square(x):
    """Over the channels."""
    return F.rms_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def mixed(x):
    """The positions by their likeness to each other."""
    x = x.flatten(2)
    return torch.softmax(x.transpose(1, 2) @ x, -1) @ x.transpose(1, 2)


MOVES = (
    shuffled,
    lambda x: x.flip(1),
    lambda x: x[:, 1:],
    lambda x: x[..., ::2],
    lambda x: x.transpose(1, -1),
    lambda x: x.roll(1, -1),
    lambda x: torch.stack((x[:, 0], x[:, -1]), 1),
    lambda x: x.repeat_interleave(2, -1),
    lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
)
PAIRS = (
    *(torch.sub, torch.mul, torch.maximum, torch.minimum, torch.add),
    lambda x, y: x / (1 + y.abs()),
    lambda x, y: torch.where(x > y, x, 0.5 * y),
)
FUNCTIONS = (
    *(torch.tanh, torch.sigmoid, F.gelu, F.silu, F.elu, F.softplus, F.mish, F.hardswish, F.hardsigmoid, torch.abs),
    *(torch.square, lambda x: F.leaky_relu(x, 0.3), lambda x: x.clamp(-0.5, 1.75), lambda x: x**3),
    *(lambda x: torch.where(x > 0.25, x, 0.1 * x - 0.2), lambda x: x / (1 + x.abs()), F.softsign, torch.floor),
    *(lambda x: x * ((x > -1) & (x < 1)), lambda x: x * torch.sigmoid(1.5 * x), lambda x: 2 * torch.tanh(x / 2 + 1)),
)
SUMS = (
    lambda x: x.sum(-1, keepdim=True),
    lambda x: x.amax(-1, keepdim=True),
    lambda x: x.amax(1, keepdim=True),
    lambda x: x.sum(1, keepdim=True),
)


class Heads(nn.Module):
    """Several outputs of one tensor; those of heads within them join the row."""

    def __init__(self, *heads: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x):
        outputs = [head(x) for head in self.heads]
        return tuple(y for output in outputs for y in (output if isinstance(output, tuple) else (output,)))


class View(nn.Module):
    """Flattening as many write it."""

    def forward(self, x):
        return x.contiguous().view(x.size(0), -1)


class Mean(nn.Module):
    """Global average pooling as many write it."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.over = tuple(range(2, 2 + dims))

    def forward(self, x):
        return x.mean(self.over)


class Functional(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class _Drawing:
    """A model in the making: layers, and the shape that they make of a sample."""

    def __init__(self, draw) -> None:
        self.draw = draw
        self.dims = draw(st.integers(0, 2))
        sizes = [draw(st.integers(3, 7)) for _ in range(self.dims)]
        self.input_shape = (draw(st.integers(1, 3 if self.dims else 8)), *sizes)
        self.layers: list[nn.Module] = []
        self.shape = self.input_shape
        self.shapes = self.input_shape

    def add(self, layer: nn.Module) -> None:
        self.layers.append(layer)
        with torch.no_grad():
            self.shape = tuple(layer.eval()(torch.zeros(2, *self.shape)).shape[1:])

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def network(self) -> nn.Module:
        if self.draw(st.integers(0, 3)) == 0:
            self.add(NORMS[self.dims](self.shape[0]))
        if self.dims:
            for _ in range(self.draw(st.integers(1, 3))):
                self.block()
            image, image_head = len(self.layers), None
            if self.draw(st.integers(0, 5)) == 0:
                image_head = self.pointwise(self.draw(st.integers(1, 3)))
            self.add(self.pick(nn.Flatten(), View(), Mean(self.dims)))
        for _ in range(self.draw(st.integers(0, 2))):
            self.add(nn.Linear(self.shape[0], self.draw(st.integers(1, 8)), bias=self.draw(EITHER)))
            self.features()
        if self.draw(st.integers(0, 7)) == 0 and not (self.dims and image_head is not None):
            return self.of_two_inputs()
        heads = [self.head() for _ in range(self.pick(1, 1, 1, 2, 3))]
        self.layers.append(Heads(*heads) if len(heads) > 1 else heads[0])
        if self.dims and image_head is not None:
            self.layers[image:] = [Heads(nn.Sequential(*self.layers[image:]), image_head)]
        return nn.Sequential(*self.layers)

    def features(self) -> None:
        """What comes between dense layers."""
        match self.pick("", "", "norm", "scale", "pair", "move", "gate"):
            case "gate":
                self.gate()
            case "norm":
                self.add(nn.BatchNorm1d(self.shape[0]))
            case "scale":
                self.scale()
            case "pair":
                self.add(Pair(nn.Linear(self.shape[0], self.shape[0]), self.pick(*PAIRS)))
            case "move" if self.shape[0] > 1:
                self.move()
        self.activation()

    def of_two_inputs(self) -> nn.Module:
        size, made = self.draw(st.integers(1, 4)), self.draw(st.integers(1, 4))
        second = self.pick(nn.Identity(), nn.Linear(size, made), nn.Sequential(nn.Linear(size, made), nn.ReLU()))
        features = self.shape[0] + (size if isinstance(second, nn.Identity) else made)
        self.shapes = (self.input_shape, (size,))
        return TwoInputs(nn.Sequential(*self.layers), second, nn.Linear(features, 3))

    def head(self) -> nn.Module:
        linear = nn.Linear(self.shape[0], self.draw(st.integers(1, 6)))
        return nn.Sequential(linear, self.pick(nn.Identity(), nn.Softmax(-1), nn.Sigmoid(), Functional(torch.tanh)))

    def block(self) -> None:
        common = "conv", "conv", "depthwise", "norm", "shortcut", "fork", "pad", "up"
        sequences = ("steps", "attention") if self.dims == 1 else ("gate", "softmax", "layer norm")
        kind = self.pick(*common, "transposed", "scale", "pair", "move", "positions", "sum", *sequences)
        channels = self.shape[0]
        match kind:
            case "conv" | "depthwise":
                self.convolution(depthwise=kind == "depthwise")
            case "norm":
                self.add(NORMS[self.dims](channels))
            case "transposed":
                self.transposed()
            case "scale":
                self.scale()
            case "pair":
                self.add(Pair(self.pointwise(channels), self.pick(*PAIRS)))
            case "move":
                self.move()
            case "positions":
                self.add(OverPositions(self.shape[-1], self.draw(st.integers(1, 4))))
            case "sum":
                self.add(Functional(self.pick(*SUMS)))
            case "gate":
                self.gate()
            case "layer norm":
                normalized = layer_normalized if channels in (2, 4) else divided_by_root_mean_square
                self.add(Functional(normalized))
            case "softmax":
                self.add(Functional(self.pick(lambda x: torch.softmax(x, 1), lambda x: torch.softmax(x, -1))))
            case "steps":
                self.steps()
            case "attention":
                self.add(self.pick(Functional(mixed), Attending(channels, weights=self.draw(EITHER))))
            case "shortcut":
                self.add(Shortcut(self.pointwise(channels)))
            case "fork":
                others = [self.pick(nn.Identity(), self.pointwise(1)) for _ in range(self.draw(st.integers(1, 2)))]
                self.add(Fork(self.pointwise(2), *others))
            case "pad":
                self.add(PADS[self.dims](tuple(self.draw(st.integers(0, 2)) for _ in range(2 * self.dims))))
            case "up" if max(self.shape) < 8:
                linear = {1: "linear", 2: "bilinear"}[self.dims]
                self.add(nn.Upsample(scale_factor=2, mode=self.pick("nearest", linear)))
        if kind in ("conv", "depthwise", "shortcut", "fork") and self.draw(EITHER):
            self.add(NORMS[self.dims](self.shape[0]))
        self.activation()
        self.pool()

    def gate(self) -> None:
        self.add(Squeezed(self.shape[0], self.pick(torch.sigmoid, lambda x: torch.softmax(x, 1))))

    def steps(self) -> None:
        kind, settings = self.pick((nn.GRU, {}), (nn.LSTM, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}))
        layers = {"num_layers": self.pick(1, 1, 2), "bias": self.draw(EITHER), "bidirectional": self.pick(False, True)}
        layer = kind(self.shape[0], self.draw(st.integers(1, 3)), batch_first=True, **layers, **settings)
        self.add(Stepped(layer, last=self.draw(EITHER)))

    def pointwise(self, outputs: int) -> nn.Module:
        conv = CONVS[self.dims](self.shape[0], outputs, 1, bias=self.draw(EITHER))
        return nn.Sequential(conv, nn.ReLU()) if self.draw(EITHER) else conv

    def convolution(self, *, depthwise: bool) -> None:
        channels, sizes = self.shape[0], self.shape[1:]
        dilation = self.pick(1, 1, 1, 2)
        kernel = tuple(self.draw(st.integers(1, max(1, min((n - 1) // dilation + 1, 3)))) for n in sizes)
        stride = tuple(self.draw(st.integers(1, 2)) for _ in sizes)
        padding = tuple(self.draw(st.integers(0, k // 2)) for k in kernel)
        groups = channels if depthwise else self.pick(*(g for g in range(1, channels + 1) if channels % g == 0))
        outputs = groups * self.draw(st.integers(1, 2)) if groups > 1 else self.draw(st.integers(1, 4))
        windows = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.add(CONVS[self.dims](channels, outputs, kernel, bias=self.draw(EITHER), **windows))

    def transposed(self) -> None:
        channels = self.shape[0]
        if max(self.shape[1:]) > 6:
            return
        stride, kernel = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 3))
        settings = {
            "stride": stride,
            "padding": self.draw(st.integers(0, kernel // 2)),
            "output_padding": self.draw(st.integers(0, stride - 1)),
            "groups": self.pick(1, channels),
        }
        outputs = settings["groups"] * self.draw(st.integers(1, 2))
        layer = TRANSPOSED[self.dims](channels, outputs, kernel, **settings)
        with torch.no_grad():
            assume(min(layer(torch.zeros(2, *self.shape)).shape) > 0)
        self.add(layer)

    def scale(self) -> None:
        size = self.pick((), (self.shape[0], *(1 for _ in self.shape[1:])))
        self.add(Scaled(torch.randn(size), self.pick(torch.zeros(()), torch.randn(size))))

    def move(self) -> None:
        move = self.pick(*MOVES)
        assume(self.shape[0] > 1)
        self.add(Functional(move))

    def activation(self) -> None:
        slope = 2.0 ** -self.draw(st.integers(0, 4))
        activation = self.pick(
            nn.ReLU(),
            nn.ReLU6(),
            nn.LeakyReLU(slope),
            nn.Hardtanh(-1.0, 1.0),
            nn.Hardtanh(-1.5, 1.5),
            Functional(F.relu),
            nn.Identity(),
            Functional(self.pick(*FUNCTIONS)),
            nn.PReLU(self.pick(1, self.shape[0])),
        )
        self.add(activation)

    def pool(self) -> None:
        kinds = self.pick("", "max", "average")
        if not kinds:
            return
        window = tuple(self.draw(st.integers(1, min(n, 3))) for n in self.shape[1:])
        stride = tuple(self.draw(st.integers(1, 3)) for _ in window)
        padding = tuple(self.draw(st.integers(0, k // 2)) for k in window)
        if kinds == "max":
            self.add(MAX_POOLS[self.dims](window, stride, padding, ceil_mode=self.draw(EITHER)))
        else:
            self.add(AVG_POOLS[self.dims](window, stride, padding))


@dataclass(frozen=True)
class Drawn:
    """A model with a scheme."""

    model: QModel
    text: str

    def __repr__(self) -> str:
        return f"{self.text}\n{dict(self.model.formats)}"


@st.composite
def quantized_models(draw) -> Drawn:
    """Instrumented models with random statistics, weights and schemes: 1 to 8 bits, thresholds 2^-10 … 2^6."""
    torch.manual_seed(draw(SEEDS) % 2**31)
    drawing = _Drawing(draw)
    model = drawing.network()
    model.train()
    assume(all(n > 0 for n in drawing.shape))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean = torch.randn_like(layer.running_mean)
            layer.running_var = torch.rand_like(layer.running_var) + 0.5
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    try:
        quantized = instrument(model, drawing.shapes, input_signed=draw(EITHER))
    except UnsupportedLayer as error:
        assert "no power of two" in str(error)
        assume(False)
    randomly_formatted(quantized, draw(SEEDS), bits=(1, 8), thresholds=(-10, 6))
    try:
        freeze(quantized)
    except InvalidInput as error:
        assert "on one grid exceed" in str(error)
        assume(False)
    return Drawn(quantized, str(model))


def randomly_formatted(model: QModel, seed: int, *, bits: tuple[int, int], thresholds: tuple[int, int]) -> QModel:
    """The model with a random scheme, in which most thresholds fit the weights."""
    rng = np.random.default_rng(seed)
    formats = {}
    layers = {node.name: layer for node, layer in zip(model.nodes, model.layers, strict=True)}
    for site in model.sites:
        width = int(rng.integers(*bits, endpoint=True))
        near = max(-3, thresholds[0]), min(2, thresholds[1])
        m = int(rng.integers(*(near if rng.integers(3) else thresholds), endpoint=True))
        layer = layers.get(site.name) if site.kind == "activation" else None
        if layer is not None and layer.limit_log2 is not None:
            m = min(m, layer.limit_log2)
        formats[site.name] = Fixed.from_threshold(signed=site.signed, bits=width, threshold_log2=m)
    model.set_scheme(scheme_of(model, formats, {}))
    return model
