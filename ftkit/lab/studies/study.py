"""A recorded study, read for a lesson."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import StudyError, nearest
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.studies.declaration import FOLDER, TEXTS, Declaration, read_declaration, several

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Study:
    """A recorded study, for a notebook to show.

    Attributes:
        declaration: what was to be run.
        rows: what was recorded, in the order of the declaration: varied parameters, ``seed``, scores by split
            (``test_accuracy``), cost, machine, versions, git revision.
    """

    declaration: Declaration
    rows: "pd.DataFrame"

    @property
    def fixed(self) -> dict[str, Any]:
        """The parameters that have one value in the whole study."""
        return {name: value for name, value in self.declaration.fixed.items() if name not in self.declaration.varied}

    def of(self, **values: Any) -> "pd.DataFrame":
        """The rows with these values of varied parameters (or seeds), and the fixed or default value of the others.

        Args:
            values: a value, or a list of values, by parameter.

        Raises:
            ValueError: the study varies no such parameter, or declares no row with the value.
        """
        self.declaration.having(**values)
        rows = self.rows
        for name in [*self.declaration.varied, *(["seed"] if "seed" in values else [])]:
            rows = rows[rows[name].isin(several(values.get(name, getattr(self.declaration.base, name))))]
        return rows

    def summary(self, by: str = "rows", score: str = "test_accuracy", **where: Any) -> "pd.DataFrame":
        """A score by the values of one parameter, over the seeds; the others as for ``of``.

        All runs are scored on the same test rows, so both intervals speak of the seeds (drawn rows, new weights,
        order) only, not of another draw of test rows. They take the scores for normally distributed.

        Args:
            by: a varied parameter.
            score: a column of ``rows``.
            where: values of other varied parameters.

        Returns:
            By value: mean, low, high, run_low, run_high, as in ``over_runs``; seeds, how many.

        Raises:
            ValueError: no such parameter, value or score.
        """
        import pandas as pd

        if score not in self.rows:
            raise ValueError(f"The study has no score {score!r}: did you mean {nearest(score, self.rows.columns)!r}?")
        self.declaration.having(**{by: []})
        rows = self.of(**where, **{by: list({row[by] for row in self.declaration.rows})})
        groups = rows.groupby(by)[score]
        table = pd.DataFrame({value: over_runs(scores) for value, scores in groups}).T
        return table.assign(seeds=groups.count()).rename_axis(index=by, columns=score)

    def near_best(self, by: str, score: str, **where: Any) -> list[Any]:
        """The value of a parameter with the highest mean score, then those that can't be told from it.

        Told from it is a value whose difference from it, seed by seed, has a 95 % t interval above 0.

        Args:
            by, score, where: as for ``summary``.
        """
        means = self.summary(by, score, **where)["mean"]
        rows = self.of(**where, **{by: list(means.index)})
        by_seed = rows.pivot_table(index="seed", columns=by, values=score)
        best = means.idxmax()
        behind = by_seed.drop(columns=best).rsub(by_seed[best], axis=0)
        return [best, *(value for value in behind if not over_runs(behind[value])["low"] > 0)]

    @property
    def origin(self) -> str:
        """Where the record comes from, in one line: how many runs, how long, on what."""
        rows = self.rows
        told = [", ".join(dict.fromkeys(rows[column])) for column in ("machine", "versions", "revision")]
        return f"{len(rows)} runs, {rows['seconds'].sum() / 60:.0f} minutes of training; " + "; ".join(told)

    def differing(self, settings: NotebookSettings, by: str) -> list[str]:
        """Names of the parameters, ``by`` apart, in which settings differ from the study: none, and it applies.

        Compared are the parameters that the study pins or varies, and those that are None in it (TOML can't say so).
        """
        ours = self.declaration.base.model_dump()
        compared = {*self.declaration.fixed, *self.declaration.varied, *(name for name in ours if ours[name] is None)}
        return [name for name in ours if name in compared - {by} and getattr(settings, name) != ours[name]]


def over_runs(values: "pd.Series") -> "pd.Series":
    """A score over runs with several seeds, or the difference of two methods seed by seed.

    Args:
        values: one a run, shape (seeds,), taken for normally distributed.

    Returns:
        mean; low and high, the 95 % t interval of the mean; run_low and run_high, the 95 % prediction interval of one
        further run. The intervals are NaN where there is one run.
    """
    import pandas as pd
    from scipy.stats import t

    mean, count = values.mean(), values.count()
    arm = t.ppf(0.975, count - 1) * values.std()
    of_mean, of_run = arm / count**0.5, arm * (1 + 1 / count) ** 0.5
    ends = {"low": mean - of_mean, "high": mean + of_mean, "run_low": mean - of_run, "run_high": mean + of_run}
    return pd.Series({"mean": mean, **ends})


def load_study(name: str, folder: Path = FOLDER) -> Study:
    """Read what was recorded of a study; prints one sentence if declared rows are missing.

    Raises:
        FileNotFoundError: no such study.
        StudyError: nothing is recorded yet.
    """
    import pandas as pd

    declaration = read_declaration(name, folder)
    recorded = declaration.recorded()
    rows = [row for row in declaration.rows if declaration.key(row) in recorded]
    if not rows:
        raise StudyError(f"Nothing is recorded of the study {name}: run `ftkit study {name}`.")
    if len(rows) < len(declaration.rows):
        print(f"{name}: {len(rows)} of {len(declaration.rows)} runs recorded; `ftkit study {name}` runs the others.")
    table = pd.DataFrame([recorded[declaration.key(row)] | row for row in rows])  # parameters typed, as declared
    numbers = [column for column in table if column not in {*rows[0], *TEXTS}]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return Study(declaration, table)
