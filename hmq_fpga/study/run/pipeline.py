"""One configuration end to end, resumable: from the float baseline to parity, resources and the page."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from hmq_fpga.deploy.convert import convert
from hmq_fpga.deploy.hls.project import DEFAULT_PART, HlsProject, LayerSettings, check_settings
from hmq_fpga.deploy.parity import Parity, Simulator, check
from hmq_fpga.deploy.qkeras.model import QKerasSimulator
from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.toolchain import GXX
from hmq_fpga.ir import cost, reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.ir.scheme import Scheme
from hmq_fpga.search.describe import description
from hmq_fpga.search.freeze import freeze, outline, run_codes
from hmq_fpga.search.graph import Join, QModel
from hmq_fpga.search.instrument import instrument
from hmq_fpga.search.methods import check_budget, find_scheme, make_options
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Listener, finetune, fit, predict
from hmq_fpga.search.zeros import ZeroPull, widen_thresholds
from hmq_fpga.study.data import Dataset, channels_last
from hmq_fpga.study.pages import run_page as page
from hmq_fpga.study.run.hardware import ESTIMATES, assemble
from hmq_fpga.study.run.stages import RunFolder, Stage, check_ours, read_record, write_json
from hmq_fpga.study.tasks import Task, resolve, training_task
from hmq_fpga.study.workers import cores

LAYERS = "layers.json"  # what the model is made of


class RunConfig(BaseModel):
    """What to run; the content of a `CONFIG.yaml`.

    Attributes:
        task: a name that `hmq-fpga tasks` lists, or `FILE.py:FUNCTION`.
        rw, ra: targets R_w and R_a.
        bits: bit-widths that a weight may get.
        tensor_bits: the same for single weights, by name (`conv1.weight`) or pattern (`*.weight`); of the input and of
            activations the largest is an upper bound.
        max_act_bits: upper bound on the bit-width of activations.
        method, options: search method and its options.
        zeros: share of zero weights to aim for, by larger thresholds and an L1 penalty while fine-tuning.
        seed: of initial weights, batches and noise.
        device: where to train and search.
        data: file or folder in place of the task's own source.
        weights: file with the state dict of a model that is trained already: no float training unless `float_steps`
            says so.
        float_steps, search_steps, finetune_steps: optimizer steps in place of the task's; `float_steps: 0` takes the
            model as the function returns it.
        backend, io_type, part, clock_ns, reuse_factor, strategy: of the hls4ml project.
        layers: reuse factor and strategy of single layers, by name.
        latency_cutoff: of the Verilog: most delay between two registers, in ns of the tracer's own delay model; 0: no
            registers.
        estimate: resources without vendor tools. `trace`: Verilog, and its tracer's own figures; `rtl`: also
            simulated by Verilator and synthesized by Yosys; `model`: LUTs by a fitted formula, no Verilog, which
            is also what a network gets that is too large to unroll; `none`.
        parity_samples: the first of the test split, whose parity is proven; by default the task's, which are all but
            for residual networks.
        out: the run's folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    rw: float = 8.0
    ra: float = 4.0
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    tensor_bits: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    max_act_bits: int = 8
    method: str = "hmq"
    options: dict[str, Any] = Field(default_factory=dict)
    zeros: float | None = Field(None, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"
    data: Path | None = None
    weights: Path | None = None
    float_steps: int | None = Field(None, ge=0)
    search_steps: int | None = Field(None, ge=1)
    finetune_steps: int | None = Field(None, ge=1)
    backend: Literal["Vitis", "Vivado"] = "Vitis"
    io_type: Literal["io_parallel", "io_stream"] | None = None
    part: str = DEFAULT_PART
    clock_ns: float = Field(5.0, gt=0)
    reuse_factor: int = Field(1, ge=1)
    strategy: Literal["Latency", "Resource", "distributed_arithmetic"] = "Latency"
    layers: dict[str, LayerSettings] = Field(default_factory=dict)
    latency_cutoff: float = Field(5.0, ge=0)
    estimate: Literal["trace", "model", "rtl", "none"] = "trace"
    parity_samples: int | None = Field(None, ge=1)
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        name = Path(self.task.rpartition(":")[0]).stem if ":" in self.task else self.task
        return self.out or Path("hls_projects") / name / f"{self.method}-rw{self.rw:g}-seed{self.seed}"


def load_config(path: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """A `CONFIG.yaml`, with settings from elsewhere on top.

    Raises:
        InvalidInput: when it cannot be read, or naming the setting that is wrong.
    """
    return make_config({**read_settings(path), **overrides})


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a `CONFIG.yaml`, unchecked.

    Raises:
        InvalidInput: when it cannot be read.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InvalidInput(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InvalidInput(f"{path}: must hold settings such as 'task: digits_mlp'")
    return settings


def make_config(settings: Mapping[str, Any]) -> RunConfig:
    """A checked configuration.

    Raises:
        InvalidInput: naming the setting that is wrong.
    """
    try:
        return RunConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"setting {where!r}: {first['msg']} (got {first['input']!r})") from error


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
        self.dataset = dataset = task.load(config.data)
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
        self.io_type = config.io_type or task.io_type
        self.project: dict[str, Any] = {
            "backend": config.backend,
            "io_type": self.io_type,
            "reuse_factor": config.reuse_factor,
            "strategy": config.strategy,
            "layers": config.layers,
        }
        self.batch_size, self.source = task.batch_size, task.source
        require_device(config.device)
        self.training = training_task(dataset, task.batch_size, config.device)
        torch.manual_seed(config.seed)
        self.model = task.build()
        if config.weights is not None:
            load_weights(self.model, config.weights)

    def check_model(self) -> QModel:
        """Find what cannot be before anything is trained; the current float model with its sites."""
        model = self.instrumented()
        check_output(self.config.task, model, self.dataset)
        check_settings(outline(model), **self.project)
        return model

    def instrumented(self) -> QModel:
        """The current float model with its sites."""
        return instrument(self.model, self.training.input_shape, input_signed=self.training.input_signed)

    def everything(self, monitor: Monitor, shared: Path | None, patience_s: float) -> dict[str, Any]:
        check_budget(self.config.method, self.budget)
        self.target.check(self.check_model())
        self.monitor = monitor
        with self.opened(patience_s) as folder:
            for stage in self.stages():
                self.do(folder, stage, shared)
            assemble(self.folder)
            page.write_page(self.folder)
            return folder.record

    def baseline(self, monitor: Monitor, patience_s: float) -> None:
        self.monitor = monitor
        with self.opened(patience_s) as folder:
            self.do(folder, self.stages()[0])

    @contextmanager
    def opened(self, patience_s: float) -> Iterator[RunFolder]:
        folder = RunFolder(self.folder)
        with folder.opened(patience_s=patience_s):
            folder.record |= {
                "config": self.config.model_dump(mode="json", exclude={"out"}),
                "resolved": {"budget": asdict(self.budget), "io_type": self.io_type, "batch_size": self.batch_size},
                "versions": versions(),
                "seed": self.config.seed,
            }
            folder.save()
            yield folder

    def do(self, folder: RunFolder, stage: Stage, shared: Path | None = None) -> None:
        with self.monitor.stage(stage.name) as self.listener:
            if not folder.run(stage, shared):
                self.monitor.skipped(stage.name)
        folder.record["metrics"] = _metrics(folder.record)
        folder.save()

    def stages(self) -> list[Stage]:
        config = self.config
        data = {"data": self.dataset.digest, "batch_size": self.batch_size, "seed": config.seed}
        data |= {"device": config.device} if config.device != "cpu" else {}
        budget = self.budget
        searching = {
            "method": config.method,
            "zeros": config.zeros,
            "options": config.options,
            "target": asdict(self.target),
            "steps": budget.search_steps,
            "learning_rate": budget.learning_rate,
        }
        hardware = {
            key: getattr(config, key) for key in ("backend", "part", "clock_ns", "reuse_factor", "strategy")
        } | {"io_type": self.io_type, "layers": {name: asdict(s) for name, s in config.layers.items()}}
        return [
            Stage(
                name="float",
                settings=data
                | {"model": str(self.model), "source": self.source, "state": _digest(self.model)}
                | {"steps": budget.float_steps, "learning_rate": budget.float_learning_rate},
                needs=(),
                makes=("float.pt",),
                work=self.train_float,
            ),
            Stage(
                name="search",
                settings=data | searching,
                needs=("float",),
                makes=("search.pt", "scheme.json", "search.json"),
                work=self.search,
            ),
            Stage(
                name="finetune",
                settings=data
                | {"steps": budget.finetune_steps, "learning_rate": budget.learning_rate, "zeros": config.zeros},
                needs=("search",),
                makes=("finetune.pt", "finetune.json"),
                work=self.finetune,
            ),
            Stage(name="freeze", settings={}, needs=("search", "finetune"), makes=("qnet", LAYERS), work=self.freeze),
            Stage(
                name="convert",
                settings=hardware | {"samples": len(self.proven.x_test)},
                needs=("freeze",),
                makes=("qkeras", "hls"),
                witnesses=("qkeras", "hls/firmware", "hls/tb_data"),
                work=self.convert,
            ),
            Stage(
                name="rtl",
                settings={key: getattr(config, key) for key in ("estimate", "part", "clock_ns", "latency_cutoff")},
                needs=("freeze",),
                makes=(ESTIMATES,),
                may_make=("rtl",),
                work=self.rtl,
            ),
            Stage(
                name="parity",
                settings={"data": self.dataset.digest, "estimate": config.estimate, "samples": len(self.proven.x_test)},
                needs=("float", "convert", "rtl"),
                makes=("parity.json",),
                work=self.parity,
            ),
        ]

    def train_float(self, new: Path) -> dict[str, Any]:
        budget = self.budget
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
        torch.save(self.model.cpu().state_dict(), new / "float.pt")
        return {}

    def search(self, new: Path) -> dict[str, Any]:
        _load(self.model, self.folder / "float.pt")
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
            "rw_target": config.rw,
            "rw_actual": cost.weight_rate(scheme),
            "ra_target": config.ra,
            "ra_actual": cost.activation_rate(model.moments, model.formats),
        }

    def finetune(self, new: Path) -> dict[str, Any]:
        model, zeros = self.quantized("search.pt").to(self.config.device), self.config.zeros
        history = finetune(
            model,
            self.training,
            steps=self.budget.finetune_steps,
            learning_rate=self.budget.learning_rate,
            seed=self.config.seed,
            penalty=None if zeros is None else ZeroPull(model, zeros),
            listener=self.listener,
        )
        torch.save(model.cpu().state_dict(), new / "finetune.pt")
        write_json(new / "finetune.json", history)
        return {}

    def quantized(self, state: str) -> Any:
        """The instrumented model with the scheme that was found and a saved state."""
        _load(self.model, self.folder / "float.pt")
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
        write_json(new / LAYERS, description(model))
        layers = cost.layer_costs(net)
        return {
            "qnet_digest": net.digest,
            "macs": sum(layer.macs for layer in layers),
            "weight_bits": sum(layer.weight_bits for layer in layers),
            "bias_bits": sum(layer.bias_bits for layer in layers),
            "bops": sum(layer.bops for layer in layers),
            "ebops": sum(layer.ebops for layer in layers),
            "zero_weights": float(np.mean(np.concatenate([op.weight.ravel() for op in net.linears]) == 0)),
        }

    def convert(self, new: Path) -> dict[str, Any]:
        project = convert(
            QNet.load(self.folder / "qnet"),
            new,
            samples=channels_last(self.proven.x_test),
            part=self.config.part,
            clock_ns=self.config.clock_ns,
            **self.project,
        )
        return {"reuse_factors": dict(project.reuse_factors)}

    def parity(self, new: Path) -> dict[str, Any]:
        parity = compare(self.folder, self.proven, verilog=self.config.estimate == "rtl")
        write_json(new / "parity.json", parity.to_json())
        dataset = self.dataset
        _load(self.model, self.folder / "float.pt")
        self.model.eval()
        outputs = predict(self.model, torch.from_numpy(dataset.x_test))
        net = QNet.load(self.folder / "qnet")
        quantized = net.decode(reference.run(net, channels_last(dataset.x_test)))
        return {
            **scores("float", channels_last(outputs.numpy()), dataset),
            **scores("qnet", quantized, dataset),
            "parity_passed": parity.passed,
        }

    def rtl(self, new: Path) -> dict[str, Any]:
        config, net = self.config, QNet.load(self.folder / "qnet")
        resources: list[Resources] = []
        if config.estimate != "none":
            from hmq_fpga.deploy.rtl import estimate as model_estimate
            from hmq_fpga.deploy.rtl import project as rtl

            resources.append(model_estimate.estimate(net))
            try:
                if config.estimate != "model":
                    project = rtl.RtlProject.create(
                        net,
                        new / "rtl",
                        latency_cutoff=config.latency_cutoff or None,
                        part=config.part,
                        clock_ns=config.clock_ns,
                    )
                    resources.append(project.trace_resources())
                    if config.estimate == "rtl":
                        resources.append(project.synthesize())
            except rtl.NotUnrolled as refused:
                resources = [replace(formula, notes=f"{formula.notes}; no RTL: {refused}") for formula in resources]
        write_json(new / ESTIMATES, [r.to_json() for r in resources])
        return {}


def compare(folder: Path, dataset: Dataset, *, verilog: bool = False) -> Parity:
    """Parity of all back ends of a run's folder with its golden model, on a test split.

    The RTL, where there is some, runs in its tracer's interpreter, and with `verilog` as Verilog too.
    """
    net = QNet.load(folder / "qnet")
    simulators: list[Simulator] = [QKerasSimulator(net), HlsProject.load(folder / "hls")]
    if (folder / "rtl").is_dir():
        from hmq_fpga.deploy.rtl.project import RtlProject

        project = RtlProject.load(net, folder / "rtl")
        simulators.append(project.interpreter())
        if verilog:
            simulators.append(project.simulator())
    return check(net, simulators, channels_last(dataset.x_test), dataset.classes_test)


def compare_again(folder: Path, data: Path | None = None) -> Parity:
    """Compile a finished run's project again and compare it, on the run's data or on the `x_test` of another file.

    Raises:
        InvalidInput: when `folder` is not a finished run, or the data do not fit its network.
    """
    record = read_record(folder)
    if record["stages"].get("convert", {}).get("state") != "done":
        raise InvalidInput(f"{folder}: its project was not finished; run it again first")
    config = make_config(record["config"])
    task = resolve(config.task)
    dataset = task.load(data or config.data)
    if data is None:
        dataset = _proven(config, task, dataset)
    return compare(folder, dataset, verilog=config.estimate == "rtl")


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
    classes = 1 + int(max(dataset.y_train.max(), dataset.y_val.max(), dataset.y_test.max()))
    if len(output) != 1 or output[0] < classes:
        raise InvalidInput(f"{task}: the model's output is {output}, but the data have {classes} classes")


def scores(of: str, outputs: np.ndarray[Any, Any], dataset: Dataset) -> dict[str, float | None]:
    """Accuracy of outputs `(n, *output shape)`, channels last, on the test split; of a regression the squared error."""
    if dataset.regression:
        error = float(np.mean(np.square(outputs - channels_last(dataset.y_test))))
        return {f"{of}_accuracy": None, f"{of}_mse": error}
    return {f"{of}_accuracy": float(np.mean(outputs.argmax(-1) == dataset.y_test))}


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    stages = {name: s for name, s in record["stages"].items() if s["state"] == "done"}
    merged: dict[str, Any] = {}
    for stage in stages.values():
        merged |= stage["metrics"]
    return merged | {"seconds": {name: stage["seconds"] for name, stage in stages.items()}}


def _allowed_threads() -> int:
    """What `OMP_NUM_THREADS` allows, or all cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(given) if given.isdecimal() else cores()


def _load(module: nn.Module, path: Path) -> None:
    module.load_state_dict(torch.load(path, weights_only=True))


def _digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    names = ("hmq-fpga", "torch", "numpy", "hls4ml", "qkeras", "tensorflow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
