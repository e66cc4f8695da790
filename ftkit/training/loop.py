"""The training loop: ``fit`` and ``evaluate``.

The loop knows no method. A method changes the model beforehand, adds a penalty to the loss, or is a callback.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from ftkit.errors import TrainingError, in_brief
from ftkit.metrics import Evaluation
from ftkit.models.device import choose_device
from ftkit.models.modules import count_parameters, eval_mode, train_mode
from ftkit.training.batching import (
    IGNORED,
    evaluation_batches,
    has_token_labels,
    make_batch,
    row_labels,
    row_lengths,
    training_batches,
)
from ftkit.training.callbacks import Callback
from ftkit.training.checks import match_rows, require_settings
from ftkit.training.losses import ModelWithLoss, Penalty, make_class_weights
from ftkit.training.monitor import Meter
from ftkit.training.state import History, TrainingRun, TrainSettings
from ftkit.training.tracking import tracked


def fit(
    model: nn.Module,
    data: Mapping[str, Any],
    settings: TrainSettings,
    *,
    penalties: Sequence[Penalty] = (),
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train a model in place, and leave it in eval mode.

    Args:
        model: called as ``model(**batch)`` without the labels; returns an object with ``logits`` of shape (N, C), for N
            rows or for the N tokens that have a label. A ``ModelWithLoss`` returns its loss instead. Parameters with
            ``requires_grad`` are trained; modules whose parameters are all frozen run in eval mode.
        data: rows by split, as ``encode`` makes them: "train" and, optionally, "validation". A row is a dict of
            numbers and sequences; its ``labels`` are its class, or one label per token, where -100 is ignored. Where
            both the rows and the model name their classes, the labels are matched by name (``match_rows``).
        settings: the learning rate, the number of epochs and all else that ``TrainSettings`` lists.
        penalties: terms added to the loss.
        callbacks: called in this order.

    Returns:
        The history of the run. After Ctrl-C too: the model then has the weights of the last complete step.

    Raises:
        TrainingError: the loss is not finite, the memory is too small, nothing is trainable, or a setting does not suit
            the model or the rows.
        DataError: the model can't read the rows, or does not know their classes.
        ModelError: the model has no embedding for its padding token.
        ValueError: there are no rows, or class_weights has the wrong length.
    """
    run = prepare(model, data, settings, penalties, callbacks)  # device, precision, optimiser, number of steps
    with Meter() as cost, _ending(run), tracked(run) as trackers:
        callbacks = [*callbacks, *trackers]
        for callback in callbacks:
            callback.on_start(run)
        for epoch in range(len(run.history.epochs), settings.num_epochs):
            if run.stop:
                break
            train_mode(model)  # in each epoch, because a callback may have unfrozen something
            for batches in steps_of(run, epoch):
                train_step(run, batches)
                for callback in callbacks:
                    callback.on_step(run)
                if run.stop:
                    break
            if run.step == (epoch + 1) * run.steps_per_epoch:
                end_epoch(run)
                for callback in callbacks:
                    callback.on_epoch(run)
    run.history.seconds, run.history.peak_rss_mib = cost.seconds, cost.peak_rss_mib
    run.history.trainable_parameters = count_parameters(model)[0]
    return run.history


def prepare(
    model: nn.Module,
    data: Mapping[str, Any],
    settings: TrainSettings,
    penalties: Sequence[Penalty] = (),
    callbacks: Sequence[Callback] = (),
) -> TrainingRun:
    """Set the seed, put the model on the device, and make the optimiser; the arguments are those of ``fit``."""
    require_settings(model, data["train"], settings)
    data = {**data, **{split: match_rows(model, data[split]) for split in ("train", "validation") if split in data}}
    precision = choose_device().precision if settings.precision == "auto" else settings.precision
    with _without_accelerate_variables():
        AcceleratorState._reset_state()  # it is global, and would refuse a precision other than that of the last run
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        set_seed(settings.seed)
        prepared = accelerator.prepare_model(model)
        optimizer = accelerator.prepare_optimizer(make_optimizer(model, settings))
    class_weights = None
    if settings.class_weights is not None:
        num_classes = getattr(getattr(model, "config", None), "num_labels", 0)  # 0: unknown, so counted from the labels
        weights = make_class_weights(settings.class_weights, row_labels(data["train"]), num_classes)
        class_weights = weights.to(accelerator.device)
    lengths = row_lengths(data["train"])
    batches_per_epoch = math.ceil(len(lengths) / settings.batch_size)
    steps_per_epoch = math.ceil(batches_per_epoch / (settings.accumulation * accelerator.num_processes))
    return TrainingRun(
        model,
        data,
        settings,
        penalties,
        callbacks,
        optimizer,
        accelerator,
        prepared,
        class_weights,
        lengths,
        steps_per_epoch,
    )


@contextmanager
def _without_accelerate_variables() -> Iterator[None]:
    """Hide what a launcher has left in the environment, because accelerate lets it overrule what the code says.

    What a launcher says of processes (RANK, WORLD_SIZE, …) and of the device stays.
    """
    kept = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")
    hidden = {name: os.environ[name] for name in os.environ if name.startswith("ACCELERATE_") and name not in kept}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def all_steps_of(run: TrainingRun, epoch: int) -> list[list[Any]]:
    """The steps of an epoch; a step is a list of batches, a batch an array of row numbers."""
    batches = training_batches(run.lengths, run.settings.batch_size, run.settings.seed, epoch)
    per_step = run.settings.accumulation * run.accelerator.num_processes
    return [batches[i : i + per_step] for i in range(0, len(batches), per_step)]


def steps_of(run: TrainingRun, epoch: int) -> list[list[Any]]:
    """The steps of an epoch that are still to do."""
    return all_steps_of(run, epoch)[run.step - epoch * run.steps_per_epoch :]


def train_step(run: TrainingRun, batches: list[Any]) -> None:
    """One optimiser step: loss and backward pass, clipping, step."""
    settings, accelerator, optimizer = run.settings, run.accelerator, run.optimizer
    rate = lr_factor(run.step, run.total_steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
    with _plain_errors(run):
        loss = backward(run, batches)
        _require_finite("loss", loss, run, batches)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        grad_norm = float(accelerator.clip_grad_norm_(trained, settings.max_grad_norm))
        if accelerator.scaler is None:
            _require_finite("gradient norm", grad_norm, run, batches)
            optimizer.optimizer.step()  # accelerate's own step would look for a package on the disk each time
        else:  # with fp16 an overflow is expected, and accelerate then skips the step
            optimizer.step()
    optimizer.optimizer.zero_grad(set_to_none=True)
    if isinstance(run.model, ModelWithLoss):
        run.model.after_step()
    run.step += 1
    run.history.steps.append({"step": run.step, "loss": loss, "lr": settings.lr * rate, "grad_norm": grad_norm})
    run.progress.update(run.step, f"loss {loss:.3f}")


def backward(run: TrainingRun, batches: list[Any]) -> float:
    """Add up the gradients of the batches of one step as if they were one large batch; return its mean loss.

    The summed loss of each batch is divided by the weight of the whole step: the number of its labels, or the sum of
    their class weights. So it does not matter how the rows are cut into batches or spread over processes, nor that the
    last batch is small.
    """
    accelerator = run.accelerator
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    idle = not mine  # the last step of an epoch may have no batch for this process, which then adds zero
    inputs = [make_batch(run.model, run.data["train"], rows, accelerator.device) for rows in mine or batches[:1]]
    labels = [batch["labels"][batch["labels"] != IGNORED] for batch in inputs]
    weight = sum(len(known) if run.class_weights is None else run.class_weights[known].sum() for known in labels)
    total_weight = accelerator.reduce(torch.as_tensor(weight, device=accelerator.device) * (not idle), "sum")
    total_rows = sum(len(rows) for rows in batches)
    mean_loss = torch.zeros((), device=accelerator.device)
    for i, (batch, known) in enumerate(zip(inputs, labels, strict=True)):
        with nullcontext() if i == len(inputs) - 1 else accelerator.no_sync(run.prepared):
            outputs, summed = _summed_loss(run, batch, known)
            loss = summed / total_weight
            for penalty in run.penalties:
                loss = loss + penalty(run.model, batch, outputs) * len(batch["labels"]) / total_rows
            loss = loss * (not idle)
            mean_loss += loss.detach()
            accelerator.backward(loss * accelerator.num_processes)  # processes average their gradients
    return float(accelerator.reduce(mean_loss, "sum"))


def _summed_loss(run: TrainingRun, batch: dict[str, Tensor], known: Tensor) -> tuple[Any, Tensor]:
    """What the model returns for a batch, and its loss summed over the known labels."""
    if isinstance(run.model, ModelWithLoss):
        outputs = run.prepared(**batch)
        return outputs, outputs.loss * len(known)
    outputs = run.prepared(**{name: value for name, value in batch.items() if name != "labels"})
    smoothing = run.settings.label_smoothing
    return outputs, F.cross_entropy(
        outputs.logits.float(), known, weight=run.class_weights, label_smoothing=smoothing, reduction="sum"
    )


def end_epoch(run: TrainingRun) -> None:
    """Validate, and keep the weights if they are the best so far (the first of equals)."""
    history = run.history
    losses = [step["loss"] for step in history.steps[-run.steps_per_epoch :]]
    rows_per_step = [sum(map(len, batches)) for batches in all_steps_of(run, len(history.epochs))]
    row = {"epoch": len(history.epochs) + 1, "train_loss": float(np.average(losses, weights=rows_per_step))}
    if "validation" in run.data:
        if has_token_labels(run.data["validation"]):
            score, sign = "validation_loss", -1
            row[score] = token_loss(run.model, run.data["validation"])
        else:
            weighted = run.settings.class_weights is not None
            best_by = run.settings.best_by or ("balanced_accuracy" if weighted else "accuracy")
            score, sign = f"validation_{best_by}", 1
            evaluation = evaluate(run.model, run.data["validation"])
            row |= {"validation_loss": evaluation.loss, "validation_accuracy": evaluation.accuracy}
            row[score] = getattr(evaluation, best_by)
        if sign * row[score] > max((sign * epoch[score] for epoch in history.epochs), default=-math.inf):
            history.best_epoch = row["epoch"]
            if run.settings.keep_best:
                run.best_weights = _trained_weights(run)
    history.epochs.append(row)


def _trained_weights(run: TrainingRun) -> dict[str, Tensor]:
    """A copy of the state of the model without what is frozen for good."""
    # the optimiser knows what trains: a callback may have frozen a part of it only for now
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    named = run.model.named_parameters(remove_duplicate=False)  # a tied weight has several names
    frozen = {name for name, p in named if id(p) not in trained}
    return {name: weights.clone() for name, weights in run.model.state_dict().items() if name not in frozen}


@contextmanager
def _ending(run: TrainingRun) -> Iterator[None]:
    """However the run ends, leave a model that can be used; Ctrl-C ends it after the last complete step."""
    try:
        yield
        run.history.ended = "stopped" if run.step < run.total_steps else "finished"
        if run.settings.keep_best and run.best_weights is not None:
            run.model.load_state_dict(run.best_weights, strict=False)
    except KeyboardInterrupt:
        run.history.ended = "interrupted"
        print(f"Interrupted after step {run.step} of {run.total_steps}: the model has the weights of that step.")
    finally:
        run.progress.close()
        run.optimizer.zero_grad(set_to_none=True)
        run.accelerator.unwrap_model(run.prepared, keep_fp32_wrapper=False)
        vars(run.model).pop("_is_accelerate_prepared", None)  # or the next fit would keep the precision of this one
        run.model.eval()


def lr_factor(step: int, total_steps: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up from 0, then the schedule.

    The schedules linear and cosine fall to 0; constant stays at 1.

    A single step is at the peak rate, since a warm-up from 0 would leave the weights as they are.
    """
    if total_steps == 1:
        return 1.0
    warmup_steps = math.ceil(settings.warmup * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over all trainable parameters; vectors (biases, norms) do not decay.

    Raises:
        TrainingError: every parameter is frozen.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("There is nothing to train, since all parameters are frozen: set requires_grad on some.")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [{**group, "initial_lr": settings.lr} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)  # fused is the fastest, on the CPU too


@torch.inference_mode()
def evaluate(model: nn.Module, rows: Any, *, batch_size: int = 64) -> Evaluation:
    """Classify labelled rows in eval mode; the model is left in the mode it was in.

    Args:
        model: as for ``fit``.
        rows: one split of what ``encode`` makes, N rows.
        batch_size: rows per forward pass; it changes memory and time, not the result.

    Returns:
        Labels, probabilities and loss, and all that follows from them, in the order of the rows. Classes are numbered
        as in the model: where both name their classes, the labels are matched by name (``match_rows``).

    Raises:
        ValueError: the rows have one label per token.
        DataError: the model can't read the rows, or does not know their classes.
        ModelError: the model has no embedding for its padding token.
    """
    if has_token_labels(rows):
        raise ValueError("These rows have one label per token and no class: use token_loss for them.")
    rows = match_rows(model, rows)
    if isinstance(model, ModelWithLoss):
        with eval_mode(model):
            return model.measure(rows, batch_size)
    device = next(model.parameters()).device
    order, logits, labels = [], [], []
    with eval_mode(model):
        for indices in evaluation_batches(row_lengths(rows), batch_size):
            batch = make_batch(model, rows, indices, device)
            labels.append(batch.pop("labels").cpu())
            logits.append(model(**batch).logits.float().cpu())
            order.append(torch.from_numpy(indices))
    given = torch.cat(order).argsort()
    scores, targets = torch.cat(logits)[given], torch.cat(labels)[given]
    return Evaluation(targets.numpy(), scores.double().softmax(-1).numpy(), F.cross_entropy(scores, targets).item())


@torch.inference_mode()
def token_loss(model: nn.Module, rows: Any, *, batch_size: int = 8) -> float:
    """Mean cross-entropy, in nats, over the tokens that have a label, in eval mode; its exponential is the perplexity.

    Args:
        model: as for ``fit``; it is left in the mode it was in.
        rows: one split of rows with one label per token, as ``encode_completions`` makes them.
        batch_size: rows per forward pass; keep it small, because the logits of a batch (labelled tokens x vocabulary)
            are held in memory.

    Raises:
        DataError, ModelError: as for ``evaluate``.
    """
    rows = match_rows(model, rows)
    device = next(model.parameters()).device
    loss, tokens = 0.0, 0
    with eval_mode(model):
        for indices in evaluation_batches(row_lengths(rows), batch_size):
            batch = make_batch(model, rows, indices, device)
            labels = batch.pop("labels")
            labels = labels[labels != IGNORED]
            loss += F.cross_entropy(model(**batch).logits.float(), labels, reduction="sum").item()
            tokens += len(labels)
    return loss / tokens


def _require_finite(what: str, value: float, run: TrainingRun, batches: list[Any]) -> None:
    if math.isfinite(value):
        return
    rows = in_brief([int(i) for rows in batches for i in rows])
    if run.step == 0:
        cause = "the rows or the starting weights contain values that are not finite: check them"
    else:
        cause = f"the learning rate is probably too high: try lr={run.settings.lr / 10:g}"
    raise TrainingError(
        f"The {what} is {value} at step {run.step + 1} of {run.total_steps} (training rows {rows}); {cause}."
    )


@contextmanager
def _plain_errors(run: TrainingRun) -> Iterator[None]:
    """Say what to do when memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error).lower()
        known = ("can't allocate memory", "not enough memory", "out of memory")
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(words in said for words in known):
            raise
        size, batches = run.settings.batch_size, run.settings.accumulation
        if isinstance(run.model, ModelWithLoss):  # its loss may depend on which rows share a batch
            advice = run.model.memory_advice
        elif size == 1:
            advice = "try shorter texts (max_length) or a smaller model"
        else:
            advice = f"try batch_size={size // 2} with accumulation={batches * 2}, which trains the same"
        raise TrainingError(
            f"The memory ran out at step {run.step + 1} with batches of {size} rows: {advice}."
        ) from error
