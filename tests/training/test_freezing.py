import math
from pathlib import Path

import pytest
import torch
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import FAMILIES, LANGUAGE_MODELS, make_tiny
from torch import nn

from ftkit.errors import FreezingError
from ftkit.models.architecture import layer_groups
from ftkit.training.callbacks import Callback, Checkpoint
from ftkit.training.freezing import GradualUnfreezing, LayerwiseRates, freeze, group_table, layer_rates
from ftkit.training.loop import evaluate, fit, make_optimizer
from ftkit.training.state import TrainingRun, TrainSettings

BERT_GROUPS = ["embeddings", "layer 0", "layer 1", "head"]


def group_of(model: nn.Module, name: str) -> str:
    return next(group.name for group in layer_groups(model) if name in group.parameters)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# Groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *LANGUAGE_MODELS])
def test_every_parameter_is_in_exactly_one_group_in_order(name: str) -> None:
    model = make_tiny(name)
    groups = layer_groups(model)
    names = [parameter for group in groups for parameter in group.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    blocks = {
        "albert": ["layer 0"],
        "t5": [f"{side} layer {i}" for side in ("encoder", "decoder") for i in range(3)],
    }.get(name.split()[0], ["layer 0", "layer 1", "layer 2"])
    assert [group.name for group in groups] == ["embeddings", *blocks, "head"]
    assert all(group.parameters for group in groups if group.name != "head")
    assert groups[1].uses == (3 if name == "albert" else 1)


@pytest.mark.parametrize(
    ("model", "parameter", "group"),
    [
        ("bert", "bert.pooler.dense.weight", "head"),
        ("electra", "electra.embeddings_project.weight", "embeddings"),
        ("deberta-v2", "deberta.encoder.rel_embeddings.weight", "embeddings"),
        ("deberta-v2", "deberta.encoder.LayerNorm.weight", "embeddings"),
        ("deberta-v2", "deberta.encoder.conv.conv.weight", "layer 0"),
        ("modernbert", "model.final_norm.weight", "head"),
        ("albert", "albert.encoder.embedding_hidden_mapping_in.weight", "embeddings"),
        ("gpt2", "transformer.ln_f.weight", "head"),
        ("llama lm", "lm_head.weight", "head"),
        ("t5", "transformer.encoder.final_layer_norm.weight", "encoder layer 2"),
        ("t5", "transformer.decoder.final_layer_norm.weight", "head"),
        (
            "t5",
            "transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder layer 0",
        ),
        ("vit", "vit.embeddings.cls_token", "embeddings"),
        ("vit", "vit.layernorm.weight", "head"),
    ],
)
def test_what_is_in_no_block_belongs_where_it_is_used(model: str, parameter: str, group: str) -> None:
    assert group_of(make_tiny(model), parameter) == group


def test_tied_parameters_are_said_to_be() -> None:
    embeddings = layer_groups(make_tiny("gpt2 lm"))[0]
    assert embeddings.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert "tied: lm_head.weight is transformer.wte.weight" in repr(embeddings)
    assert all(not group.tied for group in layer_groups(make_tiny("bert")))
    assert set(layer_groups(make_tiny("t5 seq2seq"))[0].tied.values()) == {"shared.weight"}


def test_an_architecture_that_cannot_be_read_says_what_to_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        FreezingError, match=r"Sequential can't be read layer by layer, because .* no ModuleList.*train=\["
    ):
        layer_groups(model)
    assert trained_names(freeze(model, ["1.*"])) == {"1.weight", "1.bias"}
    two = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2)]) for name in ("left", "right")})
    with pytest.raises(FreezingError, match=r"several lists of blocks \(left, right\)"):
        layer_groups(two)


# Freezing -----------------------------------------------------------------------------------------------------


def test_freeze_sets_every_parameter() -> None:
    model = make_tiny_bert()
    everything = {name for name, _ in model.named_parameters()}
    head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert freeze(model, 1) is model
    assert trained_names(model) == head
    assert trained_names(freeze(model, 2)) == head | {n for n in everything if ".layer.1." in n}
    assert trained_names(freeze(model, 4)) == everything
    assert trained_names(freeze(model, "embeddings")) == {n for n in everything if ".embeddings." in n}
    assert trained_names(freeze(model, ["layer *", "head"])) == {n for n in everything if ".embeddings." not in n}
    assert trained_names(freeze(model, "*.bias")) == {n for n in everything if n.endswith(".bias")}
    assert trained_names(freeze(model, "classifier.weight")) == {"classifier.weight"}


def test_names_that_are_not_there_are_refused_with_the_nearest() -> None:
    model = make_tiny_bert()
    before = trained_names(model)
    with pytest.raises(FreezingError, match="no group or parameter 'layer 11': did you mean 'layer 1'"):
        freeze(model, ["head", "layer 11"])
    with pytest.raises(FreezingError, match=r"'clasifier\.weight': did you mean 'classifier\.weight'"):
        freeze(model, "clasifier.weight")
    for number in (0, 5):
        with pytest.raises(FreezingError, match=f"train={number}, but the model has 4 groups"):
            freeze(model, number)
    assert trained_names(model) == before


class Look(Callback):
    """Calls a function after each step."""

    def __init__(self, look) -> None:
        self.look = look

    def on_step(self, run: TrainingRun) -> None:
        self.look(run)


def test_frozen_parts_are_in_eval_mode_during_training() -> None:
    """Two passes of the frozen encoder are equal while the head's dropout fires; also after a callback evaluates."""
    model, rows = freeze(make_tiny_bert(dropout=0.3), ["classifier.*"]), make_rows(24)
    ids, seen = torch.tensor([[1, 7, 9]]), []

    def look(run: TrainingRun) -> None:
        with torch.no_grad():
            frozen = [model.bert(input_ids=ids).pooler_output for _ in range(2)]
            whole = [model(input_ids=ids).logits for _ in range(2)]
        seen.append((torch.equal(*frozen), torch.equal(*whole)))
        evaluate(model, rows)

    fit(model, {"train": rows}, TrainSettings(num_epochs=2, batch_size=8), callbacks=[Look(look)])
    assert seen == [(True, False)] * 6


def test_running_statistics_of_a_frozen_norm_are_still() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.moving = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.frozen.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> object:
            return type("Output", (), {"logits": self.moving(self.frozen(x))})

    model = Network()
    rows = [{"x": [float(i), 5.0, -3.0], "labels": i % 3} for i in range(16)]
    fit(model, {"train": rows}, TrainSettings(num_epochs=1, batch_size=8))
    assert torch.equal(model.frozen.running_mean, torch.zeros(3))
    assert not torch.equal(model.moving.running_mean, torch.zeros(3))


# Gradual unfreezing -------------------------------------------------------------------------------------------


def epochs_that_move(num_epochs: int, callbacks: list[Callback]) -> tuple[dict[str, list[int]], nn.Module]:
    """For each group the epochs (from 1) in which it changed."""
    model = make_tiny_bert()
    groups = {group.name: list(group.parameters.values()) for group in layer_groups(model)}
    before = {name: [p.detach().clone() for p in group] for name, group in groups.items()}
    moved: dict[str, list[int]] = {name: [] for name in groups}

    class Watch(Callback):
        def on_epoch(self, run: TrainingRun) -> None:
            for name, group in groups.items():
                if any(not torch.equal(p, old) for p, old in zip(group, before[name], strict=True)):
                    moved[name].append(len(run.history.epochs))
                before[name] = [p.detach().clone() for p in group]

    settings = TrainSettings(lr=1e-3, num_epochs=num_epochs, batch_size=16, schedule="constant")
    fit(model, {"train": make_rows(40)}, settings, callbacks=[Watch(), *callbacks])
    return moved, model


@pytest.mark.parametrize("groups", [1, 2])
def test_each_group_moves_from_its_epoch_on(groups: int) -> None:
    moved, _ = epochs_that_move(4, [GradualUnfreezing(groups)])
    for depth, name in enumerate(reversed(BERT_GROUPS)):
        assert moved[name] == list(range(1 + depth // groups, 5))


def test_unfreezing_what_the_optimiser_was_not_built_with_trains_nothing() -> None:
    """The mistake that GradualUnfreezing avoids."""
    model = freeze(make_tiny_bert(), 1)
    optimizer = make_optimizer(model, TrainSettings(lr=1e-2))
    freeze(model, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=torch.tensor([[1, 7, 9]])).logits.square().sum().backward()
    optimizer.step()
    moved = {group_of(model, name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head"}


def test_with_gradual_unfreezing_the_best_epoch_is_restored_whole() -> None:
    """Epoch 1 is best; weights unfrozen later must go back to what they were then."""
    model, at_best = make_tiny_bert(dropout=0), {}
    data = {"train": make_rows(40), "validation": make_rows(20, seed=1)}

    class FirstIsBest(Callback):
        def on_epoch(self, run: TrainingRun) -> None:
            if len(run.history.epochs) == 1:
                at_best.update({name: p.detach().clone() for name, p in model.named_parameters()})
                run.history.epochs[0]["validation_accuracy"] = 2.0

    settings = TrainSettings(lr=1e-3, num_epochs=4, batch_size=8)
    history = fit(model, data, settings, callbacks=[FirstIsBest(), GradualUnfreezing()])
    assert history.best_epoch == 1
    assert all(torch.equal(p, at_best[name]) for name, p in model.named_parameters())


class StopAt(Callback):
    steers = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: TrainingRun) -> None:
        run.stop = run.step == self.step


@pytest.mark.parametrize("step", [2, 5, 6, 11, 13])
def test_a_run_resumed_at_any_step_ends_with_bit_identical_weights(step: int, tmp_path: Path) -> None:
    """5 steps an epoch, with dropout, gradual unfreezing, rates by layer and the best epoch kept."""
    settings = TrainSettings(lr=1e-3, num_epochs=4, batch_size=8)
    data = {"train": make_rows(40), "validation": make_rows(20, seed=1)}
    weights = {}
    for name, stops in (("whole", [[]]), ("resumed", [[StopAt(step)], []])):
        for stop in stops:
            model = make_tiny_bert()
            callbacks = [LayerwiseRates(0.5), Checkpoint(tmp_path / name, every=1), GradualUnfreezing(), *stop]
            history = fit(model, data, settings, callbacks=callbacks)
            assert len(history.steps) == (step if stop else 20)
        weights[name] = model.state_dict()
    assert all(torch.equal(weights["whole"][name], weights["resumed"][name]) for name in weights["whole"])


def test_gradual_unfreezing_keeps_to_what_trains_and_needs_two_groups() -> None:
    rows = {"train": make_rows(16)}
    model = freeze(make_tiny_bert(), 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, rows, TrainSettings(num_epochs=3), callbacks=[GradualUnfreezing()])
    moved = {group_of(model, name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"layer 1", "head"}
    with pytest.raises(FreezingError, match="groups=0"):
        GradualUnfreezing(0)
    with pytest.raises(FreezingError, match="only one group is trainable"):
        fit(freeze(model, 1), rows, TrainSettings(num_epochs=2), callbacks=[GradualUnfreezing()])


# Rates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1 / 2.6, 0.9])
def test_rates_are_those_of_the_formula(factor: float) -> None:
    model, seen = make_tiny_bert(), []
    name_of = {id(p): (group.name, p.ndim) for group in layer_groups(model) for p in group.parameters.values()}

    def look(run: TrainingRun) -> None:
        for options in run.optimizer.param_groups:
            for p in options["params"]:
                name, ndim = name_of[id(p)]
                distance = 3 - BERT_GROUPS.index(name)
                assert options["initial_lr"] == pytest.approx(1e-2 * factor**distance)
                assert options["lr"] == pytest.approx(run.history.steps[-1]["lr"] * factor**distance)
                assert options["weight_decay"] == (0.01 if ndim > 1 else 0)
                seen.append(id(p))

    settings = TrainSettings(lr=1e-2, num_epochs=1, batch_size=8)
    fit(model, {"train": make_rows(8)}, settings, callbacks=[LayerwiseRates(factor), Look(look)])
    assert sorted(seen) == sorted(name_of)
    for bad in (0, 1.5, -1):
        with pytest.raises(FreezingError, match="give one above 0, up to 1"):
            layer_rates(model, 1e-3, bad)


def test_a_checkpoint_of_other_rates_is_refused(tmp_path: Path) -> None:
    settings, rows = TrainSettings(num_epochs=2, batch_size=8), {"train": make_rows(16)}
    checkpoint = Checkpoint(tmp_path / "run.ckpt")
    fit(make_tiny_bert(), rows, settings, callbacks=[LayerwiseRates(0.5), checkpoint, StopAt(2)])
    with pytest.raises(ValueError, match=r"callbacks=LayerwiseRates\(factor=0\.5\), but this run has .*factor=0\.9"):
        fit(make_tiny_bert(), rows, settings, callbacks=[LayerwiseRates(0.9), checkpoint])


@pytest.mark.parametrize("kind", ["LayerwiseRates", "GradualUnfreezing"])
def test_a_checkpoint_on_the_wrong_side_is_refused_before_the_first_step(kind: str, tmp_path: Path) -> None:
    """Resumed, the run would fail, or train an epoch with other groups than it had."""
    checkpoint = Checkpoint(tmp_path / "run.ckpt")
    if kind == "LayerwiseRates":
        callbacks, order = [checkpoint, LayerwiseRates(0.5)], "put LayerwiseRates before Checkpoint"
    else:
        callbacks, order = [GradualUnfreezing(), checkpoint], "put Checkpoint before GradualUnfreezing"
    with pytest.raises(FreezingError, match=f"A resumed run would not be the same: {order} in callbacks"):
        fit(make_tiny_bert(), {"train": make_rows(16)}, TrainSettings(num_epochs=2), callbacks=callbacks)
    assert not list(tmp_path.iterdir())


def test_group_table_counts_and_names_rates() -> None:
    model = freeze(make_tiny_bert(), ["classifier.*", "layer 1"])
    table = group_table(model, layer_rates(model, 1e-3, 0.5))
    assert list(table.index) == [*BERT_GROUPS, "all"]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.loc["all", ["parameters", "trainable", "share"]].tolist() == [total, trained, trained / total]
    assert table.loc["head", "trainable"] == 66
    assert table.loc["head", "parameters"] == 66 + 32 * 33
    assert table["learning rate"].tolist()[2:4] == [5e-4, 1e-3]
    assert all(math.isnan(rate) for rate in table.loc[["embeddings", "layer 0", "all"], "learning rate"])
    assert "learning rate" not in group_table(model)
