"""One module per proposition of influx's theory: statement, assumptions, proof in full, a check over
drawn problems against NumPy oracles, and deliberate errors (mutants) on which the check must fail.

```console
python -m proofs_checks            # all of them, with a table
python -m proofs_checks P5 P9      # some of them
```
"""
