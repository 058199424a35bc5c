"""One configuration end to end, resumable: from the float baseline to parity, resources and the page."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hmq_fpga.deploy.backends import HLS, Backend, split_by_installed
from hmq_fpga.deploy.doctor import installed_version
from hmq_fpga.deploy.parity import Parity, check
from hmq_fpga.deploy.rtl.estimate import traced_luts
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.deploy.toolchain import GXX
from hmq_fpga.ir import cost, reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import WIDTHS, Scheme
from hmq_fpga.search.describe import description
from hmq_fpga.search.freeze import freeze, outline, run_codes
from hmq_fpga.search.graph import QModel
from hmq_fpga.search.layers import Join, parted, unwrapped
from hmq_fpga.search.methods import check_budget, find_scheme, make_options
from hmq_fpga.search.pruning import Nonzeros, Pruning, widen_thresholds
from hmq_fpga.search.ranges import range_notes
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.reading.exported import is_lazy
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Distillation, Listener, Output, accuracy, finetune, finished, fit, like, predict
from hmq_fpga.search.train import Task as TrainingTask
from hmq_fpga.study.budgets import pruning
from hmq_fpga.study.data import Dataset, channels_last
from hmq_fpga.study.pages import run_page as page
from hmq_fpga.study.run.config import RunConfig, make_config
from hmq_fpga.study.run.hardware import assemble
from hmq_fpga.study.run.stages import RunFolder, Stage, check_ours, read_record, write_json
from hmq_fpga.study.scales import NORMALIZATION, Normalization, check_scales
from hmq_fpga.study.tasks import Task, resolve, training_task
from hmq_fpga.study.workers import cores

LAYERS = "layers.json"  # what the model is made of
OUTPUTS = "outputs.json"  # what the hardware puts out, and what to apply to it


class Monitor(Protocol):
    """Shows progress: one bar per stage."""

    def stage(self, name: str) -> AbstractContextManager[Listener]:
        """Enter a stage; the listener hears of its steps."""

    def skipped(self, name: str) -> None:
        """Learn that a stage was done before."""


def run(config: RunConfig, monitor: Monitor, *, shared: Path | None = None, patience_s: float = 0) -> dict[str, Any]:
    """Everything that the configuration asks for; returns the run's record, as in `run.json`.

    Parity that is broken does not raise: it stands in `parity.json` and in the record's metrics.

    Args:
        config: what to run.
        monitor: hears of the stages.
        shared: folder of another run, whose float baseline is taken if it has the same inputs.
        patience_s: how long to wait for another process that works in the run's folder.

    Raises:
        InvalidInput: for anything that the user can mend, found before the folder is touched where that is possible.
    """
    task = resolve(config.task)
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
    return _Run(config, task, target).everything(monitor, shared, patience_s)


def train_baseline(config: RunConfig, monitor: Monitor, *, patience_s: float = 0) -> None:
    """Only the float baseline of a configuration, in a run's folder that others can share; see `run`."""
    check_ours(config.folder)
    _Run(config, resolve(config.task), Target()).baseline(monitor, patience_s)


def check_run(config: RunConfig, methods: Sequence[str]) -> None:
    """Raise `InvalidInput` for what no target and no seed would mend: of data, model, steps and hardware settings."""
    for method in methods:
        make_options(method, config.options)
    checked = _Run(config, resolve(config.task), Target())
    for method in methods:
        check_budget(method, checked.budget)
    checked.check_model()


class _Run:
    """The stages of one run."""

    def __init__(self, config: RunConfig, task: Task, target: Target) -> None:
        self.config, self.target = config, target
        dataset = task.load(config.data)
        self.normalization = Normalization.of(dataset.x_train, dataset.input_shapes) if config.normalize else None
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
        self.batch_size, self.source = task.batch_size, task.source
        require_device(config.device)
        if config.keep_final and not dataset.regression:
            raise InvalidInput(
                f"{config.task}: keep_final is for regressions: a class is told by the values before the final function"
            )
        self.training = training_task(dataset, task.batch_size, config.device)
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
        check_output(self.config.task, model, self.dataset)
        bits = min(bits for name, bits in self.target.activation_bits(model).items() if name in model.inputs)
        check_scales(self.dataset.x_train, bits=bits, shapes=self.dataset.input_shapes)
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
        self.target.check(self.check_model())
        self.monitor = monitor
        with self.opened(patience_s) as folder:
            for stage in self.stages():
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
            }
            folder.save()
            if self.normalization is None:
                (self.folder / NORMALIZATION).unlink(missing_ok=True)
            yield folder

    def do(self, folder: RunFolder, stage: Stage, shared: Path | None = None) -> None:
        with self.monitor.stage(stage.name) as self.listener:
            if not folder.run(stage, shared):
                self.monitor.skipped(stage.name)
        folder.record["metrics"] = _metrics(folder.record)
        folder.save()

    @property
    def basis(self) -> dict[str, Any]:
        """Settings of every stage that trains."""
        data = {"data": self.dataset.digest, "batch_size": self.batch_size, "seed": self.config.seed}
        return data | ({"device": self.config.device} if self.config.device != "cpu" else {})

    def float_stage(self) -> Stage:
        budget = self.budget
        return Stage(
            name="float",
            settings=self.basis
            | {"model": str(self.model), "source": self.source, "state": _digest(self.initial)}
            | {"steps": budget.float_steps, "learning_rate": budget.float_learning_rate},
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
            "target": asdict(self.target),
            "steps": budget.search_steps,
            "learning_rate": budget.learning_rate,
        }
        trained = versions("torch", "numpy")
        return [
            self.float_stage(),
            Stage(
                name="search",
                settings=data | searching,
                needs=("float",),
                makes=("search.pt", "scheme.json", "search.json"),
                may_make=(WIDTHS,),
                versions=trained,
                work=self.search,
            ),
            Stage(
                name="finetune",
                settings=data
                | {"steps": budget.finetune_steps, "learning_rate": budget.learning_rate, "zeros": config.zeros}
                | ({"distill": True} if config.distill else {})
                | {name: most for name in ("luts", "ebops") if (most := getattr(config, name)) is not None},
                needs=("search",),
                makes=("finetune.pt", "finetune.json"),
                versions=trained,
                work=self.finetune,
            ),
            Stage(
                name="freeze",
                settings={},
                needs=("search", "finetune"),
                makes=("qnet", LAYERS, OUTPUTS),
                versions=trained,
                work=self.freeze,
            ),
            *map(self.backend_stage, self.backends),
            Stage(
                name="parity",
                settings={"data": self.dataset.digest, "estimate": config.estimate, "samples": len(self.proven.x_test)},
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
            settings={name: value for name, value in chosen.items() if name in backend.settings},
            needs=("freeze",),
            makes=() if backend.optional else own,
            may_make=own if backend.optional else (),
            witnesses=backend.witnesses,
            versions=versions(*backend.packages),
            work=partial(self.build, backend),
        )

    def train_float(self, new: Path) -> dict[str, Any]:
        budget = self.budget
        self.own.load_state_dict(self.initial)
        if budget.float_steps:
            torch.manual_seed(self.config.seed)
            fit(
                self.model.to(self.config.device),
                self.training,
                steps=budget.float_steps,
                learning_rate=budget.float_learning_rate,
                seed=self.config.seed,
                listener=self.listener,
            )
        torch.save(self.own.cpu().state_dict(), new / "float.pt")
        if self.normalization:
            self.normalization.save(new)
        return {}

    def search(self, new: Path) -> dict[str, Any]:
        _load(self.own, self.folder / "float.pt")
        config = self.config
        model, scheme, history = find_scheme(
            self.instrumented().to(config.device),
            self.training,
            self.budget,
            self.target,
            method=config.method,
            options=config.options,
            seed=config.seed,
            listener=self.listener,
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

    def finetune(self, new: Path) -> dict[str, Any]:
        config = self.config
        model, zeros = self.quantized("search.pt").to(config.device), config.zeros
        teacher = self.model.to(config.device).eval()  # which holds the float training's parameters
        history = finetune(
            model,
            self.training,
            steps=self.budget.finetune_steps,
            learning_rate=self.budget.learning_rate,
            seed=config.seed,
            shaping=pruning(model, self.target) if zeros is None else Pruning(model, Nonzeros(zeros)),
            distillation=Distillation(teacher=teacher) if config.distill else None,
            listener=self.listener,
        )
        self.own.cpu()
        torch.save(model.cpu().state_dict(), new / "finetune.pt")
        write_json(new / "finetune.json", history)
        return {}

    def quantized(self, state: str) -> Any:
        """The instrumented model with the scheme that was found and a saved state."""
        _load(self.own, self.folder / "float.pt")
        model = self.instrumented()
        model.set_scheme(Scheme.load(self.folder / "scheme.json"))
        _load(model, self.folder / state)
        return model

    def freeze(self, new: Path) -> dict[str, Any]:
        model = self.quantized("finetune.pt")
        net = freeze(model)
        x = self.training.x_val.cpu()
        np.testing.assert_array_equal(
            run_codes(model, x, net.output_format), reference.run(net, channels_last(x.numpy()))
        )
        net.save(new / "qnet")
        config, described = self.config, description(model)
        ranges = range_notes(
            model.to(config.device), self.training, sparse=config.zeros is not None or self.target.pruned
        )
        model.cpu()
        write_json(new / LAYERS, {**described, "notes": [*described["notes"], *ranges]})
        outputs = describe_outputs(model, net, self.dataset)
        write_json(new / OUTPUTS, outputs)
        layers = cost.layer_costs(net, model.scheme)
        traced = {} if self.config.luts is None else {"luts_actual": traced_luts(net)}
        return {
            **traced,
            "qnet_digest": net.digest,
            "outputs": outputs["note"],
            "ranges": ranges,
            "macs": sum(layer.macs for layer in layers),
            "weight_bits": sum(layer.weight_bits for layer in layers),
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
        values = torch.from_numpy(net.decode(reference.run(net, channels_last(dataset.x_test))))
        return {
            **scores("float", predict(self.model, torch.from_numpy(dataset.x_test), dataset.input_shapes), dataset),
            **scores("qnet", finished(self.instrumented(), values.movedim(-1, 1)), dataset),
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
    return check(net, simulators, channels_last(dataset.x_test), dataset.classes_test)


def compare_again(folder: Path, data: Path | None = None) -> Parity:
    """Compile a finished run's project again and compare it, on the run's data or on the `x_test` of another file.

    Raises:
        InvalidInput: when `folder` is not a finished run, or the data do not fit its network.
    """
    record = read_record(folder)
    if record["stages"].get(HLS.name, {}).get("state") != "done":
        raise InvalidInput(f"{folder}: its project was not finished; run it again first")
    config = make_config(record["config"])
    task = resolve(config.task)
    dataset = task.load(data or config.data)
    if config.normalize:
        dataset = Normalization.load(folder).apply(dataset)
    if data is None:
        dataset = _proven(config, task, dataset)
    return compare(folder, dataset, config.hardware(task.io_type))


def _proven(config: RunConfig, task: Task, dataset: Dataset) -> Dataset:
    """The data set with those samples in its test split whose parity is proven."""
    n = config.parity_samples or task.parity_samples
    return replace(dataset, x_test=dataset.x_test[:n], y_test=dataset.y_test[:n])


def require_device(device: str) -> None:
    """Raise `InvalidInput` when this machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            f"device 'cuda': PyTorch {torch.__version__} finds no GPU; train on the CPU, or install a build of it "
            "for your GPU"
        )


def give_sizes(model: nn.Module, task: TrainingTask) -> None:
    """Let lazy layers learn their sizes from samples, before anything asks for their parameters.

    Raises:
        InvalidInput: when the model does not take the samples.
    """
    if not any(map(is_lazy, model.modules())):
        return
    try:
        with torch.no_grad():
            model.eval()(*parted(task.x_train[:2].cpu(), task.input_shapes))
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


def check_output(task: str, model: QModel, dataset: Dataset) -> None:
    """Raise `InvalidInput` when a model's output, channels first, is not what the data ask for."""
    output = model.nodes[-1].shape
    if dataset.regression:
        if any(final and final.name == "argmax" for final in model.finals):
            raise InvalidInput(
                f"{task}: argmax has no gradient: give classes as targets, or return the values before it"
            )
        if output != dataset.y_train.shape[1:]:
            raise InvalidInput(
                f"{task}: the model's output is {output}, but the targets are {dataset.y_train.shape[1:]}"
            )
        return
    if isinstance(model.layers[-1], Join):
        raise InvalidInput(
            f"{task}: the model has {len(model.nodes[-1].sources)} outputs and the data have classes: give real "
            f"targets for all of them in a row, (n, {output[0]}), or a loss of your own by the API"
        )
    if len(output) != 1 or max(output[0], 2) < dataset.classes:  # one output tells two classes by its sign
        raise InvalidInput(f"{task}: the model's output is {output}, but the data have {dataset.classes} classes")
    final = model.finals[0] if model.finals else None
    if output == (1,) and final and "softmax" in final.name.lower():
        raise InvalidInput(f"{task}: a softmax of one output is always one: end with Sigmoid, or with two outputs")


def scores(of: str, output: Output, dataset: Dataset) -> dict[str, float | None]:
    """Accuracy of outputs on the test split; of a regression the squared error of what the user's model returns."""
    targets = torch.from_numpy(dataset.y_test)
    if dataset.regression:
        error = like(output.returned, targets) - targets
        return {f"{of}_accuracy": None, f"{of}_mse": float(error.double().square().mean())}
    return {f"{of}_accuracy": accuracy(output.scores, targets)}


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
    if not dataset.regression:
        classes = "1 where the value is positive" if net.shapes[net.outputs[0]] == (1,) else "number of the largest"
    return {"outputs": outputs, "classes": classes, "note": f"{note}; class: {classes}" if classes else note}


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
