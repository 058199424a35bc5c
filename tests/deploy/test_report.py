import json

import pytest

from hmq_fpga.deploy.report import Resources, canonical_part, merge


def test_percent_of_a_known_part():
    record = Resources(stage="csynth", tool="Vitis HLS", part="xcvu13p-flga2577-2-e", lut=17_280, dsp=12_288, bram=0)
    assert record.percent == {"lut": 1.0, "dsp": 100.0, "bram": 0.0}  # the flip-flops are unknown, not none


@pytest.mark.parametrize("part", [None, "xcup", "xc2v1000", "xcku", "10ax115"])
def test_no_percent_of_an_unknown_part(part):
    assert Resources(stage="yosys", tool="yosys", part=part, lut=1).percent is None


def test_parts_are_one_however_tools_spell_them():
    assert canonical_part("xc7z020-clg400-1") == canonical_part("7z020clg400-1") == "7z020clg4001"


def test_json_keeps_the_unknown_null():
    entry = json.loads(json.dumps(Resources(stage="vsynth", tool="Vivado", part="xc7z020clg400-1", lut=532).to_json()))
    assert entry["lut"] == 532 and entry["ff"] is None and entry["clock_ns"] is None
    assert entry["percent"] == {"lut": 1.0}


def test_merge_replaces_the_same_stage_of_the_same_tool():
    old = [Resources(stage=stage, tool=tool, lut=1).to_json() for stage, tool in [("yosys", "yosys"), ("csynth", "V")]]
    new = [Resources(stage=stage, tool="V", lut=lut).to_json() for stage, lut in [("csynth", 2), ("vsynth", 3)]]
    assert [(e["stage"], e["lut"]) for e in merge(old, new)] == [("yosys", 1), ("csynth", 2), ("vsynth", 3)]
    assert merge(merge(old, new), new) == merge(old, new)
