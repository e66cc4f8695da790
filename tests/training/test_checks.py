"""Where model and rows meet: names of classes, labels, lengths, tokens, padding."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as t
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import VOCABULARY, make_tiny, make_word_tokenizer
from tiny_zoo import class_names, make_any
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ftkit.adapters.lora import add_lora
from ftkit.data.text import encode, shorten
from ftkit.errors import DataError, ModelError, TrainingError
from ftkit.models.loading import name_classes
from ftkit.prompting.sft import CompletionModel
from ftkit.prompting.soft_prompts import add_prompt_tuning
from ftkit.training.checks import match_rows
from ftkit.training.loop import evaluate, fit, token_loss
from ftkit.training.state import TrainSettings

SETTINGS = TrainSettings(lr=1e-2, num_epochs=1, batch_size=4)


def named_rows(names: list[str], labels: list[int], seed: int = 0) -> datasets.Dataset:
    rows = datasets.Dataset.from_list([{**row, "labels": 0} for row in make_rows(len(labels), seed=seed)])
    return rows.remove_columns("labels").add_column("labels", labels, feature=datasets.ClassLabel(names=names))


def named_model(*names: str) -> torch.nn.Module:
    model = make_tiny_bert(dropout=0, num_labels=len(names))
    name_classes(model.config, names)
    return model


def make_encoded(*lengths: int, fill: int = 5, end: int | None = 2) -> list[dict[str, Any]]:
    """Rows of these lengths, whose last token is the end mark."""
    rows = [[fill] * (length - (end is not None)) + [end] * (end is not None) for length in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2} for i, ids in enumerate(rows)]


def refuses(model: torch.nn.Module, rows: Any, error: type[Exception], message: str) -> None:
    """Both ``evaluate`` and ``fit`` refuse the rows in one sentence, before the model has computed anything."""
    calls: list[Any] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    good = make_encoded(4, 5)
    for run in (
        lambda: evaluate(model, rows),
        lambda: fit(model, {"train": rows}, SETTINGS),
        lambda: fit(model, {"train": good, "validation": rows}, SETTINGS),
    ):
        with pytest.raises(error, match=message) as caught:
            run()
        assert str(caught.value).endswith(".")
        assert "\n" not in str(caught.value)
    assert not calls
    hook.remove()


# Names of classes ---------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name(capsys: pytest.CaptureFixture) -> None:
    """A classifier of a, b and c that always says b is right about rows of b, though b is their first class."""
    model = named_model("a", "b", "c")
    model.classifier.bias.data = torch.tensor([0.0, 50.0, 0.0])
    evaluation = evaluate(model, named_rows(["b", "c"], [0] * 5))
    assert evaluation.accuracy == 1
    assert evaluation.labels.tolist() == evaluation.predictions.tolist() == [1] * 5
    assert capsys.readouterr().out == "5 rows: their classes are matched to the model's by name: b is 1\n"
    assert evaluate(model, named_rows(["c", "b", "a"], [1, 0, 1, 2])).labels.tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_fit_trains_on_classes_matched_by_name(class_weights: str | None) -> None:
    labels = [0, 1, 1, 0, 1, 1, 1]
    settings = TrainSettings(lr=1e-2, num_epochs=2, batch_size=4, class_weights=class_weights)
    matched, given = ([{}, {}] for _ in range(2))
    for kind, numbers in (("by name", labels), ("by number", [2 - label for label in labels])):
        rows = named_rows(["c", "b"], numbers) if kind == "by name" else named_rows(["a", "b", "c"], numbers)
        history = fit(named_model("a", "b", "c"), {"train": rows, "validation": rows}, settings)
        (matched if kind == "by name" else given)[:] = history.steps, history.epochs
    assert matched == given


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (["Pos", " neg"], "'Pos' is 1 ('pos'), ' neg' is 0 ('neg')"),
        (["NEG", "pos"], "'NEG' is 0 ('neg'), 'pos' is 1"),  # one of them is written alike
        (["neg", "Pos\N{NO-BREAK SPACE}"], "'neg' is 0, 'Pos\\xa0' is 1 ('pos')"),  # the same numbers already
    ],
)
def test_classes_that_differ_in_case_or_blanks_are_matched_and_said_once(
    ours: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    labels, model = [0, 1, 1, 0, 1], named_model("neg", "pos", "other")
    rows = named_rows(ours, labels)
    matched = match_rows(model, rows)
    assert capsys.readouterr().out == (
        f"5 rows: their classes are matched to the model's by name, whatever their case and blanks: {said}\n"
    )
    assert matched.features["labels"].names == ["neg", "pos", "other"]
    expected = [["neg", "pos"].index(ours[label].strip().lower()) for label in labels]
    assert matched["labels"] == expected
    assert evaluate(model, rows).labels.tolist() == expected
    capsys.readouterr()
    fit(model, {"train": rows, "validation": rows}, TrainSettings(lr=1e-2, num_epochs=3, batch_size=4))
    assert capsys.readouterr().out.count("are matched to the model's") == 2  # each split once, not in each epoch


@pytest.mark.parametrize(
    ("models", "ours", "message"),
    [
        (["pos", "neg"], ["POS", "Pos", "neg"], "'POS' and 'Pos' of the rows differ only in case"),
        (["pos", "neg"], ["pos", "POS"], "'pos' and 'POS' of the rows differ only in case"),
        (["pos", "POS", "neg"], ["neg", "Pos"], "'Pos' of the rows may be the model's 'pos' or 'POS'"),
    ],
)
def test_classes_that_would_become_one_are_refused(models: list[str], ours: list[str], message: str) -> None:
    rows = named_rows(ours, [i % len(ours) for i in range(6)])
    refuses(named_model(*models), rows, DataError, message)


def test_names_that_differ_in_case_count_before_numbers() -> None:
    """A model of transformers calls its classes LABEL_0, …, which rows may write in their own order."""
    rows = named_rows(["label_1", "label_0"], [0, 1, 1])
    assert match_rows(named_model("LABEL_0", "LABEL_1"), rows)["labels"] == [1, 0, 0]


def test_exact_names_count_before_those_that_differ_in_case() -> None:
    rows = named_rows(["POS", "pos"], [0, 1, 1])
    assert match_rows(named_model("pos", "POS"), rows)["labels"] == [1, 0, 0]


def test_a_class_without_rows_need_not_be_known() -> None:
    rows = named_rows(["neg", "neutral", "pos"], [0, 2, 2, 0])
    assert evaluate(named_model("neg", "pos"), rows).labels.tolist() == [0, 1, 1, 0]


def test_several_adapters_of_one_base_have_classes_of_their_own() -> None:
    """The base has one config, which can name the classes of one adapter only."""
    model = add_lora(named_model("neg", "pos"), rank=2)
    add_lora(model, rank=2, name="mail")
    assert evaluate(model, named_rows(["ham", "spam"], [0, 1, 1])).labels.tolist() == [0, 1, 1]


def test_rows_that_are_made_when_they_are_read_are_read_once() -> None:
    """Such as decoded images: to check them beforehand would decode them all once more."""
    read = []

    def make(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        read.append(len(batch["given"]))
        return {"input_ids": batch["given"], "labels": [0] * len(batch["given"])}

    rows = datasets.Dataset.from_dict({"given": [[5, 6], [7, 8], [9, 10], [5, 9]]}).with_transform(make)
    assert len(evaluate(named_model("a", "b"), rows, batch_size=2).labels) == 4
    assert sum(read) <= 4 + 4 + 2  # the lengths, the batches, and a look at the first row


def test_classes_that_the_model_does_not_know_are_refused() -> None:
    message = r"does not know, 'news', and the model's are 'film', 'product', 'tweet'"
    refuses(named_model("film", "product", "tweet"), named_rows(["film", "news"], [0, 1, 0]), DataError, message)
    stars = named_model("1", "2", "3")  # a class 0 is not 1 star
    refuses(stars, named_rows(["0", "1", "2"], [0, 1, 2]), DataError, "does not know, '0'")


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["class 0", "class 1"], ["0", "1"]])
def test_numbers_are_no_names(names: list[str], capsys: pytest.CaptureFixture) -> None:
    for model, rows in (
        (named_model(*names), named_rows(["no", "yes"], [0, 1, 1])),
        (named_model("no", "yes"), named_rows(names, [0, 1, 1])),
        (named_model(*names), named_rows(names, [0, 1, 1])),
        (named_model("no", "yes", "perhaps"), named_rows(["no", "yes"], [0, 1, 1])),  # the same numbers already
        (named_model("no", "yes"), make_rows(3)),  # without names
    ):
        assert match_rows(model, rows) is rows
    assert capsys.readouterr().out == ""


def test_the_config_of_a_body_says_nothing_of_the_classes_of_the_head_above_it() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_tiny_bert().bert
            self.config, self.head = self.body.config, torch.nn.Linear(32, 5)

        def forward(self, **batch: torch.Tensor) -> Any:
            return t.modeling_outputs.SequenceClassifierOutput(logits=self.head(self.body(**batch).pooler_output))

    assert evaluate(Own(), named_rows(list("abcde"), [4, 3, 0])).labels.tolist() == [4, 3, 0]


# Labels and texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1.0, 0.5, "pos", None, -1, -100, True])
@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_a_label_that_is_no_class_is_refused(label: Any, kind: str) -> None:
    if kind == "list":
        rows = make_rows(3)
        rows[1]["labels"] = label
        where = 1
    else:  # the whole column has the type of the label
        rows = datasets.Dataset.from_list([{**row, "labels": label} for row in make_rows(3)])
        where = 0
    refuses(make_tiny_bert(), rows, DataError, rf"The label of row {where} is {label!r}, and a classifier needs the n")


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_more_classes_than_the_model_has_are_refused(kind: Any) -> None:
    rows = make_rows(3)
    rows[2]["labels"] = 2
    refuses(make_tiny_bert(), kind(rows), DataError, "The label of row 2 is 2, and BertFor.* has 2 classes, 0 to 1")


def test_rows_without_labels_or_tokens_are_refused() -> None:
    unlabelled = [{"input_ids": [1, 2], "attention_mask": [1, 1]}]
    refuses(make_tiny_bert(), unlabelled, DataError, "no column 'labels'")
    for family in ("bert", "gpt2"):
        refuses(make_tiny(family), make_encoded(3, 0, end=None), DataError, "Row 1 has no token")


@pytest.mark.parametrize("text", [None, 3])
def test_a_text_that_is_none_is_refused(text: Any) -> None:
    splits = {"train": datasets.Dataset.from_dict({"text": ["w3", "w4"], "label": [0, 1]})}
    splits["test"] = datasets.Dataset.from_dict({"text": ["w3", None] if text is None else [3, 3], "label": [0, 1]})
    for cut in (encode, shorten):
        with pytest.raises(DataError, match=rf"In row \d of the split 'test' the text is {text}: "):
            cut(splits, make_word_tokenizer(), max_length=8)


# Length -------------------------------------------------------------------------------------------------------

TABLES = {
    "AlbertForSequenceClassification": 64,
    "BartForSequenceClassification": 64,
    "BertForSequenceClassification": 64,
    "BioGptForSequenceClassification": 64,
    "DistilBertForSequenceClassification": 64,
    "ElectraForSequenceClassification": 64,
    "GPT2ForSequenceClassification": 64,
    "GPTNeoForSequenceClassification": 64,
    "MPNetForSequenceClassification": 62,  # positions begin behind the padding token
    "MraForSequenceClassification": 64,  # the table has two positions more than a row can use
    "NystromformerForSequenceClassification": 64,
    "OpenAIGPTForSequenceClassification": 64,
    "OPTForSequenceClassification": 64,
    "RobertaForSequenceClassification": 63,
    "RoFormerForSequenceClassification": 64,
    "XLMForSequenceClassification": 64,
    "XLMRobertaForSequenceClassification": 63,
    "YosoForSequenceClassification": 64,
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_as_long_as_the_position_table_pass_and_longer_ones_are_refused(name: str) -> None:
    model, most = make_any(name), TABLES[name]
    assert np.isfinite(evaluate(model, make_encoded(most, 3)).loss)
    refuses(model, make_encoded(3, most + 1), DataError, rf"Row 1 has {most + 1} tokens, and .* max_length={most}\.$")


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "XLNetForSequenceClassification"])
def test_relative_positions_have_no_limit(name: str) -> None:
    assert np.isfinite(evaluate(make_any(name), make_encoded(80, 3)).loss)


def test_a_tokenizer_without_a_limit_does_not_hide_that_of_the_network() -> None:
    tokenizer = make_word_tokenizer()
    assert tokenizer.model_max_length > 1e29
    splits = {"train": datasets.Dataset.from_dict({"text": ["w5 " * 70, "w6"], "label": [0, 1]})}
    rows = encode(splits, tokenizer, max_length=100)["train"]
    refuses(make_tiny("gpt2"), rows, DataError, "Row 0 has 70 tokens, and GPT2For.* can read 64 at most")


def test_a_language_model_is_kept_within_its_window() -> None:
    rows = [
        {"input_ids": [5] * n, "attention_mask": [1] * n, "answer_mask": [True] * n, "labels": [5] * n} for n in (3, 64)
    ]
    torch.manual_seed(0)
    lm = t.AutoModelForCausalLM.from_config(make_tiny("llama").config)
    assert np.isfinite(token_loss(CompletionModel(lm), rows))
    model = CompletionModel(add_prompt_tuning(lm, make_word_tokenizer(), init_text="w5", num_tokens=4))
    for run in (lambda: token_loss(model, rows), lambda: fit(model, {"train": rows}, SETTINGS)):
        with pytest.raises(DataError, match="Row 1 has 64 tokens, and LlamaForCausalLM can read 60 at most"):
            run()
    rows[0]["labels"] = [5, VOCABULARY, 5]
    with pytest.raises(
        DataError, match=f"A token has the label {VOCABULARY}, and those of LlamaForCausalLM are 0 to 59"
    ):
        token_loss(CompletionModel(lm), rows[:1])


# Tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_a_token_without_an_embedding_is_refused(token: int) -> None:
    rows = make_rows(3)
    rows[2]["input_ids"][1] = token
    for kind in (list, datasets.Dataset.from_list):
        refuses(
            make_tiny_bert(), kind(rows), DataError, rf"Row 2 has the token {token}, and BertFor.* the tokens 0 to 59"
        )


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("padding", [VOCABULARY, -1])
def test_a_padding_token_without_an_embedding_is_refused(family: str, padding: int) -> None:
    model = make_tiny(family)
    model.config.pad_token_id = padding
    refuses(model, make_encoded(3, 4), ModelError, rf"The padding token is {padding}, and .* the tokens 0 to 59")
    assert np.isfinite(evaluate(model, make_encoded(4, 4)).loss)  # nothing to pad


def encoder_decoders() -> list[str]:
    texts = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    classes = [name for name in class_names() if name in texts]
    return [name for name in classes if getattr(getattr(t, name).config_class(), "is_encoder_decoder", False)]


@pytest.mark.parametrize("name", encoder_decoders())
def test_a_row_needs_one_end_mark_where_the_head_reads_it(name: str) -> None:
    model = make_any(name)
    model.config.decoder_start_token_id = 1
    good, bad = make_encoded(4, 6), make_encoded(4, 6)
    bad[1]["input_ids"][2] = 2
    assert np.isfinite(evaluate(model, good).loss)
    batch = {"input_ids": torch.tensor([[5, 5, 5, 2], [5, 2, 5, 2]])}
    try:
        model(**batch)
    except ValueError:  # transformers: all examples must have the same number of <eos> tokens
        refuses(model, bad, DataError, r"Row 1 has the end mark \(token 2\) 2 times, and .* needs it exactly once")
        refuses(model, make_encoded(4, 6, end=None), DataError, r"Row 0 has the end mark \(token 2\) 0 times")
    else:
        assert np.isfinite(evaluate(model, bad).loss)


# Padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name",
    ["XLNet", "XLM", "Flaubert", "GPT2", "Llama", "Gemma", "Bloom", "OPT", "Bert", "Roberta", "DebertaV2", "MT5"],
)
def test_the_batch_size_does_not_change_a_result(name: str, side: str) -> None:
    """Whatever side the tokenizer pads, each row gets the probabilities that it has alone."""
    model, tokenizer = make_any(f"{name}ForSequenceClassification"), make_word_tokenizer()
    tokenizer.padding_side = side
    with torch.no_grad():
        for parameter in model.parameters():  # so large that every token matters
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    texts = ["w5 w6 w7 </s>", "w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 </s>"]
    rows = encode({"test": datasets.Dataset.from_dict({"text": texts, "label": [0, 1]})}, tokenizer)["test"]
    alone, together = (evaluate(model, rows, batch_size=size).probabilities for size in (1, 2))
    np.testing.assert_allclose(alone, together, atol=1e-5)
    with torch.no_grad():
        plain = [model(input_ids=torch.tensor([row["input_ids"]])).logits.softmax(-1)[0].numpy() for row in rows]
    np.testing.assert_allclose(alone, plain, atol=1e-5)


# Settings -----------------------------------------------------------------------------------------------------


def test_a_score_of_classes_needs_classes() -> None:
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1], "answer_mask": [True, True], "labels": [5, 6]}]
    torch.manual_seed(0)
    model = CompletionModel(t.AutoModelForCausalLM.from_config(make_tiny("llama").config))
    with pytest.raises(TrainingError, match="best_by needs one class per row"):
        fit(model, {"train": rows}, TrainSettings(best_by="macro_f1"))
