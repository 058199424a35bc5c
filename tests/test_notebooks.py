"""What is committed of the notebooks; `make test` runs them."""

import re

import nbformat
import pytest

import hmq_fpga as hmq
from tests.notebooks import FOLDER, METADATA

BOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_its_outputs_and_uses_public_names(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run python -m tests.notebooks"
    assert not any(cell.metadata for cell in notebook.cells)
    source = "\n".join(cell.source for cell in code)
    assert re.findall(r".*import.*hmq_fpga.*", source) == ["import hmq_fpga as hmq"]
    assert set(re.findall(r"\bhmq\.(\w+)", source)) <= set(hmq.__all__)
    outputs = [output for cell in code for output in cell.outputs]
    assert len(outputs) >= 3
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    shown = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr)/", shown)


def test_they_are_small():
    assert len(BOOKS) == 6
    assert sum(path.stat().st_size for path in BOOKS) < 2_000_000
