import numpy as np
import pytest
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def digits_file(tmp_path_factory):
    """A small data set in a user's file: a part of the digits."""
    x, y = load_digits(return_X_y=True)
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    x = (x / 16).astype(np.float32)
    np.savez(path, x_train=x[:900], y_train=y[:900], x_test=x[900:1100], y_test=y[900:1100])
    return path


@pytest.fixture(scope="session")
def own_model(tmp_path_factory):
    """A user's file with models that work and models that do not."""
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(
        "import torch\n"
        "from torch import nn\n"
        "def small():\n"
        "    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))\n"
        "def gelu():\n"
        "    return nn.Sequential(nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 10))\n"
        "def nan():\n"
        "    model = small()\n"
        "    model[0].weight.data[0, 0] = float('nan')\n"
        "    return model\n"
        "def narrow():\n"
        "    return nn.Linear(64, 4)\n"
        "def mirror():\n"
        "    conv = [nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)]\n"
        "    return nn.Sequential(*conv, nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid())\n"
        "def logistic():\n"
        "    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 1), nn.Sigmoid())\n"
        "def logit():\n"
        "    return logistic()[:-1]\n"
        "def certain():\n"
        "    return nn.Sequential(nn.Linear(64, 1), nn.Softmax(1))\n"
        "class Heads(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Linear(64, 12), nn.ReLU())\n"
        "        self.mean, self.halves = nn.Linear(12, 1), nn.Linear(12, 2)\n"
        "    def forward(self, x):\n"
        "        x = self.body(x)\n"
        "        return self.mean(x), self.halves(x)\n"
        "def over_rows():\n"
        "    conv = [nn.Conv1d(8, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2)]\n"
        "    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(24, 10))\n"
        "def deaf_worker():\n"
        "    import multiprocessing\n"
        "    return deaf() if multiprocessing.parent_process() else small()\n"
        "def deaf():\n"
        "    import os, signal\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except:\n"
        "        pass\n"
        "    return small()\n"
        "def flat():\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 4, stride=4), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.Flatten())\n"
        "def overlap():\n"
        "    pool = nn.MaxPool2d(3, stride=2)\n"
        "    return nn.Sequential(nn.Conv2d(1, 2, 1), pool, nn.Flatten(), nn.Linear(18, 10))\n"
        "def needy(width):\n"
        "    return nn.Linear(64, width)\n"
        "def broken():\n"
        "    raise ValueError('a depth\\nis missing')\n"
    )
    return path
