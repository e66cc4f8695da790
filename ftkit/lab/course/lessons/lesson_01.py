"""The exercises of lesson 01, full fine-tuning."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ftkit.lab.course.judging import Exercise, loss_and_gradient


def exercise_cross_entropy() -> Exercise:
    """The loss of a classifier, by hand."""

    def cross_entropy(logits, labels):
        log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
        return -log_p.gather(-1, labels[:, None]).mean()

    def ordinary(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows, classes = rng.integers(2, 9), rng.integers(3, 7)
        logits = torch.tensor(2 * rng.normal(size=(rows, classes)), dtype=torch.float32)
        return logits, torch.tensor(rng.integers(classes, size=rows))

    def large(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """right for small logits and wrong for those near 1,000, where exp overflows: use logsumexp"""
        logits, labels = ordinary(rng)
        return 1000 * logits, labels

    def no_minus(logits, labels):
        """the minus sign is missing: log p is negative, a loss is not"""
        return -cross_entropy(logits, labels)

    def summed(logits, labels):
        """take the mean over the rows, not the sum"""
        return cross_entropy(logits, labels) * len(labels)

    def softmax_twice(logits, labels):
        """softmax is applied twice"""
        return cross_entropy(logits.softmax(-1), labels)

    def no_log(logits, labels):
        """the logarithm is missing: this is the mean probability of the right class"""
        return -logits.softmax(-1)[torch.arange(len(labels)), labels].mean()

    def no_softmax(logits, labels):
        """logits are not log-probabilities yet: subtract the logsumexp of each row"""
        return -logits[torch.arange(len(labels)), labels].mean()

    def all_classes(logits, labels):
        """only the log-probability of the right class counts: pick one from each row by its label"""
        return -logits.log_softmax(-1).mean()

    def columns(logits, labels):
        """the softmax runs over the classes, dimension -1, not over the rows"""
        return -logits.log_softmax(0)[torch.arange(len(labels)), labels].mean()

    def exp_overflows(logits, labels):
        """right for small logits and wrong for those near 1,000, where exp overflows: use logsumexp"""
        e = logits.exp()
        return (e.sum(-1) / e[torch.arange(len(labels)), labels]).log().mean()

    def log_of_nearly_zero(logits, labels):
        """right for small logits and wrong for those near 1,000, where exp overflows: use logsumexp"""
        return -(logits.softmax(-1) + 1e-9)[torch.arange(len(labels)), labels].log().mean()

    return Exercise(
        "cross-entropy",
        cross_entropy,
        (ordinary, large),
        (
            no_minus, summed, softmax_twice, no_log, no_softmax, all_classes, columns, exp_overflows,
            log_of_nearly_zero,
        ),
        (
            "The log-probability of a class is its logit minus the logsumexp of all logits of the row.",
            "`logits.logsumexp(dim=-1, keepdim=True)` has shape (B, 1) and can be subtracted from the logits.",
            "Pick one log-probability from each row with `log_p[torch.arange(len(labels)), labels]`; "
            "the loss is minus their mean.",
        ),
        minutes=8,
        difficulty=2,
        forbidden=("torch.nn.functional.cross_entropy",),
        outcome=loss_and_gradient,
    )  # fmt: skip


def exercise_warm_up() -> Exercise:
    """The schedule of the learning rate: a linear rise, then a linear fall."""

    def warm_up_factor(step, warmup, total):
        if step < warmup:
            return step / warmup
        return (total - step) / (total - warmup)

    def lengths(rng: np.random.Generator) -> tuple[int, int]:
        warmup = int(rng.integers(4, 30))
        return warmup, warmup + int(rng.integers(10, 200))

    def rising(rng: np.random.Generator) -> tuple[int, int, int]:
        warmup, total = lengths(rng)
        return int(rng.integers(1, warmup)), warmup, total

    def falling(rng: np.random.Generator) -> tuple[int, int, int]:
        warmup, total = lengths(rng)
        return int(rng.integers(warmup + 1, total)), warmup, total

    def peak(rng: np.random.Generator) -> tuple[int, int, int]:
        """at step `warmup` the factor is 1"""
        warmup, total = lengths(rng)
        return warmup, warmup, total

    def end(rng: np.random.Generator) -> tuple[int, int, int]:
        """at step `total` the factor is 0"""
        warmup, total = lengths(rng)
        return total, warmup, total

    def no_rise(step, warmup, total):
        """before step `warmup` the factor rises from 0 to 1: half-way through the warm-up it is 0.5"""
        return 1 - step / total

    def rise_over_all(step, warmup, total):
        """the rise takes `warmup` steps, not `total`"""
        return step / total

    def one_step_ahead(step, warmup, total):
        """the factor is 0 at step 0, so it is step / warmup, without + 1"""
        return (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)

    def never_falls(step, warmup, total):
        """after the warm-up the factor falls, down to 0"""
        return min(1, step / warmup)

    def falls_from_the_start(step, warmup, total):
        """the fall runs from step `warmup`, where the factor is 1, to step `total`"""
        return step / warmup if step < warmup else 1 - step / total

    def falls_too_late(step, warmup, total):
        """the fall has total - warmup steps, and ends at step `total`"""
        return step / warmup if step < warmup else 1 - (step - warmup) / total

    return Exercise(
        "warm-up",
        warm_up_factor,
        (rising, falling, peak, end),
        (no_rise, rise_over_all, one_step_ahead, never_falls, falls_from_the_start, falls_too_late),
        (
            "There are two parts: treat steps before `warmup` and the others separately.",
            "In the first part the factor grows from 0 by 1 / warmup a step.",
            "In the second part it is the number of steps that are left, divided by the number of steps in that part.",
        ),
        minutes=6,
        difficulty=1,
    )


def exercise_accumulation() -> Exercise:
    """The loss of a batch that is computed in parts."""

    def accumulate(mean_losses, sizes):
        return sum(loss * size for loss, size in zip(mean_losses, sizes, strict=True)) / sum(sizes)

    def ordinary(rng: np.random.Generator) -> tuple[list[float], list[int]]:
        parts = int(rng.integers(2, 6))
        sizes = [8] * (parts - 1) + [int(rng.integers(1, 7))]  # the last part is what is left over
        return [float(loss) for loss in rng.uniform(0.1, 3, parts)], sizes

    def mean_of_means(mean_losses, sizes):
        """a mean of means gives the small last part too much weight"""
        return sum(mean_losses) / len(mean_losses)

    def sum_of_means(mean_losses, sizes):
        """adding the means makes the step as many times too large as there are parts"""
        return sum(mean_losses)

    def sum_of_rows(mean_losses, sizes):
        """divide by the number of rows of all parts"""
        return sum(loss * size for loss, size in zip(mean_losses, sizes, strict=True))

    def divided_by_parts(mean_losses, sizes):
        """divide by the number of rows of all parts, not by the number of parts"""
        return sum(loss * size for loss, size in zip(mean_losses, sizes, strict=True)) / len(sizes)

    def last_part(mean_losses, sizes):
        """every part counts, not the last one alone"""
        return mean_losses[-1]

    return Exercise(
        "accumulation",
        accumulate,
        (ordinary,),
        (mean_of_means, sum_of_means, sum_of_rows, divided_by_parts, last_part),
        (
            "Every row of the batch must count as much as any other, whichever part it is in.",
            "A part's mean loss times its size is the sum of the losses of its rows.",
            "Add these sums over all parts, then divide by the number of all rows, `sum(sizes)`.",
        ),
        minutes=5,
        difficulty=1,
    )


def exercise_learning_curve() -> Exercise:
    """What a learning curve says about a run."""

    def diagnose(training, validation, ln_c):
        if training[-1] > 0.9 * ln_c:
            return "too high" if max(training) > 1.05 * ln_c else "too low"
        return "overfitting" if validation[-1] > min(validation) + 0.1 else "good"

    def falling(rng: np.random.Generator, start: float, end: float) -> list[float]:
        share = np.linspace(0, 1, int(rng.integers(20, 60))) ** rng.uniform(0.5, 1.5)
        return (start + (end - start) * share).tolist()

    def low(rng: np.random.Generator, ln_c: float) -> tuple[list[float], list[float]]:
        training = falling(rng, ln_c, ln_c * rng.uniform(0.95, 0.99))
        return training, (ln_c * rng.uniform(0.97, 1.01, int(rng.integers(2, 5)))).tolist()

    def high(rng: np.random.Generator, ln_c: float) -> tuple[list[float], list[float]]:
        training = [ln_c, *falling(rng, ln_c * rng.uniform(1.15, 1.6), ln_c * rng.uniform(0.97, 1.03))]
        return training, (ln_c * rng.uniform(0.98, 1.05, int(rng.integers(2, 5)))).tolist()

    def good(rng: np.random.Generator, ln_c: float) -> tuple[list[float], list[float]]:
        training = falling(rng, ln_c * rng.choice([1.0, 1.15]), ln_c * rng.uniform(0.1, 0.4))
        lowest = ln_c * rng.uniform(0.6, 0.8)
        return training, [*np.linspace(ln_c, lowest, int(rng.integers(2, 5))), lowest + rng.uniform(0, 0.04)]

    def over(rng: np.random.Generator, ln_c: float) -> tuple[list[float], list[float]]:
        lowest = ln_c * rng.uniform(0.5, 0.7)
        rise = np.linspace(lowest, lowest + ln_c * rng.uniform(0.4, 0.9), int(rng.integers(2, 9)))
        return falling(rng, ln_c, ln_c * rng.uniform(0.02, 0.2)), [ln_c, *rise]

    def several(rng: np.random.Generator) -> list[tuple[list[float], list[float], float]]:
        """compare it with the three rules of the exercise, one after the other"""
        kinds = rng.permutation([low, high, good, over] * 5)
        sizes = np.log(rng.integers(2, 7, len(kinds)))
        return [(*kind(rng, float(ln_c)), float(ln_c)) for kind, ln_c in zip(kinds, sizes, strict=True)]

    def each(answer: Callable, arguments: Sequence[Any]) -> list[str]:
        return [answer(*deepcopy(run)) for run in arguments]

    def swapped(training, validation, ln_c):
        """too high and too low are swapped: a rate that is too high makes the loss rise"""
        said = diagnose(training, validation, ln_c)
        return {"too low": "too high", "too high": "too low"}.get(said, said)

    def always_low(training, validation, ln_c):
        """a rate can also be too high: then the training loss has been above 1.05 of ln C"""
        said = diagnose(training, validation, ln_c)
        return "too low" if said == "too high" else said

    def rise_alone(training, validation, ln_c):
        """look at the end first: a loss that rose at the start and fell afterwards has learned"""
        return "too high" if max(training) > 1.05 * ln_c else diagnose(training, validation, ln_c)

    def gap(training, validation, ln_c):
        """validation loss above training loss is usual; to overfit is that it rises"""
        said = diagnose(training, validation, ln_c)
        return "overfitting" if said == "good" and validation[-1] > training[-1] + 0.1 else said

    def last_epoch(training, validation, ln_c):
        """compare the last validation loss with the lowest of all, not with the one before"""
        said = diagnose(training, validation, ln_c)
        return "good" if said == "overfitting" and validation[-1] <= validation[-2] + 0.1 else said

    def first_epoch(training, validation, ln_c):
        """compare the last validation loss with the lowest of all, not with the first"""
        said = diagnose(training, validation, ln_c)
        return "good" if said == "overfitting" and validation[-1] <= validation[0] + 0.1 else said

    def never_over(training, validation, ln_c):
        """overfitting is missing: the validation loss has risen above its lowest point"""
        said = diagnose(training, validation, ln_c)
        return "good" if said == "overfitting" else said

    def two_classes(training, validation, ln_c):
        """ln C depends on the number of classes: use what is passed in, not 0.69"""
        return diagnose(training, validation, 0.69)

    return Exercise(
        "learning-curve",
        diagnose,
        (several,),
        (
            swapped, always_low, rise_alone, gap, last_epoch, first_epoch, never_over, two_classes,
        ),
        (
            "First ask whether anything was learned: the last training loss against 0.9 of ln C.",
            "If nothing was: did the training loss rise? `max(training) > 1.05 * ln_c` tells too high from too low.",
            "If something was: compare `validation[-1]` with `min(validation)`.",
        ),
        minutes=8,
        difficulty=2,
        outcome=each,
    )  # fmt: skip


class _Classifier(nn.Module):
    """A linear layer with the interface of a network of transformers: ``network(**batch).logits``."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features, classes)

    def forward(self, inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(inputs))


def exercise_training_step() -> Exercise:
    """One step of training: loss, gradient, clipping, update."""

    def training_step(network, optimizer, batch, labels, loss_function):
        loss = loss_function(network(**batch).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def two_steps(answer: Callable, arguments: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The weights after two steps, and the loss that each step returned."""
        network, batch, labels, loss_function = deepcopy(arguments)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        losses = [torch.as_tensor(answer(network, optimizer, batch, labels, loss_function)).detach() for _ in range(2)]
        return [weight.detach() for weight in network.parameters()], losses

    def steep(rng: np.random.Generator) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor, Callable]:
        rows, features, classes = rng.integers(6, 12), int(rng.integers(3, 6)), int(rng.integers(2, 4))
        network = _Classifier(features, classes)
        with torch.no_grad():
            for weight in network.parameters():
                weight.copy_(torch.tensor(rng.normal(size=weight.shape)))
        # so steep that clipping matters
        batch = {"inputs": torch.tensor(9 * rng.normal(size=(rows, features)), dtype=torch.float32)}
        return network, batch, torch.tensor(rng.integers(classes, size=rows)), F.cross_entropy

    def another_loss(rng: np.random.Generator) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor, Callable]:
        """use the loss function that is passed in, whichever it is"""
        network, batch, labels, _ = steep(rng)
        return network, batch, labels, F.multi_margin_loss

    def no_backward(network, optimizer, batch, labels, loss_function):
        """nothing moved: backward(), then step(), and no zero_grad() between the two"""
        return loss_function(network(**batch).logits, labels)

    def gradients_kept(network, optimizer, batch, labels, loss_function):
        """the first gradient is still in the second: zero_grad() is missing"""
        loss = loss_function(network(**batch).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss

    def not_clipped(network, optimizer, batch, labels, loss_function):
        """clip the gradient after backward() and before step()"""
        loss = loss_function(network(**batch).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def clipped_by_value(network, optimizer, batch, labels, loss_function):
        """clip the norm of the whole gradient to 1, not each of its numbers"""
        loss = loss_function(network(**batch).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_value_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def loss_afterwards(network, optimizer, batch, labels, loss_function):
        """the network is right, the loss is not: return the loss from before the step"""
        training_step(network, optimizer, batch, labels, loss_function)
        return loss_function(network(**batch).logits, labels)

    def zero_returned(network, optimizer, batch, labels, loss_function):
        """the network is right, the loss is not: return that of the logits and the labels, not a number of your own"""
        training_step(network, optimizer, batch, labels, loss_function)
        return 0.0

    return Exercise(
        "training-step",
        training_step,
        (steep, another_loss),
        (
            no_backward, gradients_kept, not_clipped, clipped_by_value, loss_afterwards, zero_returned,
        ),
        (
            "Five things happen, in this order: loss, backward, clip, step, zero_grad.",
            "`torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)` clips what backward() leaves in the weights.",
            "Keep the loss in a variable before the step and return it at the end; the optimizer clears the gradients.",
        ),
        minutes=6,
        difficulty=2,
        outcome=two_steps,
    )  # fmt: skip
