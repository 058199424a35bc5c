"""One configuration end to end, resumable: from the float baseline to parity, resources and the page."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial, wraps
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Concatenate, ParamSpec, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hmq_fpga.deploy.backends import HLS, Backend, require_unchanged, split_by_installed
from hmq_fpga.deploy.doctor import installed_version
from hmq_fpga.deploy.parity import Parity, check
from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.deploy.toolchain import GXX
from hmq_fpga.ir import cost, reference
from hmq_fpga.ir.dead import without_dead
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.ops import Shape
from hmq_fpga.ir.scheme import WIDTHS, Scheme
from hmq_fpga.search import parallel
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.describe import description
from hmq_fpga.search.freeze import freeze, outline, run_codes
from hmq_fpga.search.graph import Final, QModel
from hmq_fpga.search.layers import Join, parted, unwrapped
from hmq_fpga.search.logic import check_least
from hmq_fpga.search.methods import check_budget, find_scheme, make_options
from hmq_fpga.search.metrics import figures, like
from hmq_fpga.search.pruning import Nonzeros, Pruning, widen_thresholds
from hmq_fpga.search.ranges import SHARES, magnitudes, notes_on
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.reading.exported import is_lazy
from hmq_fpga.search.samples import parts_of, together
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import (
    Distillation,
    Listener,
    Output,
    evaluate,
    finetune,
    finished,
    fit,
    ignore,
    predict,
    rank,
)
from hmq_fpga.search.train import Task as TrainingTask
from hmq_fpga.study.budgets import pruning
from hmq_fpga.study.dataset import SPLITS, Array, Dataset
from hmq_fpga.study.pages import run_page as page
from hmq_fpga.study.run.config import RunConfig, make_config
from hmq_fpga.study.run.hardware import assemble
from hmq_fpga.study.run.stages import RunFolder, Stage, check_ours, read_record, write_json
from hmq_fpga.study.scales import NORMALIZATION, Normalization, check_scales
from hmq_fpga.study.sources import Options, channels_last, take
from hmq_fpga.study.tasks import Task, over_sequences, resolve, training_task
from hmq_fpga.study.workers import cores

LAYERS = "layers.json"  # what the model is made of
RANGES = "ranges.json"  # how large the values of every tensor are
OUTPUTS = "outputs.json"  # what the hardware puts out, and what to apply to it
TRY = "try.json"  # figures of one of several searches
_OWN = {"loss": "custom_loss", **{name: name for name in ("metric", "optimizer", "scheduler")}}  # settings, of the task
_AT_ONCE = 1024  # samples


class Monitor(Protocol):
    """Shows progress: one bar per stage."""

    def stage(self, name: str) -> AbstractContextManager[Listener]:
        """Enter a stage; the listener hears of its steps."""

    def skipped(self, name: str) -> None:
        """Learn that a stage was done before."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str) -> AbstractContextManager[Listener]:  # noqa: ARG002
        """Enter a stage."""
        return nullcontext(ignore)

    def skipped(self, name: str) -> None:
        """Learn that a stage was done before."""


def run(
    config: RunConfig,
    monitor: Monitor | None = None,
    *,
    data: object = None,
    shared: Path | None = None,
    patience_s: float = 0,
) -> dict[str, Any]:
    """Everything that the configuration asks for; returns the run's record, as in `run.json`.

    Parity that is broken does not raise: it stands in `parity.json` and in the record's metrics. Of several processes
    that `torchrun` started all train, and all else is the first one's; the others return an empty record.

    Args:
        config: what to run.
        monitor: hears of the stages.
        data: in place of the configuration's: a torch `Dataset` or `DataLoader`, arrays, frames, …; see `sources.take`.
        shared: folder of another run, whose float baseline is taken if it has the same inputs.
        patience_s: how long to wait for another process that works in the run's folder.

    Raises:
        InvalidInput: for anything that the user can mend, found before the folder is touched where that is possible.
    """
    task = resolve(config.task, data_options(config))
    if data is not None:
        options = replace(data_options(config), sequences=over_sequences(task.build()))
        task = replace(task, load=lambda _: take(data, options=options))
    target = Target(
        weight_rate=config.rw,
        weight_bits=config.weight_bits,
        bops=config.bops,
        luts=config.luts,
        ebops=config.ebops,
        activation_rate=config.ra,
        bits=config.bits,
        tensor_bits=config.tensor_bits,
        max_activation_bits=config.max_act_bits,
    )
    make_options(config.method, config.options)
    check_ours(config.folder)
    GXX.require()
    device = parallel.own_device(config.device)
    require_device(device)
    with parallel.joined(device):
        stages = _Run(config, task, target, device)
        if parallel.number():
            stages.follow()
            return {}
        try:
            return stages.everything(monitor or Silent(), shared, patience_s)
        finally:
            stages.dismiss()


def train_baseline(config: RunConfig, monitor: Monitor, *, patience_s: float = 0) -> None:
    """Only the float baseline of a configuration, in a run's folder that others can share; see `run`."""
    check_ours(config.folder)
    _Run(config, resolve(config.task, data_options(config)), Target()).baseline(monitor, patience_s)


def check_run(config: RunConfig, methods: Sequence[str]) -> None:
    """Raise `InvalidInput` for what no target and no seed would mend: of data, model, steps and hardware settings."""
    for method in methods:
        make_options(method, config.options)
    checked = _Run(config, resolve(config.task, data_options(config)), Target())
    for method in methods:
        check_budget(method, checked.budget)
    checked.check_model()


def data_options(config: RunConfig) -> Options:
    """How a configuration takes the user's data."""
    return Options(target=config.target, kind=config.target_kind, workers=config.workers)


_P = ParamSpec("_P")
_Work = Callable[Concatenate["_Run", Path, _P], dict[str, Any]]


def _together(work: _Work[_P]) -> _Work[_P]:
    """A training that the first of several processes begins, and in which the others join."""

    @wraps(work)
    def joined(run: _Run, new: Path, /, *arguments: _P.args, **named: _P.kwargs) -> dict[str, Any]:
        leads, run.leads = run.leads, False  # an error leaves the others in the midst of it
        if leads:
            parallel.from_first((work.__name__, arguments, named))
        made = work(run, new, *arguments, **named)
        run.leads = leads
        return made

    return joined


class _Run:
    """The stages of one run."""

    def __init__(self, config: RunConfig, task: Task, target: Target, device: str | None = None) -> None:
        self.config, self.target, self.device = config, target, device or config.device
        dataset = task.load(config.data)
        self.normalization = (
            Normalization.of(dataset.samples("train"), dataset.input_shapes) if config.normalize else None
        )
        self.dataset = dataset = self.normalization.apply(dataset) if self.normalization else dataset
        self.proven = _proven(config, task, dataset)
        torch.set_num_threads(min(task.threads, _allowed_threads()))
        self.folder = config.folder
        steps = {
            key: value
            for key in ("float_steps", "search_steps", "finetune_steps")
            if (value := getattr(config, key)) is not None
        }
        if config.weights is not None:
            steps = {"float_steps": 0, **steps}
        self.budget = replace(task.budget, **steps)
        self.hardware = config.hardware(task.io_type)
        self.backends, self.left_out = split_by_installed()
        self.source = task.source
        require_device(self.device)
        self.leads = parallel.processes() > 1 and parallel.number() == 0  # others wait for what this process tells
        if config.keep_final and dataset.kind != "values":
            raise InvalidInput(
                f"{config.task}: keep_final is for regressions: a class is told by the values before the final function"
            )
        own: dict[str, Any] = {_OWN[name]: task.function(of) for name in _OWN if (of := getattr(config, name))}
        plain = dataset.kind != "classes" or config.loss is not None  # no cross entropy of classes
        if plain and config.label_smoothing:
            raise InvalidInput("label_smoothing: is for classes, and for no loss of your own")
        input_noise = task.input_noise if config.input_noise is None else config.input_noise
        if input_noise and "train" in dataset.streams:
            raise InvalidInput("input_noise: is for data in memory: let the torch Dataset make it, by a transform")
        self.training = training_task(
            dataset,
            task.batch_size,
            self.device,
            input_noise=input_noise,
            class_weights=config.class_weights,
            label_smoothing=0.0 if plain else config.smoothing(task.label_smoothing),
            **own,
        )
        self.batch_size = self.training.batch_size
        parallel.check_batch(min(self.batch_size, len(dataset.samples("train"))))
        torch.manual_seed(config.seed)
        self.model = task.build()
        self.own = unwrapped(self.model)  # whose names are those of its state dict
        give_sizes(self.own, self.training)
        if config.weights is not None:
            load_weights(self.own, config.weights)
        self.initial = copy.deepcopy(self.own.state_dict())
        self.read: tuple[str, QModel] | None = None

    def check_model(self) -> QModel:
        """Find what cannot be before anything is trained; the current float model with its sites."""
        model = self.instrumented()
        check_output(self.config.task, model, self.dataset, judged=self.config.loss is None)
        bits = min(bits for name, bits in self.target.activation_bits(model).items() if name in model.inputs)
        check_scales(self.dataset.samples("train"), bits=bits, shapes=self.dataset.input_shapes)
        net = outline(copy.deepcopy(model))
        for backend in self.backends:
            backend.check(net, self.hardware)
        return model

    def instrumented(self) -> QModel:
        """The current float model with its sites: read again only where its parameters have changed since."""
        digest = _digest(self.own.state_dict())
        if self.read is None or self.read[0] != digest:
            made = instrument(
                self.model,
                self.training.input_shape,
                input_signed=self.training.input_signed,
                keep_final=self.config.keep_final,
            )
            self.read = digest, made
            several = self.training.kind == "several"
            if several or (self.config.loss and isinstance(made.layers[-1], Join)):
                self.training = replace(self.training, output_shapes=made.output_shapes)
        return self.read[1]

    def take_trained(self, shared: Path | None) -> None:
        """Give the model the parameters that its float training left, where that has been done: those are searched."""
        for path in (self.folder, shared):
            if path is not None and RunFolder(path).look().has(self.float_stage()):
                _load(self.own, path / "float.pt")
                return

    def everything(self, monitor: Monitor, shared: Path | None, patience_s: float) -> dict[str, Any]:
        check_budget(self.config.method, self.budget)
        self.take_trained(shared)
        model = self.check_model()
        self.target.check(model)
        check_least(model, self.target)
        self.monitor = monitor
        with self.opened(patience_s) as folder:
            for stage in self.stages():
                if stage.name == "freeze":
                    self.dismiss()
                self.do(folder, stage, shared)
            folder.record["left_out"] = self.left_out_so_far()
            folder.save()
            assemble(self.folder)
            page.write_page(self.folder)
            return folder.record

    def baseline(self, monitor: Monitor, patience_s: float) -> None:
        self.monitor = monitor
        with self.opened(patience_s) as folder:
            self.do(folder, self.float_stage())

    @contextmanager
    def opened(self, patience_s: float) -> Iterator[RunFolder]:
        folder = RunFolder(self.folder)
        with folder.opened(patience_s=patience_s):
            folder.record |= {
                "config": self.config.model_dump(mode="json", exclude={"out"}),
                "resolved": {
                    "budget": asdict(self.budget),
                    "io_type": self.hardware.io_type,
                    "batch_size": self.batch_size,
                },
                "versions": versions("torch", "numpy", *(name for b in self.backends for name in b.packages)),
                "seed": self.config.seed,
                "data": {
                    "samples": {split: len(self.dataset.samples(split)) for split in SPLITS},
                    "class_names": list(self.dataset.class_names),
                    "notes": list(self.dataset.notes),
                },
            }
            folder.save()
            if self.normalization is None:
                (self.folder / NORMALIZATION).unlink(missing_ok=True)
            yield folder

    def do(self, folder: RunFolder, stage: Stage, shared: Path | None = None) -> None:
        self.checkpoints, self.key = folder.checkpoints_of(stage), folder.input_digest(stage)
        with self.monitor.stage(stage.name) as self.listener:
            if not folder.run(stage, shared):
                self.monitor.skipped(stage.name)
        folder.record["metrics"] = _metrics(folder.record)
        folder.save()

    def checkpoint(self, training: str) -> Checkpoint:
        """Of one training of the present stage."""
        return Checkpoint(self.checkpoints / training, key=self.key, every_s=self.config.checkpoint_s)

    def follow(self) -> None:
        """Join in what the first process trains; what it has written so far is read, nothing written."""
        self.listener, self.checkpoints, self.key = ignore, self.folder, ""
        while told := parallel.from_first(()):
            name, arguments, named = told
            with TemporaryDirectory() as new:
                getattr(self, name)(Path(new), *arguments, **named)

    def dismiss(self) -> None:
        """Let the processes go that wait for what to do."""
        if self.leads:
            parallel.from_first(())
        self.leads = False

    @property
    def basis(self) -> dict[str, Any]:
        """Settings of every stage that trains."""
        config, smoothing, noise = self.config, self.training.label_smoothing, self.training.input_noise
        data = {"data": self.dataset.digest, "batch_size": self.batch_size, "seed": config.seed}
        own = {name: of for name in _OWN if (of := getattr(config, name))}
        data |= own | ({"source": self.source} if own else {})
        data |= {"label_smoothing": smoothing} if smoothing else {}
        data |= {"input_noise": noise} if noise else {}
        data |= {"class_weights": config.class_weights} if config.class_weights else {}
        data |= {"device": device} if (device := torch.device(self.device).type) != "cpu" else {}
        return data | ({"processes": n} if (n := parallel.processes()) > 1 else {})

    @property
    def kept(self) -> dict[str, Any]:
        """Setting of the stages that may keep another state than the last."""
        return {"keep": self.config.keep} if self.config.keep != "last" else {}

    def float_stage(self) -> Stage:
        budget = self.budget
        return Stage(
            name="float",
            settings=self.basis
            | {"model": str(self.model), "source": self.source, "state": _digest(self.initial)}
            | {"steps": budget.float_steps, "learning_rate": budget.float_learning_rate}
            | self.kept,
            needs=(),
            makes=("float.pt", *((NORMALIZATION,) if self.normalization else ())),
            versions=versions("torch", "numpy"),
            work=self.train_float,
        )

    def stages(self) -> list[Stage]:
        config, budget = self.config, self.budget
        finals = [final.name for final in self.instrumented().finals if final]
        data = self.basis | ({"finals": finals} if finals else {}) | ({"keep_final": True} if config.keep_final else {})
        searching = {
            "method": config.method,
            "zeros": config.zeros,
            "options": config.options,
            **self.kept,
            "target": asdict(self.target),
            "steps": budget.search_steps,
            "learning_rate": budget.learning_rate,
        }
        tuning = (
            {"steps": budget.finetune_steps, "learning_rate": budget.learning_rate, "zeros": config.zeros}
            | ({"distill": True} if config.distill else {})
            | {name: most for name in ("luts", "ebops") if (most := getattr(config, name)) is not None}
            | self.kept
        )
        trained = versions("torch", "numpy")
        seeds = range(config.seed, config.seed + config.tries) if config.tries > 1 else ()
        tries = {f"try-seed{seed}": seed for seed in seeds}
        return [
            self.float_stage(),
            *(
                Stage(
                    name=name,
                    settings=data | {"search": searching, "finetune": tuning, "try": seed},
                    needs=("float",),
                    makes=(name,),
                    versions=trained,
                    work=partial(self.attempt, name, seed),
                )
                for name, seed in tries.items()
            ),
            Stage(
                name="search",
                settings=data | searching | ({"tries": config.tries} if tries else {}),
                needs=("float", *tries),
                makes=("search.pt", "scheme.json", "search.json"),
                may_make=(WIDTHS,),
                versions=trained,
                work=partial(self.choose, tuple(tries)) if tries else self.search,
            ),
            Stage(
                name="finetune",
                settings=data | tuning,
                needs=("search", *tries),
                makes=("finetune.pt", "finetune.json"),
                versions=trained,
                work=self.take_chosen if tries else self.finetune,
            ),
            Stage(
                name="freeze",
                settings={"drop_dead": True} if config.drop_dead else {},
                needs=("search", "finetune"),
                makes=("qnet", LAYERS, OUTPUTS, RANGES),
                versions=trained,
                work=self.freeze,
            ),
            *map(self.backend_stage, self.backends),
            Stage(
                name="parity",
                settings={"data": self.dataset.digest, "estimate": config.estimate, "samples": len(self.proven.x_test)}
                | {"made": True},
                needs=("float", "freeze", *(backend.name for backend in self.backends)),
                makes=("parity.json",),
                versions=versions("numpy"),
                work=self.parity,
            ),
        ]

    def backend_stage(self, backend: Backend) -> Stage:
        chosen = {**asdict(self.hardware), "samples": len(self.proven.x_test)}
        own = (backend.name,)
        return Stage(
            name=backend.name,
            settings={name: of for name, of in chosen.items() if name in backend.settings and of is not None},
            needs=("freeze",),
            makes=() if backend.optional else own,
            may_make=own if backend.optional else (),
            witnesses=backend.witnesses,
            versions=versions(*backend.packages),
            work=partial(self.build, backend),
        )

    @_together
    def train_float(self, new: Path) -> dict[str, Any]:
        budget = self.budget
        self.own.load_state_dict(self.initial)
        if budget.float_steps:
            torch.manual_seed(self.config.seed)
            fit(
                self.model.to(self.device),
                self.training,
                steps=budget.float_steps,
                learning_rate=budget.float_learning_rate,
                seed=self.config.seed,
                keep=self.config.keep,
                listener=self.listener,
                checkpoint=self.checkpoint("float"),
            )
        torch.save(self.own.cpu().state_dict(), new / "float.pt")
        if self.normalization:
            self.normalization.save(new)
        return {}

    @_together
    def search(self, new: Path, seed: int | None = None) -> dict[str, Any]:
        _load(self.own, self.folder / "float.pt")
        config = self.config
        model, scheme, history = find_scheme(
            copy.deepcopy(self.instrumented()).to(self.device),  # there may be another search
            self.training,
            self.budget,
            self.target,
            method=config.method,
            options=({"keep": config.keep} if config.method == "hmq" else {}) | config.options,
            seed=config.seed if seed is None else seed,
            listener=self.listener,
            checkpoint=self.checkpoint("search"),
        )
        if config.zeros is not None:
            scheme = widen_thresholds(model, scheme, config.zeros)
        torch.save(model.cpu().state_dict(), new / "search.pt")
        scheme.save(new / "scheme.json")
        write_json(new / "search.json", history)
        return {
            "rw_actual": cost.weight_rate(scheme),
            **{f"{name}_target": value for name, value in config.bounds.items()},
            "ra_target": config.ra,
            "ra_actual": cost.activation_rate(model.moments, model.formats),
        }

    @_together
    def finetune(self, new: Path, seed: int | None = None, found: Path | None = None) -> dict[str, Any]:
        config = self.config
        model, zeros = self.quantized(found or self.folder, "search.pt").to(self.device), config.zeros
        teacher = self.model.to(self.device).eval()  # which holds the float training's parameters
        history = finetune(
            model,
            self.training,
            steps=self.budget.finetune_steps,
            learning_rate=self.budget.learning_rate,
            seed=config.seed if seed is None else seed,
            shaping=(
                pruning(model, self.target, self.training)
                if zeros is None
                else Pruning(model, Nonzeros(zeros), self.training)
            ),
            distillation=Distillation(teacher=teacher) if config.distill else None,
            keep=config.keep,
            listener=self.listener,
            checkpoint=self.checkpoint("finetune"),
        )
        self.own.cpu()
        torch.save(model.cpu().state_dict(), new / "finetune.pt")
        write_json(new / "finetune.json", history)
        return {}

    def attempt(self, name: str, seed: int, new: Path) -> dict[str, Any]:
        """One of several searches, fine-tuned: a folder of what both leave, and its figures on validation data."""
        folder = new / name
        folder.mkdir()
        told = self.search(folder, seed)
        self.finetune(folder, seed, folder)
        model = self.quantized(folder, "finetune.pt")
        costs = {"luts": traced_luts, "ebops": cost.ebops}
        kept = all(costs[of](freeze(model)) <= most for of, most in self.config.bounds.items() if of in costs)
        found = evaluate(model.to(self.device), self.training)
        model.cpu()
        write_json(folder / TRY, {"seed": seed, "bounds_kept": kept, **found, "search": told})
        return {}

    def choose(self, names: tuple[str, ...], new: Path) -> dict[str, Any]:
        """Take the best of several searches: of those that keep the bounds, that which is best on validation data."""
        tries = {name: json.loads((self.folder / name / TRY).read_text()) for name in names}
        best = max(tries, key=lambda name: (tries[name]["bounds_kept"], *rank(tries[name])))
        for file in ("search.pt", "scheme.json", "search.json", WIDTHS):
            if (self.folder / best / file).exists():
                shutil.copyfile(self.folder / best / file, new / file)
        told = [{key: value for key, value in of.items() if key != "search"} for of in tries.values()]
        return {**tries[best]["search"], "tries": told, "seed_kept": tries[best]["seed"]}

    def take_chosen(self, new: Path) -> dict[str, Any]:
        """The fine-tuned state of the search that was chosen."""
        seed = read_record(self.folder)["stages"]["search"]["metrics"]["seed_kept"]
        for file in ("finetune.pt", "finetune.json"):
            shutil.copyfile(self.folder / f"try-seed{seed}" / file, new / file)
        return {}

    def quantized(self, folder: Path, state: str) -> Any:
        """The instrumented model with the scheme that was found and a saved state."""
        _load(self.own, self.folder / "float.pt")
        model = self.instrumented()
        model.set_scheme(Scheme.load(folder / "scheme.json"))
        _load(model, folder / state)
        return model

    def freeze(self, new: Path) -> dict[str, Any]:
        model = self.quantized(self.folder, "finetune.pt")
        net = freeze(model)
        for x, _ in self.training.samples("val").in_order(_AT_ONCE):
            np.testing.assert_array_equal(
                run_codes(model, x.cpu(), net.output_format), reference.run(net, channels_last(x.cpu().numpy()))
            )
        config, described, dead = self.config, description(model), dict[str, int]()
        if config.drop_dead:
            passes = [
                self.training.samples("train").in_order(_AT_ONCE),
                self.training.samples("val").in_order(_AT_ONCE),
            ]
            net, dead = without_dead(net, (channels_last(x.cpu().numpy()) for x, _ in chain(*passes)))
        net.save(new / "qnet")
        found = magnitudes(model.to(self.device), self.training)
        ranges = notes_on(model, found, sparse=config.zeros is not None or self.target.pruned)
        ranges += [
            f"{name}: {count} of {net.shapes[name][-1]} channels are taken out, which no training or validation sample "
            "activates"
            for name, count in dead.items()
        ]
        model.cpu()
        write_json(new / LAYERS, {**described, "notes": [*described["notes"], *ranges]})
        spans = {
            name: {"zeros": int(of.counts[0]), "nonzero": of.nonzero, "log2": of.quantiles()}
            for name, of in found.items()
        }
        write_json(new / RANGES, {"shares": SHARES, "tensors": spans})
        outputs = describe_outputs(model, net, self.dataset)
        write_json(new / OUTPUTS, outputs)
        layers = cost.layer_costs(net, model.scheme)
        traced = {} if self.config.luts is None else {"luts_actual": traced_luts(net)}
        return {
            **traced,
            **({"dead_channels": dead} if config.drop_dead else {}),
            "qnet_digest": net.digest,
            "outputs": outputs["note"],
            "ranges": ranges,
            "macs": sum(layer.macs for layer in layers),
            "weight_bits": cost.weight_bits(model.scheme),
            "bias_bits": sum(layer.bias_bits for layer in layers),
            "bops": sum(layer.bops for layer in layers),
            "ebops": sum(layer.ebops for layer in layers),
            "zero_weights": float(np.mean(np.concatenate([op.weight.ravel() for op in net.linears]) == 0)),
        }

    def build(self, backend: Backend, new: Path) -> dict[str, Any]:
        net, samples = QNet.load(self.folder / "qnet"), channels_last(self.proven.x_test)
        made = backend.create(net, new, self.hardware, samples)
        told = {"resources": [resources.to_json() for resources in made.resources], "left_out": made.left_out}
        return {**made.metrics, **told}

    def scores(self, of: str, output: Output, targets: Tensor) -> dict[str, float | None]:
        """Figures of outputs on the test split, and the user's metric; `accuracy` is None but of classes and labels.

        Where targets are several, or not comparable with the outputs but by the user's loss, there is `loss` alone.
        """
        found: dict[str, float | None] = {"accuracy": None}
        if not self.comparable(output.returned, targets):
            found["loss"] = float(self.training.loss(output.returned, targets, output.scores))
        else:
            found |= figures(*output, targets)
        if self.training.metric:
            found["metric"] = float(self.training.metric(self.training.outputs(output.returned), targets))
        return {f"{of}_{name}": value for name, value in found.items()}

    def comparable(self, returned: Tensor, targets: Any) -> bool:
        """Whether there is one target, which outputs can be compared with by more than the user's loss."""
        one = self.training.kind == "values" or not self.training.output_shapes
        return self.training.kind != "several" and one and _fit(returned, targets)

    def scores_of_targets(self, floats: Output, integers: Output, targets: Any) -> list[dict[str, Any]]:
        """The same of each of several targets that can be compared with its output."""
        names = QNet.load(self.folder / "qnet").outputs
        parts = ([self.training.parts(values) for values in output] for output in (floats, integers))
        of_float, of_qnet = (list(zip(*part, tree_leaves(targets), strict=False)) for part in parts)
        return [
            {"output": name, "float": figures(*float_), "qnet": figures(*qnet)}
            for name, float_, qnet in zip(names, of_float, of_qnet, strict=False)
            if _fit(float_[0], float_[-1])
        ]

    def left_out_so_far(self) -> dict[str, str]:
        """Why there is nothing of a back end, by its name."""
        made = read_record(self.folder)["stages"]
        refused = {name: line for name, stage in made.items() if (line := stage.get("metrics", {}).get("left_out"))}
        return self.left_out | refused

    def parity(self, new: Path) -> dict[str, Any]:
        parity = compare(self.folder, self.proven, self.hardware)
        write_json(new / "parity.json", {**parity.to_json(), "left_out": self.left_out_so_far()})
        dataset = self.dataset
        _load(self.own, self.folder / "float.pt")
        self.model.eval()
        net = QNet.load(self.folder / "qnet")
        quantized, found = self.instrumented(), []
        for x, y in dataset.samples("test").in_order(_AT_ONCE):
            values = torch.from_numpy(net.decode(reference.run(net, channels_last(x.numpy())))).movedim(-1, 1)
            outputs = (predict(self.model, x, dataset.input_shapes), finished(quantized, values))
            found.append((x[:, :0], (*map(tuple, outputs), parts_of(y)[0])))
        _, (of_float, of_integers, targets) = together(found)
        floats, integers = Output(*of_float), Output(*of_integers)
        several = {"targets": self.scores_of_targets(floats, integers, targets)} if dataset.kind == "several" else {}
        return {
            **self.scores("float", floats, targets),
            **self.scores("qnet", integers, targets),
            **several,
            "parity_passed": parity.passed,
        }


def compare(folder: Path, dataset: Dataset, hardware: Hardware) -> Parity:
    """Parity of all back ends that are there with the golden model of a run, on a test split."""
    net = QNet.load(folder / "qnet")
    installed, _ = split_by_installed()
    simulators = [
        simulator
        for backend in installed
        if (folder / backend.name).is_dir()
        for simulator in backend.simulators(net, folder, hardware)
    ]
    return check(net, simulators, channels_last(dataset.x_test), dataset.classes_test, made=True)


def compare_again(folder: Path, data: Path | None = None) -> Parity:
    """Compile a finished run's project again and compare it, on the run's data or on the `x_test` of another file.

    Raises:
        InvalidInput: when `folder` is not a finished run, or the data do not fit its network.
        ParityError: when something on disk is not the network's; nothing is simulated then.
    """
    record = read_record(folder)
    if record["stages"].get(HLS.name, {}).get("state") != "done":
        raise InvalidInput(f"{folder}: its project was not finished; run it again first")
    config = make_config(record["config"])
    dataset = _dataset_of(folder, config, data)
    if data is None:
        dataset = _proven(config, resolve(config.task, data_options(config)), dataset)
    hardware = config.hardware(record["resolved"]["io_type"])
    require_unchanged(QNet.load(folder / "qnet"), folder, hardware, split_by_installed()[0])
    return compare(folder, dataset, hardware)


def samples_of(folder: Path, data: Path | None = None) -> Array:
    """The test split of a run's data, or of another file, as its network takes it: real, channels last.

    Raises:
        InvalidInput: when `folder` is not a run, or the data do not fit its network.
    """
    return channels_last(_dataset_of(folder, make_config(read_record(folder)["config"]), data).x_test)


def _dataset_of(folder: Path, config: RunConfig, data: Path | None) -> Dataset:
    """A run's data, or another file's, as its network takes them."""
    dataset = resolve(config.task, data_options(config)).load(data or config.data)
    return Normalization.load(folder).apply(dataset) if config.normalize else dataset


def _proven(config: RunConfig, task: Task, dataset: Dataset) -> Dataset:
    """The data set with those samples in its test split whose parity is proven."""
    n = config.parity_samples or task.parity_samples
    return replace(dataset, x_test=dataset.x_test[:n], y_test=tree_map(lambda y: y[:n], dataset.y_test))


def require_device(device: str) -> None:
    """Raise `InvalidInput` when this machine has no such device."""
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise InvalidInput(
            f"device {device!r}: PyTorch {torch.__version__} finds no GPU; train on the CPU, or install a build of it "
            "for your GPU"
        )
    wanted, found = torch.device(device).index or 0, torch.cuda.device_count()
    if wanted >= found:
        raise InvalidInput(f"device {device!r}: this machine has {found}, the last is 'cuda:{found - 1}'")


def give_sizes(model: nn.Module, task: TrainingTask) -> None:
    """Let lazy layers learn their sizes from samples, before anything asks for their parameters.

    Raises:
        InvalidInput: when the model does not take the samples.
    """
    if not any(map(is_lazy, model.modules())):
        return
    try:
        with torch.no_grad():
            model.eval()(*parted(task.samples("train").head(2)[0].cpu(), task.input_shapes))
    except Exception as error:  # of the user's forward
        reason = " ".join(str(error).split("\n", 1)[0].split())
        raise InvalidInput(f"model: does not accept an input of shape {task.input_shape}: {reason}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Give a model the state dict in a file, which is never unpickled as anything but tensors.

    Raises:
        InvalidInput: when it cannot be read, or is another model's.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        model.load_state_dict(state)
    except Exception as error:  # from a damaged or foreign file anything may come
        reason = str(error).split(". ")[0].splitlines()
        raise InvalidInput(
            f"{path}: not a state dict of this model ({' '.join(reason[:2]).strip()}); "
            "give a file that torch.save(model.state_dict(), file) wrote"
        ) from error


def _fit(returned: Tensor, target: Tensor) -> bool:
    """Whether a target, where it is real, has the shape of an output."""
    return not target.is_floating_point() or like(returned, target).shape == target.shape


def check_output(task: str, model: QModel, dataset: Dataset, *, judged: bool = True) -> None:
    """Raise `InvalidInput` when a model's output, channels first, is not what the data ask for.

    `judged`: targets are compared with outputs by a loss of ours, not of the user's.
    """
    finals = model.finals or (None,)
    if dataset.kind == "several":
        targets, outputs = tree_leaves(dataset.y_train), model.output_shapes
        if len(outputs) < len(targets):
            raise InvalidInput(f"{task}: the data have {len(targets)} targets, but the model {len(outputs)} outputs")
        for i, (output, target) in enumerate(zip(outputs, targets, strict=False)):
            final = finals[i] if model.finals else None
            _check_target(task, f"output {i}", output, final, target, dataset.classes_of(i), judged)
        return
    if isinstance(model.layers[-1], Join) and dataset.kind != "values":
        if judged:
            raise InvalidInput(
                f"{task}: the model has {len(model.nodes[-1].sources)} outputs and the data one target: give a target "
                f"for each, real ones for all of them in a row, (n, {model.nodes[-1].shape[0]}), or a loss of your own"
            )
        return
    for final in finals:
        _check_target(task, "output", model.nodes[-1].shape, final, dataset.y_train, dataset.classes, judged)


def _check_target(
    task: str, name: str, output: Shape, final: Final | None, target: Array, classes: int, judged: bool
) -> None:
    if target.dtype.kind == "f":
        if final and final.name == "argmax":
            raise InvalidInput(
                f"{task}: argmax has no gradient: give classes as targets, or return the values before it"
            )
        if judged and output != (target.shape[1:] or (1,)):
            raise InvalidInput(f"{task}: the model's {name} is {output}, but the targets are {target.shape[1:]}")
    elif target.dtype.kind == "b":
        if output != target.shape[1:]:
            raise InvalidInput(f"{task}: the model's {name} is {output}, but the data have {target.shape[1]} labels")
    elif len(output) != 1 or max(output[0], 2) < classes:  # one output tells two classes by its sign
        raise InvalidInput(f"{task}: the model's {name} is {output}, but the data have {classes} classes")
    elif output == (1,) and final and "softmax" in final.name.lower():
        raise InvalidInput(f"{task}: a softmax of one output is always one: end with Sigmoid, or with two outputs")


def describe_outputs(model: QModel, net: QNet, dataset: Dataset) -> dict[str, Any]:
    """What the hardware puts out, and what is left to apply to it: the content of `outputs.json`.

    Returns:
        `outputs`: name, shape (channels last) and the final function of each that is to be applied, or None; `classes`:
        how they name the class, None of a regression; `note`: all of it in words.
    """
    finals = model.finals or (None,) * len(net.outputs)
    outputs = [
        {"name": name, "shape": list(net.shapes[name]), "apply": final.name if final else None}
        for name, final in zip(net.outputs, finals, strict=True)
    ]
    told = [
        f"values before {output['apply']}; apply {output['apply']}" if output["apply"] else "as the model returns them"
        for output in outputs
    ]
    note = told[0] if len(told) == 1 else "; ".join(f"{o['name']}: {t}" for o, t in zip(outputs, told, strict=True))
    classes = None
    if dataset.kind == "labels":
        classes = "each label is there where its value is positive"
    elif dataset.kind == "classes":
        classes = "1 where the value is positive" if net.shapes[net.outputs[0]] == (1,) else "number of the largest"
    names = {"class_names": list(dataset.class_names)} if dataset.class_names else {}
    return {"outputs": outputs, "classes": classes, **names, "note": f"{note}; class: {classes}" if classes else note}


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    stages = {name: s for name, s in record["stages"].items() if s["state"] == "done"}
    merged: dict[str, Any] = {}
    for stage in stages.values():
        merged |= {key: value for key, value in stage["metrics"].items() if key not in ("resources", "left_out")}
    return merged | {"seconds": {name: stage["seconds"] for name, stage in stages.items()}}


def _allowed_threads() -> int:
    """What `OMP_NUM_THREADS` allows, or all cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdecimal() else cores()


def _load(module: nn.Module, path: Path) -> None:
    module.load_state_dict(torch.load(path, weights_only=True))


def _digest(state: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(state.items()):
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of this package and of others, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("hmq-fpga", *packages):
        if known := installed_version(name):
            found[name] = known
    return found
