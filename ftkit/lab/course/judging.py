"""An exercise, and how an answer to it is judged: right, or wrong with the name of the mistake.

An answer is run beside the reference on random arguments. Where they differ, the catalogued mistake that gives what the
answer gives is the mistake that was made.
"""

import copy
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ftkit.errors import first_line

_NOT_ATTEMPTED = "not attempted yet"


class Objection(Exception):  # noqa: N818 - its message is the verdict on an answer, no error of the kit
    """A fault in the form of an answer; the message is what the check says."""


def called_once(answer: Callable, arguments: Sequence[Any]) -> Any:
    """Outcome of a function that computes something from its arguments and must leave them as they are.

    Args:
        answer: the function.
        arguments: the arguments of the call.

    Raises:
        Objection: an argument was changed.
    """
    given = copy.deepcopy(list(arguments))
    result = answer(*given)
    if not all(same(*pair) for pair in zip(given, arguments, strict=True) if isinstance(pair[0], _CHANGEABLE)):
        raise Objection("it changes what it is given: work on a copy")
    return result


def loss_and_gradient(answer: Callable, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Outcome of a loss: its value, then its gradient with respect to each argument that is a tensor of floats.

    Args:
        answer: the function.
        arguments: the arguments of the call.

    Raises:
        Objection: the answer is no tensor, not one number, or has no gradient.
    """
    given = [
        value.detach().clone().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for value in arguments
    ]
    loss = answer(*given)
    if not torch.is_tensor(loss):
        raise Objection("return a tensor: a plain number has no gradient")
    if loss.ndim:
        raise Objection(f"return one number, the mean over the rows, not a tensor of shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise Objection("it has no gradient: compute it from the given tensors alone, without .item() and .detach()")
    inputs = [value for value in given if torch.is_tensor(value) and value.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)


@dataclass(frozen=True)
class Exercise:
    """A function that the reader is to write.

    Attributes:
        name: as in ``check("cross-entropy", …)``; also the grade_id of the cell with its solution.
        reference: the right answer, which is shown as the solution.
        cases: each draws the arguments of one call from a random generator. The ordinary case comes first. A special
            one has a docstring, which is said about an answer that is right in the cases before and wrong in this one.
        mistakes: wrong answers that readers give; the docstring of each is what the check says about it.
        hints: three sentences of growing help.
        minutes: time that a student needs, about.
        difficulty: 1 (one idea), 2 (several steps) or 3 (the idea of the lesson, in full).
        forbidden: functions that the answer must not call, such as ``torch.nn.functional.cross_entropy``.
        outcome: runs an answer on drawn arguments and returns what it is judged by.
    """

    name: str
    reference: Callable
    cases: Sequence[Callable[[np.random.Generator], Sequence[Any]]]
    mistakes: Sequence[Callable]
    hints: tuple[str, str, str]
    minutes: int
    difficulty: int
    forbidden: Sequence[str] = ()
    outcome: Callable[[Callable, Sequence[Any]], Any] = called_once

    @property
    def effort(self) -> str:
        """Minutes and difficulty, in words."""
        return f"about {self.minutes} minutes, difficulty {self.difficulty} of 3"


def judge(exercise: Exercise, answer: Any, seeds: Sequence[int]) -> str | None:
    """Judge an answer on random arguments.

    Args:
        exercise: the exercise.
        answer: what the reader wrote; a function, if it is right.
        seeds: one for each draw of the arguments in each case.

    Returns:
        What is wrong, in one sentence without a full stop; None if the answer is right. Whatever the answer does, no
        error is raised.
    """
    if not callable(answer):
        return f"{answer!r} is not a function: define one in the cell of the exercise"
    trials: list[tuple[Sequence[Any], Any, Any]] = []
    for case in exercise.cases:
        for seed in seeds:
            arguments = case(np.random.default_rng(seed))
            allowed: list[Any] = []
            expected = exercise.outcome(_watched(exercise.reference, allowed), arguments)
            nothing_may_be_returned = any(value is None for value in allowed)
            try:
                given = _run(exercise, answer, arguments, nothing_may_be_returned)
            except Objection as objection:
                return str(objection)
            except NotImplementedError:
                return _NOT_ATTEMPTED
            except (Exception, SystemExit) as error:
                return _raised(error, answer)
            trials.append((arguments, given, expected))
        if not all(same(given, expected) for _, given, expected in trials):
            return _explain(exercise, case, trials)  # with the cases before: two mistakes may differ in these alone
    return None


def same(one: Any, other: Any) -> bool:
    """Whether two outcomes agree: numbers to four digits, whatever holds them (tensor, array, list, plain number)."""
    a, b = _array(one), _array(other)
    if a is not None and b is not None:
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


_CHANGEABLE = torch.Tensor | np.ndarray | list | dict


def _run(exercise: Exercise, answer: Callable, arguments: Sequence[Any], nothing_may_be_returned: bool) -> Any:
    """Outcome of an answer; an Objection if it returns nothing or calls what it must not."""
    returned: list[Any] = []
    with _calls_of(exercise.forbidden, answer) as calls:
        try:
            return exercise.outcome(_watched(answer, returned), arguments)
        finally:
            if calls:
                raise Objection(f"write it yourself, without {calls[0]}")
            if not nothing_may_be_returned and any(value is None or value is ... for value in returned):
                raise Objection(f"{_NOT_ATTEMPTED}: it returns nothing, or `return` is missing")


def _watched(answer: Callable, returned: list[Any]) -> Callable:
    """The function, noting what it returns."""

    def call(*arguments: Any, **named: Any) -> Any:
        returned.append(answer(*arguments, **named))
        return returned[-1]

    return call


@contextmanager
def _calls_of(names: Sequence[str], answer: Callable) -> Iterator[list[str]]:
    """Note the calls of functions, also of those that the answer's notebook has imported by name."""
    calls: list[str] = []
    with ExitStack() as restore:
        for name in names:
            home, _, attribute = name.rpartition(".")
            module = importlib.import_module(home)
            original = getattr(module, attribute)

            def noted(*arguments: Any, _name: str = attribute, _original: Callable = original, **named: Any) -> Any:
                calls.append(_name)
                return _original(*arguments, **named)

            names_of = getattr(answer, "__globals__", {})
            for namespace in (vars(module), names_of):
                for key in [key for key, value in namespace.items() if value is original]:
                    namespace[key] = noted
                    restore.callback(namespace.__setitem__, key, original)
        yield calls


def _raised(error: BaseException, answer: Callable) -> str:
    """The reader's own exception as a sentence, with the line of their code."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" in line {lines[-1]} of its cell" if lines else ""
    kind, text = type(error).__name__, first_line(error)
    return f"it raises {kind}{where}" + ("" if text == kind else f": {text}")


def _explain(exercise: Exercise, case: Callable, trials: Sequence[tuple[Sequence[Any], Any, Any]]) -> str:
    """What is wrong with an answer that differs from the reference in a trial: arguments, given, expected."""

    def makes(mistake: Callable, arguments: Sequence[Any], given: Any) -> bool:
        try:
            return same(given, exercise.outcome(mistake, arguments))
        except Exception:
            return False

    for mistake in exercise.mistakes:
        if all(makes(mistake, arguments, given) for arguments, given, _ in trials):
            return in_words_of(mistake)
    constant = all(same(given, trials[0][1]) for _, given, _ in trials)
    if constant and not all(same(expected, trials[0][2]) for _, _, expected in trials):
        return "it returns the same for all arguments, and so cannot be right"
    if case.__doc__:
        return in_words_of(case)
    arguments, given, expected = next(trial for trial in trials if not same(*trial[1:]))
    if isinstance(given, tuple) and isinstance(expected, tuple) and len(given) == len(expected):
        given, expected = next(pair for pair in zip(given, expected, strict=True) if not same(*pair))
    names = list(inspect.signature(exercise.reference).parameters)
    names = names if len(names) == len(arguments) else [""] * len(arguments)
    listed = ", ".join(f"{name}={_shown(value)}".lstrip("=") for name, value in zip(names, arguments, strict=True))
    return f"for {listed} it gives {_shown(given)}, and {_shown(expected)} is right"


def in_words_of(function: Callable) -> str:
    """The docstring of a mistake or of a special case, as one line."""
    return " ".join((function.__doc__ or "").split())


def _array(value: Any) -> NDArray[np.float64] | None:
    """The value as numbers, None if it is something else."""
    if value is None or isinstance(value, str | Mapping):
        return None
    try:
        return np.asarray(value.detach().cpu() if torch.is_tensor(value) else value, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        return None


def _shown(value: Any) -> str:
    """A value in a sentence: small ones as they are, large ones by their shape."""
    numbers = _array(value)
    if numbers is None:
        return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
    if numbers.ndim == 0:
        return f"{float(numbers):.4g}"
    if numbers.size <= 6 and numbers.ndim == 1:
        return f"[{', '.join(f'{number:.4g}' for number in numbers)}]"
    return f"an array of shape {numbers.shape}"
