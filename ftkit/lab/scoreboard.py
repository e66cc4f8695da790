"""The scores of all methods of a lesson, by seed: those trained here, and those on record."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ftkit.lab.results import method_entry
from ftkit.metrics import Comparison, Evaluation, compare

if TYPE_CHECKING:
    import pandas as pd


class Scoreboard:
    """Scores on the test rows by method and seed.

    Args:
        seeds: seeds of this run; scores of other seeds count in ``pooled`` and ``compare`` only.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.seeds = list(seeds)
        self._tested: dict[str, dict[int, Evaluation]] = {}
        self._costs: dict[str, dict[int, Any]] = {}
        self._weights: dict[str, int] = {}
        self._recorded: dict[str, dict[int, float]] = {}

    def note(self, method: str, seed: int, evaluation: Evaluation, cost: Any, weights: int) -> None:
        """Note what a method scored with a seed.

        Args:
            method: name of the method, such as "full".
            seed: seed of the run.
            evaluation: on the test rows, which are the same for all.
            cost: History or Meter: has ``seconds`` and ``peak_rss_mib``.
            weights: number of trained weights; of several seeds, the largest counts.
        """
        self._tested.setdefault(method, {})[seed] = evaluation
        self._costs.setdefault(method, {})[seed] = cost
        self._weights[method] = max(weights, self._weights.get(method, 0))

    def add_record(self, method: str, rows: "pd.DataFrame") -> None:
        """Add the recorded runs of a method on the same test rows.

        Args:
            method: name of the method.
            rows: rows of a study, with the columns ``seed`` and ``test_accuracy``; there may be none.
        """
        found = dict(zip(rows["seed"], rows["test_accuracy"], strict=True))
        self._recorded.setdefault(method, {}).update(found)

    def metrics(self, order: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """Entries by method for ``save_metrics``, from the seeds of this run.

        Args:
            order: methods that come first; names without a score are left out.
        """
        names = [name for name in dict.fromkeys((*order, *self._tested)) if name in self._tested]
        entries = {}
        for name in names:
            seeds = [seed for seed in self.seeds if seed in self._tested[name]]
            if seeds:
                evaluations, costs = ([of[name][seed] for seed in seeds] for of in (self._tested, self._costs))
                entries[name] = method_entry(evaluations, costs, seeds=seeds, trainable_parameters=self._weights[name])
        return entries

    def pooled(self, order: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """The same entries with the mean accuracy over all seeds, and ``by_seed`` of all, for ``plots.scores``."""
        entries = self.metrics(order)
        for name, entry in entries.items():
            scores = list(self._accuracies(name).values())
            entry |= {"accuracy": sum(scores) / len(scores), "by_seed": scores}
        return entries

    def compare(self, first: str, second: str, *, rows: bool = False) -> Comparison:
        """Compare two methods over all seeds that both have.

        If one of them has recorded scores, the interval stands for other seeds on the same test rows, because the
        record has no single answers.

        Args:
            first, second: names of the methods.
            rows: leave the record out, so that the interval stands for other test rows, too.

        Raises:
            ValueError: the methods have no seed in common.
        """
        a, b = self._accuracies(first), self._accuracies(second)
        shared = sorted(set(a) & set(b))
        both = sorted(set(self._tested.get(first, {})) & set(self._tested.get(second, {})))
        if not rows and len(shared) > max(len(both), 1):
            return compare([a[seed] for seed in shared], [b[seed] for seed in shared], by="seed")
        if not both:
            raise ValueError(f"{first} and {second} have no seed in common: note or add scores of the same seeds.")
        return compare(*([self._tested[name][seed].correct for seed in both] for name in (first, second)))

    def verdict(self, first: str, second: str) -> str:
        """The comparison of two methods as a sentence, see ``Comparison.sentence``."""
        return self.compare(first, second).sentence(first, second)

    def _accuracies(self, name: str) -> Mapping[int, float]:
        tested = {seed: evaluation.accuracy for seed, evaluation in self._tested.get(name, {}).items()}
        return self._recorded.get(name, {}) | tested
