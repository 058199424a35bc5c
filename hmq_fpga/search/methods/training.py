"""Training through quantizers that move: what methods share that change thresholds while weights learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hmq_fpga.search.graph import QModel
from hmq_fpga.search.optimizer import RAdam
from hmq_fpga.search.quantizers import Grid, TrainedGrid
from hmq_fpga.search.train import Budget, History, Listener, Recorder, Task, batches, falling, finished, finite

_NEWS = 150  # how often listeners hear

Grids = Mapping[str, Grid] | Mapping[str, TrainedGrid]


def train_through(
    model: QModel,
    task: Task,
    budget: Budget,
    grids: Callable[[int, Tensor, Tensor], Grids],
    *others: torch.optim.Optimizer,
    seed: int,
    listener: Listener,
) -> History:
    """Train a model for the steps of a search, at learning rates that fall to zero along a cosine.

    Args:
        model: trained in place.
        task: training data.
        budget: its search's steps and learning rate.
        grids: asked before each step, with its number and batch, for the quantizers of all sites by name.
        others: optimizers of further parameters, whose learning rates fall likewise.
        seed: of the order of the batches.
        listener: hears of the progress.
    """
    steps = budget.search_steps
    optimizer = RAdam((model.parameters(), budget.learning_rate))
    schedules = [LambdaLR(other, partial(falling, steps=steps)) for other in others]
    recorder = Recorder(listener)
    every = max(steps // _NEWS, 1)
    model.train()
    for step, (x, y) in enumerate(batches(task, steps, torch.Generator().manual_seed(seed))):
        returned, scores = finished(model, model(x, grids(step, x, y)))
        loss = task.loss(returned, y, scores)
        optimizer.step(loss, falling(step, steps))
        for other, schedule in zip(others, schedules, strict=True):
            other.step()
            other.zero_grad()
            schedule.step()
        if step % every == 0 or step == steps - 1:
            figures = {"epoch": task.epoch(step + 1), "loss": finite(loss), **task.accuracies("batch", scores, y)}
            recorder(step + 1, steps, figures)
    optimizer.release()
    model.eval()
    return recorder.history
