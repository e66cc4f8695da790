"""Every notebook runs from top to bottom at the smoke tier, without a network, under nbval."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ftkit.data.assets import registry

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").rglob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_the_smoke_tier_without_a_network(path: Path, tmp_path: Path) -> None:
    """Once its assets are there; cells tagged nbval-check-output give what is committed."""
    for name in nbformat.read(path, as_version=4).metadata.ftkit.assets:
        registry.fetch(name, progress=False)
    nowhere = "http://127.0.0.1:9"  # whoever asks the network all the same is refused
    env = os.environ | {"FTKIT_OFFLINE": "1", "FTKIT_TIER": "smoke", "FTKIT_RUN_DIR": str(tmp_path)}
    env |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "ALL_PROXY": nowhere, "NO_PROXY": "127.0.0.1,localhost"}
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]

    results = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert {"settings", "metrics"} == set(results)
    for method in results["metrics"].values():
        assert {"accuracy", "ci95", "seeds", "by_seed", "trainable_parameters", "seconds", "peak_rss_mib"} <= set(
            method
        )
        assert 0 <= method["ci95"][0] <= method["accuracy"] <= method["ci95"][1] <= 1
