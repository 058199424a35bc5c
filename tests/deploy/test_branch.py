"""Branch and bound against all points of small programs."""

import numpy as np
import pytest

from hmq_fpga.deploy.branch import Program, Search


def drawn(seed: int) -> tuple[Program, dict[int, int], int]:
    """A program of whole numbers, an objective, and its largest value at a point that keeps all rows; -inf if none."""
    rng, program = np.random.default_rng(seed), Program()
    for _ in range(2):
        lo = int(rng.integers(-6, 4))
        program.variable(lo, lo + int(rng.integers(1, 9)))
    for _ in range(3):
        program.binary()
    for _ in range(int(rng.integers(1, 6))):
        terms = {v: int(c) for v, c in enumerate(rng.integers(-9, 10, 5)) if c}
        program.add(terms, int(rng.integers(-20, 30)))
    objective = {v: int(c) for v, c in enumerate(rng.integers(-9, 10, 5))}
    spans = [np.arange(lo, hi + 1) for lo, hi in zip(program.lo, program.hi, strict=True)]
    points = np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 5)
    kept = np.ones(len(points), bool)
    for terms, limit in zip(program.rows, program.limits, strict=True):
        kept &= points[:, list(terms)] @ list(terms.values()) <= limit
    values = points[kept] @ [objective[v] for v in range(5)]
    return program, objective, int(values.max()) if len(values) else -(10**6)


def decided(program: Program, objective: dict[int, int], level: int, *, nodes: int = 4000, step: int = 4000) -> str:
    """Whether a point that the search gave reaches the level, none does, or that is open."""
    search = Search(program, objective, level)
    while search.nodes < nodes and not search.ended:
        search.run(step)
        for point in np.rint(search.points):
            held = (
                sum(c * point[v] for v, c in row.items()) <= limit
                for row, limit in zip(program.rows, program.limits, strict=True)
            )
            if all(held) and sum(c * point[v] for v, c in objective.items()) >= level:
                return "reached"
    return "excluded" if search.excluded else "open"


@pytest.mark.parametrize("step", [1, 4000])
def test_it_decides_as_all_points_do(step):
    for seed in range(60):
        program, objective, most = drawn(seed)
        program.decisive = [0, 1]
        if most > -(10**6):
            assert decided(program, objective, most, step=step) == "reached", seed
        for more in (1, 20):
            assert decided(program, objective, max(most, -100) + more, step=step) == "excluded", seed


def test_without_decisive_variables_only_bounds_exclude():
    found = [decided(program, o, max(most, -100) + 1) for program, o, most in map(drawn, range(60))]
    assert found.count("excluded") > 30 and "open" in found and "reached" not in found


@pytest.mark.parametrize("scale", [1, 2**12, 2**24, 2**40])
def test_bounds_hold_whatever_the_multipliers(scale):
    """And are those of whole arithmetic; where float64 could not hold that, there is none."""
    rng = np.random.default_rng(scale)
    for seed in range(30):
        program, objective, most = drawn(seed)
        program.rows = [{v: c * scale for v, c in row.items()} for row in program.rows]
        program.limits = [limit * scale for limit in program.limits]
        search = Search(program, objective, -(10**9))
        search.run(1)
        nodes = search._open.take(np.zeros(20, np.int64))
        nodes.lo[:], nodes.hi[:] = program.lo, program.hi
        nodes.multipliers[:] = rng.exponential(0.3, (20, len(program.rows)))
        bounds = search._most(nodes)
        assert (bounds >= most).all()
        if scale > 2**36:
            assert np.isinf(bounds).any() or (bounds < 2**53).all()


def test_the_same_question_has_the_same_key():
    program, objective, most = drawn(5)
    key = Search(program, objective, most).key
    assert key == Search(program, dict(objective), most).key != Search(program, objective, most + 1).key
    program.limits[0] += 1
    assert key != Search(program, objective, most).key
