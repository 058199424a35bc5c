"""What pruning knows of the values that weights multiply."""

import pytest
import torch
from torch import nn

from hmq_fpga.search.calibrate import least_error_formats, max_thresholds_log2, scheme_of
from hmq_fpga.search.deviations import LEAST, input_deviations
from hmq_fpga.search.pruning import Nonzeros, Pruning
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.train import Task

LAYERS = {
    "dense": (nn.Linear(6, 4), (6,)),
    "dense_over_time": (nn.Linear(6, 4), (5, 6)),
    "conv": (nn.Conv2d(4, 6, 3), (4, 6, 6)),
    "conv_of_groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), (4, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 3, 3)),
}


def ready(layer, shape, x):
    """A model of one layer with formats that are fine enough not to matter."""
    model = instrument(nn.Sequential(layer), shape, input_signed=True)
    task = Task(x_train=x, y_train=torch.arange(len(x)) % 3, x_val=x[:3], y_val=torch.arange(3))
    bits = {site.name: 16 for site in model.sites}
    model.set_scheme(scheme_of(model, least_error_formats(model, task, bits, max_thresholds_log2(model, task)), {}))
    return model, task


@pytest.mark.parametrize("name", LAYERS)
def test_deviations_are_those_of_what_each_weight_multiplies(name):
    layer, shape = LAYERS[name]
    channel = len(shape) if isinstance(layer, nn.Linear) else 1  # of a batch
    x = torch.randn(300, *shape, generator=torch.Generator().manual_seed(0)) + 3
    scale = torch.linspace(0.1, 2, x.shape[channel]).view([-1 if i == channel else 1 for i in range(x.ndim)])
    model, _ = ready(layer, shape, x * scale)
    (found,) = input_deviations(model, x * scale).values()

    wanted = (x * scale).movedim(channel, 0).flatten(1).std(1, correction=0)
    wanted = wanted / wanted.square().mean().sqrt()
    full = found.expand(layer.weight.shape)
    if isinstance(layer, nn.ConvTranspose2d):
        of_weight = wanted.view(-1, 1, 1, 1).expand_as(full)
    else:
        groups = getattr(layer, "groups", 1)
        rows = [wanted.view(groups, -1)[i * groups // len(full)] for i in range(len(full))]
        of_weight = torch.stack(rows).view(*full.shape[:2], *(1,) * (full.ndim - 2)).expand_as(full)
    torch.testing.assert_close(full, of_weight, rtol=1e-2, atol=1e-3)


def test_weights_of_a_constant_go_first():
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.2, 1, 32).view(4, 8))
    x = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0.75
    model, task = ready(layer, (8,), x)
    assert input_deviations(model, x)["linear_0.weight"][5] == LEAST
    pruning = Pruning(model, Nonzeros(1 / 8), task)
    pruning(0, 100)
    for step in range(1, 100):
        pruning(step, 100)
    weight = model.weights["linear_0.weight"].detach()
    assert (weight == 0).nonzero()[:, 1].unique().tolist() == [5]
    assert (weight[:, 5] == 0).all()
