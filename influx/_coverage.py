"""What a curvature makes of every parameter."""

import equinox as eqx
import jax.tree_util as jtu

from ._curvature import AbstractCurvature, AbstractFactored
from ._curvature.block import Blocks
from ._influence import Influence, check_influence
from ._response import implicit_response


class Treatment(eqx.Module):
    """One row of a coverage table: the `parameters` (their paths in the model), how many entries they
    have, and the `treatment`."""

    parameters: tuple[str, ...]
    entries: int
    treatment: str


class Coverage(eqx.Module):
    """What `coverage` found. `str(coverage)` is a plain table; `.share` the share of all parameters that
    each treatment has."""

    rows: tuple[Treatment, ...]

    @property
    def share(self) -> dict[str, float]:
        total = sum(row.entries for row in self.rows)
        shares: dict[str, float] = {}
        for row in self.rows:
            shares[row.treatment] = shares.get(row.treatment, 0.0) + row.entries / total
        return shares

    def __str__(self) -> str:
        total = sum(row.entries for row in self.rows)
        share = lambda row: f"{row.entries / total:7.2%} {row.entries:12,}  {row.treatment:36}"
        return "\n".join(f"{share(row)} {', '.join(row.parameters)}" for row in self.rows)


def coverage(f: Influence) -> Coverage:
    """Which approximation each parameter of the model gets, so that nothing is skipped in silence.

    | treatment | is |
    |---|---|
    | `"Kronecker"` | G ⊗ A, a weight and its bias together |
    | `"Kronecker, one-hot input"` | the same for look-ups: A is a diagonal of counts |
    | `"… diagonal input factor"` (or `output`) | a side of more than 4,096: the diagonal of its factor |
    | `"exact"` | the matrix's own block: parameters of at most 1,024 entries used in any other way |
    | `"diagonal"` | the diagonal of that block, where it is larger |
    | `"unused"` | the output does not depend on it: its block is l2 |
    | a curvature's name | that curvature, of all such parameters together |
    | `"excluded"` | frozen by `restrict` |

    A parameter that fits none of them is an error where the curvature meets the model.

    **Raises:** `ValueError` under `Unrolled`, which has no curvature.

    **Cost:** none: it reads what the curvature holds.
    """
    check_influence("coverage", f)
    response = implicit_response(f.response, "coverage")
    rows = _rows(response.curvature, response.factored, _leaves(f.model))
    kept = sum(row.entries for row in rows)
    whole = [size for _, size in _leaves(f.risk.whole(f.model))]
    if sum(whole) > kept:
        rows.append(Treatment(("outside the restriction",), sum(whole) - kept, "excluded"))
    return Coverage(tuple(rows))


def _leaves(model) -> list[tuple[str, int]]:
    leaves = jtu.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
    return [(jtu.keystr(path), leaf.size) for path, leaf in leaves]


def _rows(
    curvature: AbstractCurvature, factored: AbstractFactored, leaves: list[tuple[str, int]]
) -> list[Treatment]:
    if factored.layered is not None:
        layers = [block.layer for block in factored.layered.blocks]
        names = lambda layer: tuple(leaves[leaf][0] for leaf in layer.leaves)
        return [Treatment(names(layer), layer.size, layer.treatment) for layer in layers]
    if isinstance(factored, Blocks):
        return [row for part in _parts(factored, leaves) for row in _rows(*part)]
    names, sizes = zip(*leaves)
    return [Treatment(names, sum(sizes), type(curvature).__name__)]


def _parts(factored: Blocks, leaves):
    """Each block with its own curvature and leaves, told by where they start."""
    starts, start = {}, 0
    for name, size in leaves:
        starts[start] = (name, size)
        start += size
    for block in factored.blocks:
        own = [starts[i] for i in block.indices.tolist() if i in starts]
        yield block.curvature, block.factored, own
