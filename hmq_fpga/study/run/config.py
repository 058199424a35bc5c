"""What to run, checked: the content of a `CONFIG.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hmq_fpga.deploy.rtl.devices import find_device
from hmq_fpga.deploy.settings import DEFAULT_PART, Estimate, Hardware, HlsBackend, IoType, LayerSettings, Strategy
from hmq_fpga.ir.errors import InvalidInput

DEFAULT_RW = 8.0
BOUNDS = {  # settings, and what people call them
    "rw": "R_w",
    "weight_bits": "weight bits",
    "bops": "bit operations",
    "luts": "LUTs",
    "ebops": "EBOPs",
}
_ROUNDING = 1e-9
_REACHED = {"rw": "rw_actual", "luts": "luts_actual"}  # metrics that are not called like the setting


def bounds_in(values: Mapping[str, Any], suffix: str = "") -> dict[str, float]:
    """The bounds among settings or, by their suffix, among metrics."""
    return {name: value for name in BOUNDS if (value := values.get(name + suffix)) is not None}


def reached(metrics: Mapping[str, Any], name: str) -> float:
    """What a run's network has of a bound, by the name of its setting."""
    value: float = metrics[_REACHED.get(name, name)]
    return value


def missed(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The bounds that a run's network exceeds: what it costs, by the name of their setting."""
    found = {}
    for name, bound in bounds_in(metrics, "_target").items():
        actual = reached(metrics, name)
        share = bound / actual if name == "rw" else actual / bound
        if share > 1 + _ROUNDING:
            found[name] = actual
    return found


def labelled(bounds: Mapping[str, float]) -> str:
    """Part of a folder's name: `rw8`."""
    return "-".join(f"{name}{value:.12g}" for name, value in bounds.items())


def told(bounds: Mapping[str, float]) -> str:
    """The same for people: `R_w 8`."""
    return ", ".join(
        f"R_w {value:g}" if name == "rw" else f"{value:,.0f} {BOUNDS[name]}" for name, value in bounds.items()
    )


class RunConfig(BaseModel):
    """What to run; the content of a `CONFIG.yaml`.

    Attributes:
        task: a name that `hmq-fpga tasks` lists, or `FILE.py:FUNCTION`.
        rw, weight_bits, bops, luts, ebops: bounds, as in `Target`; R_w = 8 where none is given.
        ra: target R_a.
        bits: bit-widths that a weight may get.
        tensor_bits: the same for single weights, by name (`conv1.weight`) or pattern (`*.weight`); of the input and of
            activations the largest is an upper bound.
        max_act_bits: upper bound on the bit-width of activations.
        method, options: search method and its options.
        zeros: share of zero weights to aim for, by larger thresholds and pruning while fine-tuning.
        distill: whether fine-tuning learns from the float model too.
        drop_dead: whether channels that no training or validation sample activates are taken out of the frozen network.
        label_smoothing: share of a class's probability that is spread over all; by default see `smoothing`.
        input_noise: of training inputs, in deviations of each input value; by default the task's, of one's own none.
        class_weights: how much the samples of each class count, or `balanced`: every class as much as any other.
        loss, metric, optimizer, scheduler: functions in the file of one's own model, by name; see `train.Task`.
        keep: the last state of the float training, of a search by `hmq` and of the fine-tuning, or that which is best
            on validation data.
        tries: searches with the seeds from `seed` on, each of them fine-tuned; the best on validation data is kept.
        seed: of initial weights, batches and noise.
        device: where to train and search: `cpu`, `cuda`, or `cuda:N` for one of several GPUs.
        checkpoint_s: seconds after which the state of a long stage is written anew; killed, it goes on from there.
        data: file or folder in place of the task's own source, or of the function `data` beside one's own model.
        target: column of a table that is to be learnt; by default the last.
        target_kind: `classes`, `labels` (of which a sample may have several) or `values`, where targets could be more
            than one of them.
        workers: processes that load a torch `Dataset`.
        normalize: whether inputs lose the training data's mean and are divided by its deviation, of each feature or
            channel; both are kept in the run's `normalization.json`, and the hardware takes inputs so normalized.
        keep_final: whether a final tanh or sigmoid of a regression becomes a table in hardware; else it is left out,
            and the run says what to apply to its outputs.
        weights: file with the state dict of a model that is trained already: no float training unless `float_steps`
            says so.
        float_steps, search_steps, finetune_steps: optimizer steps in place of the task's; `float_steps: 0` takes the
            model as the function returns it.
        backend, io_type, part, clock_ns, reuse_factor, strategy: of the hls4ml project.
        layers: reuse factor and strategy of single layers, by name.
        latency_cutoff: of the Verilog: most delay between two registers, in ns of the tracer's own delay model; 0: no
            registers.
        estimate: resources without vendor tools. `trace`: Verilog, and its tracer's own figures; `rtl`: also
            simulated by Verilator and synthesized by Yosys; `route`: Verilog, placed and routed by nextpnr; `model`:
            LUTs by a fitted formula, no Verilog, which is also what a network gets that is too large to unroll; `none`.
        route_device: what the estimate `route` places on, `ecp5-85k` by default.
        parity_samples: the first of the test split, whose parity is proven; by default the task's, which are all but
            for residual networks.
        out: the run's folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    rw: float | None = None
    weight_bits: float | None = Field(default=None, gt=0)
    bops: float | None = Field(default=None, gt=0)
    luts: float | None = Field(default=None, gt=0)
    ebops: float | None = Field(default=None, gt=0)
    ra: float = 4.0
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    tensor_bits: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    max_act_bits: int = 8
    method: str = "hmq"
    options: dict[str, Any] = Field(default_factory=dict)
    zeros: float | None = Field(default=None, gt=0, lt=1)
    distill: bool = False
    drop_dead: bool = False
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    input_noise: float | None = Field(default=None, ge=0)
    class_weights: Literal["balanced"] | tuple[float, ...] | None = None
    loss: str | None = None
    metric: str | None = None
    optimizer: str | None = None
    scheduler: str | None = None
    keep: Literal["last", "best"] = "last"
    tries: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    checkpoint_s: float = Field(default=120, ge=0)
    data: Path | None = None
    target: str | None = None
    target_kind: Literal["classes", "labels", "values"] | None = None
    workers: int = Field(default=0, ge=0)
    normalize: bool = False
    keep_final: bool = False
    weights: Path | None = None
    float_steps: int | None = Field(default=None, ge=0)
    search_steps: int | None = Field(default=None, ge=1)
    finetune_steps: int | None = Field(default=None, ge=1)
    backend: HlsBackend = "Vitis"
    io_type: IoType | None = None
    part: str = DEFAULT_PART
    clock_ns: float = Field(default=5.0, gt=0)
    reuse_factor: int = Field(default=1, ge=1)
    strategy: Strategy = "Latency"
    layers: dict[str, LayerSettings] = Field(default_factory=dict)
    latency_cutoff: float = Field(default=5.0, ge=0)
    estimate: Estimate = "trace"
    route_device: str | None = None
    parity_samples: int | None = Field(default=None, ge=1)
    out: Path | None = None

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise ValueError("give cpu, cuda, or cuda:N for one of several GPUs")
        return device

    @field_validator("route_device")
    @classmethod
    def _known_fpga(cls, device: str | None) -> str | None:
        if device is not None:
            find_device(device)
        return device

    @model_validator(mode="after")
    def _one_pruning(self) -> RunConfig:
        if len(given := [name for name in ("zeros", "luts", "ebops") if getattr(self, name) is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} all prune: give one")
        if given and self.keep == "best":
            raise ValueError(f"keep best: {given[0]} prunes until the last step, whose state alone keeps it: keep last")
        if self.route_device and self.estimate != "route":
            raise ValueError("route_device: is for estimate: route")
        if self.scheduler and not self.optimizer:
            raise ValueError("scheduler: give the optimizer that it is of, too")
        return self

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, values: Any) -> Any:
        given = isinstance(values, dict) and any(values.get(name) is not None for name in BOUNDS)
        return values if given or not isinstance(values, dict) else {**values, "rw": DEFAULT_RW}

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by the name of their setting."""
        return bounds_in(self.model_dump(include=set(BOUNDS)))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        name = Path(self.task.rpartition(":")[0]).stem if ":" in self.task else self.task
        return self.out or Path("hls_projects") / name / f"{self.method}-{labelled(self.bounds)}-seed{self.seed}"

    def smoothing(self, of_task: float) -> float:
        """The label smoothing that counts: by default the task's, and none where a network is pruned or distilled.

        A pruned one has no capacity to spare for it, and smoothed teachers tell less (Müller, Kornblith, Hinton, "When
        Does Label Smoothing Help?", 2019, Section 4).
        """
        if self.label_smoothing is not None:
            return self.label_smoothing
        pruned = any(most is not None for most in (self.zeros, self.luts, self.ebops))
        return 0.0 if pruned or self.distill else of_task

    def hardware(self, io_type: IoType) -> Hardware:
        """What was chosen about hardware; `io_type` is the task's, where none was."""
        names = [field.name for field in fields(Hardware)]
        return Hardware(**{name: getattr(self, name) for name in names} | {"io_type": self.io_type or io_type})


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
