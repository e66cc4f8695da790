"""Cost of continual learning: Fisher information against a loop over rows, and a step with each method.

``fisher_speedup``: time of the obvious loop, with a forward and a backward pass for each row and the squares of its
gradients, over the time of ``diagonal_fisher``, for the diagonal empirical Fisher information of ``minilm`` on 256 film
sentences. For each parameter the two must agree within 1e-4 of the norm; otherwise the script ends.

Step ratios: time of ``fit`` for some steps of 16 film sentences with a penalty, or with as many replayed rows in each
step, over the time of as many steps without. Old outputs are computed beforehand, once per row; ``old_outputs_steps``
is the number of plain steps that this takes for the rows of one step.

In each round the variants run one after the other, in another order from round to round. A ratio is the median over
rounds of the ratio within a round. Leave the machine idle; about a minute and a half per round.

    python benchmarks/continual.py [--rounds 5] [--rows 256] [--steps 20]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH_SIZE, MAX_LENGTH, SEED, LR = 16, 64, 0, 1e-4
TOLERANCE = 1e-4


def fisher_by_row(model: nn.Module, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The same by a loop with one backward pass per row."""
    model.eval()
    parameters = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        inputs = {name: torch.tensor([value]) for name, value in row.items() if name != "labels"}
        loss = nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([row["labels"]]))
        for total, grad in zip(totals.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total.addcmul_(grad, grad)
    return {name: total / len(rows) for name, total in totals.items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest distance of ours from theirs over all parameters, relative to the norm of theirs.

    Some parameters, like the bias of a key, have no Fisher information but rounding errors. A norm below a millionth of
    the largest one is therefore replaced by that millionth.
    """
    least = 1e-6 * max(float(wanted.norm()) for wanted in theirs.values())
    return max(
        float((ours[name] - wanted).norm()) / max(float(wanted.norm()), least) for name, wanted in theirs.items()
    )


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256, help="number of rows for the Fisher information")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    from ftkit.continual.fisher import diagonal_fisher
    from ftkit.continual.penalties import EWC, L2SP, Distillation, add_old_logits
    from ftkit.continual.replay import ReplayBuffer, mix
    from ftkit.data.text import encode, load_text
    from ftkit.models.loading import load_classifier
    from ftkit.training.loop import fit
    from ftkit.training.state import TrainSettings

    num_rows = BATCH_SIZE * arguments.steps
    splits = load_text("movie-sentiment", train=max(arguments.rows, 2 * num_rows), validation=1, test=1)
    model, tokenizer = load_classifier("minilm", splits["train"].features["label"].names, seed=SEED)
    rows = encode(splits, tokenizer, max_length=MAX_LENGTH)["train"].to_list()
    fisher_rows, new_rows, old_rows = rows[: arguments.rows], rows[:num_rows], rows[num_rows : 2 * num_rows]

    def fisher() -> dict[str, Tensor]:
        return diagonal_fisher(model, fisher_rows, "empirical")

    def by_row() -> dict[str, Tensor]:
        return fisher_by_row(model, fisher_rows)

    ewc, l2sp, distillation = EWC(1.0), L2SP(model, 1.0), Distillation(model)
    ewc.remember(model, diagonal_fisher(model, fisher_rows[:32], "empirical"))
    buffer = ReplayBuffer(num_rows)
    buffer.add(old_rows)
    distilled_seconds, distilled = timed(lambda: add_old_logits(model, new_rows))
    plain = TrainSettings(lr=LR, num_epochs=1, batch_size=BATCH_SIZE, keep_best=False, seed=SEED)
    variants: dict[str, tuple[Any, TrainSettings, list[Any]]] = {
        "plain": (new_rows, plain, []),
        "ewc": (new_rows, plain, [ewc]),
        "l2sp": (new_rows, plain, [l2sp]),
        "replay": (mix(new_rows, buffer.rows), plain.model_copy(update={"accumulation": 2}), []),
        "distillation": (distilled, plain, [distillation]),
    }
    start = {name: weights.clone() for name, weights in model.state_dict().items()}

    def train(variant: str) -> float:
        """Seconds per step."""
        model.load_state_dict(start)
        data, settings, penalties = variants[variant]
        seconds, history = timed(lambda: fit(model, {"train": data}, settings, penalties=penalties))
        if len(history.steps) != arguments.steps:
            raise SystemExit(f"{variant} took {len(history.steps)} steps instead of {arguments.steps}.")
        return seconds / len(history.steps)

    speedups, seconds = [], {variant: [] for variant in variants}
    differences = []
    for turn in range(arguments.rounds):
        model.load_state_dict(start)
        taken = {}
        for name, run in [("ours", fisher), ("theirs", by_row)][:: 1 if turn % 2 == 0 else -1]:
            taken[name] = timed(run)
        differences.append(difference(taken["ours"][1], taken["theirs"][1]))
        if not differences[-1] <= TOLERANCE:
            raise SystemExit(
                f"The Fisher information differs by {differences[-1]:.1e}, more than {TOLERANCE:g}: "
                "the two do not compute the same, so their times cannot be compared."
            )
        speedups.append(taken["theirs"][0] / taken["ours"][0])
        print(f"round {turn + 1} fisher: {taken['ours'][0]:.2f} s, by row {taken['theirs'][0]:.2f} s", flush=True)
        del taken
        order = list(variants)
        for variant in order[turn % len(order) :] + order[: turn % len(order)]:  # so that no variant always comes first
            seconds[variant].append(train(variant))
            print(f"round {turn + 1} {variant:>12}: {1000 * seconds[variant][-1]:.0f} ms per step", flush=True)

    def ratio(variant: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[variant], seconds["plain"], strict=True)), 3)

    figures = {"fisher_speedup": round(statistics.median(speedups), 2)}
    figures |= {f"{variant}_step_ratio": ratio(variant) for variant in variants if variant != "plain"}
    plain_seconds = statistics.median(seconds["plain"])
    figures |= {
        "old_outputs_steps": round(distilled_seconds / arguments.steps / plain_seconds, 3),
        "plain_step_ms": round(1000 * plain_seconds, 1),
        "fisher_difference": max(differences),
        "rows": arguments.rows,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
