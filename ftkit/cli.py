"""The ``ftkit`` command. Each sub-command imports what it needs when it runs, so that ``--help`` is instant."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ftkit``; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    parser = argparse.ArgumentParser(prog="ftkit", description=__doc__.split(".")[0])
    parser.parse_args(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
