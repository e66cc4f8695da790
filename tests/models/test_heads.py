"""Several heads: the same scores as the layer they were split from, and only a row's own classes."""

import copy

import pytest
import torch
from tiny_bert import make_tiny_bert
from tiny_models import CONFIGS, TEXT_CLASSIFIERS, disturb, make_inputs, make_word_tokenizer
from tiny_sequences import encode, make_model, make_sequence
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from ftkit.errors import ModelError
from ftkit.models.heads import MultiHead
from ftkit.models.loading import save
from ftkit.training.batching import make_batch
from ftkit.training.loop import evaluate


def mixed_batch(model, sequence):
    rows = [row for task in encode(sequence) for row in task["train"][:4]]
    return make_batch(model, rows, torch.arange(len(rows)).numpy(), torch.device("cpu"))


@pytest.mark.parametrize("family", TEXT_CLASSIFIERS)
def test_splitting_the_last_layer_changes_no_score(family):
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = 7
    network = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = make_inputs(family)
    with torch.no_grad():
        before = network(**inputs).logits
        scores = MultiHead(network, make_sequence()).eval()(task=torch.tensor([0, 1, 2]), **inputs)
    torch.testing.assert_close(scores.all_logits, before)
    own = [[0, 1], [2, 3, 4], [5, 6]]
    for row, columns in enumerate(own):
        assert scores.logits[row].isfinite().nonzero().flatten().tolist() == columns
        torch.testing.assert_close(scores.logits[row, columns], before[row, columns])


def test_several_heads_are_not_saved_as_a_plain_model(tmp_path):
    """Neither whole nor without the module around the network, and the advice works."""
    model = make_model(make_sequence())
    for part in (model, model.network):
        with pytest.raises(ModelError, match=r"several heads, .*: keep its weights with torch\.save\(") as refused:
            save(part, make_word_tokenizer(), tmp_path / "model")
        assert "adapter" not in str(refused.value)
    assert not (tmp_path / "model").exists()
    torch.save(model.network.state_dict(), tmp_path / "weights")
    again = make_model(make_sequence())
    disturb(again)
    again.network.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_loss_of_a_mixed_batch_is_the_sum_over_its_heads():
    sequence = make_sequence()
    model = make_model(sequence)
    batch = mixed_batch(model, sequence)
    labels, tasks = batch.pop("labels"), batch["task"]
    scores = model(**batch)
    loss = F.cross_entropy(scores.logits, labels, reduction="sum")
    expected = torch.zeros(())
    for task, (start, stop) in enumerate([(0, 2), (2, 5), (5, 7)]):
        mine = tasks == task
        expected = expected + F.cross_entropy(
            scores.all_logits[mine, start:stop], labels[mine] - start, reduction="sum"
        )
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other)
        assert grad.isfinite().all()


def test_a_row_gives_other_heads_no_gradient():
    sequence = make_sequence()
    model = make_model(sequence)
    batch = {name: value[:4] for name, value in mixed_batch(model, sequence).items()}  # first task
    F.cross_entropy(model(**{n: v for n, v in batch.items() if n != "labels"}).logits, batch["labels"]).backward()
    for name, head in model.head_parameters().items():
        assert model.get_parameter(name).grad.ne(0).any() == (head == "head 0"), name


def test_a_growing_head_scores_all_classes_seen_so_far():
    sequence = make_sequence("growing")
    model = make_model(sequence)
    batch = mixed_batch(model, sequence)
    del batch["labels"]
    for seen, known in [(1, 2), (2, 5), (3, 7)]:
        model.seen = seen
        assert model(**batch).logits.isfinite().sum(1).tolist() == [known] * 12
    assert make_model(make_sequence("many_domains"))(**batch).logits.isfinite().all()


def test_heads_are_found_by_name_and_probabilities_cover_all_classes():
    sequence = make_sequence()
    model = make_model(sequence)
    sizes = {}
    for name, head in model.head_parameters().items():
        sizes[head] = sizes.get(head, 0) + model.get_parameter(name).numel()
    assert sizes == {"head 0": 33 * 2, "head 1": 33 * 3, "head 2": 33 * 2}
    assert model.heads_of([0, 2]) == {"head 0", "head 2"}
    evaluation = evaluate(model, encode(sequence)[1]["test"])
    assert evaluation.probabilities.shape == (12, 7)
    assert set(evaluation.predictions) <= {2, 3, 4}
    assert evaluation.probabilities[:, 2:5].sum(1) == pytest.approx(1)


def test_a_network_for_other_classes_is_refused():
    with pytest.raises(
        ValueError, match="The tasks have 7 classes in all, but BertForSequenceClassification has a head"
    ):
        MultiHead(make_tiny_bert(num_labels=4), make_sequence())
    with pytest.raises(ValueError, match="BertModel has no head"):
        MultiHead(make_tiny_bert().bert, make_sequence())
