import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from hmq_fpga.search.train import Budget, Task, fit

torch.set_num_threads(1)  # more only slow such small networks down


@pytest.fixture(scope="session")
def digits() -> Task:
    data = load_digits()
    x, y = torch.from_numpy((data.data / 16).astype(np.float32)), torch.from_numpy(data.target)
    return Task(x_train=x[:1000], y_train=y[:1000], x_val=x[1000:1250], y_val=y[1000:1250])


@pytest.fixture(scope="session")
def budget() -> Budget:
    return Budget(float_steps=300, search_steps=300, finetune_steps=100)


@pytest.fixture(scope="session")
def mlp(digits: Task, budget: Budget) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )
    fit(model, digits, steps=budget.float_steps, learning_rate=1e-2, seed=0)
    return model
