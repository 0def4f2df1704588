"""The command `influx`, also `python -m influx`."""

import sys

from ._extras import missing_extras


def main() -> None:
    """Run the command line; exits with one line where the extras `influx[demo]` are missing."""
    problem = missing_extras()
    if problem:
        sys.exit(problem)
    from ._demo.app import app

    app(prog_name="influx")
