"""What each part of keeping a bound on logic is worth: without it, or with another in its place, at equal LUTs.

    python benchmarks/ablation.py pendigits_shallow --luts 1700 --seeds 8
    python benchmarks/ablation.py mnist14_mlp --luts 3000 --variants "as built" "saliency: magnitude alone" --seeds 8

Rows are kept in `ablation.json`, and those already there are not repeated. Every training starts from the float model
of its seed. Nothing is chosen by the test split.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import Row, baseline, fill, instrumented, quantize
from torch import Tensor

from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.ir import reference
from hmq_fpga.ir.fixed import Codes, Reals
from hmq_fpga.ir.logic import luts as formula
from hmq_fpga.ir.logic import signed_digits
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Concat, Gather, Input, Op, Quantize
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.logic import start
from hmq_fpga.search.pruning import EVENTS, PRUNED_BY, NetworkCost, Pruning
from hmq_fpga.search.quantizers import fake_quantize, grid_of
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Task
from hmq_fpga.study.data import channels_last
from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "ablation.json"
BATCHES = 32  # whose gradients are taken at a time
REGROWN = 0.05  # of all weights, at the first event
JUDGED_BY = 8192  # samples of each split that formats of channels are judged by
LEARNT_RATE = 8.0  # R_a: four bits of the largest activation
ROOM_FOR_CHANNELS = 1.06  # by which training exceeds the bound where formats of channels take out the rest


def main() -> None:
    """Fill the rows, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS])
    parser.add_argument("--luts", type=float, nargs="+", default=[1700])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = (
        {"task": task, "luts": luts, "variant": variant, "seed": seed}
        for task, seed, luts, variant in product(
            arguments.tasks, range(arguments.seeds), arguments.luts, arguments.variants
        )
    )
    (HERE / "ablation.md").write_text(page(fill(ROWS, wanted, _measure)))


# --- what differs ----------------------------------------------------------------------------------------------------


class Unpolished(NetworkCost):
    """Nothing is left to single weights."""

    room = 1.0


class ByFormula(Pruning):
    """The tracer measures at the end alone."""

    _finishing = False

    def _measured(self) -> float:
        return super()._measured() if self._finishing else self._goal.size(self._model)

    def _finish(self, samples: float) -> None:
        self._finishing = True
        super()._finish(samples)


class ByMagnitude(Pruning):
    """Whatever a weight multiplies."""

    def _worth_of(self, name: str, weight: Tensor) -> Tensor:
        return super()._worth_of(name, weight) / self._deviations[name]


class PerDigit(Pruning):
    """Worth divided by what the code costs: its signed digits."""

    def _worth_of(self, name: str, weight: Tensor) -> Tensor:
        return super()._worth_of(name, weight) / self._digits(name, weight)

    def _digits(self, name: str, weight: Tensor) -> Tensor:
        format_ = self._model.scheme[name].format
        return torch.from_numpy(signed_digits(format_.encode(weight.detach().numpy()))).to(weight).clamp_min(1)


class _ByGradient(Pruning):
    """With gradients of the loss, of batches of training samples."""

    def _gradients(self, batches: int) -> Iterator[dict[str, Tensor]]:
        weights, task = self._model.weights, self._task
        generator = torch.Generator().manual_seed(0)
        for (x, y), _ in zip(task.samples("train").shuffled(task.batch_size, generator), range(batches), strict=False):
            with torch.enable_grad():
                loss = task.loss(self._model(x), y)
            yield dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))


class Fisher(_ByGradient, PerDigit):
    """Curvature (empirical Fisher information): by what the loss grows to second order, for each signed digit."""

    _curvature: Mapping[str, Tensor] | None = None

    def _prune(self, count: int, worth: Tensor) -> None:
        super()._prune(count, worth)
        self._curvature = None

    def _worth_of(self, name: str, weight: Tensor) -> Tensor:
        if self._curvature is None:
            each = [*self._gradients(BATCHES)]
            weights = self._model.weights
            self._curvature = {name: torch.stack([of[name] for of in each]).square().mean(0) for name in weights}
        tensor, weight = self._model.scheme[name], weight.detach()
        codes = fake_quantize(weight, grid_of(tensor.format, tensor.widths, weight))
        saliency = weight.square() * (self._curvature[name] + 1e-12) / self._digits(name, weight)
        return saliency * (codes != 0)


class Neurons(Pruning):
    """A weight of a neuron whose weights matter little matters less: whole neurons go."""

    def _worth_of(self, name: str, weight: Tensor) -> Tensor:
        worth = super()._worth_of(name, weight)
        of_neuron = worth.mean(dim=tuple(range(1, worth.ndim)), keepdim=True)
        return worth * (of_neuron / worth.mean().clamp_min(1e-12)).sqrt()


class Regrowing(_ByGradient):
    """Weights come back, too (Evci et al., "Rigging the Lottery", 2020): those of the largest gradients."""

    def __call__(self, step: int, steps: int) -> None:
        """Prune, and let others grow: fewer and fewer."""
        super().__call__(step, steps)
        if 0 < step < PRUNED_BY * steps and step % max(steps // EVENTS, 1) == 0:
            self._regrow(REGROWN * (1 - step / (PRUNED_BY * steps)))

    @torch.no_grad()
    def _regrow(self, share: float) -> None:
        weights = self._model.weights
        each = [*self._gradients(BATCHES)]
        found = {name: torch.stack([of[name] for of in each]).sum(0) * (1 - self._kept[name]) for name in weights}
        sizes = torch.cat([gradient.abs().flatten() for gradient in found.values()])
        least = sizes.sort(descending=True).values[round(share * len(sizes))]
        for name, weight in weights.items():
            grown = (found[name].abs() > least) & (found[name] != 0)
            self._kept[name][grown] = 1
            weight[grown] = -found[name][grown].sign() * self._model.scheme[name].format.step


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to keep a bound.

    Attributes:
        pruning: by what weights are chosen.
        cost: what the goal is.
        distill: whether the float model teaches.
        method: of the search.
        activation_bits: at most, in place of what `logic.start` gives.
        learnt: whether each activation learns its own, of as many together as `LEARNT_RATE` would give all.
        channels: whether each channel of the input and of activations has a format of its own.
    """

    pruning: type[Pruning] = Pruning
    cost: type[NetworkCost] = NetworkCost
    distill: bool = True
    method: str = "hmq"
    activation_bits: int | None = None
    learnt: bool = False
    channels: bool = False


AS_BUILT = "as built"
VARIANTS = {
    AS_BUILT: Variant(),
    "no distillation": Variant(distill=False),
    "no polishing of single codes": Variant(cost=Unpolished),
    "the formula alone, the tracer at the end": Variant(pruning=ByFormula),
    "saliency: magnitude alone": Variant(pruning=ByMagnitude),
    "saliency for each signed digit": Variant(pruning=PerDigit),
    "saliency: curvature for each signed digit": Variant(pruning=Fisher),
    "whole neurons": Variant(pruning=Neurons),
    "regrowth": Variant(pruning=Regrowing),
    "activations of 3 bits": Variant(activation_bits=3),
    "activations of 5 bits": Variant(activation_bits=5),
    "activation bits learnt by tensor": Variant(activation_bits=8, learnt=True),
    "`hgq`: bits for each weight": Variant(method="hgq"),
    "formats for each channel": Variant(channels=True),
}


# --- formats of channels ---------------------------------------------------------------------------------------------


class Channels:
    """A network whose inputs and activations may have fewer bits at either end, of each channel other ones.

    Attributes:
        dropped: by tensor, for each channel how many bits are dropped below and above.
    """

    def __init__(self, net: QNet) -> None:
        self._net = net
        self.dropped: dict[str, Codes] = {
            op.name: np.zeros((net.shapes[op.name][-1], 2), np.int64)
            for op in net.ops
            if isinstance(op, Input | Quantize) and len(net.shapes[op.name]) == 1
        }

    def net(self) -> QNet:
        """It, written in the ops that there are: each kind of channels quantized by itself, then side by side again."""
        return QNet(tuple(self._ops()), self._net.outputs)

    def _ops(self) -> Iterator[Op]:
        for op in self._net.ops:
            dropped = self.dropped.get(op.name)
            if not isinstance(op, Input | Quantize) or dropped is None or not dropped.any():
                yield op
                continue
            source = op.source if isinstance(op, Quantize) else f"{op.name}_wide"
            if isinstance(op, Input):
                yield replace(op, name=source)
            kinds, kind_of = np.unique(dropped, axis=0, return_inverse=True)
            parts = [np.flatnonzero(kind_of.ravel() == kind) for kind in range(len(kinds))]
            for number, (part, (below, above)) in enumerate(zip(parts, kinds.tolist(), strict=True)):
                yield Gather(name=f"{op.name}_some{number}", source=source, index=part)
                format_ = replace(op.format, width=op.format.width - below - above, frac=op.format.frac - below)
                yield Quantize(name=f"{op.name}_part{number}", source=f"{op.name}_some{number}", format=format_)
            joined = [f"{op.name}_part{number}" for number in range(len(parts))]
            row = [joined[0], *(f"{op.name}_row{number}" for number in range(1, len(joined)))]
            for name, first, second in zip(row[1:], row, joined[1:], strict=False):
                yield Concat(name=name, sources=(first, second))
            yield Gather(name=op.name, source=row[-1], index=np.argsort(np.concatenate(parts)))

    def narrow(self, splits: list[tuple[Reals, Codes]], enough: Callable[[QNet], bool]) -> QNet:
        """Drop bits where neither score nor loss is worse on a split, until it is enough or there is no more."""
        before = [self._figures(self._net, *split) for split in splits]
        kept, rng = self._net, np.random.default_rng(0)
        tried = True
        while tried:
            tried = False
            places = [(name, c, end) for name, of in self.dropped.items() for c in range(len(of)) for end in (0, 1)]
            for name, channel, end in (places[i] for i in rng.permutation(len(places))):
                dropped = self.dropped[name]
                if dropped[channel].sum() >= self._net.formats[name].width - 1:
                    continue
                dropped[channel, end] += 1
                net = self.net()
                if all(self._as_good(net, *split, bound) for split, bound in zip(splits, before, strict=True)):
                    kept, tried = net, True
                    if enough(net):
                        return net
                else:
                    dropped[channel, end] -= 1
        return kept

    def _as_good(self, net: QNet, x: Reals, y: Codes, before: tuple[float, float]) -> bool:
        """Whether neither figure is worse."""
        return all(now >= then for now, then in zip(self._figures(net, x, y), before, strict=True))

    @staticmethod
    def _figures(net: QNet, x: Reals, y: Codes) -> tuple[float, float]:
        """Accuracy, and the mean log likelihood."""
        scores = torch.from_numpy(net.decode(reference.run(net, x)))
        likelihood = torch.log_softmax(scores, 1)[torch.arange(len(y)), torch.from_numpy(y)]
        return float((scores.argmax(1).numpy() == y).mean()), float(likelihood.mean())


# --- figures ---------------------------------------------------------------------------------------------------------


def _measure(*, task: str, luts: float, variant: str, seed: int) -> Row:
    base, way = baseline(task, seed), VARIANTS[variant]
    dataset, target = base.dataset, Target(luts=luts)
    most = ROOM_FOR_CHANNELS * luts if way.channels else luts

    def shaping(model: QModel, _target: Target, training: Task) -> Pruning:
        return way.pruning(model, way.cost("LUTs", most, traced_luts, formula), training)

    started = time.process_time()
    if way.activation_bits:
        target = replace(start(instrumented(base), target), max_activation_bits=way.activation_bits)
    options = {}
    if way.learnt:
        target, options = replace(target, activation_rate=LEARNT_RATE), {"activation_widths": "learnt"}
    quantized, _ = quantize(
        base, target, seed=seed, distill=way.distill, method=way.method, options=options, shaping=shaping
    )
    net = freeze(quantized)
    if way.channels:
        splits = [
            (channels_last(x[:JUDGED_BY]), y[:JUDGED_BY])
            for x, y in ((dataset.x_val, dataset.y_val), (dataset.x_train, dataset.y_train))
        ]
        net = Channels(net).narrow(splits, lambda net: traced_luts(net) <= luts)
    codes = reference.run(net, channels_last(dataset.x_test))
    return {
        "test": float(np.mean(codes.argmax(1) == dataset.y_test)),
        "lut": traced_luts(net),
        "activation_bits": {op.name: op.format.width for op in net.ops if isinstance(op, Quantize)},
        "seconds": time.process_time() - started,
    }


def page(rows: list[Row]) -> str:
    """Means over seeds, and of each seed's difference from what is built."""
    lines = [
        "Test split, eight seeds; `difference` is that of each seed from what is built: mean and standard deviation.",
        "LUTs are the tracer's, seconds processor time of one thread for search and fine-tuning. Made by",
        "`python benchmarks/ablation.py pendigits_shallow --luts 1700 --seeds 8`, and the same of",
        "`mnist14_mlp --luts 3000 --variants 'as built' 'saliency: magnitude alone'`; two cores of x86-64.",
    ]
    for task, luts in sorted({(row["task"], row["luts"]) for row in rows}, key=lambda key: (key[0], -key[1])):
        lines += [
            "",
            f"## {task}, {luts:,.0f} LUTs",
            "",
            "| | seeds | test % | difference | alkaid LUT | s |",
            "|---|---|---|---|---|---|",
        ]
        built = _tests(rows, task, luts, AS_BUILT)
        for variant in VARIANTS:
            tests = _tests(rows, task, luts, variant)
            if not tests:
                continue
            group = [row for row in rows if (row["task"], row["luts"], row["variant"]) == (task, luts, variant)]
            lut, seconds = (np.mean([row[name] for row in group]) for name in ("lut", "seconds"))
            differences = [tests[seed] - built[seed] for seed in tests if seed in built]
            lines.append(
                f"| {variant} | {len(tests)} | {_told([*tests.values()])} "
                f"| {'' if variant == AS_BUILT else _told(differences, '+')} | {lut:,.0f} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def _tests(rows: list[Row], task: str, luts: float, variant: str) -> dict[int, float]:
    """Test accuracies in % by seed."""
    key = (task, luts, variant)
    return {row["seed"]: 100 * row["test"] for row in rows if (row["task"], row["luts"], row["variant"]) == key}


def _told(values: list[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.2f} ± {np.std(values, ddof=min(len(values) - 1, 1)):.2f}"


if __name__ == "__main__":
    main()
