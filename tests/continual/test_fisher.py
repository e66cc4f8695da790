"""The Fisher information by layer, compared with backward passes of single rows in float64 and with closed forms."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import TEXT_CLASSIFIERS, VOCABULARY, disturb, make_tiny
from torch import nn

from ftkit.adapters.bottleneck import add_adapters
from ftkit.adapters.lora import add_lora
from ftkit.continual.fisher import diagonal_fisher
from ftkit.models.architecture import layer_groups

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def rows_for_tiny(num_rows: int = 6) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num_rows):
        ids = [*rng.integers(3, VOCABULARY, size=rng.integers(2, 9)).tolist(), 2]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(rng.integers(3))})
    return rows


def fisher_by_row(model, rows, kind):
    """Compute the Fisher information by its definition, in float64."""
    model = copy.deepcopy(model).double().eval()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for row in rows:
        inputs = {name: torch.tensor([value]) for name, value in row.items() if name != "labels"}
        log_p = model(**inputs).logits.log_softmax(-1)[0]
        for c in [row["labels"]] if kind == "empirical" else range(len(log_p)):
            model.zero_grad()
            log_p[c].backward(retain_graph=True)
            weight = 1.0 if kind == "empirical" else log_p[c].exp().item()
            for name, total in totals.items():
                grad = model.get_parameter(name).grad
                if grad is not None:
                    total += weight * grad.square()
    return {name: total / len(rows) for name, total in totals.items()}


def assert_same(ours, expected, tolerance=1e-4):
    assert ours.keys() == expected.keys()
    least = 1e-6 * max(
        wanted.norm().item() for wanted in expected.values()
    )  # the exact value for the bias of a key is zero
    for name, wanted in expected.items():
        scale = max(wanted.norm().item(), least)
        assert (ours[name].double() - wanted).norm().item() <= tolerance * scale, name


@pytest.mark.parametrize("family", TEXT_CLASSIFIERS)
def test_every_family_gives_the_result_of_single_rows(family):
    model, rows = make_tiny(family), rows_for_tiny()
    assert_same(diagonal_fisher(model, rows, batch_size=4), fisher_by_row(model, rows, "exact"))


def train_two_groups(model):
    model.requires_grad_(False)
    for group in layer_groups(model)[-2:]:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    return model


PARTS = {
    "two groups": train_two_groups,
    "lora": lambda model: disturb(add_lora(model, rank=2, targets="all-linear")),
    "adapters": lambda model: disturb(add_adapters(model, 4, kind="houlsby", activation="gelu")),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", TEXT_CLASSIFIERS)
def test_a_part_of_every_family_gives_the_result_of_single_rows_at_any_batch_size(family, part):
    model, rows = PARTS[part](make_tiny(family)), rows_for_tiny(8)
    expected = fisher_by_row(model, rows, "exact")
    for batch_size in (1, 3, 8):
        # a tensor of a LoRA update may be a small difference of large numbers in float32
        assert_same(diagonal_fisher(model, rows, batch_size=batch_size), expected, 1e-3 if part == "lora" else 1e-4)


def test_a_layer_below_an_adapter_gives_the_result_of_single_rows():
    model, rows = add_adapters(make_tiny("bert"), 4), rows_for_tiny(6)
    disturb(model).requires_grad_(True)  # so that the layer whose output the adapter changes trains, too
    assert_same(diagonal_fisher(model, rows, batch_size=3), fisher_by_row(model, rows, "exact"))


class Tokens(nn.Module):
    """Classify the mean of the embeddings; what happens to them in between differs."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 5).requires_grad_(False)
        self.layer, self.head, self.between = nn.Linear(5, 5), nn.Linear(5, 3).requires_grad_(False), between

    def forward(self, input_ids, attention_mask):
        x, mask = self.table(input_ids), attention_mask[:, :, None]
        return SimpleNamespace(logits=self.head(self.between(self.layer, x, mask)))


def mean(x, mask):
    return (x * mask).sum(1) / mask.sum(1)


def some_rows(layer, x, mask):
    chosen = x[:, 0, 0] > 0
    return mean(x, mask).index_copy(0, chosen.nonzero().flatten(), mean(layer(x[chosen]).tanh(), mask[chosen]))


BETWEEN = {
    "only some rows reach the layer": some_rows,
    "changed in place": lambda layer, x, mask: mean(layer(x).tanh_(), mask),
    "a weight used outside of its layer": lambda layer, x, mask: mean((layer(x) @ layer.weight).tanh(), mask),
    "tokens before rows": lambda layer, x, mask: mean(layer(x.transpose(0, 1)).tanh().transpose(0, 1), mask),
    "an output with rows of its own": lambda layer, x, mask: (
        mean(x, mask) @ layer(torch.eye(5, dtype=x.dtype)[:2]).tanh().sum(0).diag()
    ),
    "padding counts": lambda layer, x, mask: layer(x).tanh().mean(1),
    "twice in one pass": lambda layer, x, mask: mean(layer(layer(x).tanh()).tanh(), mask),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("length", [2, None])
def test_what_cannot_go_layer_by_layer_goes_row_by_row(between, length):
    model, rows = Tokens(BETWEEN[between]), rows_for_tiny(6)
    rows = [{key: value[:length] if key != "labels" else value for key, value in row.items()} for row in rows]
    expected = fisher_by_row(model, rows, "exact")
    for batch_size in (2, 4):  # as many rows as tokens, or as rows of its own
        assert_same(diagonal_fisher(model, rows, batch_size=batch_size), expected)


def test_a_frozen_bert_still_goes_layer_by_layer(monkeypatch):
    model, rows = train_two_groups(make_tiny("bert")), rows_for_tiny(8)
    sizes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: sizes.append(len(batch["input_ids"])) or forward(**batch))
    diagonal_fisher(model, rows, batch_size=4)
    assert sizes == [2, 1, 1, 4, 4]  # two rows tried both ways, then whole batches


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_size_changes_nothing(batch_size):
    model, rows = make_tiny_bert(num_labels=3), make_rows(11)
    ours = diagonal_fisher(model, rows, "empirical", batch_size=batch_size)
    assert_same(ours, fisher_by_row(model, rows, "empirical"))


def test_it_is_not_the_squared_gradient_of_the_batch():
    model, rows = make_tiny_bert(), make_rows(32)
    ours = diagonal_fisher(model, rows, "empirical")
    loss = 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        loss = loss + nn.functional.cross_entropy(logits, torch.tensor([row["labels"]])) / len(rows)
    loss.backward()
    wrong = sum(p.grad.square().sum() for p in model.parameters())
    assert sum(f.sum() for f in ours.values()) > 3 * wrong


class Softmax(nn.Module):
    """Softmax regression, whose Fisher information is known: F[c, d] = mean over rows of p_c (1 - p_c) x_d^2."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def softmax_rows(num_rows):
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=4).tolist(), "labels": int(rng.integers(3))} for _ in range(num_rows)]


def test_softmax_regression_gives_its_closed_form():
    model, rows = Softmax(), softmax_rows(40)
    x = torch.tensor([row["x"] for row in rows])
    with torch.no_grad():
        p = model(x).logits.softmax(-1)
    exact = diagonal_fisher(model, rows)
    torch.testing.assert_close(exact["layer.weight"], (p * (1 - p)).T @ x.square() / len(rows))
    torch.testing.assert_close(exact["layer.bias"], (p * (1 - p)).mean(0))
    empirical = diagonal_fisher(model, rows, "empirical")["layer.bias"]
    labels = nn.functional.one_hot(torch.tensor([row["labels"] for row in rows]), 3)
    torch.testing.assert_close(empirical, (labels - p).square().mean(0))


def test_the_mean_of_sampled_ones_is_the_exact_one():
    model, rows = Softmax(), softmax_rows(50)
    exact = diagonal_fisher(model, rows)["layer.weight"]
    draws = [diagonal_fisher(model, rows, "sampled", batch_size=50, seed=seed)["layer.weight"] for seed in range(200)]
    error = torch.stack(draws).std(0) / 200**0.5
    assert ((torch.stack(draws).mean(0) - exact).abs() < 5 * error).all()
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[3], diagonal_fisher(model, rows, "sampled", batch_size=50, seed=3)["layer.weight"])


def test_masked_classes_do_not_count():
    class Masked(Softmax):
        def forward(self, x):
            return SimpleNamespace(logits=self.layer(x).masked_fill(torch.tensor([False, False, True]), -torch.inf))

    model, rows = Masked(), softmax_rows(20)
    x = torch.tensor([row["x"] for row in rows])
    with torch.no_grad():
        p = model(x).logits.softmax(-1)
    fisher = diagonal_fisher(model, rows)
    torch.testing.assert_close(fisher["layer.weight"], (p * (1 - p)).T @ x.square() / len(rows))
    assert fisher["layer.weight"][2].eq(0).all()


def test_the_model_stays_unchanged_and_frozen_weights_have_no_fisher_information():
    model, rows = make_tiny_bert(dropout=0.5).train(), make_rows(8)
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].eval()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    first, second = diagonal_fisher(model, rows), diagonal_fisher(model, rows)
    assert all(torch.equal(first[name], second[name]) for name in first)  # computed in eval mode, so without dropout
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], weights) for name, weights in model.state_dict().items())
    assert not any(name.startswith("bert.embeddings") for name in first)
    assert_same(first, fisher_by_row(model, rows, "exact"))


def test_invalid_kinds_empty_rows_and_frozen_models_are_refused():
    model, rows = make_tiny_bert(), make_rows(4)
    with pytest.raises(ValueError, match="no Fisher information of kind 'true'"):
        diagonal_fisher(model, rows, "true")
    with pytest.raises(ValueError, match="no rows"):
        diagonal_fisher(model, [])
    with pytest.raises(ValueError, match="All parameters are frozen"):
        diagonal_fisher(model.requires_grad_(False), rows)
