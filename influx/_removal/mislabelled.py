"""Which labels are wrong: what the others say against what is given."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._checks import check_whole, require_concrete
from .._custom_types import Model
from .._jacobian import is_affine
from .._memorization import own_margins
from .._risk import EmpiricalRisk
from .._validate import class_labels, class_logits_shape, require_labels, validate
from .evidence import by_features, by_model

REASONS = ("agrees with the others", "memorized", "not fitted")


class Mislabelled(eqx.Module):
    """What `find_mislabelled` found, per training point. `str(found)` is a table of the ten most suspect
    labels, `found.table(k)` of the k most suspect.

    - `score`: −`margin_without`; higher is more suspect, above 0 the others contradict the label: by
      "features" they give another class, by "model" they give this one less than even odds, which with
      more than two classes it may have and still be `suggested`
    - `given`, `suggested`: the label as it is, and the class that the others give the point
    - `margin_without`: the given class's margin by the others
    - `margin`: γᵢ(θ̂), the log-odds of the given label under the model as it was passed
    - `reason`: 0 agrees with the others; 1 memorized: contradicted, yet the model has learned it;
      2 not fitted: contradicted, and the model has not (`influx.REASONS` names them)
    """

    score: Float[Array, " n"]
    given: Int[Array, " n"]
    suggested: Int[Array, " n"]
    margin_without: Float[Array, " n"]
    margin: Float[Array, " n"]
    reason: Int[Array, " n"]

    def table(self, k: int = 10) -> str:
        """The k most suspect labels, most suspect first."""
        check_whole("k", k)
        rows = [f"{'index':>8} {'given':>6} {'suggested':>10} {'score':>9}  reason"]
        for i in np.argsort(-np.asarray(self.score), kind="stable")[:k]:
            labels = f"{int(self.given[i]):>6} {int(self.suggested[i]):>10}"
            reason = REASONS[int(self.reason[i])]
            rows.append(f"{i:>8} {labels} {float(self.score[i]):>9.3f}  {reason}")
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.table()


def find_mislabelled(
    risk: EmpiricalRisk, model: Model, *, evidence: Literal["features", "model"] = "features"
) -> Mislabelled:
    r"""Rank training points by how much the other points contradict their label.

    ```python
    found = influx.find_mislabelled(risk, model)
    print(found.table(20))                    # what to look at; nothing is deleted for you
    suspects = jnp.argsort(-found.score)
    ```

    Where labels are replaced at random, the chance that one is wrong falls with the probability that the
    other points give it. A point's own training hides that probability, and so do other wrong labels;
    the rule takes both away. It needs neither held-out data nor the retraining of a network.

    **Arguments:** `evidence`: what asks the others.

    - `"features"`: indicators of the labels are regressed on how near points lie, by

          K = 1 + mean over layers of exp(−‖aᵢ − aⱼ‖²),

      a the layer's input, centred and of mean square 1. The layers are the first half of the model's
      linear ones, in the order of the program (of one, that one; look-ups only where there are no
      others): a network has bent its later features towards wrong labels, and its last layer, however
      well it removes a point, believes them. By P12 this is the part of influence which does not read
      labels: feature similarity. Removal is
      exact for the features, ridge and data weights that are given: (ŷᵢ − hᵢyᵢ)/(1 − hᵢ), h the
      leverage, y the indicators less 1/C (which is added back). The ridge is, of six between Σw/3,300
      and Σw/14, the one whose predictions without each point err least. The margin γ is ŷ of the given
      class less the largest other. Asked twice: the second time with data weights wᵢ·(1 + γᵢ), within
      [0, wᵢ]. Features and the others' weights have seen the point's label, which favours it a little.
    - `"model"`, for outputs affine in the parameters: the model's own margins without the point,
      γᵢ(θ̂₋ᵢ), by one Newton step (P10). Four rounds: the model is refitted with data weights
      wᵢP(label i is right), where

          P(right) = σ(γᵢ(θ̂₋ᵢ) + log((1 − ε)(C − 1)/ε)),

      the posterior if a share ε of labels is any other class; ε is what 50 steps of EM from 0.1 make of
      it, the margins held fixed: all but the maximum-likelihood share within [0.001, 1 − 1/C]. Its
      classes are those a linear model can tell apart; points are near in `"features"` whatever it can.

    Pass the whole network, not its restricted head: a head's one layer takes the last features.

    **Sign and unit.** Higher is more suspect. `"features"`: differences of regressed indicators, above 0
    where the others prefer another class. `"model"`: log-odds, above 0 where they give the label less
    than even odds.

    **Raises:** `ValueError` for a loss without classes, `evidence="model"` where outputs are not affine,
    `evidence="features"` where no layer is linear in a parameter; what `influence` raises for a Hessian
    that is singular (give `l2` > 0).

    **Cost:** `"features"`: O(n²d + n³), d the number of the layers' inputs, and a few arrays of n²
    numbers. `"model"`: four trainings by Newton, n Newton steps each.

    **Source:** the rule is this project's own. Leave-one-out errors of kernel ridge regression: Allen,
    "The Relationship Between Variable Selection and Data Augmentation and a Method for Prediction"
    (1974). Posterior weights: Dempster, Laird & Rubin, "Maximum Likelihood from Incomplete Data via the
    EM Algorithm" (1977).
    """
    if evidence not in ("features", "model"):
        raise ValueError(f'`evidence` must be "features" or "model", got {evidence!r}.')
    require_concrete("find_mislabelled", risk, model)
    risk = validate(risk, model)
    if evidence == "model" and not is_affine(risk, model):
        raise ValueError(
            '`evidence="model"` refits the model without suspects by Newton, and its outputs are not '
            'affine in its parameters. Use `evidence="features"`.'
        )
    classes = _classes(risk, model)
    labels = class_labels(risk.data[1])
    if evidence == "model":
        found = by_model(risk, model, labels)
    else:
        found = by_features(risk, model, labels, classes)
    margin, _ = own_margins(risk, model)
    reason = jnp.where(found.margin > 0, 0, jnp.where(margin > 0, 1, 2))
    suggested = jnp.argmax(found.scores, axis=1)
    return Mislabelled(-found.margin, labels, suggested, found.margin, margin, reason)


def _classes(risk: EmpiricalRisk, model: Model) -> int:
    try:
        classes = class_logits_shape(risk, model).shape[0]
    except ValueError as error:
        raise ValueError(
            "`find_mislabelled` asks which class the others give a point, and this loss knows of none: "
            f"{error} For targets that are numbers rank by `influx.self_influence(f)`, ascending, or by "
            "`influx.value(f, heldout).value`, ascending."
        ) from error
    require_labels(risk)
    if classes < 2:
        raise ValueError("`find_mislabelled` needs at least two classes, the model has one output.")
    return classes
