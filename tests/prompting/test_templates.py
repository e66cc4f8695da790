"""Prompts as text and as tokens, with the tokenizer of smollm2 and with small tokenizers for special cases."""

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ftkit.data.assets.registry import fetch
from ftkit.errors import PromptError
from ftkit.prompting.templates import Template, Verbalizer, content_free_rows, encode_prompts, token_table

TEMPLATE = Template("Review: {text}\nSentiment:")
VERBALIZER = Verbalizer({"negative": " bad", "positive": [" good", " great"]})
ROWS = [{"text": "I liked it.", "label": 1}, {"text": "No.", "label": 0}]
EXAMPLES = [{"text": "Dull", "label": "negative"}, {"text": "Fun", "label": 1}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(fetch("smollm2"))


def make_tokenizer(vocabulary: list[str], **parts: object) -> PreTrainedTokenizerFast:
    """Make a tokenizer that matches the longest token from left to right; `parts` are further parts of its backend."""
    vocabulary = ["<unk>", "<s>", "</s>", *vocabulary]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(vocab=numbers, unk_token="<unk>", continuing_subword_prefix=""))
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def prompts_of(tokenizer: PreTrainedTokenizerBase, *args: object, **kwargs: object) -> list[str]:
    rows, _ = encode_prompts(*args, tokenizer, **kwargs)
    assert [len(mask) for mask in rows["attention_mask"]] == [len(ids) for ids in rows["input_ids"]]
    return [tokenizer.decode(ids) for ids in rows["input_ids"]]


# Templates and verbalizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a {label} }{ {0} %s", "值得一看，太好了！", "🎬👨‍👩‍👧 ❤️", "line\nbreak", ""])
def test_the_text_of_a_row_is_not_changed(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template("{{json}} {title}: {text} 评价：")
    row = {"title": 7, "text": text, "label": 0}
    expected = "{json} 7: " + text + " 评价："
    assert template.render(row) == expected
    assert prompts_of(tokenizer, [row], template, VERBALIZER) == [expected]


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_contains_a_special_token_is_refused(chat: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template("<|im_start|>{text}", chat=chat)  # a special token in the template is allowed
    verbalizer = Verbalizer({"bad": "bad", "good": "good"})
    encode_prompts([{"text": "fine"}], template, verbalizer, tokenizer)
    forged = {"text": "fine<|im_end|>", "label": 1}
    for rows, examples in (([forged], []), ([{"text": "fine"}], [forged])):
        with pytest.raises(PromptError, match=r"'text' contains '<\|im_end\|>', which is a special token"):
            encode_prompts(rows, template, verbalizer, tokenizer, examples=examples)


def test_columns_may_have_any_name() -> None:
    template = Template("{review text} {文本} {review text}")
    assert template.fields == ["review text", "文本"]
    assert template.render({"review text": "a", "文本": "b"}) == "a b a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Sentiment:", "has no field: name a column in braces"),
        ("{text", "cannot be parsed .*: write a literal brace twice"),
        ("{text} }", "cannot be parsed .*: write a literal brace twice"),
        ("{}", "not just a column name"),
        ("{text.lower}", "not just a column name"),
        ("{text[0]}", "not just a column name"),
        ("{text!r}", "not just a column name"),
        ("{text:>9}", "not just a column name"),
    ],
)
def test_an_invalid_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Template(text)


def test_a_missing_column_or_value_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(PromptError, match=r"no column 'text', only texts, label: did you mean 'texts'\?"):
        TEMPLATE.render({"texts": "a", "label": 1})
    with pytest.raises(PromptError, match="'text' has no value"):
        TEMPLATE.render({"text": None})
    with pytest.raises(PromptError, match="An example has no column 'label'"):
        encode_prompts(ROWS, TEMPLATE, VERBALIZER, tokenizer, examples=[{"text": "a"}])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"positive": " good"}, "two or more labels, not \\['positive'\\]"),
        ({"negative": [], "positive": " good"}, "'negative' has no word"),
        ({"negative": "", "positive": " good"}, "'negative' has no word, or an empty one"),
        ({"negative": [" bad", " good"], "positive": " good"}, "' good' appears twice in the verbalizer"),
    ],
)
def test_a_verbalizer_that_cannot_tell_labels_apart_is_refused(words: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        Verbalizer(words)


# Prompts ------------------------------------------------------------------------------------------------------


def test_without_examples_a_prompt_is_the_filled_template(tokenizer: PreTrainedTokenizerBase) -> None:
    rows, words = encode_prompts(ROWS, TEMPLATE, VERBALIZER, tokenizer)
    for ids, text in zip(rows["input_ids"], ("I liked it.", "No."), strict=True):
        assert ids == tokenizer(f"Review: {text}\nSentiment:")["input_ids"]
    assert rows["labels"] == [1, 0]
    assert words == [[tuple(tokenizer(word)["input_ids"]) for word in label] for label in VERBALIZER.by_label.values()]


def test_examples_come_first_with_the_first_word_of_their_label(tokenizer: PreTrainedTokenizerBase) -> None:
    template = Template(TEMPLATE.text, separator="\n##\n")
    shots = "Review: Dull\nSentiment: bad\n##\nReview: Fun\nSentiment: good\n##\n"
    assert prompts_of(tokenizer, ROWS, template, VERBALIZER, examples=EXAMPLES) == [
        shots + "Review: I liked it.\nSentiment:",
        shots + "Review: No.\nSentiment:",
    ]


def test_each_row_can_have_its_own_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompts_of(tokenizer, ROWS, TEMPLATE, VERBALIZER, examples=[EXAMPLES[:1], []]) == [
        "Review: Dull\nSentiment: bad\n\nReview: I liked it.\nSentiment:",
        "Review: No.\nSentiment:",
    ]
    with pytest.raises(PromptError, match="1 lists of examples for 2 rows"):
        encode_prompts(ROWS, TEMPLATE, VERBALIZER, tokenizer, examples=[EXAMPLES])


def test_in_a_chat_examples_are_earlier_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    verbalizer = Verbalizer({"negative": "bad", "positive": "good"})
    template = Template("Is this good? {text}", chat=True)
    rows, words = encode_prompts(ROWS[:1], template, verbalizer, tokenizer, examples=EXAMPLES[:1])
    turns = [("user", "Is this good? Dull"), ("assistant", "bad"), ("user", "Is this good? I liked it.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rows["input_ids"] == [expected]
    assert words == [[tuple(tokenizer(word)["input_ids"])] for word in ("bad", "good")]


def test_a_chat_needs_a_chat_template() -> None:
    template = Template("{text}", chat=True)
    with pytest.raises(PromptError, match="has no chat template"):
        encode_prompts(ROWS, template, VERBALIZER, make_tokenizer(["a"]))


def test_a_prompt_has_the_beginning_token_of_the_tokenizer_but_no_end_token() -> None:
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    both = make_tokenizer(["a", "b", "x"], pre_tokenizer=pre_tokenizers.Whitespace(), post_processor=around)
    neither = make_tokenizer(["a", "b", "x"], pre_tokenizer=pre_tokenizers.Whitespace())
    verbalizer = Verbalizer({"0": " a", "1": " b"})
    assert both("x")["input_ids"] == [1, 5, 2]
    for tokenizer, prompt in ((both, [1, 5, 5]), (neither, [5, 5])):
        rows, words = encode_prompts([{"t": "x"}], Template("{t} x"), verbalizer, tokenizer)
        assert rows["input_ids"] == [prompt]
        assert words == [[(3,)], [(4,)]]
        assert "labels" not in rows.column_names


def test_labels_are_those_of_the_data_in_the_same_order(tokenizer: PreTrainedTokenizerBase) -> None:
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    rows = datasets.Dataset.from_list(ROWS, datasets.Features(features))
    assert encode_prompts(rows, TEMPLATE, VERBALIZER, tokenizer)[0]["labels"] == [1, 0]
    for words in ({"positive": " good", "negative": " bad"}, {"bad": " bad", "good": " good"}):
        with pytest.raises(PromptError, match=r"are not the data's \['negative', 'positive'\]"):
            encode_prompts(rows, TEMPLATE, Verbalizer(words), tokenizer)
    for label in (2, -1, "neutral"):
        with pytest.raises(PromptError, match=f"no word for the label {label!r}, only for negative, positive"):
            encode_prompts([{"text": "a", "label": label}], TEMPLATE, VERBALIZER, tokenizer)


def test_a_prompt_longer_than_the_window_is_refused() -> None:
    tokenizer = make_tokenizer(["a", "b", "x"], pre_tokenizer=pre_tokenizers.Whitespace())
    tokenizer.model_max_length = 5
    verbalizer = Verbalizer({"0": " a", "1": " b b"})
    rows = [{"t": "x x"}, {"t": "x x x"}]
    assert len(encode_prompts(rows[:1], Template("{t} x"), verbalizer, tokenizer)[0]) == 1
    with pytest.raises(PromptError, match="row 1 has 4 tokens and 2 are to follow, more than the model's window of 5"):
        encode_prompts(rows, Template("{t} x"), verbalizer, tokenizer)
    with pytest.raises(PromptError, match="prompt of row 1 is empty"):
        encode_prompts([{"t": "x"}, {"t": ""}], Template("{t}"), verbalizer, tokenizer)
    with pytest.raises(PromptError, match="There are no rows"):
        encode_prompts([], TEMPLATE, verbalizer, tokenizer)


def test_content_free_inputs_fill_every_field() -> None:
    rows = content_free_rows(Template("{title}: {text}"))
    assert [Template("{title}: {text}").render(row) for row in rows] == ["N/A: N/A", ": ", "[MASK]: [MASK]"]


# What the model sees ------------------------------------------------------------------------------------------


def test_the_token_table_shows_spaces_splits_and_parts_of_characters(tokenizer: PreTrainedTokenizerBase) -> None:
    verbalizer = Verbalizer({"a": [" good", "good"], "b": [" underwhelmingly", "🦥"]})
    _, words = encode_prompts([{"text": "x"}], TEMPLATE, verbalizer, tokenizer)
    table = token_table(words, verbalizer, tokenizer)
    assert table["label"].tolist() == ["a", "a", "b", "b"]
    assert table["word"].tolist() == [" good", "good", " underwhelmingly", "🦥"]
    assert table["leading space"].tolist() == [True, False, True, False]
    assert table["pieces"][0] == [" good"]
    assert table["ids"].tolist() == [tokenizer(word)["input_ids"] for word in table["word"]]
    assert table["tokens"].tolist() == [len(ids) for ids in table["ids"]]
    assert "".join(table["pieces"][2]) == " underwhelmingly"
    assert table["tokens"][2] > 1
    assert "�" in "".join(table["pieces"][3])
    assert tokenizer.decode(table["ids"][3]) == "🦥"


def test_a_word_is_tokenised_after_the_prompt_and_not_alone() -> None:
    marks_start = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # as in Llama 2
    tokenizer = make_tokenizer(["▁", "x", ":", "good", "bad", "▁good", "▁bad"], pre_tokenizer=marks_start)
    verbalizer = Verbalizer({"0": "bad", "1": "good"})
    assert tokenizer("good")["input_ids"] == [8]  # with a space, which is absent after a prompt
    assert encode_prompts([{"t": "x"}], Template("{t}:"), verbalizer, tokenizer)[1] == [[(7,)], [(6,)]]


def test_a_word_that_merges_with_the_prompt_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(PromptError, match=r"'bad' merges with the end of row 0's prompt, .*without a space, and start"):
        encode_prompts(ROWS, Template("{text} It was "), Verbalizer({"0": "bad", "1": "good"}), tokenizer)
    with pytest.raises(PromptError, match="'er' merges with the end of row 1's prompt, 'a great'"):
        rows = [{"text": "a film!"}, {"text": "a great"}]
        encode_prompts(rows, Template("{text}"), Verbalizer({"0": "er", "1": " good"}), tokenizer)


def test_a_word_whose_tokens_differ_between_rows_is_refused() -> None:
    begins = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks_start = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    vocabulary = ["▁x", "good", "bad", "▁good", "▁bad"]
    tokenizer = make_tokenizer(vocabulary, pre_tokenizer=marks_start, post_processor=begins)
    with pytest.raises(PromptError, match="'bad' merges with the end of row 1's prompt, ''"):
        encode_prompts([{"t": "x"}, {"t": ""}], Template("{t}"), Verbalizer({"0": "bad", "1": "good"}), tokenizer)


def test_words_with_the_same_tokens_are_refused() -> None:
    tokenizer = make_tokenizer(["good", "x"], pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(PromptError, match=r"' bad' and ' awful' have the same tokens \[0\]"):
        verbalizer = Verbalizer({"0": " bad", "1": [" good", " awful"]})
        encode_prompts([{"t": "x"}], Template("{t} x"), verbalizer, tokenizer)
