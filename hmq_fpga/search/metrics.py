"""Figures of merit of a network's outputs: of classes, of several labels for each sample, and of real targets."""

from __future__ import annotations

from torch import Tensor

ONE_NUMBER = ((1,), ())  # shapes of one number for each sample


def like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs in the shape of targets, where they are one number for each sample."""
    return outputs.reshape(targets.shape) if outputs.shape[1:] in ONE_NUMBER and targets[0].numel() == 1 else outputs


def accuracy(scores: Tensor, classes: Tensor) -> float:
    """Share of samples whose largest score is that of their class; a single score is positive for class 1."""
    found = scores.flatten() > 0 if scores.shape[1:] in ONE_NUMBER else scores.argmax(1)
    return float((found == classes).double().mean())


def figures(returned: Tensor, scores: Tensor, targets: Tensor) -> dict[str, float]:
    """What to say of a whole split.

    Args:
        returned: what the user's model returns.
        scores: the same before a final softmax or sigmoid.
        targets: int64 classes, `(n,)`; bool labels, `(n, labels)`, each told by the sign of its score; else real.

    Returns:
        Of classes `accuracy`. Of labels `accuracy`, the share of samples with all of them right; `label_accuracy`, the
        share of labels; and `f1_micro`, `f1_macro`: of all labels together, and the mean of each label's own, which is
        zero where neither a label nor a prediction is there. Of real targets `mse`, `rmse`, `mae`, and `r2`, the mean
        over outputs of the share of variance explained, leaving out outputs that do not vary.
    """
    if targets.is_floating_point():
        return _of_values(like(returned, targets).double(), targets.double())
    if targets.ndim > 1:
        return _of_labels(scores > 0, targets.bool())
    return {"accuracy": accuracy(scores, targets)}


def _of_labels(found: Tensor, labels: Tensor) -> dict[str, float]:
    right = (found == labels).double()
    hits, made = (found & labels).sum(0).double(), (found.sum(0) + labels.sum(0)).double()
    each = 2 * hits / made.clamp(min=1)
    return {
        "accuracy": float(right.prod(1).mean()),
        "label_accuracy": float(right.mean()),
        "f1_micro": float(2 * hits.sum() / made.sum().clamp(min=1)),
        "f1_macro": float(each.mean()),
    }


def _of_values(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    error = outputs - targets
    mse = float(error.square().mean())
    found = {"mse": mse, "rmse": mse**0.5, "mae": float(error.abs().mean())}
    spread = (targets - targets.mean(0)).square().sum(0)
    if (varies := spread > 0).any():
        found["r2"] = float((1 - error.square().sum(0)[varies] / spread[varies]).mean())
    return found
