"""How hard samples are: the higher a score, the harder.

Scores that are published the other way round, margin and AUM, have their sign or direction turned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UsageError

Scores = npt.NDArray[np.float32]
WINDOW = 10
"""Steps from epoch to epoch that a window of TDDS has."""


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Euclidean distance of the class probabilities from the label, in [0, sqrt 2].

    Source: Paul et al., "Deep Learning on a Data Diet", 2021: of a network early in training, the
    mean over several.

    Args:
        logits: (N, C).
        labels: int64 (N,).
    """
    apart = logits.double().softmax(1) - F.one_hot(labels, logits.shape[1])
    return apart.square().sum(1).sqrt()


def margin(logits: Tensor) -> Tensor:
    """1 less the difference of the two largest class probabilities, in [0, 1]."""
    best = logits.double().softmax(1).topk(2, dim=1).values
    return 1 - (best[:, 0] - best[:, 1])


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the class probabilities, in nats."""
    log = logits.double().log_softmax(1)
    return -(log.exp() * log).sum(1)


def least_confidence(logits: Tensor) -> Tensor:
    """1 less the largest class probability."""
    return 1 - logits.double().softmax(1).amax(1)


class Dynamics:
    """Scores from what a network says of samples after each epoch of its training.

    Args:
        labels: int64 (N,).
        window: epochs of a window of TDDS.
        decay: of TDDS, by which the weight of earlier windows falls.
    """

    def __init__(self, labels: Tensor, window: int = WINDOW, decay: float = 0.9) -> None:
        self.labels, self.window, self.decay = labels, window, decay
        self.epochs = 0
        self._was_right = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        self._learned = self._was_right.clone()
        self._forgotten = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        self._margins = self._forgotten.clone()
        self._last: Tensor | None = None
        self._steps: list[Tensor] = []
        self._tdds = self._forgotten.clone()

    def add(self, logits: Tensor) -> None:
        """Take the logits (N, C) after the next epoch."""
        self.epochs += 1
        right = logits.argmax(1) == self.labels
        self._forgotten += self._was_right & ~right
        self._was_right, self._learned = right, self._learned | right
        own = logits.double().gather(1, self.labels[:, None])[:, 0]
        others = logits.double().scatter(1, self.labels[:, None], -torch.inf).amax(1)
        self._margins += own - others
        log = logits.double().log_softmax(1)
        if self._last is not None:
            self._steps.append((log.exp() * (log - self._last)).abs().sum(1))
            if len(self._steps) == self.window:
                steps = torch.stack(self._steps)
                spread = (steps - steps.mean(0)).square().sum(0).sqrt()
                self._tdds = (1 - self.decay) * self._tdds + self.decay * spread
                del self._steps[0]
        self._last = log

    def scores(self) -> dict[str, Scores]:
        """``forgetting``, ``aum`` and ``tdds``, float32 (N,) each.

        ``forgetting``: how often a sample was right and then wrong (Toneva et al., "An Empirical
        Study of Example Forgetting during Deep Neural Network Learning", 2019); one that never was
        right counts as forgotten once more than it could have been.

        ``aum``: minus the mean over epochs of the label's logit less the largest other one (Pleiss
        et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", 2020).

        ``tdds``: with p_t the class probabilities after epoch t, D_t = sum over classes of
        |p_(t+1) (log p_(t+1) - log p_t)|. For each window of W steps R is the Euclidean norm of D
        less its mean in the window; from one window to the next, S = (1 - decay) S + decay R, so
        that late windows weigh most (Zhang et al., "Spanning Training Progress: Temporal Dual-Depth
        Scoring (TDDS) for Enhanced Dataset Pruning", 2024).

        Raises:
            UsageError: there are fewer epochs than a window needs.
        """
        check_epochs(self.epochs, self.window)
        never = torch.full_like(self._forgotten, self.epochs // 2 + 1)
        found = {
            "forgetting": torch.where(self._learned, self._forgotten, never),
            "aum": -self._margins / self.epochs,
            "tdds": self._tdds,
        }
        return {name: values.cpu().numpy().astype(np.float32) for name, values in found.items()}


def check_epochs(epochs: int, window: int = WINDOW) -> None:
    """Raise UsageError where there are fewer epochs than a window of TDDS needs."""
    if epochs < window + 1:
        raise UsageError(
            f"Scores from training need {window + 1} epochs, and there are {epochs}.",
            hint=f"Train for longer: --set proxy.train.epochs={window + 1} or more.",
            code="few-epochs",
        )


def cosine_distance(x: npt.NDArray[Any], centres: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """1 less the cosine of each row and its centre, exact near 0 too.

    Args:
        x: (N, D).
        centres: (N, D), the centre that each row is compared with.
    """
    a, b = (np.asarray(rows, np.float64) for rows in (x, centres))
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b)]
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = a / lengths[0] - b / lengths[1]
    # Half the squared distance of unit vectors: a difference from 1 would lose its digits.
    made: npt.NDArray[np.float64] = np.einsum("ij,ij->i", apart, apart) / 2
    return made
