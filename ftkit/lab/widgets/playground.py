"""Two widgets for language models: a chat box and a playground for prompts."""

import html
import threading
from collections.abc import Sequence
from typing import Any

import torch
from ipywidgets import HTML, Button, FloatSlider, HBox, IntSlider, Text, Textarea, VBox
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftkit.lab.widgets.display import StaticPreview, in_thread, said, somebody_is_there
from ftkit.models.generation import generate, next_tokens
from ftkit.plots import NO_MATH, short
from ftkit.prompting.few_shot import balanced_examples
from ftkit.prompting.scoring import score, to_evaluation
from ftkit.prompting.templates import Row, Template, Verbalizer, encode_prompts

_WIDE = {"width": "auto"}


def chat_box(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, opening: str, max_new_tokens: int = 80
) -> "ChatBox | StaticPreview":
    """Chat with a language model that was tuned for it; use it as the last expression of a cell.

    Args:
        model, tokenizer: as returned by ``load_language_model``; the tokenizer needs a chat template.
        opening: text in the box at the start. If nobody is there to use the widget, a static preview shows the greedy
            answer to it.
        max_new_tokens: maximum length of an answer in tokens.
    """
    box = ChatBox(model, tokenizer, opening, max_new_tokens)
    if somebody_is_there():
        return box
    box.temperature.value = 0
    box.reply()
    return StaticPreview(box.conversation.value)


class ChatBox:
    """Widget with a text box, the temperature and the conversation so far; see ``chat_box``.

    A thread streams each answer.

    Attributes:
        message, temperature, conversation, status: widgets.
        turns: messages so far, each ``{"role": …, "content": …}``.
        thread: thread of the last answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: str, max_new_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.turns: list[dict[str, str]] = []
        self.thread: threading.Thread | None = None
        self._stopped = threading.Event()
        style = {"description_width": f"{len('temperature')}ch"}
        self.message = Textarea(opening, description="you", style=style, layout=_WIDE)
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
        """Move the text in the box into the conversation and add the model's answer."""
        asked = {"role": "user", "content": self.message.value}
        pieces = generate(
            self.model,
            self.tokenizer,
            [*self.turns, asked],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature.value,
            seed=len(self.turns),
        )
        self.message.value = ""  # only here: a message that `generate` refuses stays in the box
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
            f'<p class="{NO_MATH}" style="white-space: pre-wrap">'
            f"<b>{who[turn['role']]}:</b> {html.escape(turn['content'])}</p>"
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
    """Change a prompt and see the effect on its predictions; use it as the last expression of a cell.

    Args:
        model, tokenizer: as returned by ``load_language_model``.
        rows: labelled rows to classify; the prompt and the predictions for the first one are shown.
        pool: labelled rows from which few-shot examples are drawn.
        template, verbalizer: template and label words at the start.
    """
    shown = Playground(model, tokenizer, rows, pool, template, verbalizer)
    if somebody_is_there():
        return shown
    shown.ask()
    return StaticPreview(shown.result.value)


class Playground:
    """Widget with template, label words, number of examples, temperature and the predictions; see ``playground``.

    Attributes:
        template, words, examples, temperature, result, status: widgets; ``words`` has one per label.
        thread: thread of the last scoring.
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
        labels = {label: short(label) for label in verbalizer.by_label}
        style = {"description_width": f"{max(map(len, [*labels.values(), 'temperature']))}ch"}
        self.template = Textarea(template.text, description="template", style=style, layout=_WIDE)
        self.words = {
            label: Text(
                "|".join(words),
                description=f'<span class="{NO_MATH}">{html.escape(labels[label])}</span>',
                description_allow_html=True,
                style=style,
                layout=_WIDE,
                tooltip="label words, separated by |",
            )
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
        """Score the rows with the current prompt and show the result.

        Raises:
            ValueError: the template or the label words cannot be used.
        """
        template = Template(self.template.value)
        verbalizer = Verbalizer({label: box.value.split("|") for label, box in self.words.items()})
        examples = balanced_examples(self.pool, self.examples.value) if self.examples.value else []
        encoded, words = encode_prompts(self.rows, template, verbalizer, self.tokenizer, examples=examples)
        scores = score(self.model, encoded, words)
        evaluation = to_evaluation(scores, encoded["labels"])
        ids = encoded[0]["input_ids"]
        chosen = torch.tensor(scores[0] / self.temperature.value).softmax(-1).tolist()
        # the temperature sharpens or flattens the distribution but does not change its order
        following = next_tokens(self.model, self.tokenizer, ids, k=8, temperature=self.temperature.value)
        correct = f"{evaluation.correct.sum()} of {len(self.rows)} rows correct"
        self.result.value = (
            f"<p><b>{correct}</b>. The prompt of the first row:</p>"
            f'<pre style="white-space: pre-wrap">{html.escape(self.tokenizer.decode(ids))}</pre>'
            + _bars("class", dict(zip(verbalizer.labels, chosen, strict=True)))
            + _bars("next token", dict(zip(map(repr, following["token"]), following["probability"], strict=True)))
        )

    def _start(self) -> None:
        self.thread = in_thread(self.ask_button, self.status, self.ask, lambda: None)


def _slider(kind: type, name: str, value: float, low: float, high: float, **options: Any) -> Any:
    return kind(value, min=low, max=high, description=name, layout=_WIDE, **options)


def _bars(title: str, probabilities: dict[str, float]) -> str:
    """Probabilities as an HTML table with bars."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align: left"><code>{html.escape(name)}</code></th><td>{p:.3f}</td>'
        f'<td><div style="background: #0072B2; height: 0.8em; width: {200 * p:.0f}px"></div></td></tr>'
        for name, p in probabilities.items()
    )
    heads = "".join(f'<th scope="col" style="text-align: left">{head}</th>' for head in (title, "probability", ""))
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
