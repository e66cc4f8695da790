"""What contrastive learning costs: locked towers cached, gradients cached, emoji drawn, pictures encoded.

``locked_epoch_speedup``: an epoch of ``fit`` that trains two heads on locked ``minilm`` and ``efficientnet-lite0``, in
batches of 64 pairs of 128 x 128 pixels, on the rows of ``encode_pairs``, which encodes each pair in each epoch, over
the same on the rows of ``cache_towers``. Filling the cache is not in it: that takes ``cache_seconds``. Both kinds of
rows must give the same embeddings within 1e-4 of their norm.

``cached_gradient_memory_ratio``: the peak resident memory of one step of ``fit`` that trains both towers on a batch of
1,024 pairs with ``chunk_size=64``, over that of a step on a plain batch of 64. ``cached_gradient_time_ratio``: its
seconds over those of a step on the 1,024 in one piece; where 20 GiB, or what is free, don't hold them, both on a half
or a quarter (``plain_pairs``). Each step is made in a process of its own, which in every arm holds the libraries, the
towers and all 1,024 drawn pictures (``loaded_mib``); pictures beyond the 977 for training are bolder drawings of the
first. Before that, the gradients of 256 pairs with and without chunks must agree within 1e-5 of their norm.

``draw_seconds``: all emoji drawn at 128 x 128 in a fresh process; imports and the list of emoji are not counted.

``encode_speedup``: 512 of the pictures through the reference network, ``efficientnet_lite_pytorch`` in eval and
inference mode, in batches of 64, over ``cache_towers``. The features must agree within 1e-4 of their norm.

Within a round the arms come one after the other, the order turned from round to round; ratios are medians over the
rounds of those of one round. A difference too large ends the script. Leave the machine idle.

    python benchmarks/clip.py [--rounds 3] [--rows 977] [--pairs 1024]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from efficientnet_lite_pytorch import EfficientNet as LibraryNetwork
from torch import Tensor

from ftkit import assets, drawings
from ftkit.batching import make_batch
from ftkit.contrastive import TwoTowers
from ftkit.efficientnet import NAME
from ftkit.encoders import load_image_encoder, load_text_encoder
from ftkit.images import load_images
from ftkit.meter import Meter
from ftkit.pairs import PairRows, Pairs, encode_pairs
from ftkit.towercache import cache_towers
from ftkit.training import TrainSettings, fit

BATCH_SIZE, SIZE, SEED, LR = 64, 128, 0, 1e-4
NUM_ENCODED, NUM_CHECKED = 512, 256
MOST_MIB = 20 * 1024
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5


def make_model(chunk_size: int | None = None, dropout: float | None = None) -> TwoTowers:
    text, image = load_text_encoder("minilm", dropout=dropout), load_image_encoder(NAME)
    return TwoTowers(text, image, chunk_size=chunk_size, seed=SEED)


def make_rows(model: TwoTowers, number: int) -> PairRows:
    """Rows of so many emoji; where they don't suffice, the first ones come again in bold."""
    pairs = load_images("emoji", size=SIZE, seed=SEED)["train"]
    if number > len(pairs):
        bold = load_images("emoji", size=SIZE, seed=SEED, weight=700)["train"].take(range(number - len(pairs)))
        pictures = np.concatenate([pairs.pictures, bold.pictures])
        pairs = Pairs(pictures, pairs.captions + bold.captions, pd.concat([pairs.facts, bold.facts]))
    return encode_pairs({"train": pairs.take(range(number))}, model)["train"]


def make_settings(batch_size: int) -> TrainSettings:
    return TrainSettings(lr=LR, num_epochs=1, batch_size=batch_size, warmup=0, keep_best=False, seed=SEED)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def require_same(what: str, difference: float, most: float) -> float:
    if not difference <= most:
        raise SystemExit(f"{what} differ by {difference:.1e}, more than {most:g}: the two do not compute the same.")
    return difference


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference, by that of theirs."""
    return float((ours - theirs).norm() / theirs.norm())


def step(num_pairs: int, batch: int, chunk_size: int | None) -> dict[str, float]:
    """One step on the first ``batch`` of ``num_pairs`` rows: seconds and peak memory."""
    model = make_model(chunk_size)
    all_rows = make_rows(model, num_pairs)
    rows = all_rows.take(range(batch))
    loaded = psutil.Process().memory_info().rss / 2**20
    with Meter() as meter:
        fit(model, {"train": rows}, make_settings(batch))
    return {"seconds": meter.seconds, "mib": meter.peak_rss_mib, "loaded_mib": loaded}


def gradients(number: int) -> dict[str, float]:
    """How far those with chunks are from those without; there is no dropout."""
    model = make_model(dropout=0).train()
    batch = make_batch(model, make_rows(model, number), np.arange(number), model.device)
    found = []
    for model.chunk_size in (BATCH_SIZE, None):
        model.zero_grad()
        model(**batch).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return {"difference": relative(*found)}


def draw() -> dict[str, float]:
    characters = list(drawings.emoji_names())
    seconds, pictures = timed(lambda: drawings.draw(characters, size=SIZE))
    return {"seconds": seconds, "emoji": len(pictures)}


def in_a_process(task: str, **options: int | None) -> dict[str, float]:
    """What this script prints last when it is called so."""
    command = [sys.executable, __file__, "--task", task, "--options", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} {options} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_locked(turn: int, model: TwoTowers, rows: PairRows, heads: dict[str, Tensor]) -> dict[str, float]:
    """An epoch of the heads on either kind of rows, and the time to fill the cache."""
    model.lock("text", "image").load_state_dict(heads, strict=False)
    cache_seconds, cached = timed(lambda: cache_towers(model, {"train": rows})["train"])
    some = range(min(BATCH_SIZE, len(rows)))
    for ours, theirs in zip(model.encode(cached.take(some)), model.encode(rows.take(some)), strict=True):
        require_same("Embeddings of cached and of other rows", relative(ours, theirs), TOLERANCE)
    seconds = {}
    for arm, data in [("cached", cached), ("uncached", rows)][:: 1 if turn % 2 == 0 else -1]:
        model.load_state_dict(heads, strict=False)
        seconds[arm] = fit(model, {"train": data}, make_settings(BATCH_SIZE)).seconds
    return {**seconds, "cache_seconds": cache_seconds}


def measure_encoding(turn: int, model: TwoTowers, rows: PairRows, library: Any) -> dict[str, float]:
    """Features of the pictures, which in both arms are made ready row by row."""
    model.lock("image").text.requires_grad_(True)  # so that only pictures are encoded

    def ours() -> Tensor:
        return torch.from_numpy(cache_towers(model, {"train": rows})["train"].features["image"][0])

    @torch.inference_mode()
    def theirs() -> Tensor:
        features = []
        for start in range(0, len(rows), BATCH_SIZE):
            part = range(start, min(start + BATCH_SIZE, len(rows)))
            pictures = torch.from_numpy(np.stack([rows[i]["pixel_values"] for i in part]))
            features.append(library.extract_features(pictures).mean((2, 3)))
        return torch.cat(features)

    taken = {run.__name__: timed(run) for run in (ours, theirs)[:: 1 if turn % 2 == 0 else -1]}
    difference = require_same("Features", relative(taken["ours"][1], taken["theirs"][1]), TOLERANCE)
    return {"ours": taken["ours"][0], "theirs": taken["theirs"][0], "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=977, help="emoji for the locked towers, 64 or more")
    parser.add_argument("--pairs", type=int, default=1024, help="of the batch with cached gradients, 64 or more")
    parser.add_argument("--task", choices=["step", "gradients", "draw"], help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps({"step": step, "gradients": gradients, "draw": draw}[arguments.task](**arguments.options)))
        return

    results: dict[str, list[dict[str, float]]] = {}

    def note(name: str, result: dict[str, float]) -> None:
        results.setdefault(name, []).append(result)
        print(f"{name:>12}: { {key: float(f'{value:.4g}') for key, value in result.items()} }", flush=True)

    num_pairs = plain_pairs = arguments.pairs
    note("gradients", in_a_process("gradients", number=min(num_pairs, NUM_CHECKED)))
    differ = require_same("Gradients", results["gradients"][0]["difference"], GRADIENT_TOLERANCE)
    small = in_a_process("step", num_pairs=num_pairs, batch=BATCH_SIZE, chunk_size=None)
    room = min(MOST_MIB, 0.9 * psutil.virtual_memory().available / 2**20) - small["loaded_mib"]
    while plain_pairs * (small["mib"] - small["loaded_mib"]) / BATCH_SIZE > room:
        plain_pairs //= 2
    steps = {"plain_64": (BATCH_SIZE, None), "cached": (num_pairs, BATCH_SIZE), "plain": (plain_pairs, None)}
    if plain_pairs < num_pairs:
        print(f"{num_pairs} pairs in one piece would not fit: times are compared on {plain_pairs}", flush=True)
        steps["cached_part"] = (plain_pairs, BATCH_SIZE)
    for turn in range(arguments.rounds):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # none always comes first
            batch, chunk_size = steps[name]
            note(name, in_a_process("step", num_pairs=num_pairs, batch=batch, chunk_size=chunk_size))
        note("draw", in_a_process("draw"))

    model, library = make_model(), LibraryNetwork.from_name(NAME).eval()
    library.load_state_dict(torch.load(next(assets.fetch(NAME).glob("*.pth")), weights_only=True))
    rows = make_rows(model, arguments.rows)
    pictures = rows.take(range(min(NUM_ENCODED, len(rows))))
    heads = {key: v.clone() for key, v in model.state_dict().items() if not key.startswith(("text.", "image."))}
    measure_locked(0, model, rows.take(range(BATCH_SIZE)), heads)  # all warm up
    measure_encoding(0, model, pictures.take(range(BATCH_SIZE)), library)
    for turn in range(arguments.rounds):
        note("locked", measure_locked(turn, model, rows, heads))
        note("encoding", measure_encoding(turn, model, pictures, library))

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float:
        both = zip(results[over[0]], results[under[0]], strict=True)
        return round(statistics.median(a[over[1]] / b[under[1]] for a, b in both), 3)

    def typical(name: str, key: str) -> float:
        return round(statistics.median(result[key] for result in results[name]), 3)

    comparable = "cached" if plain_pairs == num_pairs else "cached_part"
    figures = {
        "locked_epoch_speedup": ratio(("locked", "uncached"), ("locked", "cached")),
        "cached_gradient_memory_ratio": ratio(("cached", "mib"), ("plain_64", "mib")),
        "cached_gradient_time_ratio": ratio((comparable, "seconds"), ("plain", "seconds")),
        "draw_seconds": typical("draw", "seconds"),
        "encode_speedup": ratio(("encoding", "theirs"), ("encoding", "ours")),
        "cache_seconds": typical("locked", "cache_seconds"),
        "cached_epoch_seconds": typical("locked", "cached"),
        "loaded_mib": typical("plain_64", "loaded_mib"),
        "plain_64_mib": typical("plain_64", "mib"),
        f"cached_{num_pairs}_mib": typical("cached", "mib"),
        f"plain_{plain_pairs}_mib": typical("plain", "mib"),
        f"cached_{num_pairs}_seconds": typical("cached", "seconds"),
        "gradient_difference": differ,
        "feature_difference": max(result["difference"] for result in results["encoding"]),
    }
    sizes = {"plain_pairs": plain_pairs, "threads": torch.get_num_threads(), **vars(arguments)}
    print(json.dumps({**figures, **{name: size for name, size in sizes.items() if size is not None}}))


if __name__ == "__main__":
    main()
