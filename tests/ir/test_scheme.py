import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


def with_widths(widths: object, name: str = "fc.weight") -> Tensor:
    format_ = Fixed(signed=True, width=6, frac=7)
    return Tensor(name=name, kind="weight", format=format_, size=4, widths=np.asarray(widths))


def test_widths_are_saved_and_loaded(tmp_path: Path) -> None:
    scheme = Scheme((with_widths([0, 6, 3, 1]), Tensor(name="x", kind="input", format=Fixed(False, 4, 6), size=3)))
    scheme.save(tmp_path / "scheme.json")
    loaded = Scheme.load(tmp_path / "scheme.json")
    assert loaded == scheme
    assert hash(loaded["fc.weight"]) == hash(scheme["fc.weight"])
    np.testing.assert_array_equal(loaded["fc.weight"].widths, [0, 6, 3, 1])
    assert loaded["x"].widths is None
    assert loaded != Scheme((with_widths([0, 6, 3, 2]), scheme["x"]))
    entry = json.loads((tmp_path / "scheme.json").read_text())["tensors"][0]
    assert (entry["bits"], entry["widths"]) == (6, "fc.weight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scheme.json", "widths.npz"]


def test_a_scheme_without_widths_leaves_none_behind(tmp_path: Path) -> None:
    Scheme((with_widths([0, 6, 3, 1]),)).save(tmp_path / "scheme.json")
    Scheme.from_json({"tensors": [ENTRY]}).save(tmp_path / "scheme.json")
    assert [path.name for path in tmp_path.iterdir()] == ["scheme.json"]


def test_widths_count() -> None:
    tensor = with_widths([0, 6, 3, 1])
    assert (tensor.bits, tensor.mean_width) == (10, 2.5)
    whole = Scheme.from_json({"tensors": [ENTRY]})["fc_weight"]
    assert (whole.bits, whole.mean_width) == (36, 3)


def test_widths_stay_as_they_are_given() -> None:
    given_ = np.array([0, 6, 3, 1])
    tensor = with_widths(given_)
    given_[0] = 5
    assert tensor.bits == 10
    assert tensor.widths is not None
    with pytest.raises(ValueError, match="read-only"):
        tensor.widths[0] = 1


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([1, 2, 3], "'fc.weight': widths are 3 int64, not 4 integers"),
        ([[1, 2, 3, 4]], "widths are 1×4 int64, not 4 integers"),
        ([1.0, 2, 3, 4], "widths are 4 float64, not 4 integers"),
        ([1, -2, 3, 4], "widths of -2 … 4 bits; they must be within 0 … 6"),
        ([1, 2, 7, 300], "widths of 1 … 300 bits; they must be within 0 … 6"),
    ],
)
def test_wrong_widths_are_named(widths: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message):
        with_widths(widths)
    Scheme((with_widths([0, 6, 3, 1]),)).save(tmp_path / "scheme.json")
    np.savez(tmp_path / "widths.npz", **{"fc.weight": np.asarray(widths)})
    with pytest.raises(InvalidInput, match=rf"scheme\.json: not a readable scheme: tensor .*{message}"):
        Scheme.load(tmp_path / "scheme.json")


def test_only_a_weight_has_widths() -> None:
    with pytest.raises(InvalidInput, match="'x': only a weight has widths"):
        Tensor(name="x", kind="input", format=Fixed(False, 4, 6), size=1, widths=np.array([1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "widths.npz beside it cannot be read"),
        (lambda path: path.write_bytes(b"PK"), "widths.npz beside it cannot be read"),
        (lambda path: np.savez(path, other=np.array([1])), "'fc.weight': its widths 'fc.weight' are not in widths.npz"),
        (lambda path: np.savez(path, **{"fc.weight": np.array([None])}), "widths.npz beside it cannot be read"),
    ],
)
def test_widths_that_are_lost_are_an_error(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    Scheme((with_widths([0, 6, 3, 1]),)).save(tmp_path / "scheme.json")
    damage(tmp_path / "widths.npz")
    with pytest.raises(InvalidInput, match=rf"scheme\.json: .*{message}"):
        Scheme.load(tmp_path / "scheme.json")


@pytest.mark.parametrize("name", [None, 3, [], "other"])
def test_widths_are_named_by_a_text(name: object) -> None:
    with pytest.raises(InvalidInput, match=r"'fc_weight': its widths .* are not in widths\.npz"):
        Scheme.from_json({"tensors": [{**ENTRY, "widths": name}]})
