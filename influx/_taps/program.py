"""A program read for its linear uses of parameters, and run with each of them watched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array

from .._equations import CALLS, apply, inner_program
from .rules import RULES
from .tap import Tap
from .view import Made, Spread, View
from .windows import max_pool

# Windows of more entries than this are not taken apart: each is a slice in the program.
_LARGEST_POOL = 64

Role = View | Spread | Made | None
_ELEMENTWISE = ("add", "sub", "mul", "div", "add_any")


@dataclass(frozen=True)
class Use:
    """How a program uses a parameter leaf: "tap" or "bias" (`tap` is then that tap's key),
    "elementwise", or the name of an operation that no rule covers."""

    leaf: int
    kind: str
    tap: int = -1


@dataclass
class Reading:
    """What `read` found: the taps in the order of the program, where they are, and every use.

    `escaped` are taps whose output goes elsewhere than to one addition of a bias: the cotangent of the
    sum is then not that of the output.
    """

    taps: list[Tap] = field(default_factory=list)
    at: dict[int, Tap] = field(default_factory=dict)  # the equation's number
    inner: dict[int, "Reading"] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    escaped: set[int] = field(default_factory=set)
    depth: int = 0


def read(program: Jaxpr, roles: Sequence[Role], leaf_shapes, *, depth=0, counter=None):
    """The taps of `program`, given what its inputs are, and the roles of its outputs."""
    counter = iter(range(10**9)) if counter is None else counter
    known: dict[Any, Role] = {v: role for v, role in zip(program.invars, roles) if role is not None}
    found = Reading(depth=depth)
    role_of = lambda v: None if isinstance(v, Literal) else known.get(v)
    for number, equation in enumerate(program.eqns):
        inputs = [role_of(v) for v in equation.invars]
        if not any(inputs):
            continue
        name = equation.primitive.name
        if name in CALLS:
            inner, outs = read(
                inner_program(equation)[0], inputs, leaf_shapes, depth=depth, counter=counter
            )
            _adopt(found, number, inner, inner.taps)
            known.update(_named(equation.outvars, outs))
        elif name == "scan":
            inner = _read_scan(equation, inputs, leaf_shapes, depth, counter)
            length = equation.params["length"]
            _adopt(found, number, inner, [t.scanned(length, depth) for t in inner.taps])
        else:
            out = _read_equation(found, number, equation, inputs, leaf_shapes, counter)
            known.update(_named(equation.outvars[:1], [out]))
    for v in program.outvars:
        if isinstance(role := role_of(v), View | Spread):
            found.uses.append(Use(role.leaf, "output"))
    return found, [role_of(v) for v in program.outvars]


def escaping(roles: Sequence[Role]) -> set[int]:
    """The taps of those that are a tap's output."""
    return {role.tap for role in roles if isinstance(role, Made)}


def _named(variables, roles) -> dict[Any, Role]:
    return {v: role for v, role in zip(variables, roles) if role is not None}


def _adopt(found: Reading, number: int, inner: Reading, taps: list[Tap]) -> None:
    found.inner[number] = inner
    found.taps += taps
    found.escaped |= inner.escaped
    # A parameter handed back by an inner program is followed further outside.
    found.uses += [use for use in inner.uses if use.kind != "output"]


def _read_scan(equation, inputs, leaf_shapes, depth, counter) -> Reading:
    """Constants of the loop are the same parameter at every step, scanned arrays one slice each."""
    consts, carried = equation.params["num_consts"], equation.params["num_carry"]
    roles: list[Role] = []
    uses = []
    for place, role in enumerate(inputs):
        if isinstance(role, View) and place >= consts + carried:
            roles.append(role.scanned(depth))
        elif isinstance(role, View) and place < consts:
            roles.append(role)
        else:
            roles.append(None)
            if isinstance(role, View | Spread):
                uses.append(Use(role.leaf, "scan"))
    inner, outs = read(
        inner_program(equation)[0], roles, leaf_shapes, depth=depth + 1, counter=counter
    )
    inner.uses += uses
    inner.escaped |= escaping(inputs) | escaping(outs)
    # A parameter that a loop hands on is not followed.
    inner.uses = [Use(u.leaf, "scan") if u.kind == "output" else u for u in inner.uses]
    return inner


def _read_equation(found: Reading, number, equation, inputs, leaf_shapes, counter) -> Role:
    name = equation.primitive.name
    first = inputs[0]
    moved = _moved(equation, first, leaf_shapes) if len(equation.invars) == 1 else None
    if moved is not None:
        return moved
    views = [i for i, role in enumerate(inputs) if isinstance(role, View)]
    leaves = [role.leaf for role in inputs if isinstance(role, View | Spread)]
    if name in RULES and len(views) == 1 == len(leaves):
        view = inputs[views[0]]
        rule = RULES[name](equation, views[0], view, next(counter))
        if rule is not None:
            tap, features = rule
            found.taps.append(tap)
            found.at[number] = tap
            found.uses.append(Use(view.leaf, "tap", tap.key))
            found.escaped |= escaping(inputs)
            return None if features is None else Made(tap.key, features, view.scans)
    if name in ("add", "add_any") and (use := _bias(inputs, leaf_shapes)):
        found.uses.append(use)
        return None
    found.escaped |= escaping(inputs)
    kind = "elementwise" if name in _ELEMENTWISE else name
    found.uses += [Use(leaf, kind) for leaf in leaves]
    return None


def _moved(equation, role: Role, leaf_shapes) -> Role:
    """The role of what only moves, repeats or casts its input; `None` for any other operation."""
    name, params = equation.primitive.name, equation.params
    shape = equation.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        return _repeated(role, shape, params["broadcast_dimensions"], leaf_shapes)
    moves = {
        "transpose": lambda x: x.transpose(params["permutation"]),
        "reshape": lambda x: x.reshape(shape),
        "squeeze": lambda x: x.reshape(shape),
        "expand_dims": lambda x: x.reshape(shape),
        "convert_element_type": lambda x: x,
        "copy": lambda x: x,
    }
    floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    if (
        name not in moves
        or not floating
        or (params.get("dimensions") is not None and name == "reshape")
    ):
        return None
    if isinstance(role, View):
        return moves[name](role)
    if isinstance(role, Spread):
        return Spread(role.leaf, moves[name](role.entries), role.scans)
    assert isinstance(role, Made)
    return Made(role.tap, moves[name](role.features), role.scans)


def _repeated(role: Role, shape, dimensions, leaf_shapes) -> Role:
    def spread(x: np.ndarray) -> np.ndarray:
        sizes = [1] * len(shape)
        for axis, d in enumerate(dimensions):
            sizes[d] = x.shape[axis]
        return np.broadcast_to(x.reshape(sizes), shape)

    if isinstance(role, View):
        if np.prod(shape) == np.prod(role.shape) and list(dimensions) == sorted(dimensions):
            return role.reshape(shape)
        return Spread(role.leaf, spread(role.entries(leaf_shapes[role.leaf])), role.scans)
    if isinstance(role, Spread):
        return Spread(role.leaf, spread(role.entries), role.scans)
    assert isinstance(role, Made)
    return Made(role.tap, spread(role.features), role.scans)


def _bias(inputs, leaf_shapes) -> Use | None:
    """A parameter added to a tap's output, one entry a feature, in the features' order."""
    made = [role for role in inputs if isinstance(role, Made)]
    others = [role for role in inputs if isinstance(role, View | Spread)]
    if len(made) != 1 or len(others) != 1 or made[0].scans != others[0].scans:
        return None
    other = others[0]
    entries = other.entries(leaf_shapes[other.leaf]) if isinstance(other, View) else other.entries
    features = made[0].features
    # Axes of length 1 are repeated by the addition itself.
    fits = all(a in (1, b) for a, b in zip(entries.shape, features.shape))
    same = fits and np.array_equal(np.broadcast_to(entries, features.shape), features)
    return Use(other.leaf, "bias", made[0].tap) if same else None


def run(
    program: Jaxpr, reading: Reading, consts: Sequence[Array], inputs: Sequence[Array], shifts
) -> tuple[list[Array], list[Array]]:
    """The outputs of `program` with `shifts` (an array for each tap) added to what the taps make, and
    the activations of the taps."""
    values: dict[Any, Array] = dict(zip(program.constvars, consts)) | dict(
        zip(program.invars, inputs)
    )
    value = lambda v: v.val if isinstance(v, Literal) else values[v]
    activations, waiting = [], list(shifts)
    for number, equation in enumerate(program.eqns):
        operands = [value(v) for v in equation.invars]
        if number in reading.at:
            tap = reading.at[number]
            activations.append(tap.activation(operands))
            if tap.output is None:
                (out,) = apply(program, equation, operands)
            else:
                out = tap.output(activations[-1], operands)
            outs = [out + waiting.pop(0)]
        elif number in reading.inner:
            inner = reading.inner[number]
            here = [waiting.pop(0) for _ in inner.taps]
            go = _run_scan if equation.primitive.name == "scan" else _run_call
            outs, seen = go(equation, inner, operands, here)
            activations += seen
        elif _is_max_pool(equation):
            outs = [max_pool(operands[0], equation.params)]
        else:
            outs = apply(program, equation, operands)
        values.update(zip(equation.outvars, outs))
    return [value(v) for v in program.outvars], activations


def _is_max_pool(equation) -> bool:
    if equation.primitive.name != "reduce_window_max":
        return False
    floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    return floating and math.prod(equation.params["window_dimensions"]) <= _LARGEST_POOL


def _run_call(equation, inner: Reading, operands, shifts):
    program, consts = inner_program(equation)
    return run(program, inner, consts, operands, shifts)


def _run_scan(equation, inner: Reading, operands, shifts):
    params = equation.params
    consts, carried = params["num_consts"], params["num_carry"]
    body = params["jaxpr"]
    fixed, start, scanned = (
        operands[:consts],
        operands[consts : consts + carried],
        operands[consts + carried :],
    )

    def step(carry, slices):
        xs, here = slices
        outs, seen = run(body.jaxpr, inner, body.consts, [*fixed, *carry, *xs], here)
        return outs[:carried], (outs[carried:], seen)

    carry, (outs, seen) = jax.lax.scan(
        step, list(start), (list(scanned), list(shifts)),
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    joined = [tap.gather_steps(a, inner.depth - 1) for tap, a in zip(inner.taps, seen)]
    return [*carry, *outs], joined
