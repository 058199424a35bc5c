import pytest
from torch import nn

from hmq_fpga.ir.errors import InvalidInput
from hmq_fpga.search.reading import instrument
from hmq_fpga.search.target import Target
from hmq_fpga.study.run.config import RunConfig
from hmq_fpga.study.tasks import TASKS, resolve

SHAPES = {
    "digits_mlp": (64,),
    "digits_cnn": (1, 8, 8),
    "digits_tiny_cnn": (1, 8, 8),
    "pendigits_mlp": (16,),
    "pendigits_shallow": (16,),
    "mnist14_mlp": (196,),
    "mnist14_wide": (196,),
    "letter_mlp": (16,),
    "magic_mlp": (10,),
    "jets_mlp": (16,),
    "mnist_cnn": (1, 28, 28),
    "fashion_cnn": (1, 28, 28),
    "dscnn_fsdd": (1, 49, 10),
    "conv1d_fsdd": (10, 49),
    "fsdd_gru": (1, 49, 10),
    "mnist_rows_gru": (1, 28, 28),
    "tanh_policy": (4,),
    "digits_autoencoder": (64,),
    "resnet8_cifar": (3, 32, 32),
    "resnet20_cifar": (3, 32, 32),
    "resnet18_cifar": (3, 32, 32),
}
OUTPUTS = {"letter_mlp": 26, "magic_mlp": 2, "jets_mlp": 5, "tanh_policy": 1, "digits_autoencoder": 64}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_searched(name):
    model = instrument(TASKS[name].build(), SHAPES[name])
    Target().check(model)
    assert model.nodes[-1].shape == (OUTPUTS.get(name, 10),)


def test_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\n\ndef build():\n    return nn.Linear(3, 2)\n\ndef wrong():\n    return 7\n")
    task = resolve(f"{file}:build")
    assert isinstance(task.build(), nn.Linear)
    assert "def build" in task.source
    with pytest.raises(InvalidInput, match="with --data"):
        task.load(None)
    with pytest.raises(InvalidInput, match="must return a torch module, returned int"):
        resolve(f"{file}:wrong").build()
    with pytest.raises(InvalidInput, match="no function 'missing'"):
        resolve(f"{file}:missing")


def test_unknown_names(tmp_path):
    with pytest.raises(InvalidInput, match="unknown task 'digit_mlp'; there are digits_mlp"):
        resolve("digit_mlp")
    with pytest.raises(InvalidInput, match="no such file"):
        resolve(f"{tmp_path}/none.py:build")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with pytest.raises(InvalidInput, match="cannot be imported: ModuleNotFoundError"):
        resolve(f"{broken}:build")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, 0.1),
        ({"bops": 1e6}, 0.1),
        ({"luts": 4000}, 0),
        ({"zeros": 0.5}, 0),
        ({"distill": True}, 0),
        ({"luts": 4000, "label_smoothing": 0.2}, 0.2),
    ],
)
def test_what_is_pruned_or_distilled_is_trained_without_label_smoothing(given, found):
    assert RunConfig(task="digits_mlp", **given).smoothing(0.1) == found
