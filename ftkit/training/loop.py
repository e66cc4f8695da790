"""The training loop: ``fit`` and ``evaluate``.

The loop knows no method. A method changes the model beforehand, adds a penalty to the loss, or is a callback.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from ftkit.errors import TrainingError
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
from ftkit.training.losses import ModelWithLoss, Penalty, make_class_weights
from ftkit.training.monitor import Meter, ProgressBar
from ftkit.training.state import History, TrainingRun, TrainSettings


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
        model: called as ``model(**batch)`` without the labels; gives an object with ``logits`` of shape (N, C): for N
            rows, or for the N tokens that are labelled; an ``ModelWithLoss`` gives its loss instead. What has
            ``requires_grad`` is trained; modules whose parameters are all frozen run in eval mode.
        data: rows by split, as ``encode`` makes them: "train" and, if there is one, "validation". A row is a dict of
            numbers and sequences; its ``labels`` are its class, or one a token, those of -100 left out.
        settings: see TrainSettings.
        penalties: terms added to the loss.
        callbacks: called in this order.

    Returns:
        The history. After Ctrl-C too: the model then has the weights of the last whole step.

    Raises:
        TrainingError: a loss that is not finite, memory that does not suffice, nothing to train, class weights where
            there are no classes.
    """
    if isinstance(model, ModelWithLoss) and (settings.label_smoothing or settings.class_weights is not None):
        raise TrainingError(f"{type(model).__name__} has a loss of its own: set label_smoothing 0, class_weights None.")
    accelerator = _accelerator(settings.precision)
    set_seed(settings.seed)
    wrapped = accelerator.prepare_model(model)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, settings))
    # accelerate's step looks for a package on the disk each time; only its loss scaling is needed
    take_step = optimizer.optimizer.step if accelerator.scaler is None else optimizer.step
    lengths = row_lengths(data["train"])
    class_weights = None
    if settings.class_weights is not None:  # only then are all labels read
        if has_token_labels(data["train"]):
            raise TrainingError("class_weights are for rows with a class, and these have a label a token: set it None.")
        weights = make_class_weights(settings.class_weights, row_labels(data["train"]), _num_classes(model))
        class_weights = weights.to(accelerator.device)

    batches_a_step = settings.accumulation * accelerator.num_processes
    steps_an_epoch = math.ceil(math.ceil(len(lengths) / settings.batch_size) / batches_a_step)
    run = TrainingRun(model, data, settings, optimizer, total_steps=steps_an_epoch * settings.num_epochs)
    bar = ProgressBar(run.total_steps, "training")
    meter = Meter()
    try:
        with meter:
            for callback in callbacks:
                callback.on_start(run)
            for epoch in range(len(run.history.epochs), settings.num_epochs):
                if run.stop:
                    break
                train_mode(model)  # anew each epoch: a callback may have unfrozen something
                batches = training_batches(lengths, settings.batch_size, settings.seed, epoch)
                groups = [batches[i : i + batches_a_step] for i in range(0, len(batches), batches_a_step)]
                for group in groups[run.step - epoch * steps_an_epoch :]:
                    rate = lr_factor(run.step, run.total_steps, settings)
                    for parameters in optimizer.param_groups:
                        parameters["lr"] = parameters["initial_lr"] * rate
                    with _plain_errors(run):
                        loss = accumulate_gradients(accelerator, wrapped, run, group, class_weights, penalties)
                        _require_finite("loss", loss, run, group)
                        trained = [p for parameters in optimizer.param_groups for p in parameters["params"]]
                        grad_norm = float(accelerator.clip_grad_norm_(trained, settings.max_grad_norm))
                        if accelerator.scaler is None:  # with fp16 an overflow is expected: that step is skipped
                            _require_finite("gradient norm", grad_norm, run, group)
                        take_step()
                    optimizer.optimizer.zero_grad(set_to_none=True)
                    if isinstance(model, ModelWithLoss):
                        model.after_step()
                    run.step += 1
                    run.history.steps.append(
                        {"step": run.step, "loss": loss, "lr": settings.lr * rate, "grad_norm": grad_norm}
                    )
                    bar.update(run.step, f"loss {loss:.3f}")
                    for callback in callbacks:
                        callback.on_step(run)
                    if run.stop:
                        break
                if run.step == (epoch + 1) * steps_an_epoch:
                    _end_epoch(run, steps_an_epoch)
                    for callback in callbacks:
                        callback.on_epoch(run)
            run.history.ended = "stopped" if run.step < run.total_steps else "finished"
            if settings.keep_best and run.best_weights is not None:
                model.load_state_dict(run.best_weights, strict=False)
    except KeyboardInterrupt:
        run.history.ended = "interrupted"
        print(f"Interrupted after step {run.step} of {run.total_steps}: the model has the weights of that step.")
    finally:
        bar.close()
        optimizer.zero_grad(set_to_none=True)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        vars(model).pop("_is_accelerate_prepared", None)  # or the next fit would keep the precision of this one
        model.eval()
    run.history.seconds, run.history.peak_rss_mib = meter.seconds, meter.peak_rss_mib
    run.history.trainable_parameters = count_parameters(model)[0]
    return run.history


@torch.inference_mode()
def evaluate(model: nn.Module, rows: Any, *, batch_size: int = 64) -> Evaluation:
    """Classify labelled rows in eval mode; the model is left in the mode it was in.

    Args:
        model: as for ``fit``.
        rows: one split of what ``encode`` makes, N rows.
        batch_size: rows a forward pass; it changes memory and time, not the result.

    Returns:
        Labels, probabilities and loss, and all that follows from them; rows in the order they were given.

    Raises:
        ValueError: rows with a label a token.
    """
    if has_token_labels(rows):
        raise ValueError("These rows have a label a token, and no class: measure them with token_loss.")
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
    """Mean cross-entropy, in nats, of the tokens that rows are labelled with, in eval mode; its exp is the perplexity.

    Args:
        model: as for ``fit``; it is left in the mode it was in.
        rows: one split of rows with a label a token, as ``encode_completions`` makes them.
        batch_size: rows a forward pass, few, for the logits (labelled tokens x vocabulary) of a batch are in memory.
    """
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


def lr_factor(step: int, total_steps: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up from 0, then the schedule down to 0."""
    warmup_steps = math.ceil(settings.warmup * total_steps)
    if step < warmup_steps:
        return step / warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over what requires a gradient; vectors (biases, norms) do not decay.

    Raises:
        TrainingError: every parameter is frozen.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("There is nothing to train: all parameters are frozen; set requires_grad on some of them.")
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [{**group, "initial_lr": settings.lr} for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)  # fused: on the CPU too, it is the fastest


def _num_classes(model: nn.Module) -> int:
    """Classes of a model whose config tells; 0 for another, whose classes are those of its rows."""
    return getattr(getattr(model, "config", None), "num_labels", 0)


def _end_epoch(run: TrainingRun, steps_an_epoch: int) -> None:
    """Validate, and keep the weights if they are the best so far (the first of equals)."""
    history = run.history
    losses = [step["loss"] for step in history.steps[-steps_an_epoch:]]
    row = {"epoch": len(history.epochs) + 1, "train_loss": sum(losses) / len(losses)}
    if "validation" in run.data:
        if has_token_labels(run.data["validation"]):
            measure, sign = "validation_loss", -1
            row[measure] = token_loss(run.model, run.data["validation"])
        else:
            measure, sign = "validation_accuracy", 1
            evaluation = evaluate(run.model, run.data["validation"])
            row |= {"validation_loss": evaluation.loss, measure: evaluation.accuracy}
        if sign * row[measure] > max((sign * epoch[measure] for epoch in history.epochs), default=-math.inf):
            history.best_epoch = row["epoch"]
            if run.settings.keep_best:
                # what the optimiser holds, for a callback may have frozen some of it for now
                trained = {id(p) for parameters in run.optimizer.param_groups for p in parameters["params"]}
                # under all its names, for a tied weight has several
                named = run.model.named_parameters(remove_duplicate=False)
                frozen = {name for name, p in named if id(p) not in trained}
                weights = run.model.state_dict()
                run.best_weights = {name: weights[name].clone() for name in weights if name not in frozen}
    history.epochs.append(row)


def _accelerator(precision: str) -> Accelerator:
    """Accelerate's view of device, precision and processes, made anew for each run."""
    if precision == "auto":
        precision = choose_device().precision
    AcceleratorState._reset_state()  # it is global, and would refuse another precision than the last run's
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision)


def _require_finite(what: str, value: float, run: TrainingRun, group: list[Any]) -> None:
    if math.isfinite(value):
        return
    numbers = [str(int(i)) for rows in group for i in rows]
    rows = ", ".join(numbers[:8]) + (", …" if len(numbers) > 8 else "")
    if run.step == 0:
        cause = "the rows or the starting weights hold values that are not finite: check them"
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
        advice = f"try batch_size={size // 2} with accumulation={batches * 2}, which trains the same"
        if isinstance(
            run.model, ModelWithLoss
        ):  # its rows may be of one loss, like pairs that are each other's negatives
            advice = run.model.memory_advice
        elif size == 1:
            advice = "try shorter texts (max_length) or a smaller model"
        raise TrainingError(f"Out of memory at step {run.step + 1} with {size} rows a batch: {advice}.") from error


def accumulate_gradients(
    accelerator: Accelerator,
    wrapped: nn.Module,
    run: TrainingRun,
    group: list[Any],
    class_weights: Tensor | None,
    penalties: Sequence[Penalty],
) -> float:
    """Add up the gradients of one step's batches as if they were one large batch; returns its mean loss.

    Each batch's summed loss is divided by the weight of the whole group, which is the number of its labels or the sum
    of their class weights, so that it does not matter how the rows are cut into batches and spread over processes, nor
    that a last batch is small.
    """
    mine = group[accelerator.process_index :: accelerator.num_processes]
    idle = not mine  # an epoch's last step may not have a batch for every process: this one then adds nothing
    batches = [make_batch(run.model, run.data["train"], rows, accelerator.device) for rows in mine or group[:1]]
    total_rows = sum(len(rows) for rows in group)
    counted = [batch["labels"][batch["labels"] != IGNORED] for batch in batches]
    weight = sum(len(labels) if class_weights is None else class_weights[labels].sum() for labels in counted)
    total_weight = accelerator.reduce(torch.as_tensor(weight, device=accelerator.device) * (not idle), "sum")
    mean_loss = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(wrapped):
            if isinstance(run.model, ModelWithLoss):
                outputs = wrapped(**batch)
                summed = outputs.loss * len(counted[i])
            else:
                outputs = wrapped(**{name: value for name, value in batch.items() if name != "labels"})
                summed = F.cross_entropy(
                    outputs.logits.float(),
                    counted[i],
                    weight=class_weights,
                    label_smoothing=run.settings.label_smoothing,
                    reduction="sum",
                )
            loss = summed / total_weight
            for penalty in penalties:
                loss = loss + penalty(run.model, batch, outputs) * len(batch["labels"]) / total_rows
            loss = loss * (not idle)
            mean_loss += loss.detach()
            accelerator.backward(loss * accelerator.num_processes)  # processes average their gradients
    return float(accelerator.reduce(mean_loss, "sum"))
