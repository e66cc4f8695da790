"""The chat box and the playground, with a tiny random language model and the tokenizer of smollm2."""

import re

import pytest
import torch
from bs4 import BeautifulSoup
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ftkit.data.assets.registry import fetch
from ftkit.lab.widgets import playground as module
from ftkit.lab.widgets.display import StaticPreview, said
from ftkit.lab.widgets.playground import ChatBox, Playground, chat_box, playground
from ftkit.models.generation import generate
from ftkit.prompting.scoring import score, to_evaluation
from ftkit.prompting.templates import Template, Verbalizer, encode_prompts

TEMPLATE = Template("Review: {text}\nSentiment:")
VERBALIZER = Verbalizer({"negative": " bad", "positive": [" good", " great"]})
ROWS = [{"text": text, "label": label} for text, label in (("Fine <b>!", 1), ("Dull.", 0), ("Good fun", 1), ("No", 0))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(fetch("smollm2"), model_max_length=512)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **size)).eval()


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "somebody_is_there", lambda: True)


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, turns: list[dict], **how: float) -> str:
    return "".join(generate(model, tokenizer, turns, max_new_tokens=12, **how))


def send(box: ChatBox) -> None:
    box.send_button.click()
    if box.thread:
        box.thread.join()


def test_the_static_preview_shows_the_greedy_answer(model, tokenizer) -> None:
    preview = chat_box(model, tokenizer, opening="Hello", max_new_tokens=12)
    assert isinstance(preview, StaticPreview)
    reply = answer(model, tokenizer, [{"role": "user", "content": "Hello"}])
    box = ChatBox(model, tokenizer, "Hello", 12)
    box.temperature.value = 0
    send(box)
    assert box.turns == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}]
    assert box.conversation.value in preview._repr_html_()
    assert "widget" not in preview._repr_html_() and "JupyterLab" in preview._repr_html_()


@pytest.mark.usefixtures("somebody")
def test_a_chat_continues_from_the_earlier_turns(model, tokenizer) -> None:
    box = chat_box(model, tokenizer, opening="Hello", max_new_tokens=12)
    send(box)
    assert box.message.value == ""
    box.message.value = "<b>Why?</b>"
    send(box)
    assert [turn["role"] for turn in box.turns] == ["user", "assistant"] * 2
    assert box.turns[3]["content"] == answer(model, tokenizer, box.turns[:3], temperature=0.7, seed=2)
    assert "&lt;b&gt;Why?" in box.conversation.value
    box.clear_button.click()
    assert (box.turns, box.conversation.value) == ([], "")


def test_a_stopped_answer_keeps_its_beginning(model, tokenizer, monkeypatch) -> None:
    box = ChatBox(model, tokenizer, "Hello", 12)

    def pieces(*args, **kwargs):
        yield "one "
        box.stop_button.click()
        yield "two "

    monkeypatch.setattr(module, "generate", pieces)
    send(box)
    assert box.turns[-1]["content"] == "one "
    assert not box.send_button.disabled and box.stop_button.disabled


def test_an_empty_message_and_a_too_long_one_are_refused_with_a_sentence(model, tokenizer) -> None:
    box = ChatBox(model, tokenizer, "  ", 12)
    send(box)
    assert "Write something" in box.status.value
    box.message.value = "word " * 600
    send(box)
    assert "window of 512: give fewer" in box.status.value
    assert box.turns == [] and not box.send_button.disabled
    assert box.message.value.startswith("word")  # the reader's text is not lost


def test_the_playground_shows_the_probabilities_of_the_first_row(model, tokenizer) -> None:
    how = {"pool": ROWS, "template": TEMPLATE, "verbalizer": VERBALIZER}
    preview = playground(model, tokenizer, ROWS, **how)
    encoded, words = encode_prompts(ROWS, TEMPLATE, VERBALIZER, tokenizer)
    evaluation = to_evaluation(score(model, encoded, words), encoded["labels"])
    shown = preview._repr_html_()
    assert f"{evaluation.correct.sum()} of 4 rows correct" in shown
    assert "Review: Fine &lt;b&gt;!" in shown
    for p in evaluation.probabilities[0]:
        assert f"<td>{p:.3f}</td>" in shown


@pytest.mark.usefixtures("somebody")
def test_no_character_of_a_text_or_class_has_a_meaning_in_a_widget(model, tokenizer) -> None:
    labels = {"$5 to $10": " cheap", "<b>&": " dear", "_x": " odd", "long " * 100: " fine"}
    rows = [{"text": "$1 or $2 <i>", "label": label} for label in range(4)]
    shown = playground(model, tokenizer, rows, pool=rows, template=TEMPLATE, verbalizer=Verbalizer(labels))
    shown.ask()
    for label, box in shown.words.items():
        description = BeautifulSoup(box.description, "html.parser")
        assert box.description_allow_html and "mathjax_ignore" in description.span["class"]
        assert description.text.strip("\u200b") == label[:31].strip() + "…" * (len(label) > 32)
    assert shown.template.style.description_width == "32ch"
    box = ChatBox(model, tokenizer, "from $1 to $2", 4)
    box.reply()
    preview = StaticPreview(shown.result.value)._repr_html_()
    for page in (preview, box.conversation.value, said("$1 or $2")):
        text = next(node for node in BeautifulSoup(page, "html.parser").find_all(string=re.compile(r"\$1|\$5")))
        assert any("mathjax_ignore" in parent.get("class", []) for parent in text.parents)


@pytest.mark.usefixtures("somebody")
def test_the_playground_explains_what_is_wrong_with_a_template(model, tokenizer) -> None:
    shown = playground(model, tokenizer, ROWS, pool=ROWS, template=TEMPLATE, verbalizer=VERBALIZER)
    assert isinstance(shown, Playground)
    shown.template.value = "Review: {txt}"
    shown.ask_button.click()
    shown.thread.join()
    assert "no column &#x27;txt&#x27;" in shown.status.value
    shown.template.value, shown.examples.value = "{text} It was", 2
    shown.words["positive"].value = " great| fine"
    shown.ask_button.click()
    shown.thread.join()
    assert shown.status.value == ""
    assert shown.result.value.count(" It was") == 3
    flat = shown.result.value
    shown.temperature.value = 0.1
    shown.ask()
    assert shown.result.value != flat
