"""The oracle: problems, gradients, Hessians and minimisers in NumPy float64, sharing no code with
influx.

A gradient is written out by hand. A Hessian is the complex-step derivative of that gradient,
Im ∇J(θ + i·h·e_k)/h with h = 1e-30: it has no truncation error above h² and no cancellation, so it
is exact to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Family:
    """A loss, and the layer sizes of a linear model (d, K) or a tanh network (d, hidden, K)."""

    name: str
    loss: str
    sizes: tuple[int, ...]
    n: int = 10

    @property
    def leaves(self) -> tuple[int, ...]:
        """The number of parameters of each leaf: weight, bias, layer by layer."""
        pairs = zip(self.sizes, self.sizes[1:])
        return tuple(size for i, o in pairs for size in (o * i, o))

    @property
    def P(self) -> int:
        return sum(self.leaves)


@dataclass(frozen=True, eq=False)
class Problem:
    """Data, weights w, l2 per leaf, a damping λ, queries, and the parameters θ to look at."""

    family: Family
    seed: int
    X: np.ndarray
    y: np.ndarray
    w: np.ndarray
    l2: np.ndarray
    damping: float
    Xq: np.ndarray
    yq: np.ndarray
    theta: np.ndarray

    @property
    def n(self) -> int:
        return len(self.X)

    @property
    def penalty(self) -> np.ndarray:
        """The diagonal of ∇²Ω."""
        return np.repeat(self.l2, self.family.leaves)

    def __repr__(self) -> str:
        return (
            f"Problem({self.family.name}, seed={self.seed}, damping={self.damping}, "
            f"l2={self.l2.tolist()}, w={self.w.tolist()})"
        )


def complex_step(fn: Callable, theta: np.ndarray) -> np.ndarray:
    """∂fn/∂θ, exact to rounding; the last axis is θ's."""
    h, P = 1e-30, theta.size
    columns = [np.imag(fn(theta + 1j * h * np.eye(P)[k])) / h for k in range(P)]
    return np.stack(columns, axis=-1)


def logsumexp(z: np.ndarray) -> np.ndarray:
    top = z.real.max(axis=-1, keepdims=True)
    return np.log(np.exp(z - top).sum(axis=-1)) + top[..., 0]


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - logsumexp(z)[..., None])


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _layers(family: Family, theta: np.ndarray):
    blocks = np.split(theta, np.cumsum(family.leaves)[:-1])
    shapes = zip(family.sizes, family.sizes[1:])
    return [(W.reshape(o, i), b) for (i, o), W, b in zip(shapes, blocks[::2], blocks[1::2])]


def _hidden(family: Family, theta: np.ndarray, X: np.ndarray) -> np.ndarray:
    """The input of the last layer."""
    for W, b in _layers(family, theta)[:-1]:
        X = np.tanh(X @ W.T + b)
    return X


def outputs(family: Family, theta: np.ndarray, X: np.ndarray) -> np.ndarray:
    W, b = _layers(family, theta)[-1]
    return _hidden(family, theta, X) @ W.T + b


def jacobians(family: Family, theta: np.ndarray, X: np.ndarray) -> np.ndarray:
    """∂output/∂θ, [n, K, P], for at most one hidden layer."""
    h = _hidden(family, theta, X)
    n, K = len(X), family.sizes[-1]
    eye = np.broadcast_to(np.eye(K), (n, K, K))
    last = [(eye[..., None] * h[:, None, None, :]).reshape(n, K, -1), eye]
    if len(family.sizes) == 2:
        return np.concatenate(last, axis=2)
    back = _layers(family, theta)[-1][0][None] * (1 - h**2)[:, None, :]
    first = [(back[..., None] * X[:, None, None, :]).reshape(n, K, -1), back]
    return np.concatenate(first + last, axis=2)


def loss_of_output(kind: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    if kind == "softmax":
        return logsumexp(z) - np.take_along_axis(z, y[:, None], 1)[:, 0]
    if kind == "binary":
        return (np.log(1 + np.exp(z)) - y * z).sum(axis=1)
    return 0.5 * ((z - y) ** 2).sum(axis=1)


def residuals(kind: str, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """∂ℓ/∂output, [n, K]."""
    if kind == "softmax":
        return softmax(z) - np.eye(z.shape[1])[y]
    return sigmoid(z) - y if kind == "binary" else z - y


def output_hessians(kind: str, z: np.ndarray) -> np.ndarray:
    """∂²ℓ/∂output², [n, K, K]."""
    if kind == "squared":
        return np.broadcast_to(np.eye(z.shape[1]), (*z.shape, z.shape[1]))
    if kind == "binary":
        p = sigmoid(z)
        return (p * (1 - p))[:, :, None] * np.eye(z.shape[1])
    p = softmax(z)
    return p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None, :]


def losses(problem: Problem, theta: np.ndarray, X=None, y=None) -> np.ndarray:
    X, y = (problem.X, problem.y) if X is None else (X, y)
    return loss_of_output(problem.family.loss, outputs(problem.family, theta, X), y)


def gradients(problem: Problem, theta: np.ndarray, X=None, y=None) -> np.ndarray:
    """∇ℓ of every example, [n, P]."""
    X, y = (problem.X, problem.y) if X is None else (X, y)
    family = problem.family
    residual = residuals(family.loss, outputs(family, theta, X), y)
    return np.einsum("nkp,nk->np", jacobians(family, theta, X), residual)


def objective(problem: Problem, theta: np.ndarray, w=None) -> float:
    """J(θ, w) = (1/n) Σ wᵢ ℓᵢ + Ω."""
    w = problem.w if w is None else w
    return w @ losses(problem, theta) / problem.n + 0.5 * (problem.penalty * theta**2).sum()


def gradient(problem: Problem, theta: np.ndarray, w=None) -> np.ndarray:
    w = problem.w if w is None else w
    return w @ gradients(problem, theta) / problem.n + problem.penalty * theta


def hessian(problem: Problem, theta: np.ndarray, w=None) -> np.ndarray:
    return complex_step(lambda t: gradient(problem, t, w), theta)


def gauss_newton(problem: Problem, theta: np.ndarray) -> np.ndarray:
    family = problem.family
    A = jacobians(family, theta, problem.X)
    S = output_hessians(family.loss, outputs(family, theta, problem.X))
    data = np.einsum("n,nkp,nkl,nlq->pq", problem.w / problem.n, A, S, A)
    return data + np.diag(problem.penalty)


def curvature(problem: Problem) -> np.ndarray:
    """H + λI at the problem's own θ."""
    return hessian(problem, problem.theta) + problem.damping * np.eye(problem.theta.size)


def class_logits(family: Family, z: np.ndarray) -> np.ndarray:
    return np.concatenate([0 * z, z], axis=1) if family.loss == "binary" else z


def margins(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """γ = z_y − logsumexp_{c≠y} z_c of class logits [n, C]."""
    C = z.shape[1]
    others = np.stack([np.delete(np.arange(C), label) for label in y])
    own = np.take_along_axis(z, y[:, None], 1)[:, 0]
    return own - logsumexp(np.take_along_axis(z, others, 1))


def measurement(problem: Problem, kind: str, theta: np.ndarray, X=None, y=None) -> np.ndarray:
    """A measurement of the queries (or of other examples): [m], or [m, C]."""
    X, y = (problem.Xq, problem.yq) if X is None else (X, y)
    if kind == "loss":
        return losses(problem, theta, X, y)
    z = class_logits(problem.family, outputs(problem.family, theta, X))
    if kind == "margin":
        return margins(z, y.reshape(-1).astype(int))
    return softmax(z) if kind == "probability" else z


def measurement_gradient(problem: Problem, kind: str = "loss", X=None, y=None) -> np.ndarray:
    """∇m at the problem's θ: [m, P], or [m, C, P]."""
    return complex_step(lambda t: measurement(problem, kind, t, X, y), problem.theta)


def influence(problem: Problem, kind: str = "loss") -> np.ndarray:
    """−∇mᵀ (H + λI)⁻¹ gᵢ by the formula: [m, n], or [m, C, n]."""
    solved = np.linalg.solve(curvature(problem), gradients(problem, problem.theta).T)
    return -measurement_gradient(problem, kind) @ solved


def self_influence_size(problem: Problem) -> np.ndarray:
    """sᵢ = gᵢᵀ (H + λI)⁻¹ gᵢ."""
    g = gradients(problem, problem.theta)
    return np.einsum("np,pn->n", g, np.linalg.solve(curvature(problem), g.T))


def minimise(problem: Problem, w=None, *, start=None, centre=None) -> np.ndarray:
    """The minimiser of J(·, w) near `start`; with a `centre`, that of J(·, w) + (λ/2)‖· − centre‖²."""
    start = problem.theta if start is None else start
    pull = 0.0 if centre is None else problem.damping
    centre = start if centre is None else centre
    return newton(
        lambda t: objective(problem, t, w) + 0.5 * pull * ((t - centre) ** 2).sum(),
        lambda t: gradient(problem, t, w) + pull * (t - centre),
        lambda t: hessian(problem, t, w) + pull * np.eye(t.size),
        start,
    )


def newton(value, grad, hess, theta: np.ndarray, steps: int = 200) -> np.ndarray:
    """Newton's method, convexified and with backtracking while far from a minimum."""
    for _ in range(steps):
        g, H = grad(theta), hess(theta)
        size, low = np.linalg.norm(g), np.linalg.eigvalsh(H)[0]
        step = -np.linalg.solve(H + max(0.0, 1e-2 - low) * np.eye(g.size) * (low < 1e-6), g)
        if size < 1e-11:  # one step more leaves rounding only, by quadratic convergence
            return theta + step
        length, here = 1.0, value(theta)
        # Once the gradient is tiny, differences of J are rounding: take the full step.
        while size > 1e-6 and value(theta + length * step) > here + 1e-4 * length * (g @ step):
            length *= 0.5
        theta = theta + length * step
    return theta
