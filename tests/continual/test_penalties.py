"""EWC, L2-SP and distillation: zero at the old weights, and equal to their equations elsewhere."""

from types import SimpleNamespace

import pytest
import torch
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import disturb, make_tiny
from torch import nn

from ftkit.continual.penalties import EWC, L2SP, Distillation, add_old_logits
from ftkit.models.modules import average_weights, snapshot, weight_distance
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

SETTINGS = TrainSettings(lr=0.01, num_epochs=2, batch_size=8, precision="fp32", weight_decay=0)


def make_fisher(model, seed):
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=rng) for name, p in model.named_parameters()}


def gradients(model, term):
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(term, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


def assert_same_gradients(model, ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)  # 50,000 numbers are summed in another order
    wanted = gradients(model, expected)
    for name, grad in gradients(model, ours).items():
        torch.testing.assert_close(grad, wanted[name], msg=name)


def test_ewc_equals_its_equation():
    model = make_tiny_bert()
    fisher, old = make_fisher(model, 0), snapshot(model)
    penalty = EWC(3.0)
    assert penalty(model, {}, None) == 0  # nothing is remembered yet
    penalty.remember(model, fisher)
    assert penalty(model, {}, None) == 0
    disturb(model)
    expected = 1.5 * sum((fisher[name] * (p - old[name]) ** 2).sum() for name, p in model.named_parameters())
    assert expected > 0
    assert_same_gradients(model, penalty(model, {}, None), expected)


def test_ewc_of_several_tasks_is_the_sum_over_the_tasks():
    model = make_tiny_bert()
    penalty, remembered = EWC(2.0), []
    for seed in range(3):
        fisher = make_fisher(model, seed)
        fisher["classifier.bias"].zero_()  # no task pulls at it
        if seed == 0:
            del fisher["classifier.weight"]  # a head that is new with the second task
        penalty.remember(model, fisher)
        remembered.append((fisher, snapshot(model)))
        disturb(model)
    expected = sum(
        (fisher[name] * (model.get_parameter(name) - old[name]) ** 2).sum()
        for fisher, old in remembered
        for name in fisher
    )
    assert_same_gradients(model, penalty(model, {}, None), expected)


def test_online_ewc_pulls_towards_the_latest_weights_and_lets_old_information_decay():
    model = make_tiny_bert()
    first, second = make_fisher(model, 0), make_fisher(model, 1)
    penalty = EWC(2.0, decay=0.9)
    penalty.remember(model, first)
    disturb(model)
    penalty.remember(model, second)
    old = snapshot(model)
    assert penalty(model, {}, None) == 0
    disturb(model)
    expected = sum(
        ((0.9 * first[name] + second[name]) * (p - old[name]) ** 2).sum() for name, p in model.named_parameters()
    )
    assert_same_gradients(model, penalty(model, {}, None), expected)


def test_l2sp_equals_its_equation():
    model = make_tiny_bert()
    new = ["classifier.weight", "classifier.bias"]
    old = snapshot(model)
    assert L2SP(model, 3.0)(model, {}, None) == 0
    penalty = L2SP(model, 3.0, new=new, beta=0.5)
    disturb(model)
    expected = sum(
        0.25 * p.square().sum() if name in new else 1.5 * (p - old[name]).square().sum()
        for name, p in model.named_parameters()
    )
    assert_same_gradients(model, penalty(model, {}, None), expected)


@pytest.mark.parametrize("make", [lambda m: L2SP(m, 1.0), lambda m: make_ewc(m)])
def test_frozen_weights_are_not_penalised(make):
    model = make_tiny_bert()
    penalty = make(model)
    model.bert.requires_grad_(False)
    with torch.no_grad():
        model.bert.pooler.dense.weight.add_(1)
    assert penalty(model, {}, None) == 0


def make_ewc(model, strength=1.0):
    penalty = EWC(strength)
    penalty.remember(model, make_fisher(model, 0))
    return penalty


def test_distillation_equals_the_divergence_of_torch():
    torch.manual_seed(0)
    model, temperature = nn.Linear(1, 1), 3.0
    old, new = 2 * torch.randn(5, 4), (2 * torch.randn(5, 4)).requires_grad_()
    penalty = Distillation(model, 0.7, temperature=temperature)
    ours = penalty(model, {"old_logits": old}, SimpleNamespace(logits=new))
    divergence = nn.KLDivLoss(reduction="none")((new / temperature).log_softmax(-1), (old / temperature).softmax(-1))
    expected = 0.7 * temperature**2 * divergence.sum(-1).mean()
    assert expected > 0
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, new)[0], torch.autograd.grad(expected, new)[0])
    same = penalty(model, {"old_logits": old}, SimpleNamespace(logits=old + 2))  # a softmax ignores a shift
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_each_head_has_its_own_softmax_and_masked_classes_do_not_matter():
    torch.manual_seed(0)
    model, old, new = nn.Linear(1, 1), torch.randn(5, 4), torch.randn(5, 4)
    both = Distillation(model, heads=[[0, 1], [3]])
    one = Distillation(model, heads=[range(2)])
    masked = new.clone()
    masked[:, 2:] = -torch.inf
    outputs = SimpleNamespace(logits=masked, all_logits=new)
    value = one(model, {"old_logits": old}, outputs)
    alone = Distillation(model)(model, {"old_logits": old[:, :2]}, SimpleNamespace(logits=new[:, :2]))
    assert value > 0
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(both(model, {"old_logits": old}, outputs), value)  # a softmax over one class is constant


def test_old_logits_are_the_logits_of_the_model():
    model, rows = make_tiny_bert(dropout=0.5).train(), make_rows(9)
    extended = add_old_logits(model, rows, batch_size=4)
    assert model.training
    model.eval()
    for row, with_logits in zip(rows, extended, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.tensor(with_logits.pop("old_logits")), logits, atol=1e-5, rtol=1e-4)
        assert with_logits == row
    Distillation(model)
    again = add_old_logits(model, add_old_logits(model, rows))
    assert [*again[0]] == [*rows[0], "old_logits"]


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "distilbert"])
def test_a_network_does_not_receive_the_old_logits(family):
    model = make_tiny(family)
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": 0}] * 4
    penalty = Distillation(model, 5.0)
    extended = add_old_logits(model, rows)
    before = evaluate(model, rows)
    assert evaluate(model, extended).loss == before.loss
    fit(model, {"train": extended}, SETTINGS, penalties=[penalty])
    assert evaluate(model, rows).loss != before.loss


def test_distillation_without_old_logits_says_what_to_do():
    model = make_tiny_bert()
    with pytest.raises(ValueError, match="no old_logits: train on add_old_logits"):
        fit(model, {"train": make_rows(8)}, SETTINGS, penalties=[Distillation(model)])


@pytest.mark.parametrize("kind", ["ewc", "l2sp", "distillation"])
def test_each_penalty_works_alone_with_fit(kind):
    """With strength 0 nothing changes; the greater the strength, the closer the model stays to its start."""
    moved = []
    for strength in (None, 0.0, 0.3, 30.0):
        model = make_tiny_bert(dropout=0)
        rows, old, penalties = make_rows(32), snapshot(model), []
        extended = add_old_logits(model, rows)
        if strength is not None:
            makers = {"ewc": make_ewc, "l2sp": L2SP, "distillation": Distillation}
            penalties, rows = [makers[kind](model, strength)], extended if kind == "distillation" else rows
        fit(model, {"train": rows}, SETTINGS, penalties=penalties)
        if kind == "distillation":
            now = torch.tensor([row["old_logits"].tolist() for row in add_old_logits(model, make_rows(32))])
            before = torch.tensor([row["old_logits"].tolist() for row in extended])
            moved.append((now.log_softmax(-1) - before.log_softmax(-1)).norm().item())
        else:
            moved.append(weight_distance(model, old))
    plain, none, some, much = moved
    assert none == pytest.approx(plain, rel=1e-4)
    assert plain > some > much


def test_averaging_moves_the_weights_from_new_to_old():
    model = make_tiny_bert()
    old = snapshot(model)
    assert weight_distance(model, old) == 0
    disturb(model)
    new = snapshot(model)
    apart = weight_distance(model, old)
    expected = sum((new[name] - old[name]).square().sum().item() for name in old) ** 0.5
    assert apart == pytest.approx(expected, rel=1e-5)
    average_weights(model, old, 0.25, skip=["classifier.bias"])
    for name, weights in model.named_parameters():
        wanted = new[name] if name == "classifier.bias" else 0.25 * old[name] + 0.75 * new[name]
        torch.testing.assert_close(weights.detach(), wanted)
    average_weights(model, old, 1.0)
    assert weight_distance(model, old) == 0


def test_numbers_out_of_range_are_refused():
    model = make_tiny_bert()
    with pytest.raises(ValueError, match="strength of EWC is -1: give a number of at least 0"):
        EWC(-1)
    with pytest.raises(ValueError, match="decay of EWC is 2"):
        EWC(1, decay=2)
    with pytest.raises(ValueError, match="strengths of L2-SP are -1"):
        L2SP(model, -1)
    with pytest.raises(ValueError, match=r"no parameter 'head\.weight'"):
        L2SP(model, 1, new=["head.weight"])
    with pytest.raises(ValueError, match="temperature is 0"):
        Distillation(model, temperature=0)
    with pytest.raises(ValueError, match=r"share of the old weights is 1.5"):
        average_weights(model, {}, 1.5)
