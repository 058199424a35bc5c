"""The README's table of operations, from the table that reads them: `python -m tests.readme_table` writes it anew."""

import re
from pathlib import Path

from hmq_fpga.search.reading.operations import supported

README = Path(__file__).parents[1] / "README.md"
PLACE = re.compile(r"(?<=-->\n)[^<]*(?=<!-- end of operations -->)")


def table() -> str:
    rows = [f"| {names} | {becomes} |" for names, becomes in supported().items()]
    return "\n".join(["| PyTorch | becomes |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    README.write_text(PLACE.sub(lambda _: table(), README.read_text()))
