"""Small networks of products, gates, softmax, attention and recurrence."""

import torch
import torch.nn.functional as F
from torch import nn


class SqueezeExcite(nn.Module):
    """Channels scaled by a function of all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class MobileBlock(nn.Module):
    """EfficientNet-B0's block: expanded, depthwise, squeezed and excited, projected, and a shortcut."""

    def __init__(self, channels: int, expanded: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            nn.SiLU(),
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            nn.SiLU(),
            SqueezeExcite(expanded),
            nn.Conv2d(expanded, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.body(x)


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last step, its last state, or all of its steps."""

    def __init__(self, kind: type[nn.RNNBase], features: int, size: int, read: str = "step", **settings) -> None:
        super().__init__()
        self.layer, self.head, self.read = kind(features, size, batch_first=True, **settings), nn.Linear(size, 3), read

    def forward(self, x):
        states, last = self.layer(x)
        if self.read == "all":
            return self.head(states).mean(1)
        if self.read == "state":
            return self.head((last[0] if isinstance(last, tuple) else last)[-1])
        return self.head(states[:, -1])


class Cells(nn.Module):
    """Cells in a loop, the states of one the first of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = cell = x.new_zeros(x.shape[0], 4)
        for step in x.unbind(1):
            hidden, cell = self.lstm(step, (hidden, cell))
        return self.head(self.rnn(self.gru(hidden, cell)))


class Attention(nn.Module):
    """Self-attention with a shortcut."""

    def __init__(self, size: int, heads: int, *, weights: bool = False) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(size, heads, batch_first=True), weights
        self.head = nn.Linear(size, 3)

    def forward(self, x):
        return self.head((x + self.attention(x, x, x, need_weights=self.weights)[0]).mean(1))


class Written(nn.Module):
    """Attention written out, with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4) for _ in range(3))
        self.gate, self.head = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x):
        scores = torch.einsum("bid,bjd->bij", self.query(x), self.key(x)) / 2
        mixed = torch.softmax(scores, -1) @ self.value(x)
        return self.head(F.glu(self.gate(mixed), -1)).mean(1)


class Causal(nn.Module):
    """Attention to the positions before, by a flag and by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.attention = nn.Linear(4, 12), nn.MultiheadAttention(4, 1, batch_first=True)
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).triu(1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.read(x).chunk(3, -1), is_causal=True)
        return self.head(self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0].sum(1))


class Encoder(nn.Module):
    """A transformer's layer: attention, layer norms, shortcuts and a small network."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(size, 1, 4, batch_first=True), nn.Linear(size, 3)

    def forward(self, x):
        return self.head(self.layer(x)[:, 0])


MODELS = {
    "an inverted residual with squeeze and excitation": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), MobileBlock(3, 4), nn.Flatten(), nn.Linear(27, 3)
        ),
        (1, 8, 8),
    ),
    "a softmax inside": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 3)), (6,)),
    "a GRU of two layers, its last step": (lambda: Recurrent(nn.GRU, 3, 4, num_layers=2), (4, 3)),
    "an LSTM, its last state": (lambda: Recurrent(nn.LSTM, 3, 4, "state"), (3, 3)),
    "an RNN, all steps": (lambda: Recurrent(nn.RNN, 3, 4, "all", bias=False, nonlinearity="relu"), (4, 3)),
    "cells in a loop": (Cells, (3, 3)),
    "attention of two heads": (lambda: Attention(4, 2), (3, 4)),
    "attention that gives its weights": (lambda: Attention(4, 1, weights=True), (3, 4)),
    "attention written out, and a gate": (Written, (3, 3)),
    "attention to what came before": (Causal, (3, 4)),
    "a transformer's layer": (lambda: Encoder(4), (2, 4)),
}


class Everything(nn.Module):
    """Recurrence, attention and a softmax, as small as they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x, _ = self.gru(x)
        x = self.attention(x, x, x, need_weights=False)[0].flatten(1)
        return self.head(x * torch.softmax(x, 1))
