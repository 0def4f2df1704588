from dataclasses import replace
from typing import Literal

import numpy as np

from .._influence import Influence, check_influence
from .._measurement import Logit, Margin, Probability, check_class
from .._validate import class_logits_shape, require_labels


def classification(
    f: Influence,
    kind: Literal["probability", "logit", "margin"] = "probability",
    *,
    class_: int | None = None,
) -> Influence:
    """Influence on a classifier's outcome instead of its loss.

    ```python
    influx.classification(f, "probability")((Xq, yq))            # [m, C, n]: I(i; p_c(x)) for every c
    influx.classification(f, "margin")((Xq, yq))                 # [m, n]: I(i; γ(x, y))
    ```

    - `"probability"`: p_c(x). Over the classes the influences sum to 0 (P8).
    - `"logit"`: z_c(x).
    - `"margin"`: γ = z_y − logsumexp_{c≠y} z_c, the log-odds of the query's label y. γ > 0 means
      p_y > ½.

    For hard labels I(i; CE) = −I(i; p_y)/p_y and I(i; γ) = I(i; p_y)/(p_y(1 − p_y)).

    **Sign.** Positive: training more on point i raises the probability, logit or margin.

    **Arguments:** `class_`: one class in place of all C, for "probability" and "logit": [m, n].

    **Raises:** `ValueError` for an unknown kind, a class that does not exist, a `class_` with
    "margin", or a loss that is no classifier's.

    **Cost:** C solves per query in place of one.

    **Source:** Kounavis, Dia & Ramazanli, arXiv:2305.16094 ("classification influence"); the
    definitions are this project's own.
    """
    check_influence("classification", f)
    if kind not in ("probability", "logit", "margin"):
        raise ValueError(
            f'`kind` must be "probability", "logit" or "margin", got {kind!r}. For anything else '
            "use `influx.measure(f, fn)`."
        )
    logits = class_logits_shape(f.risk, f.model)
    if kind == "margin":
        if class_ is not None:
            raise ValueError("The margin is that of the query's own label: leave `class_` out.")
        require_labels(f.risk)
        return replace(f, measurement=Margin())
    if class_ is not None and (isinstance(class_, bool) or not hasattr(class_, "__index__")):
        raise ValueError(
            f"`class_` must be the index of one class, got {class_!r}. Leave it out for all classes."
        )
    check_class(class_, logits)
    chosen = None if class_ is None else np.asarray(class_)
    return replace(f, measurement={"probability": Probability, "logit": Logit}[kind](chosen))
