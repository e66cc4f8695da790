"""The prompt classifier, compared with its definition: word by word and row by row, with plain transformers."""

import copy

import numpy as np
import pytest
import torch
from tiny_bert import make_rows
from tiny_models import CONFIGS, VOCABULARY, disturb, make_tiny, make_word_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ftkit.adapters.lora import add_lora, load_adapter, save_adapter
from ftkit.data.text import encode
from ftkit.models.loading import class_names
from ftkit.prompting.classifier import PromptClassifier
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SINGLE = [[(5,)], [(6,)], [(7,)]]
SEVERAL = [[(5,), (6,)], [(7,)], [(8,), (9,), (10,)]]
LONG = [[(5, 6), (7,)], [(5, 8, 9), (5, 8)], [(10, 11, 12), (10, 13)]]  # two runs: with 5 8 and with 10 11 appended
NAMES = ["bad", "so so", "good"]


def make_lm(family: str = "llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()


def make_batch():
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[2, 1:] = 0
    return ids, mask


def by_definition(lm, prompt: list[int], words, length_normalised: bool) -> torch.Tensor:
    """Compute the scores of the labels for one row, with a separate pass for each word and without padding."""
    scores = []
    for label_words in words:
        log_probs = []
        for word in label_words:
            logits = lm(torch.tensor([[*prompt, *word]])).logits[0].double().log_softmax(-1)
            steps = [logits[len(prompt) - 1 + i, token] for i, token in enumerate(word)]
            log_probs.append(sum(steps) / (len(word) if length_normalised else 1))
        scores.append(torch.stack(log_probs).logsumexp(0))
    return torch.stack(scores)


@pytest.mark.parametrize("length_normalised", [False, True])
@pytest.mark.parametrize("words", [SINGLE, SEVERAL, LONG], ids=["single", "several", "long"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_scores_are_those_of_the_definition(family, words, length_normalised):
    lm = make_lm(family)
    ids, mask = make_batch()
    ours = PromptClassifier(lm, words, NAMES, length_normalised=length_normalised)(ids, mask).logits
    prompts = [row[: n.item()].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]
    expected = torch.stack([by_definition(lm, prompt, words, length_normalised) for prompt in prompts])
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


def test_with_every_token_as_a_word_scores_are_the_log_probabilities_of_the_model():
    lm = make_lm()
    ids, mask = make_batch()
    every = PromptClassifier(
        lm, [[(token,)] for token in range(VOCABULARY)], [str(token) for token in range(VOCABULARY)]
    )
    with torch.no_grad():
        scores, logits = every(ids, mask).logits, lm(ids, attention_mask=mask).logits[[0, 1, 2, 3], [4, 8, 0, 8]]
    torch.testing.assert_close(scores, logits.log_softmax(-1), rtol=0, atol=1e-5)
    assert scores.exp().sum(-1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "runs", "positions"),
    [(SINGLE, 1, 1), (SEVERAL, 1, 1), ([[(5, 6)], [(5, 7)]], 1, 2), (LONG, 2, 3)],
)
def test_no_more_is_computed_than_the_words_need(words, runs, positions):
    lm = make_lm()
    shapes = []
    lm.model.register_forward_hook(lambda module, args, output: shapes.append(output.last_hidden_state.shape))
    lm.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    ids, mask = make_batch()
    PromptClassifier(lm, words, NAMES[: len(words)])(ids, mask)
    appended = positions - 1
    assert shapes == [(4 * runs, 9 + appended, 16), (4 * runs, positions, VOCABULARY)]


def test_the_gradient_is_that_of_the_definition():
    lm, plain = make_lm().double(), make_lm().double()
    ids, mask = make_batch()
    labels = torch.tensor([0, 2, 1, 1])
    F.cross_entropy(PromptClassifier(lm, LONG, NAMES)(ids, mask).logits.double(), labels).backward()
    prompts = [row[: n.item()].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]
    F.cross_entropy(torch.stack([by_definition(plain, prompt, LONG, False) for prompt in prompts]), labels).backward()
    for (name, ours), theirs in zip(lm.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6, msg=name)


def test_fit_and_evaluate_work_with_lora(tmp_path):
    base = make_lm()
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    adapted = add_lora(base, rank=4)
    model = PromptClassifier(adapted, [[(5,)], [(6,)]], ["low", "high"])
    data = {"train": make_rows(64), "validation": make_rows(40, seed=1)}
    before = evaluate(model, data["validation"])
    history = fit(model, data, TrainSettings(lr=0.02, num_epochs=2, batch_size=16))
    after = evaluate(model, data["validation"])
    assert after.loss < before.loss
    assert after.accuracy == max(epoch["validation_accuracy"] for epoch in history.epochs)
    weights = {name.replace(".base_layer", ""): p for name, p in adapted.get_base_model().named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in frozen.items())

    folder = save_adapter(model.lm, tmp_path)
    assert not (folder / "labels.json").exists()  # the language model has no classes
    loaded = PromptClassifier(load_adapter(make_lm(), folder), [[(5,)], [(6,)]], ["low", "high"])
    np.testing.assert_array_equal(evaluate(loaded, data["validation"]).probabilities, after.probabilities)


def test_the_best_weights_are_kept_without_copies_of_the_frozen_ones():
    class Spy:
        def on_start(self, run): ...

        def on_step(self, run): ...

        def on_epoch(self, run):
            self.kept = run.best_weights

    spy = Spy()
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    lm = add_lora(AutoModelForCausalLM.from_config(config))
    data = {"train": make_rows(8), "validation": make_rows(8)}
    fit(PromptClassifier(lm, SINGLE, NAMES), data, TrainSettings(num_epochs=1), callbacks=[spy])
    assert spy.kept and all("lora_" in name for name in spy.kept)


def test_labels_become_named_classes_and_rows_of_encode_are_accepted():
    import datasets

    rows = {"text": ["w5 w9", "w7 w8 w30", "w11"], "label": [1, 0, 1]}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    split = datasets.Dataset.from_dict(rows, features=features)
    lm = make_lm()
    model = PromptClassifier(lm, [[(5,)], [(6,)]], split.features["label"].names)
    assert class_names(model.config) == ["no", "yes"]
    assert class_names(lm.config) != ["no", "yes"]  # the language model's own config is unchanged
    evaluation = evaluate(model, encode({"test": split}, make_word_tokenizer(), max_length=8)["test"])
    scores = [by_definition(lm, ids, [[(5,)], [(6,)]], False) for ids in ([5, 9], [7, 8, 30], [11])]
    np.testing.assert_allclose(evaluation.probabilities, torch.stack(scores).softmax(-1).detach(), atol=1e-6)
    assert evaluation.labels.tolist() == [1, 0, 1]


def test_class_weights_and_label_smoothing_apply():
    lm = disturb(make_lm())
    rows = make_rows(16)
    model = PromptClassifier(lm, [[(5,)], [(6,)]], ["low", "high"])
    settings = TrainSettings(num_epochs=1, class_weights=(0.5, 2.0), label_smoothing=0.1)
    scores = torch.stack([by_definition(lm, row["input_ids"], [[(5,)], [(6,)]], False) for row in rows]).detach()
    labels = torch.tensor([row["labels"] for row in rows])
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = F.cross_entropy(scores, labels, weight=weights, label_smoothing=0.1).item()
    assert fit(model, {"train": rows}, settings).steps[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "names", "message"),
    [
        ([[(5,)], [(6,)]], ["a"], r"words for 2 labels, and the names are \['a'\]: give two"),
        ([[(5,)]], ["a"], "give two or more different names"),
        ([[(5,)], [(6,)]], ["a", "a"], "give two or more different names"),
        ([[(5,)], []], ["a", "b"], "The label 'b' has no words"),
        ([[(5,)], [()]], ["a", "b"], "The label 'b' has no words, or a word without tokens"),
        ([[(5,), (6,)], [(6,)]], ["a", "b"], r"The tokens \[6\] are a word of 'a' and of 'b'"),
    ],
)
def test_words_that_cannot_tell_labels_apart_are_refused(words, names, message):
    with pytest.raises(ValueError, match=message) as caught:
        PromptClassifier(make_lm(), words, names)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_language_model_is_refused():
    for name in ("bert", "llama", "bert mlm"):
        with pytest.raises(ValueError, match="is not a causal language model"):
            PromptClassifier(make_tiny(name), SINGLE, NAMES)


def test_padding_in_front_and_empty_rows_are_refused():
    ids, mask = make_batch()
    for words in (SINGLE, LONG):
        model = PromptClassifier(make_lm(), words, NAMES)
        with pytest.raises(ValueError, match="padding_side = 'right'"):
            model(ids.flip(1), mask.flip(1))
        empty = mask.clone()
        empty[1] = 0
        with pytest.raises(ValueError, match="leave out empty rows"):
            model(ids, empty)


def test_a_prompt_longer_than_the_window_is_refused_with_the_count():
    ids = torch.full((1, 63), 3)
    PromptClassifier(make_lm(), SINGLE, NAMES)(ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match="has 65 tokens, but the model's window is 64"):
        PromptClassifier(make_lm(), LONG, NAMES)(ids, torch.ones_like(ids))  # plus two tokens of a word
