"""The state of training in a file, so that what was killed in the middle goes on from there, bit for bit."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hmq_fpga.search import parallel

log = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """What has a state that training changes: modules, optimizers, histories; of tensors, numbers, texts and lists."""

    def state_dict(self) -> dict[str, Any]:
        """The present state."""

    def load_state_dict(self, state: Any) -> Any:
        """Take a state on, in place."""


Parts = Mapping[str, Stateful]


class Checkpoint:
    """A file of the state of one training.

    It belongs to that training alone: to its settings, to the initial state of all that learns, and to `key`. A file
    of another, or one that cannot be read, is not used.

    Args:
        path: written in one step, by one process of several; its folder is made if need be.
        key: of what else decides the result: the data, and the model's code.
        every_s: seconds from one writing to the next; the state after the last step is written in any case.
    """

    def __init__(self, path: Path, *, key: str = "", every_s: float = 120.0) -> None:
        self.path, self._key, self._every_s = path, key, every_s
        self._identity, self._written = "", 0.0

    def restore(self, parts: Parts, settings: object) -> int:
        """Bring parts that are as at the start of a training to where its file has them; the steps that are done."""
        self._identity, self._written = _digest([self._key, repr(settings), _states(parts)]), time.monotonic()
        saved = parallel.from_first(self._read() if parallel.number() == 0 else None)
        if saved is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
        _set_random(saved["random"])
        return int(saved["step"])

    def offer(self, parts: Parts, step: int, *, last: bool) -> None:
        """Write the state after `step` steps, if it is time."""
        if parallel.number() or not (last or time.monotonic() - self._written >= self._every_s):
            return
        state = {"identity": self._identity, "step": step, "parts": _states(parts), "random": _random()}
        new = self.path.with_name(f"{self.path.name}.new")
        new.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, new)
        new.replace(self.path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Take the file away, and what a killed process left of one."""
        for path in (self.path, self.path.with_name(f"{self.path.name}.new")):
            path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            same = saved["identity"] == self._identity
        except Exception as error:  # from a damaged file anything may come
            log.warning("%s: cannot be read (%s): this training starts anew", self.path, type(error).__name__)
            return None
        return saved if same else None


def _states(parts: Parts) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


def _random() -> dict[str, Any]:
    """States of the global generators, which a user's layers and transformations may draw from."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "python": random.getstate(),
    }


def _set_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


def _digest(value: object) -> str:
    sha = hashlib.sha256()

    def feed(value: object) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, item in value.items():
                sha.update(repr(key).encode())
                feed(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        else:
            sha.update(repr(value).encode())

    feed(value)
    return sha.hexdigest()
