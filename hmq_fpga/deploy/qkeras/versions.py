"""The two QKerases, and what differs between them: `qkeras` on Keras 2, and `qkeras-v3` on Keras 3."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hmq_fpga.deploy.toolchain import ToolMissing
from hmq_fpga.ir.errors import InvalidInput


def missing() -> str | None:
    """One line where QKeras is not installed: what is left out, and how to get it. Imports nothing."""
    if all(find_spec(name) for name in ("tensorflow", "keras", "qkeras")):
        return None
    return "QKeras is not installed, so its model and its simulation are left out: pip install 'hmq-fpga[qkeras]'"


def import_keras() -> Any:
    """Keras with QKeras, imported without noise and without the rewrites by which oneDNN changes the arithmetic.

    That is decided when TensorFlow is first imported, so nothing in the package imports it in another way.

    Raises:
        ToolMissing: where QKeras is not installed.
        InvalidInput: where Keras is set to compute by something else than TensorFlow.
    """
    if line := missing():
        raise ToolMissing(line)
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with quiet(), _unheard() if "tensorflow" not in sys.modules else nullcontext():
        if find_spec("triton"):  # of PyTorch's builds for GPUs: loaded after TensorFlow 2.21 it ends the process
            import_module("triton")
        import keras
        import qkeras  # noqa: F401
    if keras.backend.backend() != "tensorflow":
        raise InvalidInput(f"Keras computes by {keras.backend.backend()}, QKeras needs KERAS_BACKEND=tensorflow")
    return keras


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing on standard error, where TensorFlow 2.21 writes before it reads how much it is to say."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def quiet() -> Iterator[None]:
    """No deprecation notices of QKeras's dependencies, nor Keras's that a quantizer is serialized as a constraint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*keras\.constraints\.serialize")
        yield


@contextmanager
def floatx(dtype: str) -> Iterator[None]:
    """Make `dtype` the type of new layers, and the one that QKeras's quantizers cast to; restored afterwards."""
    import keras

    before = keras.backend.floatx()
    policy = keras.config.dtype_policy() if _is_keras_3() else None  # it outlives a change of floatx
    keras.backend.set_floatx(dtype)
    if policy:
        keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.backend.set_floatx(before)
        if policy:
            keras.config.set_dtype_policy(policy)


def plain_batch_norm() -> dict[str, bool]:
    """Arguments of a BatchNormalization that multiplies and adds, and no fused kernel of TensorFlow's."""
    return {} if _is_keras_3() else {"fused": False}


def quantizer_attribute() -> str:
    """Where a `QActivation` has its quantizer."""
    return "activation" if _is_keras_3() else "quantizer"


def custom_objects() -> dict[str, Any]:
    """QKeras's classes by name, as `load_model` takes them; those of `small` it finds by itself."""
    from qkeras.utils import _add_supported_quantized_objects

    from hmq_fpga.deploy.qkeras import small  # noqa: F401  # Keras 3 imports nothing that a file names

    objects: dict[str, Any] = {}
    _add_supported_quantized_objects(objects)
    return objects


def _is_keras_3() -> bool:
    import keras

    return int(keras.__version__.split(".")[0]) >= 3
