import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hmq_fpga.ir import ops, reference
from hmq_fpga.ir.errors import InvalidInput, UnsupportedLayer
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.search import quantizers
from hmq_fpga.search.calibrate import scheme_of
from hmq_fpga.search.freeze import freeze, run_codes
from hmq_fpga.search.layers import Function, joined, parted
from hmq_fpga.search.quantizers import Grid, TrainedGrid
from hmq_fpga.search.reading import instrument
from hmq_fpga.study.tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding="same")
        self.norm = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 2, bias=False)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4 * 2 * 2, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        x = self.relu(self.conv2(x))
        return self.head(torch.flatten(F.dropout(x, training=self.training), 1)).relu()


class Residual(nn.Module):
    """Two blocks, one with a strided shortcut, and a head of means over windows of 6 values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.down = nn.Conv2d(4, 6, 1, stride=2)
        self.conv3 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(self.conv1(x)) + x)
        x = torch.relu(torch.add(self.down(x), self.conv3(x)))
        x = F.adaptive_avg_pool2d(x, 1)
        return F.log_softmax(self.head(x.view(x.size(0), -1)), dim=1)


class Branches(nn.Module):
    """One dimension: padding, two branches side by side, normalization before a padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((1, 2), 0.0)
        self.left = nn.Conv1d(3, 4, 4, stride=2)
        self.right = nn.Conv1d(3, 2, 4, stride=2)
        self.norm = nn.BatchNorm1d(6)
        self.depthwise = nn.Conv1d(6, 6, 3, padding="same", groups=6)
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Linear(6, 4)

    def forward(self, x):
        x = self.pad(x)
        x = torch.cat([F.leaky_relu(self.left(x), 0.125), self.right(x)], dim=1)
        x = self.up(self.depthwise(self.norm(x)))
        return self.last(F.avg_pool1d(x, 4).mean(2)).softmax(-1)


class Mobile(nn.Module):
    """Separable convolutions with ReLU6, as in MobileNets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(2),
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU6(inplace=True),
            nn.Conv2d(4, 6, 1),
            nn.Hardtanh(-2.0, 2.0),
            nn.AvgPool2d((1, 2)),
            nn.ZeroPad2d((1, 0, 0, 1)),
            nn.Conv2d(6, 5, 2),
        )

    def forward(self, x):
        return self.body(x).mean((2, 3))


def flattened(model):
    model.append(nn.Flatten())
    return model


class Heads(nn.Module):
    """A mask, logits and a box, as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.mask = nn.Conv2d(4, 3, 1)
        self.logits = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5))
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.ReLU())

    def forward(self, x):
        x = self.body(x)
        return torch.sigmoid(self.mask(x)), self.logits(x), self.box(x)


class Idioms(nn.Module):
    """Ways to write things that one meets in people's models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.wide, self.same = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bare = nn.BatchNorm1d(8, affine=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.clamp(self.norm(self.conv(x)), min=0)
        x = (
            torch.cat(tensors=[F.adaptive_avg_pool2d(x, 1), F.max_pool2d(x, x.shape[2:])], dim=1)
            .squeeze(-1)
            .squeeze(-1)
        )
        x = F.dropout(self.wide(x), 0.5, self.training).clip(0, 0.75)
        x = self.bare(self.same(x)).clamp(max=1.5, min=-1.5)
        return self.last(x.view(-1, 2, 2, 2).flatten(2).contiguous().view(x.size(0), -1))


def lazy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules are new, says PyTorch
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())


def tied():
    """Two layers of one weight, of which the clip between them scales each by another factor."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Hardtanh(0, 0.75), second)


class Several(nn.Module):
    """Operations on two values, constants and values that move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("mean", torch.randn(8))
        self.last = nn.Linear(15, 3)

    def forward(self, x):
        x = (x - self.mean) / 2
        a, b = self.first(x), self.second(x[:, ::2])
        a, b = F.relu(a * self.scale), -b + 1
        both = torch.stack([a - b, a * b, torch.maximum(a, b), torch.minimum(a, b), a + a], 1)
        square = (torch.cat([b[:, :2], a[:, 1:3], b[:, 3:4]], 1) ** 2) * 0.25
        pooled = torch.cat([both.sum(2), both.amax(-1), square], 1)
        return self.last(pooled)


class Functions(nn.Module):
    """Functions of one value, as tables."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Mish, nn.Hardswish, nn.Hardsigmoid)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(5, 2), kind()) for kind in kinds)
        self.slopes = nn.PReLU(2)
        self.last = nn.Linear(2 * len(kinds), 3)

    def forward(self, x):
        x = [branch(x) for branch in self.branches]
        x[0], x[1], x[2] = F.leaky_relu(x[0], 0.1), self.slopes(x[1]), x[2].abs().clamp(0.25, 1.75)
        return torch.tanh(self.last(torch.cat(x, 1)))


class Windows(nn.Module):
    """Windows of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
        self.multiplied = nn.Conv2d(6, 12, (3, 1), stride=(2, 1), groups=6)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.up = nn.ConvTranspose2d(12, 4, 3, stride=(2, 3), padding=1, output_padding=(1, 2), groups=2)
        self.reflected = nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")
        self.last = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        x = self.pool(self.multiplied(self.dilated(x)))
        x = F.pixel_shuffle(self.up(x), 2)[:, :, 1:]
        x = F.interpolate(self.reflected(x.repeat(1, 4, 1, 1)), scale_factor=(2, 4), mode="bilinear")
        x = F.avg_pool2d(x, 2, padding=1)
        return self.last(F.max_pool2d(x, 3, ceil_mode=True))


class Sequences(nn.Module):
    """Layers over the last of several dimensions, and sums over others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Linear(3, 6), nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(7)
        self.weight = nn.Parameter(torch.randn(6, 2, 4) / 2)
        self.rows = nn.Parameter(torch.randn(2, 5))
        self.last = nn.Bilinear(8, 6, 4)

    def forward(self, x):  # (batch, 7, 3)
        x = F.relu(self.embed(self.norm(x)))
        x = F.relu(self.mix(x.transpose(1, 2)).transpose(1, 2))  # (batch, 5, 6)
        heads = torch.einsum("bnf,fhk->bhnk", x, self.weight)  # (batch, 2, 5, 4)
        mixed = self.rows @ x  # (batch, 2, 6)
        return self.last(heads.sum(2).flatten(1), mixed.mean(1))


class Unusual(nn.Module):
    """Parametrizations, a layer used twice, hooks, in-place functions and branches on `training`."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
        self.shared = nn.Linear(6, 6)
        self.pruned = nn.utils.prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
        self.pruned.register_forward_hook(lambda _module, _inputs, output: output + 1)
        self.scale = nn.Parameter(torch.tensor(0.75))

    def forward(self, x):
        x = F.relu(self.normed(x), inplace=True)
        if self.training:
            x = F.dropout(x)
        x += self.shared(x).relu_()
        return self.pruned(self.shared(x) * self.scale)


class Classes(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class TwoInputs(nn.Module):
    """Features, and an image that is flattened with them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(2, 3, 2), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, features, image):
        image = F.relu(self.conv(image)).flatten(1)
        return {
            "sum": self.last(torch.cat([self.fc(features), image], 1)),
            "image": self.conv(image.view(-1, 2, 1, 3).repeat(1, 1, 2, 1)),
        }


class Constants(nn.Module):
    """A class token, positions, masks and zeros beside values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.Linear(3, 6), nn.Linear(6, 6)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(5, 1, 6))
        self.register_buffer("chosen", torch.arange(6) % 2 == 0)
        self.register_buffer("order", torch.tensor([3, 1, 0]))
        self.last = nn.Linear(9, 3)

    def forward(self, x):  # (batch, 4, 3)
        x = torch.cat([self.token.expand(x.size(0), -1, -1), self.embed(x)], 1)
        x = (x.transpose(0, 1) + self.positions).transpose(0, 1).masked_fill(self.chosen, 0.5)
        y = torch.maximum(x, torch.zeros_like(x)).mean(1)
        y = torch.where(self.chosen, y, torch.tanh(self.gate(y))).clamp(-4, 4)
        picked = torch.gather(y, 1, self.order.expand(len(y), -1))
        return self.last(torch.cat([y, picked * y.new_ones(3)], 1))


class Turned(nn.Module):
    """Batches that are not the first dimension, or are one with the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(12, 3)
        self.members = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):  # (batch, 5, 3)
        steps = F.relu(self.first(x.transpose(0, 1)) * 0.5 + 1)
        rows = torch.tanh(self.norm(self.first(x.reshape(-1, 3)))).view(x.size(0), -1, 4)
        joined = torch.lerp(steps.transpose(0, 1), rows, 0.25)
        mean = torch.stack([member(joined[:, -1]) for member in self.members]).mean(0)
        crossed = (self.members[0].weight @ mean.T).T
        return self.last(torch.cat([mean, joined.min(1).values, F.glu(torch.cat([crossed, mean], 1))], 1))


class Numbers(nn.Module):
    """One number for each sample, inside and returned, behind functions or not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(1, 2)

    def forward(self, x):
        x = self.body(x)
        score = x[:, 0] * x[:, 1] - 0.5 * x[:, 2].relu()
        head = self.head(score[:, None])
        return (
            torch.sigmoid(head)[:, :1].squeeze(-1),
            x.sum(1),
            torch.tanh(x.mean(1) * 0.5).unsqueeze(1),
            head.view(-1, 1, 2),
        )


class Partial(nn.Module):
    """Functions that have no value for some numbers that a format holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, *inputs):
        x = F.relu(self.first(inputs[0]))
        return self.last(torch.cat([torch.log(x + 1), torch.sqrt(x)], 1))


class Compared(nn.Module):
    """Truth values of two tensors, of channels with numbers of their own, and of what else decides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(13, 2)
        self.register_buffer("least", torch.tensor([-0.25, 0.0, 0.5]))

    def forward(self, x):
        a, b = self.first(x), F.relu(self.second(x))
        larger = (a >= b) & ~(a == b)
        either = (a > self.least) | (b <= 0.25)
        smaller = (a < b) | (b <= self.least)
        missing = (x == 0).any(1, keepdim=True).float() + (a > 0).all(1).float()[:, None]
        chosen = torch.where(larger, a, -b), a * either, a * smaller, b.masked_fill(a != b, 1.0)
        return self.last(torch.cat([*chosen, missing], 1))


class Divided(nn.Module):
    """Quotients of two values, and norms that are written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(16, 2)

    def forward(self, x):
        a, b = self.first(x), self.second(x)
        e = torch.exp(-F.relu(a))
        spread = (b - b.mean(1, keepdim=True)) / (b.std(1, keepdim=True) + 0.125)
        whitened = (a - a.mean(1, keepdim=True)) / torch.sqrt(a.var(1, keepdim=True, unbiased=False) + 0.125)
        return self.last(torch.cat([a / (1 + b.abs()), e / e.sum(1, keepdim=True), spread, whitened], 1))


class Normalized(nn.Module):
    """Norms of a sample's own values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rms = nn.Conv2d(2, 8, 3, padding=1), nn.RMSNorm(6)
        self.groups, self.each = nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True)
        self.known = nn.InstanceNorm2d(8, track_running_stats=True)
        self.middle, self.last = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):  # (batch, 2, 4, 2)
        x = F.relu(self.groups(self.first(x)))
        x = F.relu(self.each(x)) + self.known(x)
        return F.linear(F.normalize(self.rms(self.middle(x.amax((2, 3))))), F.normalize(self.last.weight))


class BothWays(nn.Module):
    """A recurrent layer forwards and backwards: all states, the last ones, and a sum over what has been."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, num_layers=2, batch_first=True, bidirectional=True)
        self.gru, self.last = nn.GRU(4, 2, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x):  # (batch, 3, 3)
        states, _ = self.lstm(x)
        _, hidden = self.gru(torch.cumsum(states, 1).transpose(0, 1))
        return self.last(torch.cat([hidden[0], hidden[1], states[:, -1]], 1))


MODELS = {
    "compared": (Compared, (4,)),
    "divided": (Divided, (6,)),
    "normalized": (Normalized, (2, 4, 2)),
    "both ways": (BothWays, (3, 3)),
    "padding that is not counted, or of another number": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2),
            nn.ReLU(),
            nn.ConstantPad2d((0, 1, 2, 0), 0.5),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.Flatten(),
            nn.Linear(24, 2),
        ),
        (1, 6, 6),
    ),
    "constants": (Constants, (4, 3)),
    "turned": (Turned, (5, 3)),
    "numbers": (Numbers, (4,)),
    "partial": (Partial, (4,)),
    "one number": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid(), nn.Flatten(0)),
        (4,),
    ),
    "class of each pixel": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Softmax(1), Classes()),
        (2, 3, 2),
    ),
    "several": (Several, (8,)),
    "functions": (Functions, (5,)),
    "windows": (Windows, (4, 9, 8)),
    "sequences": (Sequences, (7, 3)),
    "unusual": (Unusual, (4,)),
    "two inputs": (TwoInputs, ((4,), (2, 3, 2))),
    "flattened image": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten()), (1, 4, 4)),
    "moved output": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))), (4,)),
    "tied": (tied, (6,)),
    "idioms": (Idioms, (2, 4, 4)),
    "heads": (Heads, (2, 4, 3)),
    "residual": (Residual, (2, 5, 3)),
    "branches": (Branches, (3, 9)),
    "mobile": (Mobile, (2, 7, 8)),
    "normalized twice after flattening": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.BatchNorm1d(18),
            nn.ReLU(),
            nn.BatchNorm1d(18),
            nn.Dropout(),
            nn.Linear(18, 4),
        ),
        (1, 4, 3),
    ),
    "autoencoder": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(3, 1, 3, padding=1),
            nn.Sigmoid(),
        ),
        (1, 6, 4),
    ),
    "lone layer": (lambda: nn.Linear(6, 5), (6,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (6,)),
    "linear after linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)), (6,)),
    "folded": (
        lambda: nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Identity(), nn.ReLU(), nn.Linear(5, 4)
        ),
        (6,),
    ),
    "relu of the input": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 5)), (6,)),
    "strided, odd padding, pool before relu": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, (3, 2), stride=2, padding=(1, 0)),
            nn.BatchNorm2d(3),
            nn.MaxPool2d((2, 1)),
            nn.ReLU(),
            nn.Conv2d(3, 2, 2, padding="same"),
            nn.Flatten(),
            nn.Linear(12, 4),
        ),
        (1, 7, 6),
    ),
    "image output": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()), (2, 5, 4)),
    "functional": (Functional, (2, 6, 6)),
}


def limits(model):
    """Thresholds' logarithms that activations may not exceed, by name."""
    pairs = zip(model.nodes, model.layers, strict=True)
    return {n.name: layer.limit_log2 for n, layer in pairs if getattr(layer, "limit_log2", None) is not None}


def randomly_formatted(model, seed, bits):
    rng = np.random.default_rng(seed)
    most = limits(model)
    formats = {
        s.name: Fixed.from_threshold(
            signed=s.signed,
            bits=int(rng.integers(*bits, endpoint=True)),
            threshold_log2=min(int(rng.integers(-3, 3)), most.get(s.name, 9)),
        )
        for s in model.sites
    }
    model.set_scheme(scheme_of(model, formats, {}))
    return model


def channels_last(x):
    return x.movedim(1, -1).numpy()


def batches(n, shape):
    """A batch of each input."""
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    return [torch.randn(n, *shape) for shape in shapes]


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**31), low=st.integers(1, 3), high=st.integers(4, 12), scale=st.sampled_from([0.1, 1.0, 8.0])
)
def test_evaluation_is_the_reference(name, seed, low, high, scale):
    build, shape = MODELS[name]
    torch.manual_seed(seed)
    model = build()
    model(*batches(16, shape))  # gives BatchNorm statistics
    quantized = randomly_formatted(instrument(model, shape), seed, (low, high))
    net = freeze(quantized)
    x = joined(batches(20, shape)) * scale
    np.testing.assert_array_equal(run_codes(quantized, x, net.output_format), reference.run(net, channels_last(x)))


@pytest.mark.parametrize("name", MODELS)
def test_float_model_is_unchanged(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    model(*batches(16, shape))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = batches(20, shape)
    expected = joined(model.eval()(*x))
    read = instrument(model, shape)
    torch.testing.assert_close(read.finish(read(joined(x))), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_outputs_of_a_network_that_has_several():
    """All in a row, channels last; each by itself with its shape."""
    torch.manual_seed(0)
    quantized = randomly_formatted(instrument(Heads().eval(), (2, 4, 3)), 0, (3, 8))
    assert "3 outputs, each with a port of its own: mask, logits_2, box_2" in quantized.notes
    net = freeze(quantized)
    assert list(net.outputs) == ["mask", "logits_2", "box_2"]
    codes = reference.run(net, np.random.default_rng(0).normal(size=(7, 4, 3, 2)))
    outputs = net.split(codes)
    assert {name: output.shape for name, output in outputs.items()} == {
        "mask": (7, 4, 3, 3),
        "logits_2": (7, 5),
        "box_2": (7, 2),
    }
    np.testing.assert_array_equal(np.concatenate([o.reshape(7, -1) for o in outputs.values()], 1), codes)
    lone = freeze(randomly_formatted(instrument(nn.Linear(6, 5), (6,)), 0, (3, 8)))
    assert list(lone.split(np.zeros((7, 5)))) == list(lone.outputs)


@pytest.mark.parametrize(
    ("kind", "shape", "bypassed"),
    [
        (Residual, (2, 8, 8), {"conv1_0", "conv2_0", "down", "conv3"}),
        (Branches, (3, 8), {"left", "right"}),
        (Heads, (2, 4, 3), set()),
        (Unusual, (4,), {"shared"}),
    ],
)
def test_weights_that_a_shortcut_leads_around(kind, shape, bypassed):
    """Without the others an output is the same for all inputs."""
    torch.manual_seed(0)
    read = instrument(kind().eval(), shape)
    assert {name for name in read.weights if read.bypassed(name)} == {f"{name}.weight" for name in bypassed}
    x = torch.rand(5, *read.input_shape)
    for name in read.weights:
        without = {name: Grid(1.0, 0.0, 0.0)}
        outputs = parted(read(x, without).detach(), read.output_shapes)
        vary = [float((output - output[:1]).abs().max()) > 1e-6 for output in outputs]
        assert all(vary) == read.bypassed(name), name


def test_what_several_heads_read_is_flattened_once():
    """And rounded before, which costs less, and which hls4ml's streams cannot do afterwards."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.flatten = nn.Conv2d(1, 2, 2), nn.Flatten()
            self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x):
            x = self.flatten(self.body(x))
            return self.first(x), self.second(x)

    net = freeze(randomly_formatted(instrument(Split(), (1, 3, 3)), 0, (3, 8)))
    kinds = [(type(op).__name__, op.name) for op in net.ops]
    assert kinds == [
        ("Input", "input"),
        ("Conv", "body"),
        ("Quantize", "flatten_quant"),
        ("Flatten", "flatten"),
        ("Dense", "first"),
        ("Dense", "second"),
    ]


def test_a_shared_layer_is_one_set_of_parameters():
    """Its weight has one format, and what is folded into one use is not into the other."""
    model = instrument(Unusual(), (4,))
    layers = {node.name: layer for node, layer in zip(model.nodes, model.layers, strict=True)}
    assert layers["shared"].weight is not layers["shared_1"].weight  # scaled
    plain = instrument(Shared(), (4,))
    first, second = (layer for layer in plain.layers if isinstance(layer, nn.Linear))
    assert first.weight is second.weight and first.bias is second.bias
    assert [site.name for site in plain.sites if site.kind == "weight"] == ["fc.weight"]
    assert len(list(plain.parameters())) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_wrappers_are_looked_through():
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    names = [site.name for site in instrument(plain, (4,)).sites]
    for wrapped in (nn.DataParallel(plain), torch.compile(plain), nn.Sequential(*plain[:2], nn.DataParallel(plain[2]))):
        assert [site.name for site in instrument(wrapped, (4,)).sites] == names


def test_inputs_by_keyword():
    class Keywords(TwoInputs):
        def forward(self, *, image, features):
            return super().forward(features, image)["sum"]

    model = instrument(Keywords(), {"image": (2, 3, 2), "features": (4,)})
    assert model.inputs == {"image": (2, 3, 2), "features": (4,)}
    assert [op.name for op in freeze(randomly_formatted(model, 0, (4, 4))).inputs] == ["image", "features"]


def test_sites_and_notes_name_the_users_layers():
    model = instrument(Functional(), (2, 6, 6), input_signed=False)
    assert [(s.name, s.kind, s.size, s.signed) for s in model.sites] == [
        ("input", "input", 72, False),
        ("conv1.weight", "weight", 54, True),
        ("relu", "activation", 108, False),
        ("conv2.weight", "weight", 48, True),
        ("relu_1", "activation", 16, False),
        ("head.weight", "weight", 80, True),
        ("relu_2", "activation", 5, False),
    ]
    assert model.notes == ("dropout removed: it does nothing in evaluation", "norm folded into conv1")


def test_a_function_without_a_value_is_zero_and_has_no_gradient():
    x = torch.tensor([-1.0, 0.0, 4.0], requires_grad=True)
    for function, values in ((torch.log, [0.0, -(2.0**15), np.log(4)]), (torch.sqrt, [0.0, 0.0, 2.0])):
        y = Function(function.__name__, function)(x)
        assert y.tolist() == pytest.approx(values)
        assert torch.autograd.grad((y * torch.tensor([1.0, 0.0, 1.0])).sum(), x)[0].tolist() == [0, 0, 0.25]


def test_one_quantizer_serves_all_readers_of_an_accumulator():
    net = freeze(randomly_formatted(instrument(MODELS["linear after linear"][0](), (6,)), 0, (4, 4)))
    assert [type(op).__name__ for op in net.ops] == ["Input", "Dense", "Quantize", "Dense"]


class Control(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) + 1


class Both(Shift):
    def forward(self, x):
        return self.fc(x), x


class Twice(Shift):
    def forward(self, x):
        x = self.fc(x)
        return [x, x.relu(), x]


class ReadInside(Shift):
    def forward(self, x):
        x = self.fc(x)
        return x, x.relu()


class LostMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return y.mean((2, 3)) + F.relu(y).mean((2, 3))


class AlwaysDropout(Shift):
    def forward(self, x):
        return F.dropout(self.fc(x), 0.5)


class View(Shift):
    """An in-place function changes what another name was given to."""

    def forward(self, x):
        x = self.fc(x)
        y = x.view(-1, 2, 2)
        F.relu_(x)
        return y.flatten(1) * 2


class OfBatch(Shift):
    def forward(self, x):
        return self.fc(x) * x.size(0)


class OverBatch(Shift):
    def forward(self, x):
        return self.fc(x) - x.mean(0)


class Regrouped(Shift):
    def forward(self, x):
        return self.fc(x.reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 4))


class FixedBatch(Shift):
    def forward(self, x):
        return self.fc(x.view(2, 4))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.fc = nn.Embedding(9, 4), nn.Linear(16, 2)

    def forward(self, x):
        return self.fc(self.rows(x.long()).flatten(1))


class Written(Shift):
    def forward(self, x):
        x = self.fc(x)
        x[:, 0] = 0
        return x * 2


class Chosen(Shift):
    def forward(self, x):
        x = self.fc(x)
        return x > 0


class Cast(Shift):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x).float()


class Data(Shift):
    def forward(self, x):
        return Answer(self.fc(x))


@dataclass
class Answer:
    logits: torch.Tensor


class Empty(Shift):
    def forward(self, x):
        return F.linear(x, self.fc.weight[:0])


class Exits(Shift):
    def forward(self, x):
        raise SystemExit(3)


class Logarithm(Shift):
    def forward(self, x):
        return torch.log(self.fc(x))


class NotCopied(Shift):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one of me")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), (4,), r"'1' \(LayerNorm\): .*use BatchNorm"),
        (nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(1), nn.Linear(4, 2)), (4,), r"'1' \(LogSoftmax\): .*end only"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.ConstantPad2d(1, -math.inf)), (1, 3, 3), "constant that is not finite"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(2)), (1, 3, 3), "unequal size"),
        (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(4, 2)), (1, 3, 3), "ceil_mode=False"),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.UpsamplingBilinear2d(scale_factor=2)), (1, 2, 2), "align_corners=False"),
        (nn.Sequential(nn.LSTM(4, 3)), (5, 4), r"'0' \(LSTM\): recurrent"),
        (LostMean(), (2, 3, 3), "no power of two"),
        (Both(), (4,), "must return a tensor that it computed, or a tuple of such"),
        (Twice(), (4,), "'fc' more than once"),
        (ReadInside(), (4,), "'fc' is also read inside"),
        (nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)), (4,), "track_running_stats"),
        (nn.Sequential(nn.Linear(4, 2)), (3,), r"input of shape \(3,\)"),
        (nn.Sequential(nn.ReLU()), (4,), "no Linear and no convolution"),
        (TwoInputs(), (4,), "not accept"),
        (
            Control(),
            (4,),
            r"torch.export cannot read Control in test_graph.py:\d+: which operations it runs depends on",
        ),
        (View(), (4,), "something else than its layers do, by .*in-place functions whose input is read elsewhere"),
        (OfBatch(), (4,), "something else than its layers do, by .*what depends on the size of the batch"),
        (OverBatch(), (4,), r"'mean' \(mean\) in test_graph.py:\d+: is taken over the batch"),
        (Regrouped(), (4,), r"'fc' \(Linear\) in test_graph.py:\d+: mixes the samples of a batch"),
        (FixedBatch(), (4,), "takes batches of 2 (only|and not of 3)"),
        (Rows(), (4,), r"'to' \(to\) in test_graph.py:\d+: makes int64 of its values"),
        (nn.Embedding(9, 4), (4,), "not accept|looks rows up by a number"),
        (
            AlwaysDropout(),
            (4,),
            r"'dropout' \(dropout\) in test_graph.py:\d+: acts in evaluation too; give it training",
        ),
        (nn.Sequential(nn.Linear(4, 2), nn.Softmax(0)), (4,), r"'1' \(Softmax\): is taken over the batch; give"),
        (nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), (4,), "its output does not keep the batch as its first"),
        (Empty(), (4,), r"'linear' \(linear\) in test_graph.py:\d+: makes no values"),
        (
            lazy(),
            (4,),
            "'0' does not know its sizes yet; call the model",
        ),
        (nn.Linear(4, 2), (3, 3, 3, 4), r"samples of shape \(3, 3, 3, 4\), hardware takes .* reshape them in forward"),
        (nn.Sequential(nn.Conv2d(1, 6, 1), nn.GroupNorm(2, 6)), (1, 3, 3), r"'1' \(GroupNorm\): .* of 27 values"),
        (Written(), (4,), r"in test_graph.py:\d+: writes into a tensor; make a new one"),
        (Chosen(), (4,), r"'gt' \(gt\) in test_graph.py:\d+: is true or false; make a number of it"),
        (Cast(), (4,), "a part that runs in its own way, as under autocast"),
        (Data(), (4,), "cannot read Data: forward must return a tensor, or a tuple, list or dictionary"),
        (Exits(), (4,), r"in test_graph.py:\d+: 3"),
        (Logarithm(), (4,), "gives NaN or infinity for random inputs; keep what logarithms"),
        (NotCopied(), (4,), "NotCopied cannot be copied: there is only one of me"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_unsupported_is_named(model, shape, message, capfd):
    with pytest.raises(InvalidInput, match=message) as caught:
        instrument(model, shape)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_script_modules_are_refused():
    with pytest.raises(InvalidInput, match="give the module that was scripted"):
        instrument(torch.jit.script(nn.Sequential(nn.Linear(4, 2))), (4,))


def test_unsupported_layer_is_a_type_error():
    with pytest.raises(UnsupportedLayer):
        instrument(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), (4,))


def test_nan_in_weights_is_refused():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match=r"0\.weight holds NaN"):
        instrument(model, (4,))


def test_freeze_and_scheme_need_each_other():
    model = instrument(nn.Sequential(nn.Linear(4, 2)), (4,))
    with pytest.raises(InvalidInput, match="no scheme"):
        freeze(model)
    other = instrument(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), (4,))
    formats = {s.name: Fixed(True, 4, 2) for s in other.sites}
    with pytest.raises(InvalidInput, match="relu_1"):
        model.set_scheme(scheme_of(other, formats, {}))


def test_bias_is_on_the_accumulators_grid():
    model = randomly_formatted(instrument(nn.Sequential(nn.Linear(4, 3)), (4,)), 0, (3, 3))
    layer = model.layers[0]
    net = freeze(model)
    op = net["linear_0"]
    assert isinstance(op, ops.Dense)
    frac = net.input.format.frac + op.weight_format.frac
    np.testing.assert_array_equal(op.bias, np.rint(layer.bias.detach().double().numpy() * 2.0**frac).astype(np.int64))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_dense_layers_that_quantize_are_quantizers_and_dense_layers(name, trained):
    """Against the way with an observer, who sees each tensor before it is quantized."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomly_formatted(instrument(build().eval(), shape), 0, (3, 8))
    x = joined(batches(9, shape))
    grids, wanted = None, list(model.parameters())
    if trained:
        tensors = {site: torch.tensor(Grid.of(format_), requires_grad=True) for site, format_ in model.formats.items()}
        grids = {site: TrainedGrid(tensor, Grid(*tensor.tolist())) for site, tensor in tensors.items()}
        wanted += tensors.values()
    upstream = torch.randn(model(x).shape)
    results = []
    for observe in (None, lambda *_: None):
        y = model(x, grids, observe)
        gradients = torch.autograd.grad((y * upstream).sum(), wanted, allow_unused=True, materialize_grads=True)
        results.append((y, *gradients))
    for ours, oracle in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["mnist_cnn", "resnet8_cifar", "dscnn_fsdd"])
def test_images_have_their_channels_last(task):
    """From layer to layer, past quantizers: a convolution that must reorder them takes half as long again."""
    model = instrument(TASKS[task].build().eval(), (3, 32, 32) if "cifar" in task else (1, 28, 28))
    grids = dict.fromkeys((site.name for site in model.sites), Grid(0.25, -2.0, 1.75))
    seen = []

    def observe(name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() == 4:
            seen.append((name, tensor.stride(1)))

    model(torch.randn(2, *model.input_shape), grids, observe)
    assert len(seen) > 2 and {stride for _, stride in seen} == {1}, seen


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_quantized_again_gives_the_same_gradients(name, mixed, monkeypatch):
    """Nothing is kept but what quantizers read: gradients as if all were."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomly_formatted(instrument(build().eval(), shape), 0, (3, 8))
    x = joined(batches(5, shape))
    gradients = []
    for least in (1, 10**9):
        monkeypatch.setattr(quantizers, "RECOMPUTED", least)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(x).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for ours, oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=0, atol=0)
