"""Templates and verbalizers, and the prompts that they make of rows."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ftkit.errors import PromptError, nearest
from ftkit.models.causal_lm import chat_text, require_window, token_ids

Row = Mapping[str, Any]

Words = list[list[tuple[int, ...]]]  # for each label, for each of its words, the token ids that follow the prompt

CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. (2021)


@dataclass(frozen=True)
class Template:
    """The text of a prompt, with the columns of a row as named fields: ``Template("{text}\\nSentiment:")``.

    Only the template is read for braces, so that a row's own text may hold any; a literal brace is written twice.

    Attributes:
        text: ends where the label's word follows; with ``chat`` it is the user's turn.
        separator: between an example, its word included, and the next.
        chat: whether the tokenizer's chat template is put around it, the examples as earlier turns.

    Raises:
        PromptError: unbalanced braces, no field, or a field with an index, a conversion or a format.
    """

    text: str
    separator: str = "\n\n"
    chat: bool = False

    def __post_init__(self) -> None:
        if not self.fields:
            raise PromptError(f"The template {self.text!r} has no field: name a column in braces, such as {{text}}.")

    @cached_property
    def _pieces(self) -> list[tuple[str, str | None]]:
        """Literal texts, each with the field that follows it."""
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise PromptError(
                f"The template {self.text!r} can't be read ({error}): write a literal brace twice."
            ) from None
        for _, field, form, conversion in parsed:
            if form or conversion or (field is not None and (not field or set(field) & set(".[]"))):
                raise PromptError(
                    f"The template {self.text!r} has a field that is not just the name of a column: write {{text}}."
                )
        return [(literal, field) for literal, field, _, _ in parsed]

    @property
    def fields(self) -> list[str]:
        """The columns it names, each once, in order."""
        return list(dict.fromkeys(field for _, field in self._pieces if field is not None))

    def render(self, row: Row) -> str:
        """The text with a row's values in it.

        Raises:
            PromptError: the row lacks a column or its value.
        """
        for field in self.fields:
            if field not in row:
                raise PromptError(
                    f"The row has no column {field!r}, only {', '.join(row)}: did you mean {nearest(field, row)!r}?"
                    if row
                    else f"The row is empty and has no column {field!r}: give rows with the template's columns."
                )
            if row[field] is None:
                raise PromptError(f"The column {field!r} has no value in a row: drop that row, or give it a text.")
        return "".join(text + ("" if field is None else str(row[field])) for text, field in self._pieces)


@dataclass(frozen=True)
class Verbalizer:
    """The words that stand for the labels (Schick and Schütze, 2021).

    Attributes:
        words: by label, in the order of the classes, one word or several. A word is any text, of one or many tokens,
            and starts with a space after a template that ends without one: ``{"bad": " bad", "good": " good"}``.
        length_normalised: whether a word's score is the mean of its tokens' log-probabilities, not their sum.

    Raises:
        PromptError: fewer than two labels, a label without a word, an empty word, or a word of two labels.
    """

    words: Mapping[str, str | Sequence[str]]
    length_normalised: bool = False

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            raise PromptError(f"A verbalizer needs two or more labels, not {self.labels}: give a word for each class.")
        for label, words in self.by_label.items():
            if not words or "" in words:
                raise PromptError(f"The label {label!r} has no word, or an empty one: give it a word.")
        every = [word for words in self.by_label.values() for word in words]
        if twice := [word for word in every if every.count(word) > 1]:
            raise PromptError(
                f"The word {twice[0]!r} stands in the verbalizer twice: give each label words of its own."
            )

    @property
    def labels(self) -> list[str]:
        """The labels in the order of the classes."""
        return list(self.words)

    @property
    def by_label(self) -> dict[str, list[str]]:
        """Each label's words, as a list."""
        return {label: [words] if isinstance(words, str) else list(words) for label, words in self.words.items()}

    def index(self, label: int | str) -> int:
        """The class number of a label.

        Raises:
            PromptError: there is no such label.
        """
        numbers = {name: number for number, name in enumerate(self.labels)}
        number = numbers.get(label) if isinstance(label, str) else int(label)
        if number not in range(len(numbers)):
            raise PromptError(
                f"The verbalizer has no word for the label {label!r}, only for {', '.join(numbers)}: give it one."
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
    """Make each row's prompt, zero-shot or with examples, and find the tokens of the labels' words after it.

    The tokens are those of prompt and word together: a tokenizer may split a word in another way when it is alone.

    Args:
        rows: with the template's columns, and in ``label`` the number or name of the class, if it is known.
        template, verbalizer: see there; the labels are those of the data, in the data's order.
        tokenizer: of the model that will read the prompts, as ``load_language_model`` gives it.
        examples: labelled rows to stand before each row, each with the first word of its label; the same ones for all
            rows, or for each row a list of its own.

    Returns:
        Rows for a model, in order, with ``input_ids``, ``attention_mask`` and, where rows have labels, ``labels``;
        and the token ids of the words.

    Raises:
        PromptError: a column that is missing, labels that are not the data's, a text that holds a special token, a word
            that melts into the prompt or reads as another one does, or a prompt longer than the model's window.
    """
    if not len(rows):
        raise PromptError("There are no rows to make prompts of: give at least one.")
    class_label = getattr(rows, "features", {}).get("label")
    if isinstance(class_label, datasets.ClassLabel) and class_label.names != verbalizer.labels:
        raise PromptError(
            f"The verbalizer's labels {verbalizer.labels} are not the data's {class_label.names}: give words for the "
            "data's, in their order."
        )
    rows = list(rows)
    each = [list(examples)] * len(rows) if not examples or isinstance(examples[0], Mapping) else list(examples)
    if len(each) != len(rows):
        raise PromptError(f"There are {len(each)} lists of examples for {len(rows)} rows: give one for each row.")
    for row in [*rows, *(example for shots in each for example in shots)]:
        _require_plain(row, template, tokenizer)
    words = _encode_words(rows, template, verbalizer, tokenizer)
    texts = [_text(row, shots, template, verbalizer, tokenizer) for row, shots in zip(rows, each, strict=True)]
    prompts = token_ids(tokenizer, texts, chat=template.chat)
    longest = max(len(ids) for label in words for ids in label)
    require_window(tokenizer, prompts, longest)
    columns = {"input_ids": prompts, "attention_mask": [[1] * len(ids) for ids in prompts]}
    if all("label" in row for row in rows):
        columns["labels"] = [verbalizer.index(row["label"]) for row in rows]
    return datasets.Dataset.from_dict(columns), words


def token_table(words: Words, verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Which tokens the model really sees: a row a word.

    Args:
        words: as ``encode_prompts`` gives them.

    Returns:
        Columns: ``label``, ``word``, ``pieces`` (the text of each token; "�" is a part of a character), ``ids``,
        ``leading space`` (whether the first token has one in it) and ``tokens`` (more than one: the word is split).
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
    """Rows that say nothing: "N/A", "" and "[MASK]" in every field (Zhao et al., 2021)."""
    return [dict.fromkeys(template.fields, text) for text in CONTENT_FREE]


def _require_plain(row: Row, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a text that spells a special token: the model would take it for the end of a turn, say, not for text."""
    for field in template.fields:
        for token in tokenizer.all_special_tokens:
            if token in str(row.get(field, "")):
                raise PromptError(
                    f"A text in the column {field!r} holds {token!r}, which to this model is a mark and no text: "
                    "take it out."
                )


def _text(
    row: Row, examples: Sequence[Row], template: Template, verbalizer: Verbalizer, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The whole text of one row's prompt."""
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
    """The tokens that each word adds to a prompt; they must be the same for every row, and no two words alike."""
    rows = rows[:1] if template.chat else rows  # a chat template ends every prompt alike
    ends = [_text(row, (), template, verbalizer, tokenizer) for row in rows]  # what stands before does not matter
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
                        f"The word {word!r} melts into the end of row {number}'s prompt, {ends[number][-20:]!r}: end "
                        "the template with fixed text and without a space, and start the word with one."
                    )
            if added[0] in seen:
                raise PromptError(
                    f"The words {seen[added[0]]!r} and {word!r} are the same tokens {list(added[0])} to this model: "
                    "give each label words of its own."
                )
            seen[added[0]] = word
            encoded[-1].append(added[0])
    return encoded
