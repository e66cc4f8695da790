"""Time of ``import ftkit``, less that of starting Python, and of ``ftkit --help``.

The commands run in alternation; the figures are medians.

    python benchmarks/startup.py
"""

import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare": [sys.executable, "-c", "pass"],
    "import": [sys.executable, "-c", "import ftkit"],
    "help": [sys.executable, "-m", "ftkit.cli", "--help"],
}
ROUNDS = 21


def main() -> None:
    seconds = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    over_bare = statistics.median(i - b for i, b in zip(seconds["import"], seconds["bare"], strict=True))
    torch = subprocess.run(
        [sys.executable, "-c", "import ftkit, sys; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    print(
        json.dumps(
            {
                "import_seconds_over_bare": round(over_bare, 4),
                "help_seconds": round(statistics.median(seconds["help"]), 4),
                "import_loads_torch": torch.stdout.strip() == "True",
                "rounds": ROUNDS,
            }
        )
    )


if __name__ == "__main__":
    main()
