"""The losses as the papers print them: slow, in float64, on one-hot targets.

Nothing here is shared with the package, so that a slip in one of the two shows.
"""

import numpy as np


def sigmoid(x):
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def one_hot(labels, columns):
    """(N,) labels, of which any outside [0, columns) is background, to (N, columns)."""
    return (np.asarray(labels)[:, None] == np.arange(columns)).astype(np.float64)


def poly_focal(p_t, gamma=0.0, epsilons=(), xi=0.0, gamma_hc=0.0):
    """f(p_t), with the polynomial written as powers."""
    loss = -((1 - xi) * (1 - p_t) ** gamma + xi * (1 + p_t) ** gamma_hc) * np.log(p_t)
    for j, epsilon in enumerate(epsilons, start=1):
        loss = loss + epsilon * (1 - p_t) ** (gamma + j)
    return loss


def sigmoid_loss(logits, labels, alpha=None, xi=0.0, **poly):
    """(N, C) losses of (N, C) logits and (N,) labels."""
    logits = np.asarray(logits, np.float64)
    y = one_hot(labels, logits.shape[1])
    p = sigmoid(logits)
    loss = np.where(y == 1, poly_focal(p, xi=xi, **poly), poly_focal(1 - p, xi=0.0, **poly))
    if alpha is not None:
        alpha = np.asarray(alpha)
        loss = loss * (y * alpha + (1 - y) * (1 - alpha))
    return loss


def softmax_loss(logits, labels, **poly):
    """(N,) losses of (N, K) logits and (N,) labels."""
    logits = np.asarray(logits, np.float64)
    p_t = (softmax(logits) * one_hot(labels, logits.shape[1])).sum(axis=1)
    return poly_focal(p_t, **poly)
