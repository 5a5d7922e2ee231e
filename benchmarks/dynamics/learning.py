"""
From gradients to updates: how fast a method learns in the world of `world.py` under a given optimizer, by mean steps
(`learn`) and, as a check, by Adam on sampled groups (`simulate`).
"""

from collections.abc import Callable

import numpy as np

from benchmarks.dynamics.world import Arm, Moments, batch, logit, moments, one_skill, sigmoid


def sgd_step(of_batch: Moments) -> np.ndarray:
    """The theorem's step at a learning rate of 1: the gradient itself. Shape `(K,)`."""
    return of_batch.mean_K


def adam_step(of_batch: Moments) -> np.ndarray:
    """
    The mean step of Adam at a learning rate of 1: the mean of the gradient over the root of its mean square,

        E[g] / sqrt(sum over logits of E[g^2])         length s / sqrt(1 + s^2), s the signal to noise ratio of the batch

    All logits share one scale, because every weight of a network touches all of them. A gradient that is there in a share
    L of the updates counts sqrt(L), not L. Shape `(K,)`.
    """
    return of_batch.mean_K / max(np.sqrt(of_batch.square_K.sum()), 1e-300)


def noise_limited_step(of_batch: Moments) -> np.ndarray:
    """
    [`adam_step`] if the mean square is all noise: few groups per update, or a network in which most of a gradient belongs
    to other prompts. Its length is the signal to noise ratio of the batch. Shape `(K,)`.
    """
    return of_batch.mean_K / max(of_batch.noise, 1e-300)


def adam_step_per_logit(of_batch: Moments) -> np.ndarray:
    """[`adam_step`] with a scale for each logit. With infinitely large batches: the sign of the gradient. Shape `(K,)`."""
    return of_batch.mean_K / np.maximum(np.sqrt(of_batch.square_K), 1e-300)


def learn(
    arm: Arm,
    start_H: np.ndarray,
    n_groups: int | None = None,
    step: Callable[[Moments], np.ndarray] = sgd_step,
    learning_rate: float = 1.0,
    until: float = 0.9,
    most: int = 20_000,
    shared: bool = False,
) -> np.ndarray:
    """
    P(every step right), without luck, before each update and after the last one. The policy moves by the mean step.

    Args:
        arm ([`Arm`]):
            Gives the advantages.
        start_H (`np.ndarray` of shape `(H,)`):
            P(right step) at the start, before and after an error.
        n_groups (`int`, *optional*):
            Groups per update; None for infinitely many.
        step (`Callable`, *optional*, defaults to [`sgd_step`]):
            From the moments of the batch to the step.
        learning_rate (`float`, *optional*, defaults to `1.0`):
            Factor on the step.
        until, most (*optional*, default to `0.9`, `20_000`):
            Stops at this accuracy, or after so many updates.
        shared (`bool`, *optional*, defaults to `False`):
            Whether all steps are [`one_skill`].

    Example:

    ```python
    >>> learn(prepare("grpo"), np.full(5, 0.8), until=0.5).round(2)
    array([0.33, 0.37, 0.41, 0.45, 0.48, 0.52])
    ```
    """
    start_H = np.asarray(start_H, dtype=np.float64)
    logits_H, accuracy = logit(start_H), [float(np.prod(start_H))]
    while accuracy[-1] < until and len(accuracy) <= most:
        p_H = sigmoid(logits_H)
        group = one_skill(moments(arm, p_H, p_H)) if shared else moments(arm, p_H, start_H)
        move_K = step(batch(arm, group, n_groups))
        logits_H = logits_H + learning_rate * (move_K if shared else move_K[: arm.n_steps])
        accuracy.append(float(np.prod(sigmoid(logits_H))))
    return np.array(accuracy)


def updates_until(accuracy: np.ndarray, target: float) -> float:
    """
    After how many updates `accuracy` first reaches `target`, linear between updates; NaN if never.

    ```python
    >>> updates_until(np.array([0.1, 0.3, 0.5]), 0.4)
    1.5
    ```
    """
    above = np.flatnonzero(np.asarray(accuracy) >= target)
    if len(above) == 0:
        return float("nan")
    i = int(above[0])
    return 0.0 if i == 0 else float(i - 1 + (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1]))


def mean_until(accuracy: np.ndarray, n_updates: float) -> float:
    """
    Area under the curve from 0 to `n_updates`, over `n_updates`. A curve that ends earlier keeps its last value.

    ```python
    >>> mean_until(np.array([0.0, 1.0]), 2)
    0.75
    ```
    """
    n_whole = int(np.ceil(n_updates))
    at = np.append(np.arange(n_whole), n_updates)
    values = np.interp(at, np.arange(len(accuracy)), accuracy)
    return float(np.trapezoid(values, at) / n_updates)


def sample_gradients(
    arm: Arm, p_NH: np.ndarray, behind_NH: np.ndarray, n_groups: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Sampled gradients of N policies, each of one batch of `n_groups` groups, shape `(N, 2H)`. `p_NH` and `behind_NH` are
    P(right step) before and after an error.
    """
    size, n_steps = arm.group_size, arm.n_steps
    n_verdicts = arm.counts_CM.shape[1]
    p, behind = p_NH[:, None, None, :], behind_NH[:, None, None, :]
    draws = rng.random((len(p_NH), n_groups, size, n_steps))  # policies, groups, completions, steps
    right = draws < p
    t = np.cumprod(right, axis=-1).sum(axis=-1)
    verdict = (rng.random(t.shape)[..., None] > np.cumsum(arm.verdicts_TM, axis=1)[t][..., :-1]).sum(axis=-1)
    counts = (verdict[..., None] == np.arange(n_verdicts)).sum(axis=2)
    code = (size + 1) ** np.arange(n_verdicts)
    codes_C = arm.counts_CM @ code
    order = np.argsort(codes_C)
    group = order[np.searchsorted(codes_C[order], counts @ code)]
    paid = arm.paid_CMH[group[..., None], verdict]
    step = np.arange(n_steps)
    before = (step <= t[..., None]) * (right - p)
    after = (step > t[..., None]) * ((draws < behind) - behind)
    gradient = np.concatenate([paid * before, paid * after], axis=-1).mean(axis=2)
    if arm.name == "grpo_live":
        live = ((paid != 0).any(axis=(2, 3))).sum(axis=1)
        return gradient.sum(axis=1) / np.maximum(live, 1)[:, None]
    return gradient.mean(axis=1)


def simulate(
    arm: Arm,
    start_H: np.ndarray,
    n_groups: int,
    n_updates: int,
    learning_rate: float,
    n_runs: int = 16,
    n_weights: int = 256,
    betas: tuple[float, float] = (0.9, 0.999),
    shared: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """
    P(every step right) under Adam on sampled batches, shape `(n_runs, n_updates + 1)`: a check on [`adam_step`]. Every logit
    is a sum of `n_weights` weights with random signs, so every weight touches every logit. Adam moves the weights.

    Args:
        arm ([`Arm`]):
            Gives the advantages.
        start_H (`np.ndarray` of shape `(H,)`):
            P(right step) at the start, before and after an error.
        n_groups, n_updates (`int`):
            Groups per update, and updates.
        learning_rate (`float`):
            Length of a step of the logits if every update had the same gradient, as in [`learn`].
        n_runs, n_weights (`int`, *optional*, default to `16`, `256`):
            Independent runs, and the weights of each.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Of Adam.
        shared (`bool`, *optional*, defaults to `False`):
            Whether all steps are [`one_skill`].
        seed (`int`, *optional*, defaults to `0`):
            Of everything.
    """
    rng = np.random.default_rng(seed)
    start = np.tile(logit(start_H), 2)
    touch = rng.choice([-1.0, 1.0], size=(n_runs, n_weights, 1 if shared else 2 * arm.n_steps)) / np.sqrt(n_weights)
    touch = np.broadcast_to(touch, (n_runs, n_weights, 2 * arm.n_steps))
    weights, first, second = (np.zeros((n_runs, n_weights)) for _ in range(3))
    accuracy = np.empty((n_runs, n_updates + 1))
    for update in range(n_updates + 1):
        p = sigmoid(start + np.einsum("nw,nwh->nh", weights, touch))
        accuracy[:, update] = p[:, : arm.n_steps].prod(axis=1)
        if update == n_updates:
            break
        gradient = sample_gradients(arm, p[:, : arm.n_steps], p[:, arm.n_steps :], n_groups, rng)
        of_weights = np.einsum("nh,nwh->nw", gradient, touch)
        first = betas[0] * first + (1 - betas[0]) * of_weights
        second = betas[1] * second + (1 - betas[1]) * of_weights**2
        corrected = first / (1 - betas[0] ** (update + 1))
        scale = np.sqrt(second / (1 - betas[1] ** (update + 1))) + 1e-12
        weights = weights + learning_rate / np.sqrt(n_weights) * corrected / scale
    return accuracy
