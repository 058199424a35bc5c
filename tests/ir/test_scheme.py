import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme, Tensor
from tests.strategies import formats

TENSORS = st.lists(
    st.builds(
        Tensor,
        name=st.text(),
        kind=st.sampled_from(["weight", "activation", "input"]),
        format=formats(),
        size=st.integers(1, 10**9),
    ),
    unique_by=lambda t: t.name,
)
ENTRY = {"name": "fc_weight", "kind": "weight", "signed": True, "bits": 3, "threshold_log2": -2, "size": 12}


@given(TENSORS)
def test_json_round_trip(tensors: list[Tensor]) -> None:
    scheme = Scheme(tuple(tensors), {"method": "hmq"})
    loaded = Scheme.from_json(json.loads(json.dumps(scheme.to_json())))
    assert loaded == scheme
    assert loaded.found_by == {"method": "hmq"}


def test_save_and_load(tmp_path: Path) -> None:
    scheme = Scheme((Tensor(name="x", kind="input", format=Fixed(signed=False, width=4, frac=6), size=3),))
    scheme.save(tmp_path / "scheme.json")
    assert Scheme.load(tmp_path / "scheme.json") == scheme


def test_an_entry_says_what_the_format_is() -> None:
    [tensor] = Scheme.from_json({"tensors": [ENTRY]}).tensors
    assert tensor.format == Fixed.from_threshold(signed=True, bits=3, threshold_log2=-2)
    assert Scheme((tensor,)).to_json()["tensors"] == [ENTRY]


def test_is_a_mapping_in_network_order() -> None:
    entries = [{**ENTRY, "name": "input", "kind": "input"}, ENTRY, {**ENTRY, "name": "relu", "kind": "activation"}]
    scheme = Scheme.from_json({"tensors": entries})
    assert list(scheme) == ["input", "fc_weight", "relu"]
    assert scheme["fc_weight"].size == 12
    assert [t.name for t in scheme.of_kind("input", "activation")] == ["input", "relu"]
    with pytest.raises(KeyError):
        scheme["fc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "fc_weight.*bit-width 0"),
        ({"bits": 2.5}, "fc_weight"),
        ({"bits": True}, "fc_weight"),
        ({"signed": 1}, "fc_weight"),
        ({"kind": "bias"}, "bias"),
        ({"threshold_log2": None}, "fc_weight"),
        ({"threshold_log2": 10**6}, "fc_weight"),
        ({"size": 0}, "fc_weight"),
        ({"name": 7}, "7"),
    ],
)
def test_a_malformed_entry_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Scheme.from_json({"tensors": [{**ENTRY, **change}]})


@pytest.mark.parametrize("data", [None, [], {}, {"tensors": 3}, {"tensors": [3]}, {"tensors": [], "found_by": 3}])
def test_other_json_is_refused(data: object) -> None:
    with pytest.raises(InvalidInput):
        Scheme.from_json(data)


def test_a_tensor_is_named_once() -> None:
    with pytest.raises(InvalidInput, match="twice"):
        Scheme.from_json({"tensors": [ENTRY, ENTRY]})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"tensors": [{}]}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scheme.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"scheme\.json"):
        Scheme.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.json"):
        Scheme.load(tmp_path / "nowhere.json")
