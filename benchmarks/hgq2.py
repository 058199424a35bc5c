"""HGQ2 on the tasks of `frontier.py`: the best of its networks with so many LUTs and no more.

    make environment-hgq2
    .venv-hgq2/bin/python benchmarks/hgq2.py pendigits_shallow --luts 4000 2600 1700 --seeds 3

The same layers, data and batches as ours, as many steps as ours has in all its phases, bits of single weights and
activations. Every schedule of the penalty on EBOPs leaves a front of networks, accuracy on validation data against
EBOPs after each epoch; of each front the row is the network with most EBOPs among those that alkaid builds with
`--luts` or fewer, which is the best on validation data. The program is run on the whole test split, and has to agree
with Keras. Fronts are kept in `--out`, rows in `hgq2.json`; those already there are not made again.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from itertools import product
from pathlib import Path

from common import Row, fill

from hmq_fpga.study.tasks import TASKS

HERE = Path(__file__).parent
ROWS = HERE / "hgq2.json"
PENALTIES = (1e-5, 2e-5, 3e-5, 5e-5, 7e-5, 1e-4)
SCHEDULES: dict[str, float | None] = {**{f"constant {beta:.0e}": beta for beta in PENALTIES}, "ramp": None}


def main() -> None:
    """Fill the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="dense layers with ReLUs")
    parser.add_argument("--luts", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/hgq2"), help="where fronts are kept")
    arguments = parser.parse_args()
    from hgq2_networks import Front  # which takes seconds

    @lru_cache(maxsize=1)
    def front(task: str, schedule: str, seed: int) -> Front:
        return Front(task, SCHEDULES[schedule], seed, arguments.out / f"{task}-{schedule.replace(' ', '-')}-seed{seed}")

    def measure(*, task: str, schedule: str, seed: int, luts: float) -> Row:
        return front(task, schedule, seed).best(luts)

    wanted = (
        {"task": task, "schedule": schedule, "seed": seed, "luts": luts}
        for task, seed, schedule, luts in product(arguments.tasks, range(arguments.seeds), SCHEDULES, arguments.luts)
    )
    fill(ROWS, wanted, measure)


if __name__ == "__main__":
    main()
