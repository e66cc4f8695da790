"""Text of tiny random language models compared with transformers, and of models that follow a script."""

import copy
from collections.abc import Iterator

import pytest
import torch
import transformers as t
from peft import PromptTuningConfig, TaskType, get_peft_model
from tiny_models import CONFIGS, make_tiny

from ftkit.data.assets.registry import fetch
from ftkit.models.generation import generate, next_tokens
from ftkit.models.loading import load_language_model

PROMPT = "Once upon a time"
END = 2  # end token of smollm2


@pytest.fixture(scope="module")
def tokenizer() -> t.PreTrainedTokenizerBase:
    return t.AutoTokenizer.from_pretrained(fetch("smollm2"))


def make_lm(family: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family]) if family in CONFIGS else t.MambaConfig(
        hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3, pad_token_id=END, eos_token_id=END,
    )  # fmt: skip
    config.vocab_size = 49152
    return t.AutoModelForCausalLM.from_config(config).eval()


def make_speaker(tokenizer: t.PreTrainedTokenizerBase, text: str) -> t.PreTrainedModel:
    """A model that gives the tokens of a text, one for each call, and then the end token."""
    model = make_lm("llama")
    script: Iterator[int] = iter([*tokenizer(text)["input_ids"], END])

    def speak(module: torch.nn.Module, args: tuple, output: t.modeling_outputs.CausalLMOutputWithPast) -> None:
        output.logits = torch.nn.functional.one_hot(torch.tensor([[next(script)]]), 49152).float()

    model.register_forward_hook(speak)
    return model


# Text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mamba", "soft prompt"])
def test_greedy_text_equals_that_of_transformers(family: str, tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = make_lm("llama" if family == "soft prompt" else family)
    if family == "soft prompt":
        model = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    ids = ids[inputs["input_ids"].shape[1] :] if family != "soft prompt" else ids[-12:]
    text = "".join(generate(model, tokenizer, PROMPT, max_new_tokens=12))
    assert len(set(ids.tolist())) > 1  # not one token repeated
    assert text.rstrip("�") == tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")


def test_smollm2_answers_in_a_chat_as_in_transformers() -> None:
    model, tokenizer = load_language_model("smollm2")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    pieces = list(generate(model, tokenizer, messages, max_new_tokens=10))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "Paris" in "".join(pieces)
    assert len(pieces) > 3


def test_each_step_runs_one_token(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model, lengths = make_lm("llama"), []
    model.model.register_forward_pre_hook(lambda m, a, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    list(generate(model, tokenizer, PROMPT, max_new_tokens=5))
    assert lengths == [len(tokenizer(PROMPT)["input_ids"]), 1, 1, 1, 1]


def test_samples_follow_the_temperature(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model, logits = make_lm("llama"), torch.full((1, 1, 49152), -1e9)
    yes, no = (tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
    logits[..., yes], logits[..., no] = 1.0, 0.0
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", logits))
    texts = ["".join(generate(model, tokenizer, "a", max_new_tokens=1, temperature=2, seed=s)) for s in range(150)]
    expected = 1 / (1 + torch.tensor(-1 / 2).exp().item())  # 0.62
    assert set(texts) == {"yes", "no"}
    assert texts.count("yes") / 150 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 150) ** 0.5)


def test_the_text_depends_on_the_seed_alone(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = make_lm("llama")
    before = torch.get_rng_state()

    def say(seed: int) -> str:
        return "".join(generate(model, tokenizer, PROMPT, max_new_tokens=8, temperature=1, seed=seed))

    assert say(0) == say(0)
    assert len({say(seed) for seed in range(5)}) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_next_tokens_are_the_most_probable_ones(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = make_lm("gpt2")
    table = next_tokens(model, tokenizer, PROMPT, k=5)
    with torch.no_grad():
        probabilities = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].double().softmax(-1)
    assert table["id"].tolist() == probabilities.argsort(descending=True)[:5].tolist()
    assert table["probability"].tolist() == pytest.approx(probabilities[table["id"].tolist()].tolist(), rel=1e-4)
    assert table["token"].tolist() == [tokenizer.decode([token]) for token in table["id"]]


# Pieces and ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [" there was a fox.", "，从前有一只狐狸🦊，它很聪明。", " 👨‍👩‍👧 ❤️ é ﷽", "  two\n\n lines "]
)
def test_no_character_is_cut(text: str, tokenizer: t.PreTrainedTokenizerBase) -> None:
    pieces = list(generate(make_speaker(tokenizer, text), tokenizer, PROMPT))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert all(pieces)
    assert len(pieces) > 2


def test_a_character_that_is_incomplete_at_the_end_is_left_out(tokenizer: t.PreTrainedTokenizerBase) -> None:
    tokens = len(tokenizer(" fox🦥")["input_ids"])
    assert "".join(generate(make_speaker(tokenizer, " fox🦥"), tokenizer, "A", max_new_tokens=tokens - 1)) == " fox"
    assert "".join(generate(make_speaker(tokenizer, " fox🦥"), tokenizer, "A", max_new_tokens=tokens)) == " fox🦥"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["\nReview:"], " good\nRev\n"),
        (["\n"], " good"),
        (["Review", "good\nR"], " "),
        ([" good"], ""),
        (["那部"], " good\nRev\n\nReview: 我看"),
        (["never", "bad film"], " good\nRev\n\nReview: 我看那部 bad"),
    ],
)
def test_text_ends_before_a_stop_string(stop: list[str], expected: str, tokenizer: t.PreTrainedTokenizerBase) -> None:
    text = " good\nRev\n\nReview: 我看那部 bad"
    pieces = list(generate(make_speaker(tokenizer, text), tokenizer, "It is", stop=stop))
    assert "".join(pieces) == expected
    assert all(pieces)


def test_text_ends_at_every_end_token_of_the_model(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = make_speaker(tokenizer, " a fox and")
    model.generation_config.eos_token_id = [0, tokenizer(" fox")["input_ids"][0]]
    assert "".join(generate(model, tokenizer, "It is")) == " a"


def test_the_space_before_the_first_word_is_kept_if_the_tokenizer_drops_it() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<unk>", "▁It", "</s>", "▁is", "▁good"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([4]) == "good"
    model = make_lm("llama")
    logits = torch.nn.functional.one_hot(torch.tensor([[4]]), 49152).float()
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", logits))
    assert list(generate(model, tokenizer, "It is", max_new_tokens=2)) == [" good", " good"]


def test_the_caller_can_train_between_pieces(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = make_lm("llama").train()
    pieces = generate(model, tokenizer, PROMPT, max_new_tokens=3)
    next(pieces)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_invalid_arguments_are_refused(tokenizer: t.PreTrainedTokenizerBase) -> None:
    model = make_lm("llama")
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "The temperature is -1"),
        ({"stop": "END"}, "stop is 'END': give a list"),
        ({"stop": [""]}, "none of them empty"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, tokenizer, PROMPT, **options)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is not a causal language model"):
        generate(make_tiny("llama"), tokenizer, PROMPT)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 64
    with pytest.raises(ValueError, match="has 4 tokens and 61 are to follow, more than the model's window of 64"):
        generate(model, tokenizer, PROMPT, max_new_tokens=61)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, tokenizer, [{"role": "user", "content": "Hi"}])
