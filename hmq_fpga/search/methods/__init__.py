"""Search methods: `METHODS` maps a name to a function that finds a scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search import parallel
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.logic import ZEROS, check_least, start
from hmq_fpga.search.methods.hawq import HawqOptions, hawq
from hmq_fpga.search.methods.hgq import HgqOptions, hgq
from hmq_fpga.search.methods.hmq import MIN_STEPS, HmqOptions, hmq
from hmq_fpga.search.methods.msqe import MsqeOptions, msqe
from hmq_fpga.search.methods.pot_gradient import PotGradientOptions, pot_gradient
from hmq_fpga.search.methods.uniform import UniformOptions, uniform
from hmq_fpga.search.methods.zeroq import ZeroqOptions, zeroq
from hmq_fpga.search.pruning import widen_thresholds
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, History, Listener, Task, ignore


@dataclass(frozen=True)
class Method:
    """A search method: its function, the dataclass of its options, and the fewest steps that it can do with."""

    function: Callable[..., tuple[QModel, Scheme, History]]
    options: type
    least_steps: int = 0


METHODS: Mapping[str, Method] = {
    "hmq": Method(hmq, HmqOptions, least_steps=MIN_STEPS),
    "uniform": Method(uniform, UniformOptions),
    "hawq": Method(hawq, HawqOptions),
    "zeroq": Method(zeroq, ZeroqOptions),
    "msqe": Method(msqe, MsqeOptions),
    "pot_gradient": Method(pot_gradient, PotGradientOptions),
    "hgq": Method(hgq, HgqOptions),
}


def make_options(method: str, settings: Mapping[str, Any]) -> Any:
    """The options record of a method.

    Raises:
        InvalidInput: for an unknown method, an unknown option, or a value out of range.
    """
    if method not in METHODS:
        raise InvalidInput(f"unknown method {method!r}; there are {', '.join(sorted(METHODS))}")
    known = [field.name for field in fields(METHODS[method].options)]
    if unknown := sorted(set(settings) - set(known)):
        raise InvalidInput(f"method {method!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return METHODS[method].options(**settings)


def check_budget(method: str, budget: Budget) -> None:
    """Raise `InvalidInput` where a method needs more steps."""
    if budget.search_steps < (least := METHODS[method].least_steps):
        raise InvalidInput(f"search_steps = {budget.search_steps}: {method} needs at least {least}")


def find_scheme(
    model: QModel,
    task: Task,
    budget: Budget,
    target: Target,
    *,
    method: str = "hmq",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    listener: Listener = ignore,
    checkpoint: Checkpoint | None = None,
) -> tuple[QModel, Scheme, History]:
    """Find a scheme that meets `target`, training `model` in place.

    Of several processes each trains on its part of every batch, and all find the scheme of the first.

    Args:
        model: the instrumented network, with the float model's parameters.
        task: training data.
        budget: steps and learning rate of the search.
        target: what the scheme has to keep.
        method: a key of `METHODS`.
        options: of the method.
        seed: of noise, and of the order of the batches.
        listener: hears of the progress.
        checkpoint: where the state of a long search is kept meanwhile. A search that is called again as it was, after
            it was killed, goes on from there and finds the same.

    Returns:
        The model with the scheme set and its weights as the search left them, the scheme, and what happened over the
        steps.

    Raises:
        InvalidInput: for an unknown method or option, too few steps, or a target out of reach, before anything is
            trained.
    """
    settings = make_options(method, options or {})
    check_budget(method, budget)
    target.check(model)
    check_least(model, target)
    started = start(model, target, mixed=getattr(settings, "widths", "mixed") == "mixed")
    model, scheme, history = METHODS[method].function(
        model, task, budget, started, settings, seed=seed, listener=listener, checkpoint=checkpoint
    )
    scheme = parallel.from_first(scheme)
    if target.pruned:
        scheme = widen_thresholds(model, scheme, ZEROS)
    model.set_scheme(scheme)
    return model, scheme, history
