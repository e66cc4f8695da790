"""Read a recorded study in a lesson."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.errors import StudyError, did_you_mean
from ftkit.lab.schema import NotebookSettings
from ftkit.lab.studies.declaration import STUDIES_FOLDER, TEXT_COLUMNS, Declaration, read_declaration, several

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Study:
    """A recorded study.

    Attributes:
        declaration: its declaration.
        rows: recorded runs in the order of the declaration, with the columns varied parameters, ``seed``, scores by
            split (such as ``test_accuracy``), cost, machine, versions and git revision.
    """

    declaration: Declaration
    rows: "pd.DataFrame"

    @property
    def fixed(self) -> dict[str, Any]:
        """Parameters with the same value in the whole study."""
        return {name: value for name, value in self.declaration.fixed.items() if name not in self.declaration.varied}

    def of(self, **values: Any) -> "pd.DataFrame":
        """Select rows; varied parameters that are not named keep their fixed or default value.

        Args:
            values: a value or a list of values by varied parameter, or by ``seed``; by default all seeds.

        Raises:
            ValueError: the study does not vary such a parameter, or declares no row with the value.
        """
        self.declaration.having(**values)
        rows = self.rows
        for name in [*self.declaration.varied, *(["seed"] if "seed" in values else [])]:
            rows = rows[rows[name].isin(several(values.get(name, getattr(self.declaration.base, name))))]
        return rows

    def summary(
        self, by: str = "rows", score: str = "test_accuracy", *, by_seed: bool = False, **where: Any
    ) -> "pd.DataFrame":
        """Summarise a score over the seeds, for each value of one parameter.

        All runs are scored on the same test rows. The intervals therefore cover the variation between seeds (drawn
        rows, new weights, order) but not that of another sample of test rows. They assume a normal distribution.

        Args:
            by: name of a varied parameter.
            score: a column of ``rows``.
            by_seed: add a column by_seed, the list of the scores in the order of the seeds, which figures draw as dots.
            where: values of other varied parameters, as for ``of``.

        Returns:
            A row per value of the parameter, with the columns mean, low, high, run_low, run_high (see ``over_runs``)
            and seeds, the number of seeds.

        Raises:
            ValueError: there is no such parameter, value or score.
        """
        import pandas as pd

        if score not in self.rows:
            raise ValueError(f"The study has no score {score!r}: {did_you_mean(score, self.rows.columns)}")
        self.declaration.having(**{by: []})
        rows = self.of(**where, **{by: list({row[by] for row in self.declaration.rows})})
        groups = rows.sort_values("seed").groupby(by)[score]
        table = pd.DataFrame({value: over_runs(scores) for value, scores in groups}).T
        table = table.assign(seeds=groups.count())
        if by_seed:
            table["by_seed"] = groups.agg(lambda scores: scores.dropna().tolist())
        return table.rename_axis(index=by, columns=score)

    def near_best(self, by: str, score: str, **where: Any) -> list[Any]:
        """Find the value of a parameter with the highest mean score and those that are not clearly worse.

        A value is clearly worse if the 95 % t interval of the differences to the best value, paired by seed, lies
        above 0.

        Args:
            by, score, where: as for ``summary``.

        Returns:
            The best value, then the others.
        """
        means = self.summary(by, score, **where)["mean"]
        rows = self.of(**where, **{by: list(means.index)})
        by_seed = rows.pivot_table(index="seed", columns=by, values=score)
        best = means.idxmax()
        behind = by_seed.drop(columns=best).rsub(by_seed[best], axis=0)
        return [best, *(value for value in behind if not over_runs(behind[value])["low"] > 0)]

    @property
    def origin(self) -> str:
        """Origin of the record in one line: number of runs, minutes, machine, versions, git revision."""
        rows = self.rows
        texts = [", ".join(dict.fromkeys(rows[column])) for column in ("machine", "versions", "revision")]
        return f"{len(rows)} runs, {rows['seconds'].sum() / 60:.0f} minutes of training; " + "; ".join(texts)

    def differing(self, settings: NotebookSettings, by: str) -> list[str]:
        """Find the parameters in which settings differ from the study; it applies to them if there are none.

        Compared are the parameters that the study fixes or varies, and those that are None in it, because TOML cannot
        express None.

        Args:
            settings: settings to compare.
            by: name of a parameter to leave out.
        """
        ours = self.declaration.base.model_dump()
        compared = {*self.declaration.fixed, *self.declaration.varied, *(name for name in ours if ours[name] is None)}
        return [name for name in ours if name in compared - {by} and getattr(settings, name) != ours[name]]


def over_runs(values: "pd.Series") -> "pd.Series":
    """Summarise a score over several seeds, or the differences of two methods paired by seed.

    Args:
        values: one per run, shape (seeds,), assumed to be normally distributed.

    Returns:
        mean; low and high, the 95 % t interval of the mean; run_low and run_high, the 95 % prediction interval for one
        further run. The intervals are NaN if there is only one run.
    """
    import pandas as pd
    from scipy.stats import t

    mean, count = values.mean(), values.count()
    arm = t.ppf(0.975, count - 1) * values.std()
    of_mean, of_run = arm / count**0.5, arm * (1 + 1 / count) ** 0.5
    ends = {"low": mean - of_mean, "high": mean + of_mean, "run_low": mean - of_run, "run_high": mean + of_run}
    return pd.Series({"mean": mean, **ends})


def load_study(name: str, folder: Path = STUDIES_FOLDER) -> Study:
    """Read the recorded rows of a study; prints one sentence if declared rows are missing.

    Args:
        name: name of the study.
        folder: folder of the declaration and of the recorded rows.

    Raises:
        FileNotFoundError: there is no such study.
        StudyError: no row is recorded yet.
    """
    import pandas as pd

    declaration = read_declaration(name, folder)
    recorded = declaration.recorded()
    rows = [row for row in declaration.rows if declaration.key(row) in recorded]
    if not rows:
        raise StudyError(f"The study {name} has no recorded rows yet: run `ftkit study {name}`.")
    if len(rows) < len(declaration.rows):
        print(f"{name}: {len(rows)} of {len(declaration.rows)} runs recorded; `ftkit study {name}` runs the rest.")
    table = pd.DataFrame([recorded[declaration.key(row)] | row for row in rows])  # parameters with their types
    numbers = [column for column in table if column not in {*rows[0], *TEXT_COLUMNS}]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return Study(declaration, table)
