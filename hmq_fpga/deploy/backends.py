"""The back ends, one row each: what a run's stages, parity and `convert` loop over.

A row writes into a folder (a run's, or one to hand on) under its own name, and finds there what it simulates. Its
packages are imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmq_fpga.deploy.parity import ParityError, Simulator
from hmq_fpga.deploy.report import Resources
from hmq_fpga.deploy.settings import Hardware
from hmq_fpga.ir import reference
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet

if TYPE_CHECKING:
    from hmq_fpga.deploy.rtl.project import RtlProject

TOLD = 3  # differences that an error names
Samples = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a back end tells of what it wrote.

    Attributes:
        resources: figures that are known without further tools.
        metrics: for the run's record.
        left_out: one line on why it wrote nothing, where it cannot have the network.
    """

    resources: Sequence[Resources] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    left_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way from a network to something that runs.

    Attributes:
        name: of its folder, and of its stage in a run.
        settings: the fields of `Hardware` that decide what it writes, and `samples` if their number does.
        packages: whose versions do.
        witnesses: the part of its folder that is checked for changes, where others may add to it.
        optional: whether its folder may be absent, as that of Verilog for a network too large to unroll, and those
            of QKeras and QONNX for one that they cannot hold.
        missing: one line on what is not installed and how to get it; None where nothing is missing.
        check: raises `InvalidInput` for a network or settings that cannot be had, before anything is trained.
        create: writes `<folder>/<name>`; samples are real inputs `(n, *input_shape)` for test benches, or None.
        simulators: of what is on disk in its folder, in the order of `parity.json`.
        differences: one line for each thing on disk in its folder that is not the network's; nothing is simulated.
    """

    name: str
    settings: tuple[str, ...]
    packages: tuple[str, ...]
    witnesses: tuple[str, ...] = ()
    optional: bool = False
    missing: Callable[[], str | None]
    check: Callable[[QNet, Hardware], None]
    create: Callable[[QNet, Path, Hardware, Samples | None], Made]
    simulators: Callable[[QNet, Path, Hardware], list[Simulator]]
    differences: Callable[[QNet, Path, Hardware], list[str]]


def _nothing_missing() -> None:
    return None


def _check_nothing(net: QNet, hardware: Hardware) -> None:
    """What this back end cannot build it leaves out, with a note."""


def _missing_qkeras() -> str | None:
    from hmq_fpga.deploy.qkeras.versions import missing

    return missing()


def _create_qkeras(net: QNet, folder: Path, hardware: Hardware, samples: Samples | None) -> Made:
    from hmq_fpga.deploy.qkeras.model import export

    try:
        export(net, folder / "qkeras")
    except InvalidInput as refused:
        return Made(left_out=f"no QKeras model: {refused}")
    return Made()


def _simulate_qkeras(net: QNet, folder: Path, hardware: Hardware) -> list[Simulator]:
    from hmq_fpga.deploy.qkeras.model import QKerasSimulator

    return [QKerasSimulator.load(net, folder / "qkeras")]


def _missing_qonnx() -> str | None:
    from hmq_fpga.deploy.qonnx.model import missing

    return missing()


def _create_qonnx(net: QNet, folder: Path, hardware: Hardware, samples: Samples | None) -> Made:
    from hmq_fpga.deploy.qonnx.model import export

    try:
        refusal = export(net, folder / "qonnx")
    except InvalidInput as refused:
        return Made(left_out=f"no QONNX model: {refused}")
    return Made(metrics={"qonnx_to_hls4ml": refusal})


def _simulate_qonnx(net: QNet, folder: Path, hardware: Hardware) -> list[Simulator]:
    from hmq_fpga.deploy.qonnx.model import QonnxSimulator

    return [QonnxSimulator.load(net, folder / "qonnx")]


def _read_qonnx(net: QNet, folder: Path, hardware: Hardware) -> list[str]:
    from hmq_fpga.deploy.qonnx.model import model_differences

    return model_differences(net, folder / "qonnx")


def _read_qkeras(net: QNet, folder: Path, hardware: Hardware) -> list[str]:
    from hmq_fpga.deploy.qkeras.readback import model_differences

    return model_differences(net, folder / "qkeras")


def _check_hls(net: QNet, hardware: Hardware) -> None:
    from hmq_fpga.deploy.hls.settings import check_settings

    check_settings(net, hardware)


def _create_hls(net: QNet, folder: Path, hardware: Hardware, samples: Samples | None) -> Made:
    from hmq_fpga.deploy.hls.limits import limits
    from hmq_fpga.deploy.hls.project import HlsProject

    project = HlsProject.of(net, folder / "hls", hardware)
    if samples is not None:
        project.write_tb_data(samples, reference.run(net, samples))
    factors = dict(project.reuse_factors)
    return Made(metrics={"reuse_factors": factors, "hls_limits": limits(net, hardware, factors)})


def _simulate_hls(net: QNet, folder: Path, hardware: Hardware) -> list[Simulator]:
    from hmq_fpga.deploy.hls.project import HlsProject

    return [HlsProject.load(folder / "hls")]


def _read_hls(net: QNet, folder: Path, hardware: Hardware) -> list[str]:
    from hmq_fpga.deploy.hls.readback import project_differences

    return project_differences(net, folder / "hls", hardware)


def _create_rtl(net: QNet, folder: Path, hardware: Hardware, samples: Samples | None) -> Made:
    if hardware.estimate == "none":
        return Made()
    from hmq_fpga.deploy.rtl.estimate import estimate

    formula = estimate(net)
    if hardware.estimate == "model":
        return Made(resources=[formula])
    from hmq_fpga.deploy.rtl.project import RtlProject
    from hmq_fpga.deploy.rtl.trace import NotUnrolled

    try:
        project = RtlProject.create(
            net,
            folder / "rtl",
            latency_cutoff=hardware.latency_cutoff or None,
            part=hardware.part,
            clock_ns=hardware.clock_ns,
        )
    except NotUnrolled as refused:
        return Made(resources=[replace(formula, notes=f"{formula.notes}; no RTL: {refused}")])
    measured = [formula, project.trace_resources()]
    if hardware.estimate == "rtl":
        measured.append(project.synthesize())
    elif hardware.estimate == "route":
        return _routed(project, measured, hardware)
    return Made(resources=measured)


def _routed(project: RtlProject, measured: list[Resources], hardware: Hardware) -> Made:
    """With what nextpnr finds; a network that does not fit the device is told so, and no error."""
    from hmq_fpga.deploy.rtl.devices import find_device
    from hmq_fpga.deploy.rtl.nextpnr import DoesNotFit

    try:
        found = project.route(project.folder / "route", find_device(hardware.route_device))
    except DoesNotFit as refused:
        *others, trace = measured
        return Made(resources=[*others, replace(trace, notes=f"{trace.notes}; not routed: {refused}")])
    return Made(resources=[*measured, found])


def _check_rtl(net: QNet, hardware: Hardware) -> None:
    """Only what routing needs, since that comes after the training; what cannot be built is left out with a note."""
    if hardware.estimate != "route":
        return
    from hmq_fpga.deploy.rtl.devices import find_device
    from hmq_fpga.deploy.rtl.nextpnr import require_tools

    require_tools(find_device(hardware.route_device))
    if not hardware.latency_cutoff:
        raise InvalidInput(
            "latency_cutoff 0: Verilog without registers has no clock to route for; give more, or estimate rtl"
        )


def _simulate_rtl(net: QNet, folder: Path, hardware: Hardware) -> list[Simulator]:
    """The tracer's interpreter, and for the estimate `rtl` the Verilog too."""
    from hmq_fpga.deploy.rtl.project import RtlProject

    project = RtlProject.load(net, folder / "rtl")
    interpreter: Simulator = project.interpreter()
    return [interpreter, project.simulator()] if hardware.estimate == "rtl" else [interpreter]


def _read_rtl(net: QNet, folder: Path, hardware: Hardware) -> list[str]:
    from hmq_fpga.deploy.rtl.readback import verilog_differences

    return verilog_differences(net, folder / "rtl", latency_cutoff=hardware.latency_cutoff or None)


QKERAS = Backend(
    name="qkeras",
    settings=(),
    packages=("qkeras", "tensorflow"),
    optional=True,
    missing=_missing_qkeras,
    check=_check_nothing,
    create=_create_qkeras,
    simulators=_simulate_qkeras,
    differences=_read_qkeras,
)
QONNX = Backend(
    name="qonnx",
    settings=(),
    packages=("qonnx", "onnx", "onnxruntime"),
    optional=True,
    missing=_missing_qonnx,
    check=_check_nothing,
    create=_create_qonnx,
    simulators=_simulate_qonnx,
    differences=_read_qonnx,
)
HLS = Backend(
    name="hls",
    settings=("backend", "io_type", "part", "clock_ns", "reuse_factor", "strategy", "layers", "samples"),
    packages=("hls4ml",),
    witnesses=("hls/firmware", "hls/tb_data"),
    missing=_nothing_missing,
    check=_check_hls,
    create=_create_hls,
    simulators=_simulate_hls,
    differences=_read_hls,
)
RTL = Backend(
    name="rtl",
    settings=("estimate", "route_device", "part", "clock_ns", "latency_cutoff"),
    packages=("alkaid",),
    witnesses=("rtl/rtl.json", "rtl/src", "rtl/stream"),
    optional=True,
    missing=_nothing_missing,
    check=_check_rtl,
    create=_create_rtl,
    simulators=_simulate_rtl,
    differences=_read_rtl,
)
BACKENDS = (QKERAS, QONNX, HLS, RTL)


def require_unchanged(net: QNet, folder: Path, hardware: Hardware, backends: Sequence[Backend]) -> None:
    """Compare what back ends left on disk with the network, before anything is simulated.

    Raises:
        ParityError: naming file, tensor and both values of the first differences.
    """
    for backend in backends:
        if (folder / backend.name).is_dir():
            require_none(backend.differences(net, folder, hardware), folder, "run again to write it anew")


def require_none(differences: Sequence[str], folder: Path, remedy: str) -> None:
    """Raise `ParityError` with the first differences of a folder's content from the network, where there are any."""
    if differences:
        more = f"; and {len(differences) - TOLD} more" if len(differences) > TOLD else ""
        raise ParityError(f"{folder}: not the network's: {'; '.join(differences[:TOLD])}{more}; {remedy}")


def split_by_installed() -> tuple[tuple[Backend, ...], dict[str, str]]:
    """The back ends that are installed, and for each of the others by name the line that says what it lacks."""
    missing = {backend.name: line for backend in BACKENDS if (line := backend.missing())}
    return tuple(backend for backend in BACKENDS if backend.name not in missing), missing
