"""Cost of contrastive learning: caching locked towers and gradients, drawing emoji, encoding images.

``locked_epoch_speedup``: time of an epoch of ``fit`` on rows of ``encode_pairs``, which encodes each pair in each
epoch, over that of an epoch on rows of ``cache_towers``, which give the same embeddings. It trains two heads on locked
``minilm`` and ``efficientnet-lite0``, in batches of 64 pairs of 128 x 128 pixels. Filling the cache takes
``cache_seconds`` more.

``cached_gradient_memory_ratio``: peak resident memory of a step of ``fit`` that trains both towers on a batch of 1,024
pairs with ``chunk_size=64``, over that of a step on a plain batch of 64. ``cached_gradient_time_ratio``: its time over
that of a step on the 1,024 pairs in one piece. If these do not fit into 20 GiB, or into the free memory, both are
timed on a half or a quarter of the pairs (``plain_pairs``). Each step is made in its own process, which always holds
the libraries, the towers and all 1,024 images (``loaded_mib``); there are 977 training emoji, and the other images are
bold drawings of the first of them. Before that, the gradients of 256 pairs with and without chunks must agree
within 1e-5 of their norm.

``draw_seconds``: time to draw all emoji at 128 x 128 in a new process, without imports and without listing them.

``encode_speedup``: time to encode 512 of the images with the reference network, ``efficientnet_lite_pytorch`` in eval
and inference mode, in batches of 64, over that of ``cache_towers``. Features and embeddings must agree within 1e-4 of
their norm.

In each round the variants run one after the other, in another order from round to round. A ratio is the median over
rounds of the ratio within a round. Leave the machine idle.

    python benchmarks/clip.py [--rounds 3] [--rows 977] [--pairs 1024]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from efficientnet_lite_pytorch import EfficientNet as LibraryNetwork
from numpy.typing import NDArray
from torch import Tensor

from ftkit.contrastive.feature_cache import cache_towers
from ftkit.contrastive.rows import PairRows, encode_pairs
from ftkit.contrastive.towers import TwoTowers
from ftkit.data import emoji
from ftkit.data.assets import registry
from ftkit.data.images import load_images
from ftkit.data.pairs import join
from ftkit.models.efficientnet import NAME
from ftkit.models.encoders import load_image_encoder, load_text_encoder
from ftkit.training.batching import make_batch
from ftkit.training.loop import fit
from ftkit.training.monitor import Meter
from ftkit.training.state import TrainSettings

BATCH_SIZE, SIZE, SEED, LR = 64, 128, 0, 1e-4
NUM_ENCODED, NUM_CHECKED, MOST_MIB = 512, 256, 20 * 1024


def make_model(chunk_size: int | None = None, dropout: float | None = None) -> TwoTowers:
    text = load_text_encoder("minilm", dropout=dropout)
    return TwoTowers(text, load_image_encoder(NAME), chunk_size=chunk_size, seed=SEED)


def make_rows(model: TwoTowers, number: int) -> PairRows:
    """Rows of ``number`` emoji; if there are fewer, the first ones are repeated in bold."""
    pairs = load_images("emoji", size=SIZE, seed=SEED)["train"]
    if number > len(pairs):
        bold = load_images("emoji", size=SIZE, seed=SEED, weight=700)["train"].take(range(number - len(pairs)))
        pairs = join([pairs, bold])
    return encode_pairs({"train": pairs.take(range(number))}, model)["train"]


def make_settings(batch_size: int) -> TrainSettings:
    return TrainSettings(lr=LR, num_epochs=1, batch_size=batch_size, warmup=0, keep_best=False, seed=SEED)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start, result = time.perf_counter(), run()
    return time.perf_counter() - start, result


def require_same(what: str, ours: Tensor, theirs: Tensor, most: float = 1e-4) -> float:
    """Distance of ours from theirs relative to the norm of theirs; ends the script if it is larger than ``most``."""
    if not (found := float((ours - theirs).norm() / theirs.norm())) <= most:
        raise SystemExit(f"{what} differ by {found:.1e}, more than {most:g}: the variants do not compute the same.")
    return found


def step(num_pairs: int, batch: int, chunk_size: int | None) -> dict[str, float]:
    """Seconds and peak memory of one step on the first ``batch`` of ``num_pairs`` rows."""
    model = make_model(chunk_size)
    rows = make_rows(model, num_pairs)
    data = {"train": rows if batch == num_pairs else rows.take(range(batch))}  # take copies the images
    loaded = psutil.Process().memory_info().rss / 2**20
    with Meter() as meter:
        fit(model, data, make_settings(batch))
    return {"seconds": meter.seconds, "mib": meter.peak_rss_mib, "loaded_mib": loaded}


def compare_gradients(number: int) -> dict[str, float]:
    """Relative distance of the gradients with chunks from those without, both without dropout."""
    model = make_model(dropout=0).train()
    batch = make_batch(model, make_rows(model, number), np.arange(number), model.device)
    found = []
    for model.chunk_size in (BATCH_SIZE, None):
        gradients = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return {"difference": require_same("Gradients", *found, 1e-5)}


def draw() -> dict[str, float]:
    characters = list(emoji.emoji_names())
    return {"seconds": timed(lambda: emoji.draw(characters, size=SIZE))[0]}


def in_a_process(task: str, **options: int | None) -> dict[str, float]:
    """Run a task of this script in its own process and return the result that it prints."""
    command = [sys.executable, __file__, "--task", task, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task} {options}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_locked(turn: int, model: TwoTowers, rows: PairRows) -> dict[str, float]:
    """Seconds of an epoch of the heads on cached and on uncached rows, and to fill the cache."""
    model.lock("text", "image")
    cache_seconds, cached = timed(lambda: cache_towers(model, {"train": rows})["train"])
    ours, theirs = (torch.cat(model.encode(data.take(range(BATCH_SIZE)))) for data in (cached, rows))
    require_same("Embeddings of cached and of uncached rows", ours, theirs)
    variants = [("cached", cached), ("uncached", rows)][:: 1 if turn % 2 == 0 else -1]
    taken = {variant: fit(model, {"train": data}, make_settings(BATCH_SIZE)).seconds for variant, data in variants}
    return {**taken, "cache_seconds": cache_seconds}


def measure_encoding(turn: int, model: TwoTowers, rows: PairRows, library: Any) -> dict[str, float]:
    """Seconds of either network to encode the images; both include the preparation of the rows."""
    model.lock("image").text.requires_grad_(True)  # only a locked tower is encoded

    def ours() -> Tensor:
        return torch.from_numpy(cache_towers(model, {"train": rows})["train"].features["image"][0])

    @torch.inference_mode()
    def theirs() -> Tensor:
        features = []
        for part in np.split(np.arange(len(rows)), range(BATCH_SIZE, len(rows), BATCH_SIZE)):
            images = torch.from_numpy(np.stack([rows[i]["pixel_values"] for i in part]))
            features.append(library.extract_features(images).mean((2, 3)))
        return torch.cat(features)

    taken = {run.__name__: timed(run) for run in (ours, theirs)[:: 1 if turn % 2 == 0 else -1]}
    difference = require_same("Features", taken["ours"][1], taken["theirs"][1])
    return {name: seconds for name, (seconds, _) in taken.items()} | {"difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=977, help="emoji for the locked towers, 64 or more")
    parser.add_argument("--pairs", type=int, default=1024, help="pairs in the batch with cached gradients, 64 or more")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)  # for in_a_process: task and options
    arguments = parser.parse_args()
    if arguments.task:
        run = {"step": step, "gradients": compare_gradients, "draw": draw}[arguments.task[0]]
        print(json.dumps(run(**json.loads(arguments.task[1]))))
        return

    results: dict[str, list[dict[str, float]]] = {}

    def note(name: str, result: dict[str, float]) -> None:
        results.setdefault(name, []).append(result)
        print(f"{name:>12}: {result}", flush=True)

    num_pairs = plain_pairs = arguments.pairs
    note("gradients", in_a_process("gradients", number=min(num_pairs, NUM_CHECKED)))
    small = in_a_process("step", num_pairs=num_pairs, batch=BATCH_SIZE, chunk_size=None)
    room = min(MOST_MIB, 0.9 * psutil.virtual_memory().available / 2**20) - small["loaded_mib"]
    while plain_pairs * (small["mib"] - small["loaded_mib"]) / BATCH_SIZE > room:
        plain_pairs //= 2
    steps = {"plain_64": (BATCH_SIZE, None), "cached": (num_pairs, BATCH_SIZE), "plain": (plain_pairs, None)}
    compared = "cached" if plain_pairs == num_pairs else "cached_part"
    if compared not in steps:
        print(f"{num_pairs} pairs in one piece do not fit into memory: times are compared on {plain_pairs}", flush=True)
        steps[compared] = (plain_pairs, BATCH_SIZE)
    for turn in range(arguments.rounds):
        for name in np.roll(list(steps), -turn).tolist():  # so that no variant always comes first
            note(name, in_a_process("step", num_pairs=num_pairs, batch=steps[name][0], chunk_size=steps[name][1]))
        note("draw", in_a_process("draw"))

    model, library = make_model(), LibraryNetwork.from_name(NAME).eval()
    library.load_state_dict(torch.load(next(registry.fetch(NAME).glob("*.pth")), weights_only=True))
    rows = make_rows(model, arguments.rows)
    few, some = (rows.take(range(min(number, len(rows)))) for number in (BATCH_SIZE, NUM_ENCODED))
    measure_locked(0, model, few), measure_encoding(0, model, few, library)  # warm-up
    for turn in range(arguments.rounds):
        note("locked", measure_locked(turn, model, rows))
        note("encoding", measure_encoding(turn, model, some, library))

    def column(name: str, key: str) -> NDArray[np.float64]:
        return np.array([result[key] for result in results[name]])

    figures = {
        "locked_epoch_speedup": column("locked", "uncached") / column("locked", "cached"),
        "cached_gradient_memory_ratio": column("cached", "mib") / column("plain_64", "mib"),
        "cached_gradient_time_ratio": column(compared, "seconds") / column("plain", "seconds"),
        "draw_seconds": column("draw", "seconds"),
        "encode_speedup": column("encoding", "theirs") / column("encoding", "ours"),
        "cache_seconds": column("locked", "cache_seconds"),
        "loaded_mib": column("plain_64", "loaded_mib"),
        "plain_64_mib": column("plain_64", "mib"),
        f"cached_{num_pairs}_mib": column("cached", "mib"),
        f"plain_{plain_pairs}_mib": column("plain", "mib"),
        "gradient_difference": column("gradients", "difference"),
        "feature_difference": column("encoding", "difference"),
    }
    medians = {name: float(f"{np.median(values):.4g}") for name, values in figures.items()}
    sizes = {"rows": len(rows), "pairs": num_pairs, "plain_pairs": plain_pairs, "rounds": arguments.rounds}
    print(json.dumps({**medians, **sizes, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
