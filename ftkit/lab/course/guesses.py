"""Guesses: the reader commits to a number before a result is seen, and is told afterwards how far off it was."""

import html
import math
import reprlib
from numbers import Real
from typing import Any

from IPython.display import display
from ipywidgets import HTML, FloatRangeSlider, VBox

from ftkit.lab.course.records import update_progress
from ftkit.lab.widgets.display import StaticPreview, somebody_is_there
from ftkit.plots import NO_MATH

_STEPS = 100  # positions of the slider


class Guess:
    """A range that the reader sets with a slider; see ``predict``.

    Attributes:
        what: what is guessed.
        sure: share of such ranges that should hold the truth.
        slider: the slider, which starts as wide as it can be.
    """

    def __init__(self, what: str, low: float, high: float, sure: float) -> None:
        self.what, self.sure, self._step = what, sure, (high - low) / _STEPS
        self._whole = (low, high)
        self.slider = FloatRangeSlider(
            value=(low, high),
            min=low,
            max=high,
            step=self._step,
            readout_format=".3g",
            layout={"width": "min(36em, 100%)"},
        )

    @property
    def range(self) -> tuple[float, float] | None:
        """Both ends of the range; None if nobody has moved the slider."""
        moved = [abs(end - start) > self._step / 2 for end, start in zip(self.slider.value, self._whole, strict=True)]
        return tuple(self.slider.value) if any(moved) else None


def predict(what: str, *, low: float, high: float, sure: float = 0.8) -> Guess:
    """Ask for a guess with a slider; give what it returns to ``how_far`` once the truth is known.

    Args:
        what: what is to be guessed, such as "accuracy of the linear probe".
        low, high: ends of the slider.
        sure: share of such ranges that should hold the truth, between 0 and 1.

    Raises:
        ValueError: low is not below high, or sure is not between 0 and 1.
    """
    if not low < high:
        raise ValueError(f"low={low:g} is not below high={high:g}: give the lower end of the slider first.")
    if not 0 < sure < 1:
        raise ValueError(f"sure={sure:g} is not between 0 and 1: give a share, such as 0.8.")
    guess = Guess(what, low, high, sure)
    question = (
        f'<span class="{NO_MATH}">Your guess: {html.escape(what)}. Set a range that holds it, '
        f"and be {100 * sure:.0f} % sure of it.</span>"
    )
    if somebody_is_there():
        display(VBox([HTML(question), guess.slider]))
    else:
        display(StaticPreview(f"<p>{question}</p>"))
    return guess


def how_far(guess: Any, truth: float, what: str = "", *, sure: float = 0.8) -> None:
    """Print how far off a guess was. It never raises for a guess; without one it says what is true.

    The first guess of each thing is kept for ``progress``: after it, the truth is known. For a truth between 0 and 1, a
    guess such as 70, or 0,7 with a comma, is not kept: that it can be written as 0.7 is said instead.

    Args:
        guess: a number, a range such as (0.7, 0.85), what ``predict`` returned, or None.
        truth: the true value, finite.
        what: what was guessed; without it a plain guess is not kept. A guess of ``predict`` knows it.
        sure: for a range: share of such ranges that should hold the truth.

    Raises:
        ValueError: the truth is no finite number.
    """
    truth = float(truth)
    if not math.isfinite(truth):
        raise ValueError(f"The truth is {truth}: give a finite number.")
    if isinstance(guess, Guess):
        guess, what, sure = guess.range, what or guess.what, guess.sure
    start = f"{what}: {_in_digits(truth)}" if what else f"It is {_in_digits(truth)}"
    if guess is None or guess is ...:
        print(f"{start}. There was no guess.")
        return
    ends = _ends(guess)
    if ends is None:
        shown = " ".join(reprlib.repr(guess).split())
        print(f"{start}. The guess {shown} is no number: write one, or a range such as (0.7, 0.85).")
        return
    low, high = ends
    if meant := _likely_meant(guess, low, truth):
        print(f"{start}. The guess {guess} is far from it: if you meant {meant}.")
        return
    off = max(low - truth, truth - high, 0)
    if low < high:
        verdict = f"{_in_digits(off)} {'below' if truth < low else 'above'} it" if off else "inside it"
        print(f"{start}. Your range was {_in_digits(low)} to {_in_digits(high)}: the truth is {verdict}.")
    else:
        verdict = f"{_in_digits(off)} too {'high' if low > truth else 'low'}" if off else "exactly right"
        print(f"{start}. Your guess was {_in_digits(low)}: {verdict}.")
    if what:
        entry = {"low": low, "high": high, "sure": sure, "truth": truth}
        update_progress(lambda content: content["guesses"].setdefault(what, entry))


def _ends(guess: Any) -> tuple[float, float] | None:
    """Both ends of a guess, equal for a single number; None if it is none."""
    ends = guess if isinstance(guess, tuple | list) and len(guess) == 2 else (guess, guess)
    if not all(isinstance(end, Real) and not isinstance(end, bool) and math.isfinite(end) for end in ends):
        return None
    return min(map(float, ends)), max(map(float, ends))


def _likely_meant(guess: Any, low: float, truth: float) -> str:
    """What a share was probably meant to be, written with a decimal comma or in per cent; "" if it is plausible."""
    if not 0 < truth < 1:
        return ""
    if isinstance(guess, tuple) and guess[0] == 0 and all(isinstance(end, int) for end in guess) and guess[1] > 1:
        return f"0.{guess[1]}, write it with a point"
    if 10 <= low <= 100:
        return f"per cent, write {low:g} % as {low / 100:g}"
    return ""


def _in_digits(value: float) -> str:
    """A number to three digits, or to whole numbers from 1,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
