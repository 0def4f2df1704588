"""Kronecker factors of the oracle's families in NumPy, from Jacobians written out by hand."""

from dataclasses import dataclass

import numpy as np

from . import _oracle as oracle
from ._oracle import Problem


@dataclass(frozen=True)
class DenseLayer:
    """A layer z = W h̃ (the 1 of its bias in h̃): inputs [n, i + 1], ∂output/∂z as [n, K, o], and where
    its parameters stand in θ, [o, i + 1]."""

    inputs: np.ndarray
    back: np.ndarray
    places: np.ndarray


def layers(problem: Problem) -> list[DenseLayer]:
    family, n = problem.family, problem.n
    jacobian = oracle.jacobians(family, problem.theta, problem.X)
    hidden = [oracle._hidden(family, problem.theta, problem.X)] if len(family.sizes) > 2 else []
    inputs = [problem.X, *hidden]
    found, start = [], 0
    for h, (i, o) in zip(inputs, zip(family.sizes, family.sizes[1:])):
        weight = start + np.arange(o * i).reshape(o, i)
        bias = start + o * i + np.arange(o)
        places = np.concatenate([weight, bias[:, None]], axis=1)
        found.append(
            DenseLayer(np.append(h, np.ones((n, 1)), axis=1), jacobian[:, :, bias], places)
        )
        start += o * (i + 1)
    return found


def middles(problem: Problem, fisher: str = "exact") -> np.ndarray:
    """The Fisher's second moments in output space, [n, K, K]."""
    z = oracle.outputs(problem.family, problem.theta, problem.X)
    if fisher == "exact":
        return oracle.output_hessians(problem.family.loss, z)
    r = oracle.residuals(problem.family.loss, z, problem.y)
    return r[:, :, None] * r[:, None, :]


def factors(problem: Problem, layer: DenseLayer, fisher: str = "exact"):
    """G and A."""
    each = np.einsum("nko,nkl,nlp->nop", layer.back, middles(problem, fisher), layer.back)
    G = np.einsum("n,nop->op", problem.w / problem.n, each)
    A = np.einsum("n,ni,nj->ij", problem.w / problem.w.sum(), layer.inputs, layer.inputs)
    return G, A


def kfac(problem: Problem, fisher: str = "exact") -> np.ndarray:
    """H of K-FAC, l2 (in the eigenbasis) contained."""
    return _blocks(problem, fisher, lambda layer, G, A: np.kron(G, A))


def ekfac(problem: Problem, fisher: str = "exact") -> np.ndarray:
    """H of EK-FAC: the diagonal of the layer's own block in K-FAC's eigenbasis."""
    return _blocks(problem, fisher, lambda layer, G, A: block(problem, layer, fisher))


def block(problem: Problem, layer: DenseLayer, fisher: str = "exact") -> np.ndarray:
    """The layer's block of the Fisher matrix, in the order of `places`."""
    J = np.einsum("nko,ni->nkoi", layer.back, layer.inputs)
    J = J.reshape(problem.n, J.shape[1], -1)
    return np.einsum("n,nkp,nkl,nlq->pq", problem.w / problem.n, J, middles(problem, fisher), J)


def _blocks(problem: Problem, fisher: str, matrix) -> np.ndarray:
    H = np.zeros((problem.theta.size,) * 2)
    for layer in layers(problem):
        G, A = factors(problem, layer, fisher)
        U = np.kron(np.linalg.eigh(G)[1], np.linalg.eigh(A)[1])
        flat = layer.places.reshape(-1)
        penalty = np.square(U).T @ problem.penalty[flat]
        values = np.diag(U.T @ matrix(layer, G, A) @ U) + penalty
        H[np.ix_(flat, flat)] = (U * values) @ U.T
    return H
