"""The audit of a finished run: planted faults and proofs, kept beside its parity. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hmq_fpga.deploy.audit.audit import Audit, audit
from hmq_fpga.deploy.backends import require_unchanged, split_by_installed
from hmq_fpga.deploy.hls.project import HlsProject
from hmq_fpga.deploy.vendor.run import read_inputs
from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.network import QNet
from hmq_fpga.study.pages.run_page import AUDIT, write_page
from hmq_fpga.study.run.config import make_config
from hmq_fpga.study.run.stages import read_record, write_json


def audit_run(folder: Path, *, mutants: int, proofs: bool, seed: int, said: Callable[[str], None]) -> Audit:
    """Plant faults in copies of a run's model, firmware and program, prove what was asked for, and keep the outcome.

    Raises:
        InvalidInput: when `folder` is not a finished run, or there is nothing to do.
        ParityError: when something on disk is not the network's.
    """
    record = read_record(folder)
    if record["stages"].get("parity", {}).get("state") != "done":
        raise InvalidInput(f"{folder}: has not come as far as parity; run it again first")
    if mutants < 1 and not proofs:
        raise InvalidInput(f"{mutants} mutants and no proof: nothing to do; give --mutants or --prove")
    net = QNet.load(folder / "qnet")
    hardware = make_config(record["config"]).hardware(record["resolved"]["io_type"])
    require_unchanged(net, folder, hardware, split_by_installed()[0])
    samples = read_inputs(folder / "hls", HlsProject.load(folder / "hls"))
    found = audit(net, folder, samples, mutants=mutants, proofs=proofs, seed=seed, said=said)
    write_json(folder / AUDIT, {"qnet": net.digest, "seed": seed, **found.to_json()})
    write_page(folder)
    return found
