import numpy as np

from hmq_fpga.ir import cost
from hmq_fpga.search.freeze import freeze
from hmq_fpga.search.methods import find_scheme
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.search.train import Budget, evaluate, finetune
from hmq_fpga.search.zeros import ZeroPull, share_of_zeros, widen_thresholds


def test_zeros_that_were_asked_for_at_the_same_rate(mlp, digits):
    model = instrument(mlp, digits.input_shape, input_signed=False)
    model, found, _ = find_scheme(model, digits, Budget(search_steps=150), Target(weight_rate=8), method="uniform")
    wider = widen_thresholds(model, found, 0.6)
    assert cost.weight_rate(wider) == cost.weight_rate(found)
    for name, weight in model.weights.items():
        steps = wider[name].format.step / found[name].format.step
        assert steps in (1, 2, 4, 8)
        shares = [abs(share_of_zeros(weight, f) - 0.6) for f in (found[name].format, wider[name].format)]
        assert shares[1] <= shares[0]

    model.set_scheme(wider)
    pull = ZeroPull(model, 0.6)
    before = pull.share()
    finetune(model, digits, steps=1500, learning_rate=2e-3, seed=0, penalty=pull)
    zeros = np.concatenate([op.weight.ravel() for op in freeze(model).linears]) == 0
    assert zeros.mean() == pull.share()
    assert abs(zeros.mean() - 0.6) < 0.05
    assert abs(before - 0.6) > 0.05
    assert evaluate(model, digits)["val_accuracy"] > 0.85
