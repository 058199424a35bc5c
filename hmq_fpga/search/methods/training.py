"""Training through quantizers that move: what methods share that change thresholds while weights learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, optim

from hmq_fpga.search import parallel
from hmq_fpga.search.checkpoint import Checkpoint, Stateful
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.quantizers import Grid, TrainedGrid
from hmq_fpga.search.train import Budget, Figures, History, Listener, Task, falling, finished, finite, learning, train

NEWS = 150  # how often listeners hear

Grids = Mapping[str, Grid] | Mapping[str, TrainedGrid]


def train_through(
    model: QModel,
    task: Task,
    budget: Budget,
    grids: Callable[[int, Tensor, Tensor], Grids],
    *others: optim.Optimizer,
    parts: Mapping[str, Stateful],
    settings: object,
    seed: int,
    listener: Listener,
    checkpoint: Checkpoint | None,
) -> History:
    """Train a model for the steps of a search, at learning rates that fall to zero along a cosine.

    Args:
        model: trained in place.
        task: training data.
        budget: its search's steps and learning rate.
        grids: asked before each step, with its number and batch, for the quantizers of all sites by name.
        others: optimizers of further parameters, whose learning rates fall likewise.
        parts: what else changes meanwhile, by name.
        settings: what decides the grids, see `train`.
        seed: of the order of the batches.
        listener: hears of the progress.
        checkpoint: where the state is kept meanwhile.
    """
    steps = budget.search_steps
    rates = [[group["lr"] for group in other.param_groups] for other in others]

    def step(number: int, x: Tensor, y: Tensor) -> Figures:
        returned, scores = finished(model, model(x, grids(number, x, y)))
        loss = task.loss(returned, y, scores)
        optimizer.step(loss, falling(number, steps))
        for other, initial in zip(others, rates, strict=True):
            for group, rate in zip(other.param_groups, initial, strict=True):
                group["lr"] = rate * falling(number, steps)
                parallel.average(parameter.grad for parameter in group["params"])
            other.step()
            other.zero_grad()
        return lambda: {"loss": finite(loss), **task.accuracies("batch", scores, y)}

    with learning(model, task.stepper(model.parameters(), budget.learning_rate, steps)) as optimizer:
        return train(
            step,
            task,
            parts={
                "model": model,
                "optimizer": optimizer,
                **{f"optimizer {i}": other for i, other in enumerate(others)},
                **parts,
            },
            steps=steps,
            seed=seed,
            news=NEWS,
            settings=(budget.learning_rate, settings),
            listener=listener,
            checkpoint=checkpoint,
        )
