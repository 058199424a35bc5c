"""What `test_parallel.py` has several processes do: `torchrun parallel_job.py OUT`, or one without torchrun."""

import copy
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hmq_fpga.ir import cost
from hmq_fpga.search import parallel
from hmq_fpga.search.checkpoint import Checkpoint
from hmq_fpga.search.methods import METHODS, find_scheme
from hmq_fpga.search.pruning import Nonzeros, Pruning
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, Task, finetune, fit


def digits() -> Task:
    """In double precision, in which sums in another order do not change what is chosen."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.from_numpy(data.data / 16), torch.from_numpy(data.target)
    return Task(x_train=x[:1000], y_train=y[:1000], x_val=x[1000:1250], y_val=y[1000:1250])


def network(*more: nn.Module) -> nn.Module:
    torch.manual_seed(parallel.number())  # the first one's weights count
    return nn.Sequential(nn.Linear(64, 32), *more, nn.ReLU(), nn.Linear(32, 10)).double()


class Stopping:
    """The loss of the task, which ends training once, in all processes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        self.calls += torch.is_grad_enabled()
        if self.calls == 60:
            raise StopIteration
        return F.cross_entropy(outputs, classes)


def job(out: Path) -> dict:
    """Weights of everything that is trained, and what each method finds."""
    task, made = digits(), {}
    model = network()
    fit(model, task, steps=100, learning_rate=1e-2, seed=0)
    made["float"] = model.state_dict()
    stopping = replace(task, custom_loss=Stopping())
    for _ in range(2):
        again = network()
        with suppress(StopIteration):
            fit(again, stopping, steps=100, learning_rate=1e-2, seed=0, checkpoint=Checkpoint(out / "kept", every_s=0))
    made["continued"] = again.state_dict()
    for method in METHODS:
        normed = network(nn.BatchNorm1d(32).double()) if method == "zeroq" else model
        if method == "zeroq":
            fit(normed, task, steps=30, learning_rate=1e-2, seed=0)
            made["normed"] = normed.state_dict()
        read = instrument(normed, task.input_shape).double()
        read, scheme, _ = find_scheme(read, task, Budget(search_steps=150), Target(weight_rate=10), method=method)
        formats = [(t.name, str(t.format), t.widths is None or t.widths.tolist()) for t in scheme.tensors]
        made[method] = {"rate": cost.weight_rate(scheme), "scheme": formats} | copy.deepcopy(read.state_dict())
        if method == "uniform":
            finetune(read, task, steps=50, learning_rate=2e-3, seed=0, shaping=Pruning(read, Nonzeros(0.6), task))
            made["finetune"] = read.state_dict()
            made["finetune"]["zeros"] = Nonzeros(0.6).size(read)
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.joined("cpu"):
        out = Path(sys.argv[1])
        torch.save(job(out), out / f"{parallel.number()}.pt")
        try:
            fit(network(), replace(digits(), batch_size=63), steps=1, learning_rate=1e-2, seed=0)
        except ValueError as error:
            (out / "error").write_text(str(error))
    threads = [Path(thread, "comm").read_text() for thread in Path("/proc/self/task").iterdir()]
    if "gloo" in "".join(threads):  # they would run into the end of the interpreter, and now and then abort it
        sys.exit(f"the process group has ended, its threads have not: {threads}")
