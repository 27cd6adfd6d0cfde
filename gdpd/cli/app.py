"""The commands of `gdpd`: each reads its options, calls one function of the library and prints the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gdpd.cli.options import run_config, with_run_options

app = typer.Typer(
    name="gdpd",
    help="Two-stage distillation of early time-series classifiers through a diffusion prior (GDPD).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version_asked(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _top(
    show: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_version_asked, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
@with_run_options
def distill(
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of `option: value` lines, named as below with underscores; options given here win.",
            show_default="none",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run: config, versions, metrics, history, weights, report.",
            show_default="runs/DATASET-eEARLINESS-METHOD-sSEED",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the run in the folder, with its options, from its last checkpoint.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write report.html into the folder at the end.")] = True,
    quiet: Annotated[bool, typer.Option(help="Show no progress bars.")] = False,
    **given: Any,
) -> None:
    """Train a teacher and distil one student; everything goes into one folder."""
    written = folder / "config.json" if resume and config is None and folder is not None else None
    if written is not None and written.is_file():
        config = written  # JSON is YAML; a run that is resumed by its folder need not be told its options again
    options = run_config(config, given)
    from gdpd.experiments import read_run, run_name, summarise
    from gdpd.training import run
    from gdpd.training.progress import RichProgress

    folder = folder or Path("runs") / run_name(options)
    run(options, folder, resume=resume, progress=None if quiet else RichProgress())
    _print_rows(summarise([read_run(folder)]))
    if report:
        from gdpd.report import build_report

        typer.echo(f"report: {build_report([folder], folder / 'report.html')}")
    typer.echo(f"run: {folder}")


@app.command()
@with_run_options
def profile(
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of `option: value` lines, as for `gdpd distill`.", show_default="none"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each phase that are timed. Unit: steps.")] = 50,
    trace: Annotated[
        Path | None,
        typer.Option(help="Chrome trace to write, for ui.perfetto.dev; `--trace ''` writes none."),
    ] = Path("trace.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    **given: Any,
) -> None:
    """Time the parts of a training step, forward and backward; the run's options choose data, networks and method."""
    options = run_config(config, given)
    from gdpd.training.profile import profile as measure

    found = measure(options, steps=steps, trace=None if trace is None or str(trace) in ("", ".") else trace)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from gdpd.training.profile import renderables

    console = _console()
    for made in renderables(found):
        console.print(made)
    for path in found["traces"]:
        typer.echo(f"trace: {path}   (open it at ui.perfetto.dev)")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default="required")],
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of UCR/UEA dataset folders, if not that of the run.", show_default="the run's"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Score the student of a finished run on its test series again, from its weights."""
    from gdpd.training import evaluate as score

    metrics = score(folder, data_dir=None if data_dir is None else str(data_dir))
    if as_json:
        typer.echo(json.dumps(metrics, indent=2))
        return
    teacher = metrics.get("teacher", {})
    typer.echo(f"{'score':20} {'student':>10} {'teacher':>10}")
    for name in (name for name, value in metrics.items() if isinstance(value, float)):
        told = [f"{values[name]:10.4f}" if name in values else f"{'':10}" for values in (metrics, teacher)]
        typer.echo(f"{name:20} {told[0]} {told[1]}".rstrip())


@app.command()
def datasets(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of UCR/UEA dataset folders to list before the bundled sets.", show_default="none"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """List the datasets at hand; none is ever downloaded."""
    from gdpd.data import list_datasets

    found = list_datasets(data_dir)
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in found], indent=2))
        return
    from rich.table import Table

    table = Table(header_style="bold")
    for name in ("name", "from", "train", "test", "channels", "length", "classes"):
        table.add_column(name, justify="left" if name in ("name", "from") else "right", overflow="fold")
    for row in found:
        table.add_row(*(str(value) for value in row))
    _console().print(table)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="Device: cpu, cuda or cuda:INDEX.")] = "cpu",
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="Case, such as mlp-64x100-10-frozen: network (paper, mlp), batch × width, steps, mode (forward, "
            "frozen, trainable); repeatable.",
            show_default="three usual ones",
        ),
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(help="Contender, as the table names them; repeatable.", show_default="all that suit the device"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for each case, checks and compilation aside. Unit: s.")] = 5.0,
    tf32: Annotated[bool, typer.Option(help="float32 products on tensor cores, for every contender.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="JSON file to write; `--json ''` writes none."),
    ] = Path("bench.json"),
) -> None:
    """Check and time the sampler, forward and backward, against eager, compiled and graphed PyTorch."""
    from gdpd_kernels.benchmark import report as benchmark

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    found = benchmark.bench(device, case or benchmark.CASES, contender or (), seconds, tf32, tell)
    typer.echo(benchmark.table(found))
    if json_file is not None and str(json_file) not in ("", "."):
        from gdpd.training.atomic import write_json

        write_json(json_file, found)
        typer.echo(f"\nJSON: {json_file}")
    if benchmark.failed(found):
        raise typer.Exit(1)


@app.command()
def info() -> None:
    """Print versions, the machine, which backends the sampler can use here, and why not the others."""
    from gdpd_kernels.info import main as kernels_info

    version()
    kernels_info()


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs or of grids, or folders that hold runs.", show_default="runs"),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            help="File to write; may be given several times. Of a comparison also .csv (every cell) and .tex (tables).",
            show_default="report.html in the first folder",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the page.", show_default="the datasets and methods found")
    ] = None,
    comparison: Annotated[
        bool | None,
        typer.Option(
            "--comparison/--runs",
            help="Compare methods over data sets, or show each run: curves, alpha, trajectories.",
            show_default="comparison of a grid's table, or of three data sets and more",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Method of a comparison that the others are set against.", show_default="gdpd, else the best by rank"
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method of a comparison; may be given several times.", show_default="all that have runs"),
    ] = None,
) -> None:
    """Print the table of some finished runs and write one self-contained HTML report about them."""
    from gdpd.experiments import find_runs, summarise
    from gdpd.experiments.comparison import compare, find_records, of_methods, table
    from gdpd.report import build_comparison, build_report

    folders = folders or [Path("runs")]
    outputs = output or [(folders[0] if folders[0].is_dir() else folders[0].parent) / "report.html"]
    if comparison is False:
        compared, runs = False, find_runs(folders)
    else:
        of_grid, runs = find_records(folders)
        several = len({run.method for run in runs}) > 1 and len({run.dataset for run in runs}) > 2
        compared = comparison or of_grid or several
    if compared:
        runs = of_methods(runs, method) if method else runs
        _console().print(table(compare(runs)))
        for path in outputs:
            typer.echo(f"report: {build_comparison(runs, path, title, reference)}")
        return
    if reference is not None:
        raise ValueError(f"reference={reference}: only a comparison has one; add --comparison")
    if method:
        raise ValueError(f"method={', '.join(method)}: only a comparison chooses among them; add --comparison")
    for path in outputs:
        if path.suffix.lower() in (".csv", ".tex"):
            raise ValueError(f"output={path}: tables in {path.suffix} are of a comparison; add --comparison")
    _print_rows(summarise(runs))
    for path in outputs:
        typer.echo(f"report: {build_report(folders, path, title)}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Folder of the demo's runs and its report.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="Seeds per method. Unit: runs.")] = 3,
    workers: Annotated[int, typer.Option(help="Worker processes; 0: this one. Unit: processes.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of each worker. Unit: threads.")] = 1,
) -> None:
    """Base, Base-KD and GDPD on two bundled data sets, at 20 % and 50 % read; goes on where it was stopped."""
    from gdpd.experiments.demo import run_demo

    if not run_demo(folder, seeds=seeds, workers=workers, threads=threads, console=_console()):
        raise typer.Exit(1)


@app.command()
def grid(
    file: Annotated[Path, typer.Argument(help="YAML file of the grid; `gdpd grid` in the documentation shows one.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder of the results table.", show_default="beside the file, named as it is"),
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes; 0: this one. Unit: processes.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of each worker. Unit: threads.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster to run on in place of local processes.", show_default="none"),
    ] = None,
    keep_runs: Annotated[bool, typer.Option(help="Keep every run's folder, not its row alone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what is left to do, stop.")] = False,
) -> None:
    """Data sets × earliness × methods × seeds as independent jobs; goes on where it was stopped."""
    from gdpd.experiments import read_grid
    from gdpd.experiments.grid_command import run

    read = read_grid(file)
    place = folder or (file.with_suffix("") if file.suffix else file.with_name(f"{file.name}-results"))
    if not run(
        read, place, workers=workers, threads=threads, ray=ray, keep_runs=keep_runs, dry_run=dry_run,
        console=_console(),
    ):  # fmt: skip
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    from gdpd import __version__

    typer.echo(f"gdpd {__version__}")


def _print_rows(rows: Any) -> None:
    from gdpd.experiments.summary import table

    _console().print(table(rows))


def _console() -> Any:
    from rich.console import Console

    return Console()
