"""Training of HGQ2's networks, and what alkaid makes of them; needs the extra `hgq2`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from alkaid.converter import trace_model
from alkaid.trace import HWConfig, trace
from common import Row
from hgq.config import LayerConfigScope, QuantizerConfigScope
from hgq.layers import QDense
from hgq.utils import trace_minmax
from hgq.utils.sugar import BetaScheduler, FreeEBOPs, ParetoFront, PieceWiseSchedule
from torch import nn

from hmq_fpga.deploy.rtl.trace import SOLVER, simplify
from hmq_fpga.study.tasks import TASKS, Task

LEARNING_RATE = 5e-3
CYCLES, DECAY = 10, 0.94  # of the learning rate of a ramp: restarts of a cosine, each lower than the one before
RAMP = ((0.0, 1e-6), (0.1, 1e-6), (1.0, 2e-4))  # share of the epochs, penalty: constant, then exponential


class Front:
    """Networks of one training, of which none has both less accuracy on validation data and more EBOPs than another.

    Args:
        task: whose layers and data these are.
        penalty: on EBOPs; None: the ramp.
        seed: of weights and batches.
        folder: where they are kept.
    """

    def __init__(self, task: str, penalty: float | None, seed: int, folder: Path) -> None:
        self.data = TASKS[task].load(None)
        keras.utils.set_random_seed(seed)
        self.model = _network(task)
        done = folder / "done"
        if not done.exists():
            self._train(TASKS[task], penalty, folder)
            done.touch()
        self.members = sorted(folder.glob("*.weights.h5"), key=_ebops)
        self.measured: dict[Path, Row] = {}

    def best(self, luts: float) -> Row:
        """The member with most EBOPs among those with so many LUTs, found by bisection."""
        low, high, found = 0, len(self.members), None
        while low < high:
            middle = (low + high) // 2
            row = self._measure(self.members[middle])
            if row["alkaid_lut"] <= luts:
                low, found = middle + 1, row
            else:
                high = middle
        return found or {"refused": f"no network of the front has at most {luts:g} LUTs"}

    def _train(self, task: Task, beta: float | None, folder: Path) -> None:
        x, y = self.data.x_train, self.data.y_train
        budget = task.budget
        each = len(x) // task.batch_size
        epochs = (budget.float_steps + budget.search_steps + budget.finetune_steps) // each
        steps = epochs * each
        rates = keras.optimizers.schedules
        rate = (
            rates.CosineDecay(LEARNING_RATE, steps)
            if beta
            else rates.CosineDecayRestarts(LEARNING_RATE, steps // CYCLES, t_mul=1.0, m_mul=DECAY, alpha=1e-3)
        )
        self.model.compile(
            optimizer=keras.optimizers.Adam(rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        name = "ebops={ebops}_epoch={epoch}.weights.h5"
        self.model.fit(
            x,
            y,
            batch_size=task.batch_size,
            epochs=epochs,
            validation_data=(self.data.x_val, self.data.y_val),
            verbose=0,
            callbacks=[
                FreeEBOPs(),
                BetaScheduler(_penalty(beta, epochs)),
                ParetoFront(folder, ["val_accuracy", "ebops"], [1, -1], name),
            ],
        )

    def _measure(self, member: Path) -> Row:
        if member in self.measured:
            return self.measured[member]
        self.model.load_weights(member)
        ebops = trace_minmax(self.model, self.data.x_train, verbose=0)
        program = simplify(
            trace(*trace_model(self.model, HWConfig(1, 1, -1), {"hard_dc": SOLVER["hard_dc"]}), optimize=False)
        )
        outputs = program.predict(self.data.x_test.astype(np.float64))
        if differing := int(np.sum(outputs != self.model.predict(self.data.x_test, verbose=0))):
            raise RuntimeError(f"{member}: {differing} values of alkaid's program differ from Keras's")
        validation = self.model.predict(self.data.x_val, verbose=0).argmax(1)
        self.measured[member] = {
            "validation": float(np.mean(validation == self.data.y_val)),
            "test": float(np.mean(outputs.argmax(1) == self.data.y_test)),
            "alkaid_lut": round(float(program.cost)),
            "ebops": int(ebops),
        }
        return self.measured[member]


def _network(task: str) -> keras.Model:
    layers = [layer for layer in TASKS[task].build().modules() if isinstance(layer, nn.Linear)]
    *hidden, last = (layer.out_features for layer in layers)
    with (
        QuantizerConfigScope(place="all", default_q_type="kbi", overflow_mode="SAT_SYM"),
        QuantizerConfigScope(place="datalane", default_q_type="kif", overflow_mode="WRAP"),
        LayerConfigScope(enable_ebops=True),
    ):
        dense = [QDense(width, activation="relu") for width in hidden]
        return keras.Sequential([keras.layers.Input((layers[0].in_features,)), *dense, QDense(last)])


def _penalty(beta: float | None, epochs: int) -> Callable[[int], float]:
    if beta is not None:
        return lambda _: beta
    points = [(round(share * epochs), penalty, "log") for share, penalty in RAMP]
    return PieceWiseSchedule(points)


def _ebops(member: Path) -> int:
    return int(member.name.split("_")[0].removeprefix("ebops="))
