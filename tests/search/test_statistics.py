"""What BatchNorms know of tensors stays true while they are folded."""

import pytest
import torch
from torch import nn

from hmq_fpga.search.reading import instrument


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x):
        x = self.first(x)
        return self.head(torch.relu(self.norm(x + self.second(torch.relu(x)))).amax((2, 3)))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x) * 2 + 1) * 0.5))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(9, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x).view(-1, 3))).view(-1, 9))


NETWORKS = {
    "after a dense layer": (
        (4,),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)),
    ),
    "of the input": ((4,), lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))),
    "of a sequence": (
        (2, 6),
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2)),
    ),
    "before a layer": (
        (2, 6, 6),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2)),
    ),
    "two in a row": (
        (4,),
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)),
    ),
    "transposed": (
        (2, 3, 3),
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 2)),
    ),
    "a clip at 6": (
        (4,),
        lambda: nn.Sequential(
            nn.Linear(4, 3),
            nn.BatchNorm1d(3),
            nn.ReLU6(),
            nn.BatchNorm1d(3),
            nn.Linear(3, 3),
            nn.ReLU6(),
            nn.Linear(3, 2),
        ),
    ),
    "a mean of 9, taken after": (
        (2, 5, 5),
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        ),
    ),
    "a mean of 9, taken before": (
        (2, 5, 5),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(3)),
    ),
    "of a sum": ((2, 4, 4), Residual),
    "of what is scaled": ((4,), Scaled),
    "of rows": ((3, 4), Rows),
}


def knowing(model, x):
    """The model with every BatchNorm's statistics those of `x`."""

    def learn(norm, inputs):
        channels = inputs[0].movedim(1, 0).flatten(1)
        norm.running_mean, norm.running_var = channels.mean(1), channels.var(1, correction=0)

    random = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.copy_(torch.randn(norm.weight.shape, generator=random))
            norm.bias.copy_(torch.randn(norm.bias.shape, generator=random))
        hooks = [norm.register_forward_pre_hook(learn) for norm in norms]
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_are_those_of_the_tensors(name):
    shape, make = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(200, *shape) * 3
    read = instrument(knowing(model, x), shape)
    assert read.statistics
    found = {}

    def follow(tensor, values):
        if tensor in read.statistics:
            found[tensor] = read.statistics[tensor].of(values)

    with torch.no_grad():
        read(x, grids={}, follow=follow)
    assert set(found) == set(read.statistics)
    for tensor, known in read.statistics.items():
        for figure in ("mean", "deviation"):
            torch.testing.assert_close(
                getattr(found[tensor], figure), getattr(known, figure).float(), rtol=1e-3, atol=1e-3
            )
