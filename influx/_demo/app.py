"""The Typer application behind `influx`."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Influence functions, memorization and certified removal for JAX and Equinox models.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"influx {version('influx')}")
        raise typer.Exit


@app.callback()
def influx(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Influence functions, memorization and certified removal for JAX and Equinox models."""


@app.command(
    help="Flip some labels of scikit-learn's digits, and find what training on them did.\n\n"
    "Trains multinomial logistic regression in float64, then shows the training points behind "
    "single test digits, what is memorized and what generalizes (with certificates), how "
    "predictions stand against retraining, which labels look wrong, and what removing harmful "
    "points is worth."
)
def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for scores.csv and the figures; files of a former run are replaced."
        ),
    ] = Path("influx-demo"),
    flip: Annotated[
        float, typer.Option(help="Share of training labels flipped to another class, in [0, 0.9).")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Seed of the split, the flips and the points retrained without.")
    ] = 0,
    l2: Annotated[
        float, typer.Option(help="Penalty ½·l2·‖θ‖² on weights and biases; 1e-6 to 1e6.")
    ] = 1e-2,
    retrain: Annotated[
        int, typer.Option(help="How many points to retrain without, to check the predictions.")
    ] = 60,
    figures: Annotated[bool, typer.Option(help="Draw the figures (PNG).")] = True,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing; only write the folder.")
    ] = False,
) -> None:
    """Run the demo, print its tables and write its folder."""
    from .compute import STAGES, run
    from .problem import Config

    console = Console(quiet=quiet)
    try:
        config = Config(flip=flip, seed=seed, l2=l2, retrain=retrain)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out must be a folder, and {out} is a file.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out cannot be made: {error}.") from error
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    with _progress(console) as bar:
        task = bar.add_task("Starting", total=len(STAGES) + 1)

        def on_stage(name: str) -> None:
            bar.update(task, description=name, completed=STAGES.index(name))

        results = run(config, on_stage)
        bar.update(task, description="Writing", completed=len(STAGES))
        from .files import write

        paths = write(results, out, figures=figures)
        bar.update(task, description="Done", completed=len(STAGES) + 1)
    from .report import show

    show(results, console)
    names = ", ".join(path.name for path in paths)
    console.print(f"\nWrote {names} to [bold]{out}[/]  ({time.perf_counter() - start:.0f} s)")


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description:38}"), BarColumn(20))
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
