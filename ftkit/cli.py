"""The command ``ftkit``: run notebooks, grids and studies, compare runs, fetch models and data."""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ftkit import TIERS, __version__

_SCHEDULER = "run on a dask.distributed cluster, whose scheduler is at ADDRESS (tcp://host:port)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``ftkit``.

    Args:
        argv: arguments of the command line; by default those of this process.

    Returns:
        The exit code: 0 for success, 1 for a failure that one line on stderr explains, 130 after an interruption. A
        single run that is interrupted still writes its report and returns 1.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # a Windows console may use another encoding
    if threading.current_thread() is threading.main_thread():
        _end_as_after_ctrl_c()
    warnings.showwarning = lambda message, *_: print(f"ftkit: {message}", file=sys.stderr)
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments)
    except KeyboardInterrupt:
        print("ftkit: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:  # errors of the kit, whose messages are one line
        print(f"ftkit: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ftkit", description="Learn fine-tuning by measuring it.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a notebook with parameters", add_help=False)
    run.add_argument(
        "-h", "--help", action=_RunHelp, nargs=0, help="show this help; after NOTEBOOK also list its parameters"
    )
    run.add_argument(
        "notebook",
        nargs="?",
        help="name (01_full_fine_tuning) or path of the notebook; not needed with --settings",
    )
    run.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_parameter,
        help="set a parameter; several values (1e-4,3e-4 or 0..4) make a grid, whose finished runs in DIR are skipped",
    )
    run.add_argument(
        "--tier",
        choices=TIERS,
        help=f"size of the run (default: that of --settings, else {os.environ.get('FTKIT_TIER', 'cpu')})",
    )
    run.add_argument(
        "--settings", metavar="FILE", help="take notebook, tier and parameters from a YAML file; -p and --tier win"
    )
    run.add_argument(
        "--save", metavar="FILE", help="write what runs to a YAML file for --settings, then run it; overwrites nothing"
    )
    run.add_argument("--keep", action="store_true", help="keep the best model, in DIR/<run id>/model/; as -p keep=true")
    run.add_argument("--out", default="runs", metavar="DIR", help="write to DIR/<run id>/ (default: %(default)s)")
    run.add_argument("--html", action="store_true", help="also write report.html")
    run.add_argument(
        "--track",
        metavar="TRACKER",
        help="also record losses, rates and scores with tensorboard (in DIR/<run id>/tracking/), wandb, mlflow or "
        "trackio; runs of a grid that are done are not repeated for it",
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=_count, default=1, metavar="N", help="parallel runs of a grid (default: 1)")
    where.add_argument("--scheduler", metavar="ADDRESS", help=_SCHEDULER)
    run.set_defaults(command=_run)

    compare = commands.add_parser("compare", help="compare the runs in a folder")
    compare.add_argument(
        "folder",
        metavar="DIR",
        type=Path,
        help="folder of the runs; compare.csv and compare.html are written there",
    )
    compare.set_defaults(command=_compare)

    study = commands.add_parser("study", help="run the missing rows of a recorded study")
    study.add_argument("name", metavar="NAME", help="name of the study, declared in data/studies/NAME.toml")
    study.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        type=_parameter,
        help="run only these rows, for example lr=1e-4 seed=0,1; give it after NAME",
    )
    study.add_argument("--scheduler", metavar="ADDRESS", help=_SCHEDULER)
    study.set_defaults(command=_study)

    predict = commands.add_parser("predict", help="classify the texts of a file with a kept model")
    predict.add_argument("folder", metavar="DIR", help="folder of the model, such as runs/<run id>/model")
    predict.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        default="-",
        help="CSV, TSV, JSON, JSON Lines, Parquet or Excel file, also .gz; without it, or -, one text a line on stdin",
    )
    predict.add_argument("-o", "--out", metavar="CSV", help="write to this file (default: stdout)")
    predict.add_argument("--text", metavar="COLUMN", help="column of the texts (default: guessed)")
    predict.add_argument("--label", metavar="COLUMN", help="column of the labels (default: guessed; it may be missing)")
    predict.add_argument(
        "--among",
        metavar="DIR_OR_FILE",
        help="for two towers: find the nearest in this folder of images, or in this file of captions",
    )
    predict.set_defaults(command=_predict)

    serve = commands.add_parser("serve", help="try a kept model by hand, on a page of this machine")
    serve.add_argument("folder", metavar="DIR", help="folder of the model, such as runs/<run id>/model")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 for any that is free")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s, only this machine)"
    )
    serve.set_defaults(command=_serve)

    course = commands.add_parser("course", help="make the editions for students, instructors and nbgrader")
    course.add_argument("action", choices=["build"], help="what to do")
    course.add_argument("out", metavar="OUT", help="folder for student, instructor and nbgrader")
    course.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names or paths (default: all lessons)")
    course.add_argument(
        "--no-reference",
        action="store_true",
        help="for graded labs: a lesson stops at a wrong answer instead of going on with the reference",
    )
    course.set_defaults(command=_course)

    fetch = commands.add_parser("fetch", help="download models and data")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="an asset, or a notebook for all assets that it needs")
    fetch.add_argument("--all", action="store_true", help="download all assets")
    fetch.set_defaults(command=_fetch)

    assets = commands.add_parser("assets", help="list models and data")
    shown = assets.add_mutually_exclusive_group()
    shown.add_argument("--cards", action="store_true", help="print their cards, the text of data/README.md")
    shown.add_argument("--verify", action="store_true", help="check every downloaded file and name the damaged ones")
    assets.set_defaults(command=_assets)
    return parser


class _RunHelp(argparse.Action):
    """Help of ``ftkit run``, with the parameters of the notebook if one stands before ``--help``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        parser.print_help()
        if namespace.notebook:
            from ftkit.lab.runs import notebooks

            print("\n" + notebooks.parameters_help(notebooks.find_notebook(namespace.notebook)))
        parser.exit()


def _parameter(text: str) -> tuple[str, list[Any]]:
    """Parse ``NAME=VALUE`` into the name and all its values."""
    from ftkit.lab.runs import grid

    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE.")
    try:
        return name, grid.values_of(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs: give 1 or more.")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from ftkit.data.assets import registry
    from ftkit.lab.results import format_table
    from ftkit.lab.runs import comparison, grid, notebooks

    notebook, tier, axes = _what_runs(arguments)
    where = {"tier": tier, "out": arguments.out}
    notebooks.check_tracker(arguments.track)
    if arguments.track and arguments.scheduler:
        raise ValueError("A cluster does not track its runs: leave --track out, or give --jobs instead of --scheduler.")
    planned = grid.plan(notebook, axes, tier=tier)
    if os.environ.get("WORLD_SIZE", "1") != "1" and (len(planned) > 1 or arguments.scheduler):
        raise ValueError(
            f"`accelerate launch` has started this in several processes, and it is a grid of {len(planned)}: launch "
            "each run by itself, without --scheduler."
        )
    if arguments.save:
        one = {name: values[0] for name, values in axes.items() if len(values) == 1}
        several = {name: values for name, values in axes.items() if len(values) > 1}
        given = one if "tier" in several else {"tier": tier, **one}
        _write_new(Path(arguments.save), notebooks.settings_text(notebook, given, several))
    notebooks.make_out_folder(arguments.out)
    if not arguments.scheduler:  # a worker fetches for itself
        chosen = {value for job in planned for value in job.parameters.values() if isinstance(value, str)}
        _fetch_assets([*notebooks.assets_of(notebook), *chosen.intersection(registry.names())])
    if len(planned) > 1 or arguments.scheduler:
        if arguments.scheduler:
            from ftkit.lab.runs import cluster

            failed = cluster.run_grid_on_cluster(
                notebook, planned, scheduler=arguments.scheduler, html=arguments.html, **where
            )
        else:
            failed = grid.run_grid(
                notebook, planned, jobs=arguments.jobs, html=arguments.html, track=arguments.track, **where
            )
        try:
            compared = comparison.compare_runs(Path(arguments.out), {job.identity for job in planned})
            print(comparison.format_comparisons(compared))
        except ValueError as error:  # all runs failed, or the notebook saves no results
            print(f"ftkit: {error}", file=sys.stderr)
        if failed:
            print(f"ftkit: {failed} of {len(planned)} runs failed; the same command runs them again", file=sys.stderr)
        return 1 if failed else 0
    run = notebooks.run_notebook(notebook, planned[0].parameters, track=arguments.track, **where)
    written = run.executed
    if arguments.html:
        from ftkit.lab.runs.report import write_report

        try:  # before anything is printed: the terminal may be gone
            written = write_report(run)
        except OSError as error:
            run.error = run.error or str(error).rstrip(".")
    if run.metrics:
        print(format_table(run.metrics))
    print(written)
    if run.error:
        print(f"ftkit: {run.error}", file=sys.stderr)
    return 1 if run.error else 0


def _what_runs(arguments: argparse.Namespace) -> tuple[Path, str, dict[str, list[Any]]]:
    """The notebook, the tier and the values of each parameter, from the options and the settings file."""
    from ftkit.lab.runs import grid, notebooks
    from ftkit.lab.settings_file import SettingsFile, read_settings

    file = read_settings(arguments.settings) if arguments.settings else SettingsFile(Path())
    name = arguments.notebook or file.notebook
    if name is None:
        raise ValueError("There is nothing to run: give the NOTEBOOK, or a file that names one with --settings FILE.")
    notebook = notebooks.find_notebook(name)
    if file.notebook and Path(file.notebook).stem != notebook.stem:
        raise ValueError(
            f"{file.path} is for the notebook {file.notebook}, and {name} is given: leave {name} out, or give another "
            "settings file."
        )
    axes = {name: [value] for name, value in file.parameters.items()}
    for name, values in file.grid.items():  # a text stands for several values, as after -p
        axes[name] = (
            grid.values_of(values) if isinstance(values, str) else values if isinstance(values, list) else [values]
        )
    axes |= grid.each_once([*arguments.parameter, *([("keep", [True])] if arguments.keep else [])])
    if arguments.keep and not notebooks.has_parameter(notebook, "keep"):
        raise ValueError(f"{notebook.stem} has no parameter `keep`, so it keeps no model: leave --keep out.")
    return notebook, arguments.tier or file.tier or os.environ.get("FTKIT_TIER", "cpu"), axes


def _write_new(path: Path, text: str) -> None:
    """Write a file, unless there is another one with this name."""
    from ftkit.lab.results import write_whole

    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise FileExistsError(f"{path} exists already, with other settings: give --save another name, or delete it.")
    write_whole(path, text)


def _compare(arguments: argparse.Namespace) -> int:
    from ftkit.lab.runs import comparison

    compared = comparison.compare_runs(arguments.folder)
    print(comparison.format_comparisons(compared))
    for path in comparison.write_comparisons(compared, arguments.folder):
        print(path)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    import csv

    from ftkit.lab.runs import grid
    from ftkit.lab.studies import recording

    path = recording.run_study(arguments.name, grid.each_once(arguments.only), scheduler=arguments.scheduler)
    with path.open(encoding="utf-8", newline="") as file:
        count = sum(1 for _ in csv.DictReader(file))
    print(f"{path}: {count} rows")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from ftkit.lab.kept.predicting import predict_file

    columns = {"text": arguments.text, "label": arguments.label}
    predict_file(arguments.folder, arguments.file, arguments.out, among=arguments.among, **columns)
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from ftkit.lab.kept.serving import serve
    except ModuleNotFoundError as error:
        raise RuntimeError(f"`ftkit serve` needs the package {error.name}: pip install 'ftkit[serve]'.") from None

    serve(arguments.folder, host=arguments.host, port=arguments.port)
    return 0


def _course(arguments: argparse.Namespace) -> int:
    from ftkit.lab.course.build import build_course

    for folder in build_course(arguments.out, arguments.notebooks, reference=not arguments.no_reference):
        print(folder)
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    from ftkit.data.assets import registry
    from ftkit.lab.runs import notebooks

    names = registry.names() if arguments.all else []
    for name in arguments.names:
        try:
            names += notebooks.assets_of(notebooks.find_notebook(name))
        except FileNotFoundError:
            names.append(registry.get(name).name)
    if not names:
        raise ValueError("There is nothing to fetch: name assets or a notebook, or give --all; see `ftkit assets`.")
    _fetch_assets(names)
    return 0


def _fetch_assets(names: Sequence[str]) -> None:
    from ftkit.data.assets import registry

    for name in names:
        if not registry.is_cached(name):
            registry.fetch(name)


def _assets(arguments: argparse.Namespace) -> int:
    from ftkit.data.assets import registry

    if arguments.verify:
        damaged = [sentence for name in registry.names() if (sentence := registry.verify(name))]
        cached = sum(map(registry.is_cached, registry.names()))
        print("\n".join(damaged) or f"All files of the {cached} downloaded assets are as they were when unpacked.")
        return 1 if damaged else 0
    print(registry.cards() if arguments.cards else registry.table(), end="" if arguments.cards else "\n")
    return 0


def _end_as_after_ctrl_c() -> None:
    """Clean up as after Ctrl-C when `kill` or `timeout` ends this process, or its terminal is closed."""
    signals = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under `nohup`
        signals.append(signal.SIGHUP)

    def interrupt(*_: Any) -> NoReturn:
        for number in signals:  # a terminal that is closed may send several signals: the first one is enough
            signal.signal(number, lambda *_: None)
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)


if __name__ == "__main__":
    sys.exit(main())
