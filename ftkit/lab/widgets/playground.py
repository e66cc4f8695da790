"""Two widgets around a language model: a chat box, and a playground for prompts."""

import html
import threading
from collections.abc import Sequence
from typing import Any

import torch
from ipywidgets import HTML, Button, FloatSlider, HBox, IntSlider, Text, Textarea, VBox
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftkit.lab.widgets.display import StaticPreview, in_thread, said, somebody_is_there
from ftkit.models.generation import generate, next_tokens
from ftkit.prompting.few_shot import balanced_examples
from ftkit.prompting.scoring import score, to_evaluation
from ftkit.prompting.templates import Row, Template, Verbalizer, encode_prompts

WIDE = {"width": "auto"}


def chat_box(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, opening: str, max_new_tokens: int = 80
) -> "ChatBox | StaticPreview":
    """A conversation with a language model that was tuned to have one, as the last expression of a cell.

    Args:
        model, tokenizer: as ``load_language_model`` gives them; the tokenizer has a chat template.
        opening: what stands in the box at the start; where nobody is there, its most probable answer is shown.
        max_new_tokens: of an answer, at most.
    """
    box = ChatBox(model, tokenizer, opening, max_new_tokens)
    if somebody_is_there():
        return box
    box.temperature.value = 0
    box.reply()
    return StaticPreview(box.conversation.value)


class ChatBox:
    """Text box, temperature, and the turns so far; see ``chat_box``. An answer is streamed from a thread of its own.

    Attributes:
        message, temperature, conversation, status: widgets.
        turns: {"role": …, "content": …}.
        thread: of the last answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: str, max_new_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.turns: list[dict[str, str]] = []
        self.thread: threading.Thread | None = None
        self._stopped = threading.Event()
        style = {"description_width": f"{len('temperature')}ch"}
        self.message = Textarea(opening, description="you", style=style, layout=WIDE)
        self.temperature = _slider(FloatSlider, "temperature", 0.7, 0, 2, step=0.1, style=style)
        self.conversation, self.status = HTML(), HTML()
        self.send_button = Button(description="Send", button_style="primary")
        self.stop_button = Button(description="Stop", disabled=True, tooltip="end the answer here")
        self.clear_button = Button(description="New chat")
        self.send_button.on_click(lambda _: self._start())
        self.stop_button.on_click(lambda _: self._stopped.set())
        self.clear_button.on_click(lambda _: self._clear())
        buttons = HBox([self.send_button, self.stop_button, self.clear_button])
        self._box = VBox([self.conversation, self.message, self.temperature, buttons, self.status])

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self._box._repr_mimebundle_(**options)

    def reply(self) -> None:
        """Put what is in the box into the conversation, and the model's answer after it."""
        asked = {"role": "user", "content": self.message.value}
        pieces = generate(
            self.model,
            self.tokenizer,
            [*self.turns, asked],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature.value,
            seed=len(self.turns),
        )
        self.message.value = ""  # only now that it is not refused
        self.turns += [asked, {"role": "assistant", "content": ""}]
        for piece in pieces:
            if self._stopped.is_set():
                break
            self.turns[-1]["content"] += piece
            self._show()
        self._show()

    def _start(self) -> None:
        if not self.message.value.strip():
            self.status.value = said("Write something into the box first.")
            return
        self._stopped.clear()
        self.stop_button.disabled = False
        self.clear_button.disabled = True
        self.thread = in_thread(self.send_button, self.status, self.reply, self._ended)

    def _ended(self) -> None:
        self.stop_button.disabled, self.clear_button.disabled = True, False

    def _clear(self) -> None:
        self.turns.clear()
        self._show()

    def _show(self) -> None:
        who = {"user": "you", "assistant": "model"}
        self.conversation.value = "".join(
            f'<p style="white-space: pre-wrap"><b>{who[turn["role"]]}:</b> {html.escape(turn["content"])}</p>'
            for turn in self.turns
        )


def playground(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    pool: Sequence[Row],
    template: Template,
    verbalizer: Verbalizer,
) -> "Playground | StaticPreview":
    """Change a prompt and see what it does, as the last expression of a cell.

    Args:
        model, tokenizer: as ``load_language_model`` gives them.
        rows: labelled rows to be scored; the first of them is shown token by token.
        pool: labelled rows from which examples are drawn.
        template, verbalizer: to start with.
    """
    shown = Playground(model, tokenizer, rows, pool, template, verbalizer)
    if somebody_is_there():
        return shown
    shown.ask()
    return StaticPreview(shown.result.value)


class Playground:
    """Template, words, number of examples, temperature, and what comes of them; see ``playground``.

    Attributes:
        template, words, examples, temperature, result, status: widgets; ``words`` has one for each label.
        thread: of the last question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        pool: Sequence[Row],
        template: Template,
        verbalizer: Verbalizer,
    ) -> None:
        self.model, self.tokenizer, self.rows, self.pool = model, tokenizer, rows, pool
        self.thread: threading.Thread | None = None
        width = f"{max(map(len, [*verbalizer.labels, 'temperature']))}ch"
        style = {"description_width": width}
        self.template = Textarea(template.text, description="template", style=style, layout=WIDE)
        self.words = {
            label: Text("|".join(words), description=label, style=style, layout=WIDE, tooltip="words, between bars")
            for label, words in verbalizer.by_label.items()
        }
        self.examples = _slider(IntSlider, "examples", 0, 0, min(16, len(pool)), style=style)
        self.temperature = _slider(FloatSlider, "temperature", 1.0, 0.1, 3, step=0.1, style=style)
        self.result, self.status = HTML(), HTML()
        self.ask_button = Button(description="Ask", button_style="primary")
        self.ask_button.on_click(lambda _: self._start())
        controls = [self.template, *self.words.values(), self.examples, self.temperature, self.ask_button, self.status]
        self._box = VBox([*controls, self.result])

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        return self._box._repr_mimebundle_(**options)

    def ask(self) -> None:
        """Score the rows by what is set, and show it.

        Raises:
            ValueError: no prompt can be made of it.
        """
        template = Template(self.template.value)
        verbalizer = Verbalizer({label: box.value.split("|") for label, box in self.words.items()})
        examples = balanced_examples(self.pool, self.examples.value) if self.examples.value else []
        encoded, words = encode_prompts(self.rows, template, verbalizer, self.tokenizer, examples=examples)
        scores = score(self.model, encoded, words)
        evaluation = to_evaluation(scores, encoded["labels"])
        ids = encoded[0]["input_ids"]
        chosen = torch.tensor(scores[0] / self.temperature.value).softmax(-1).tolist()
        # the temperature sharpens or flattens what comes next; which token is first stays
        following = next_tokens(self.model, self.tokenizer, ids, k=8, temperature=self.temperature.value)
        right = f"{evaluation.correct.sum()} of {len(self.rows)} rows right"
        self.result.value = (
            f"<p><b>{right}</b>; the first of them:</p>"
            f'<pre style="white-space: pre-wrap">{html.escape(self.tokenizer.decode(ids))}</pre>'
            + _bars("class", dict(zip(verbalizer.labels, chosen, strict=True)))
            + _bars("next token", dict(zip(map(repr, following["token"]), following["probability"], strict=True)))
        )

    def _start(self) -> None:
        self.thread = in_thread(self.ask_button, self.status, self.ask, lambda: None)


def _slider(kind: type, name: str, value: float, low: float, high: float, **options: Any) -> Any:
    return kind(value, min=low, max=high, description=name, layout=WIDE, **options)


def _bars(title: str, probabilities: dict[str, float]) -> str:
    """Probabilities as a table with bars."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align: left"><code>{html.escape(name)}</code></th><td>{p:.3f}</td>'
        f'<td><div style="background: #0072B2; height: 0.8em; width: {200 * p:.0f}px"></div></td></tr>'
        for name, p in probabilities.items()
    )
    heads = "".join(f'<th scope="col" style="text-align: left">{head}</th>' for head in (title, "probability", ""))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
