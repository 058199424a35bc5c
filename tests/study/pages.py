"""Runs as they are stored, and pages as they are read."""

import json
from html.parser import HTMLParser

from hmq_fpga.ir.fixed import Fixed
from hmq_fpga.ir.scheme import Scheme, Tensor
from hmq_fpga.study.run.stages import FORMAT

HOSTILE = '</svg></style><script>alert("1")</script>$\\frac{日本 & "x" {{ 7 * 7 }}'
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, attributes and text of a page, and whether its elements are nested well."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def tensor(name, kind, bits, m, size=10, signed=True):
    format_ = Fixed.from_threshold(signed=signed, bits=bits, threshold_log2=m)
    return Tensor(name=name, kind=kind, format=format_, size=size)


def make_run(folder, *, name="digits_mlp", layer="fc", mismatches=0):
    """A finished run's JSON, as it is stored."""
    folder.mkdir()

    def write(file, content):
        (folder / file).write_text(json.dumps(content))

    record = {
        "format": FORMAT,
        "config": {"task": name, "rw": 8.0, "ra": 4.0, "bits": [2, 3, 4], "method": "hmq", "seed": 3, "data": None},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "stages": {
            "search": {"state": "done", "seconds": 12.34},
            "parity": {"state": "failed", "error": "interrupted"},
        },
        "metrics": {
            "float_accuracy": 0.9648,
            "qnet_accuracy": 0.9537,
            "rw_target": 8.0,
            "rw_actual": 8.5871,
            "ra_target": 4.0,
            "ra_actual": 4.25,
            "weight_bits": 27904,
            "bias_bits": 1256,
            "macs": 7488,
            "ebops": 71792,
            "qnet_digest": "5b" * 32,
            "seconds": {"search": 12.34},
        },
    }
    write("run.json", record)
    tensors = (
        tensor("input", "input", 8, 0, signed=False),
        tensor(f"{layer}.weight", "weight", 3, -2, 4096),
        tensor(f"{layer}_q", "activation", 6, 3, signed=False),
    )
    Scheme(tensors, {"method": "hmq", "repaired": {f"{layer}.weight": [4, 3]}}).save(folder / "scheme.json")
    csim = {"values": 5400, "mismatches": mismatches, "max_abs_diff": 3 if mismatches else 0, "accuracy": 0.9537}
    if mismatches:
        csim["first_difference"] = {"tensor": layer, "sample": 2, "index": [1], "expected": 3, "actual": 0}
    simulators = {"qkeras": {**csim, "mismatches": 0, "max_abs_diff": 0, "accuracy": None}, "csim": csim}
    simulators["qkeras"].pop("first_difference", None)
    write("parity.json", {"passed": not mismatches, "samples": 540, "simulators": simulators})
    resources = [
        {"stage": "csynth", "tool": "Vitis HLS", "version": None, "part": "xcvu13p", "clock_ns": 5.0, "lut": 12345}
        | {"ff": None, "dsp": 0, "bram": None, "latency_cycles": 12, "ii": 1, "notes": layer}
    ]
    write("resources.json", resources)
    spans = {"zeros": 3, "nonzero": 4093, "log2": [-9.5, -7.0, -4.1, -3.2, -2.5, -1.9]}
    write("ranges.json", {"shares": [0, 0.01, 0.25, 0.5, 0.75, 1], "tensors": {f"{layer}.weight": spans}})
    steps = [1, 2, 3]
    search = {"step": steps, "loss": [2.0, 1.0, 0.5], "rate_expected": [4.0, 6.0, 8.0], "rate_actual": [4.0, 5.0, 8.5]}
    write("search.json", {**search, "rate_target": [4.0, 6.0, 8.0], "temperature": [1.0, 0.7, 0.5]})
    write("finetune.json", {"step": steps, "loss": [0.5, 0.4, 0.3], "val_accuracy": [0.9, 0.92, 0.95]})
    return folder
