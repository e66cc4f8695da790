"""Templates and verbalizers, and the prompts made from them."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ftkit.errors import PromptError, did_you_mean
from ftkit.models.causal_lm import chat_text, require_window, token_ids

Row = Mapping[str, Any]

Words = Sequence[Sequence[tuple[int, ...]]]  # for each label and each of its words, the token ids after the prompt


@dataclass(frozen=True)
class Template:
    """The text of a prompt, with column names as fields in braces: ``Template("{text}\\nSentiment:")``.

    Only braces in the template mark fields; the texts of the rows may contain braces. Write a literal brace twice.

    Attributes:
        text: the text of the prompt; the label's word follows at its end. With ``chat`` it is the user's turn.
        separator: the text between two examples, and between the last example and the row.
        chat: whether to use the tokenizer's chat template, with the examples as earlier turns.

    Raises:
        PromptError: the braces are unbalanced, there is no field, or a field has an index, a conversion or a format.
    """

    text: str
    separator: str = "\n\n"
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.fields:
            raise PromptError(f"The template {self.text!r} has no field: name a column in braces, such as {{text}}.")

    @cached_property
    def _pieces(self) -> list[tuple[str, str | None]]:
        """Literal texts, each with the name of the field that follows it."""
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise PromptError(
                f"The template {self.text!r} cannot be parsed ({error}): write a literal brace twice."
            ) from None
        for _, field, form, conversion in parsed:
            if form or conversion or (field is not None and (not field or set(field) & set(".[]"))):
                raise PromptError(
                    f"The template {self.text!r} has a field that is not just a column name: write it as in {{text}}."
                )
        return [(literal, field) for literal, field, _, _ in parsed]

    @property
    def fields(self) -> list[str]:
        """Names of the columns used, each once, in order."""
        return list(dict.fromkeys(field for _, field in self._pieces if field is not None))

    def render(self, row: Row) -> str:
        """Fill in the values of a row.

        Raises:
            PromptError: the row lacks a column, or the value of a column is None.
        """
        for field in self.fields:
            if field not in row:
                raise PromptError(
                    f"The row has no column {field!r}, only {', '.join(row)}: {did_you_mean(field, row)}"
                    if row
                    else f"The row is empty and has no column {field!r}: give rows with the template's columns."
                )
            if row[field] is None:
                raise PromptError(f"The column {field!r} has no value in a row: drop that row or fill in a text.")
        return "".join(text + ("" if field is None else str(row[field])) for text, field in self._pieces)


@dataclass(frozen=True)
class Verbalizer:
    """The words that stand for the labels (Schick and Schütze, 2021).

    Attributes:
        words: for each label, in the order of the classes, one word or several. A word is any text of one or more
            tokens. If the template ends without a space, it starts with one: ``{"bad": " bad", "good": " good"}``.
        length_normalised: whether the score of a word is the mean of its tokens' log-probabilities, not their sum.

    Raises:
        PromptError: there are fewer than two labels, a label has no word or an empty one, or a word appears twice.
    """

    words: Mapping[str, str | Sequence[str]]
    length_normalised: bool = False

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            raise PromptError(f"A verbalizer needs two or more labels, not {self.labels}: add a word for each class.")
        for label, words in self.by_label.items():
            if not words or "" in words:
                raise PromptError(f"The label {label!r} has no word, or an empty one: give it at least one word.")
        every = [word for words in self.by_label.values() for word in words]
        if twice := [word for word in every if every.count(word) > 1]:
            raise PromptError(
                f"The word {twice[0]!r} appears twice in the verbalizer: give each label words of its own."
            )

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the classes."""
        return list(self.words)

    @property
    def by_label(self) -> dict[str, list[str]]:
        """The words of each label, always as a list."""
        return {label: [words] if isinstance(words, str) else list(words) for label, words in self.words.items()}

    def index(self, label: int | str) -> int:
        """Look up the class number of a label, given by name or by number.

        Raises:
            PromptError: there is no such label.
        """
        numbers = {name: number for number, name in enumerate(self.labels)}
        number = numbers.get(label) if isinstance(label, str) else int(label)
        if number not in range(len(numbers)):
            raise PromptError(
                f"The verbalizer has no word for the label {label!r}, only for {', '.join(numbers)}: add one."
            )
        return number


def encode_prompts(
    rows: Sequence[Row] | datasets.Dataset,
    template: Template,
    verbalizer: Verbalizer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: Sequence[Row] | Sequence[Sequence[Row]] = (),
) -> tuple[datasets.Dataset, Words]:
    """Make a prompt for each row, with or without examples, and encode the labels' words that follow it.

    Prompt and word are tokenised together, because a tokenizer may split a word differently when it stands alone.

    Args:
        rows: N rows with the template's columns and, if known, the number or name of the class in ``label``.
        template: the template of the prompts.
        verbalizer: the words of the labels; its labels are the classes of the data, in the same order.
        tokenizer: tokenizer of the model that will read the prompts, from ``load_language_model``.
        examples: labelled rows to put before each row, each with the first word of its label: either one list for all
            rows, or a list of N lists, one for each row.

    Returns:
        A dataset of N rows, in order, with ``input_ids``, ``attention_mask`` and, if all rows have labels, ``labels``;
        and the token ids of the words.

    Raises:
        PromptError: a column is missing, the labels are not those of the data, a text contains a special token, a word
            merges with the end of a prompt or has the same tokens as another word, or a prompt is longer than the
            model's window.
    """
    if not len(rows):
        raise PromptError("There are no rows to make prompts from: give at least one.")
    class_label = getattr(rows, "features", {}).get("label")
    if isinstance(class_label, datasets.ClassLabel) and class_label.names != verbalizer.labels:
        raise PromptError(
            f"The verbalizer's labels {verbalizer.labels} are not the data's {class_label.names}: give words for the "
            "labels of the data, in the same order."
        )
    rows = list(rows)
    shots = [list(examples)] * len(rows) if not examples or isinstance(examples[0], Mapping) else list(examples)
    if len(shots) != len(rows):
        raise PromptError(f"There are {len(shots)} lists of examples for {len(rows)} rows: give one for each row.")
    for row in [*rows, *(example for row_shots in shots for example in row_shots)]:
        _refuse_special_tokens(row, template, tokenizer)
    words = _encode_words(rows, template, verbalizer, tokenizer)
    texts = [_fill(row, row_shots, template, verbalizer, tokenizer) for row, row_shots in zip(rows, shots, strict=True)]
    prompts = token_ids(tokenizer, texts, chat=template.chat)
    longest = max(len(ids) for label in words for ids in label)
    require_window(tokenizer, prompts, longest)
    columns = {"input_ids": prompts, "attention_mask": [[1] * len(ids) for ids in prompts]}
    if all("label" in row for row in rows):
        columns["labels"] = [verbalizer.index(row["label"]) for row in rows]
    return datasets.Dataset.from_dict(columns), words


def token_table(words: Words, verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Show the tokens that the model sees for each word.

    Args:
        words: token ids of the words, from ``encode_prompts``.
        verbalizer, tokenizer: those given to ``encode_prompts``.

    Returns:
        A table with one row per word and the columns ``label``, ``word``, ``pieces`` (the text of each token; "�" is
        part of a character), ``ids``, ``leading space`` (whether the first token includes a space) and ``tokens``
        (their number; the word is split if it is more than 1).
    """
    table = []
    for (label, texts), encoded in zip(verbalizer.by_label.items(), words, strict=True):
        for word, ids in zip(texts, encoded, strict=True):
            table.append(
                {
                    "label": label,
                    "word": word,
                    "pieces": [tokenizer.decode([token]) for token in ids],
                    "ids": list(ids),
                    "leading space": tokenizer.convert_ids_to_tokens(ids[0]).startswith(("Ġ", "▁", " ")),
                    "tokens": len(ids),
                }
            )
    return pd.DataFrame(table)


def content_free_rows(template: Template) -> list[dict[str, str]]:
    """Make rows without content, with "N/A", "" or "[MASK]" in every field (Zhao et al., 2021)."""
    return [dict.fromkeys(template.fields, text) for text in ("N/A", "", "[MASK]")]


def _refuse_special_tokens(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text that contains a special token, which the model would read as the end of a turn, for example."""
    for field in template.fields:
        for token in tokenizer.all_special_tokens:
            if token in str(row.get(field, "")):
                raise PromptError(
                    f"A text in the column {field!r} contains {token!r}, which is a special token of this model: "
                    "remove it from the text."
                )


def _fill(
    row: Row, examples: Sequence[Row], template: Template, verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Write the whole prompt of one row, with its examples."""
    for example in examples:
        if "label" not in example:
            raise PromptError("An example has no column 'label': take the examples from labelled rows.")
    words = list(verbalizer.by_label.values())
    shots = [(template.render(example), words[verbalizer.index(example["label"])][0]) for example in examples]
    if not template.chat:
        return template.separator.join([*(prompt + word for prompt, word in shots), template.render(row)])
    turns = [turn for prompt, word in shots for turn in (("user", prompt), ("assistant", word))]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("user", template.render(row))]]
    return chat_text(tokenizer, messages)


def _encode_words(
    rows: Sequence[Row], template: Template, verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase
) -> Words:
    """Find the tokens that each word adds to a prompt: the same after every row, and different for each word."""
    rows = rows[:1] if template.chat else rows  # a chat template gives all prompts the same end
    ends = [_fill(row, (), template, verbalizer, tokenizer) for row in rows]  # examples do not change the end
    alone = token_ids(tokenizer, ends, chat=template.chat)
    seen: dict[tuple[int, ...], str] = {}
    encoded = []
    for words in verbalizer.by_label.values():
        encoded.append([])
        for word in words:
            together = token_ids(tokenizer, [end + word for end in ends], chat=template.chat)
            added = [tuple(ids[len(prompt) :]) for ids, prompt in zip(together, alone, strict=True)]
            for number, (ids, prompt) in enumerate(zip(together, alone, strict=True)):
                if ids[: len(prompt)] != prompt or added[number] != added[0] or not added[0]:
                    raise PromptError(
                        f"The word {word!r} merges with the end of row {number}'s prompt, {ends[number][-20:]!r}: end "
                        "the template with fixed text and without a space, and start the word with a space."
                    )
            if added[0] in seen:
                raise PromptError(
                    f"The words {seen[added[0]]!r} and {word!r} have the same tokens {list(added[0])} in this model: "
                    "choose other words."
                )
            seen[added[0]] = word
            encoded[-1].append(added[0])
    return encoded
