"""Cost of a language model as a classifier: ``load_language_model`` and ``score`` against plain transformers.

Both score the same film sentences by the two label words, after the same 8 few-shot examples. ftkit runs the examples
once. Plain transformers runs each whole prompt without a cache, in batches of 16 of similar length, padded on the left,
and computes logits at the last position only. Each run is made in its own process; loading and tokenising are not
timed. In each round the two run one after the other; the figures are medians over the rounds of the ratio within a
round. Scores that differ by more than 1e-4 end the script.

Loading is timed separately, without imports and with the files in the cache of the operating system. Its memory is the
growth of the process over loading and one forward pass, as a multiple of the size of the weights. Leave the machine
idle; about 3 minutes per round.

    python benchmarks/prompt_scoring.py [--rounds 3] [--rows 200]
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
from processes import in_a_process

VARIANTS = ("ftkit", "transformers")
NUM_EXAMPLES, BATCH_SIZE, SEED = 8, 16, 0
TOLERANCE = 1e-4


def prepare(num_rows: int) -> tuple[Any, Any, Any, Any]:
    """The model, its tokenizer, rows with few-shot prompts, and the tokens of the label words."""
    from ftkit.data.text import load_text
    from ftkit.models.loading import load_language_model
    from ftkit.prompting.few_shot import balanced_examples
    from ftkit.prompting.templates import Template, Verbalizer, encode_prompts

    splits = load_text("movie-sentiment", train=1000, validation=1, test=num_rows)
    model, tokenizer = load_language_model("smollm2")
    template, verbalizer = Template("Review: {text}\nSentiment:"), Verbalizer({"negative": " bad", "positive": " good"})
    examples = balanced_examples(splits["train"], NUM_EXAMPLES, seed=SEED)
    rows, words = encode_prompts(splits["test"], template, verbalizer, tokenizer, examples=examples)
    return model, tokenizer, rows, words


def score_whole(model: Any, tokenizer: Any, rows: Any, words: Any) -> np.ndarray:
    """Plain transformers: log-probabilities of one-token label words after each whole prompt, shape (N, C)."""
    import torch

    prompts = list(rows["input_ids"])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    tokens = [token for ((token,),) in words]
    scores = np.empty((len(prompts), len(tokens)))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            texts = {"input_ids": [prompts[i] for i in chosen]}
            batch = tokenizer.pad(texts, padding_side="left", return_tensors="pt").to(model.device)
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            logits = model(**batch, position_ids=positions, use_cache=False, logits_to_keep=1).logits[:, -1]
            scores[chosen] = logits.log_softmax(-1)[:, tokens].cpu().numpy()
    return scores


def run(variant: str, num_rows: int) -> dict[str, Any]:
    """Seconds and peak memory of scoring all rows in one variant, and the scores."""
    from ftkit.prompting.scoring import score
    from ftkit.training.monitor import Meter

    model, tokenizer, rows, words = prepare(num_rows)
    score(model, rows.select(range(2)), words)  # warm-up, so that both variants find the weights in memory
    with Meter() as meter:
        scores = score(model, rows, words) if variant == "ftkit" else score_whole(model, tokenizer, rows, words)
    tokens = sum(len(ids) for ids in rows["input_ids"])
    return {
        "seconds": meter.seconds,
        "peak_rss_mib": meter.peak_rss_mib,
        "tokens_a_row": tokens / num_rows,
        "scores": scores.tolist(),
    }


def run_load() -> dict[str, float]:
    """Seconds to load smollm2, and the growth of the process after one pass, as a multiple of its weights."""
    import torch

    from ftkit.models.loading import load_language_model
    from ftkit.models.modules import count_parameters
    from ftkit.training.monitor import Meter

    with Meter() as before:
        pass
    with Meter() as whole:
        start = time.perf_counter()
        model, tokenizer = load_language_model("smollm2")
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            model(**tokenizer("A film", return_tensors="pt").to(model.device))
    weights_mib = 4 * count_parameters(model)[1] / 2**20
    return {
        "load_seconds": seconds,
        "weights_copies": (whole.peak_rss_mib - before.peak_rss_mib) / weights_mib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--variant", choices=[*VARIANTS, "load"], help=argparse.SUPPRESS)  # one run
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_load() if arguments.variant == "load" else run(arguments.variant, arguments.rows)))
        return

    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in (*VARIANTS, "load")}
    for turn in range(arguments.rounds):
        order = VARIANTS if turn % 2 == 0 else tuple(reversed(VARIANTS))  # so that neither always has a cool machine
        for variant in (*order, "load"):
            result = in_a_process(__file__, ["--variant", variant, "--rows", str(arguments.rows)])
            results[variant].append(result)
            shown = {name: value for name, value in result.items() if name != "scores"}
            print(f"{variant:>12}: {shown}", flush=True)
    difference = max(
        float(np.abs(np.subtract(ours["scores"], theirs["scores"])).max())
        for ours, theirs in zip(*(results[variant] for variant in VARIANTS), strict=True)
    )
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"The scores differ by {difference:.1e}, more than {TOLERANCE:g}: "
            "ftkit and transformers do not compute the same, so their times cannot be compared."
        )

    def typical(variant: str, key: str) -> float:
        return round(statistics.median(result[key] for result in results[variant]), 3)

    ratios = [t["seconds"] / f["seconds"] for f, t in zip(*(results[variant] for variant in VARIANTS), strict=True)]
    figures = {
        "few_shot_speedup": round(statistics.median(ratios), 2),
        "load_seconds": typical("load", "load_seconds"),
        "weights_copies": typical("load", "weights_copies"),
        "score_difference": difference,
    }
    for variant in VARIANTS:
        for key in ("seconds", "peak_rss_mib"):
            figures[f"{variant}_{key}"] = typical(variant, key)
    print(json.dumps({**figures, "rows": arguments.rows, "rounds": arguments.rounds}))


if __name__ == "__main__":
    main()
