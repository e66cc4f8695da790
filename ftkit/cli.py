"""The ``ftkit`` command; each sub-command imports what it needs only when it runs, so that help is instant."""

import argparse
import ast
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from ftkit import TIERS, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ftkit``; returns the exit code: 0 done, 1 failed (one line on stderr says why), 130 interrupted."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # the cards are not ASCII, a Windows console may think they are
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        print("ftkit: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:  # what our modules raise for people, one line each
        print(f"ftkit: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ftkit", description="Learn fine-tuning by measuring it.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute a notebook with parameters")
    run.add_argument("notebook", help="name (01_full_fine_tuning) or path")
    run.add_argument("-p", "--parameter", action="append", default=[], metavar="NAME=VALUE", type=_parameter)
    run.add_argument("--tier", choices=TIERS, default=os.environ.get("FTKIT_TIER", "cpu"), help="default: %(default)s")
    run.add_argument("--out", default="runs", metavar="DIR", help="writes DIR/<run id>/ (default: %(default)s)")
    run.add_argument("--html", action="store_true", help="write report.html too")
    run.set_defaults(command=_run)

    fetch = commands.add_parser("fetch", help="get models and data onto the disk")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="assets, or a notebook for all that it needs")
    fetch.add_argument("--all", action="store_true", help="every asset")
    fetch.set_defaults(command=_fetch)

    assets = commands.add_parser("assets", help="list the models and data")
    assets.add_argument("--cards", action="store_true", help="print the text of data/README.md")
    assets.set_defaults(command=_assets)
    return parser


def _parameter(text: str) -> tuple[str, Any]:
    """``name=value``; the value is read as JSON or a Python literal, else it is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    for read in (json.loads, ast.literal_eval):
        try:
            return name, read(value)
        except (ValueError, SyntaxError):
            continue
    return name, value


def _run(arguments: argparse.Namespace) -> int:
    from ftkit import results, runs

    notebook = runs.find_notebook(arguments.notebook)
    _fetch_assets(runs.assets_of(notebook))
    run = runs.run_notebook(
        notebook, dict(arguments.parameter), tier=arguments.tier, out=arguments.out, html=arguments.html
    )
    if run.metrics:
        print(results.format_table(run.metrics))
    print(run.report or run.executed)
    if run.error:
        print(f"ftkit: {run.error}", file=sys.stderr)
    return 1 if run.error else 0


def _fetch(arguments: argparse.Namespace) -> int:
    from ftkit import assets, runs

    names = assets.names() if arguments.all else []
    for name in arguments.names:
        try:
            names += runs.assets_of(runs.find_notebook(name))
        except FileNotFoundError:
            names.append(assets.get(name).name)
    if not names:
        raise ValueError("Nothing to fetch: name an asset or a notebook, or say --all; `ftkit assets` lists them.")
    _fetch_assets(names)
    return 0


def _fetch_assets(names: Sequence[str]) -> None:
    from ftkit import assets

    for name in names:
        if not assets.is_cached(name):
            assets.fetch(name)


def _assets(arguments: argparse.Namespace) -> int:
    from ftkit import assets

    print(assets.cards() if arguments.cards else assets.table(), end="" if arguments.cards else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
