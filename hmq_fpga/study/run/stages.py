"""Resumable stages: what has been done in a run's folder, and with which inputs.

`run.json` records for every stage the digest of its inputs and of what it wrote. A stage whose inputs did not change
and whose outputs are still what it wrote is not repeated. Everything is written beside its place and moved there, so
that a process killed at any moment leaves either the old state or the new one. A long stage keeps its state in a folder
meanwhile, which stays until the stage is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.files import check_path

RECORD = "run.json"
FORMAT = "hmq-fpga run, version 1"
_CHECKPOINT = ".checkpoint-"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run.

    Attributes:
        name: its key in `run.json`.
        settings: everything besides earlier stages that decides its outputs; JSON.
        needs: names of the stages whose outputs it reads.
        makes: files and folders that it writes, relative to the run's folder.
        may_make: more of them, which the stage decides about.
        witnesses: the part of them that is checked for changes, where others may add to a folder.
        versions: of the packages that decide its outputs.
        work: writes them into the folder that it is given, and returns metrics.
    """

    name: str
    settings: Mapping[str, Any]
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    may_make: tuple[str, ...] = ()
    witnesses: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    work: Callable[[Path], Mapping[str, Any]]


class RunFolder:
    """A run's folder and its record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}

    @contextmanager
    def opened(self, *, patience_s: float = 0) -> Iterator[RunFolder]:
        """Take the folder for this process alone, waiting `patience_s` seconds for another one to leave it.

        Raises:
            InvalidInput: when it holds something else than a run, or another process works in it.
        """
        check_ours(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=patience_s):
                for left in self.path.glob(".new-*"):
                    shutil.rmtree(left)
                yield self.look()
        except Timeout:
            raise InvalidInput(
                f"{self.path}: another process is running here; wait for it or give another --out"
            ) from None

    def look(self) -> RunFolder:
        """Read the record, if there is one."""
        if (self.path / RECORD).exists():
            self.record = read_record(self.path)
        return self

    def save(self) -> None:
        """Write the record in one step."""
        write_json(self.path / RECORD, {"format": FORMAT, **self.record})

    def run(self, stage: Stage, shared: Path | None = None) -> bool:
        """Do a stage unless it is done; returns whether it had to be.

        What another run's folder, `shared`, holds of the same stage with the same inputs is copied, not made again.
        """
        if self.has(stage):
            return False
        stages = self.record.setdefault("stages", {})
        digest = self.input_digest(stage)
        stages[stage.name] = {"state": "running", "inputs": digest}
        self.save()
        new = self.path / f".new-{stage.name}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        started = time.perf_counter()
        try:
            metrics = _copied(stage, digest, shared, new) if shared else None
            if metrics is None:
                metrics = stage.work(new)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            stages[stage.name] |= {"state": "failed", "error": str(error) or type(error).__name__}
            self.save()
            raise
        for name in stage.makes + stage.may_make:
            _move(new / name, self.path / name)
        shutil.rmtree(new)
        shutil.rmtree(self.checkpoints_of(stage), ignore_errors=True)
        stages[stage.name] |= {
            "state": "done",
            "outputs": self._output_digests(stage),
            "seconds": round(time.perf_counter() - started, 3),
            "versions": dict(stage.versions),
            "metrics": dict(metrics),
        }
        self.save()
        return True

    def has(self, stage: Stage) -> bool:
        """Whether a stage is done with these inputs, and its outputs are what it wrote."""
        made = self.record.get("stages", {}).get(stage.name, {"state": "new"})
        if made["state"] != "done":
            return False
        return (made["inputs"], made["outputs"]) == (self.input_digest(stage), self._output_digests(stage))

    def checkpoints_of(self, stage: Stage) -> Path:
        """A folder for the state of a stage while it works."""
        return self.path / f"{_CHECKPOINT}{stage.name}"

    def input_digest(self, stage: Stage) -> str:
        """Of all that decides what a stage makes; those that it needs are done."""
        stages = self.record.get("stages", {})
        needs = {name: stages[name]["outputs"] for name in stage.needs}
        inputs = {"settings": stage.settings, "versions": stage.versions, "needs": needs}
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _output_digests(self, stage: Stage) -> dict[str, str] | None:
        """Of what it made; None where something is missing that cannot be."""
        if not all((self.path / name).exists() for name in stage.makes):
            return None
        names = stage.witnesses or stage.makes + stage.may_make
        return {name: digest_of(self.path / name) if (self.path / name).exists() else "" for name in names}


def _copied(stage: Stage, inputs: str, shared: Path, new: Path) -> Mapping[str, Any] | None:
    """Copy the files that `shared` holds of a stage into `new`; its metrics, or None where they do not fit."""
    try:
        made = read_record(shared)["stages"][stage.name]
        if (made["state"], made["inputs"]) != ("done", inputs):
            return None
        for name in stage.makes:
            shutil.copyfile(shared / name, new / name)
    except (InvalidInput, KeyError, OSError):
        return None
    copies = {name: digest_of(new / name) for name in stage.makes}
    metrics: Mapping[str, Any] = made["metrics"]
    return metrics if copies == made["outputs"] else None


def check_ours(path: Path, record: str = RECORD, what: str = "run") -> None:
    """Raise `InvalidInput` unless `path` is not there, empty, or the folder of a run, or of what else has a record."""
    check_path(path)
    if path.exists() and not path.is_dir():
        raise InvalidInput(f"{path}: is a file; give a folder with --out")
    if path.is_dir() and not (path / record).exists():
        foreign = sorted(p.name for p in path.iterdir() if p.name != ".lock")
        if foreign:
            raise InvalidInput(f"{path}: holds {foreign[0]!r} but no {what}; give an empty or a new folder with --out")


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run's folder.

    Raises:
        InvalidInput: when it is missing or damaged.
    """
    try:
        record = json.loads((path / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not the folder of a run: {error}") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise InvalidInput(f"{path / RECORD}: not a record of this version of hmq-fpga; give a new folder with --out")
    return record


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files; hidden ones and built libraries left out."""
    sha = hashlib.sha256()
    if path.is_file():
        sha.update(path.read_bytes())
        return sha.hexdigest()
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and not name.endswith(".so"):
                file = Path(folder, name)
                sha.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
                sha.update(file.read_bytes())
    return sha.hexdigest()


def _move(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`, which goes first if it is a folder, and goes for good if there is no new one."""
    if old.is_dir():
        old.rename(new.with_name(f"{new.name}.old"))  # renamed, not emptied: a half of a folder is never left
    if new.exists():
        new.rename(old)
    else:
        old.unlink(missing_ok=True)
