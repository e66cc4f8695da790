"""Soft prompts, compared with plain transformers with words or vectors put in front by hand, and with plain peft."""

import copy

import pytest
import torch
from peft import PeftModel
from tiny_bert import make_rows
from tiny_models import CONFIGS, LAYERS, VOCABULARY, WIDTH, disturb, make_tiny, make_word_tokenizer
from transformers import AutoModelForCausalLM

from ftkit.adapters.lora import add_lora, load_adapter, merge, save_adapter
from ftkit.models.causal_lm import next_token_logits
from ftkit.models.modules import count_parameters
from ftkit.prompting.classifier import PromptClassifier
from ftkit.prompting.soft_prompts import add_p_tuning, add_prefix_tuning, add_prompt_tuning, nearest_words
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

# plain peft, which some tests load with, reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENIZER = make_word_tokenizer()
START = [5, 6, 7, 5]  # "w5 w6 w7", repeated to 4 tokens
FAMILIES = ["llama", "gpt2", "qwen2"]
METHODS = {
    "prompt tuning": lambda model: add_prompt_tuning(model, TOKENIZER, init_text="w5 w6 w7", num_tokens=4),
    "prefix tuning": lambda model: add_prefix_tuning(model, TOKENIZER, init_text="w5 w6 w7", num_tokens=4),
    "P-tuning": lambda model: add_p_tuning(model, num_tokens=4),
}
WORDS = [[(5,)], [(6, 7), (8,)]]


def make_lm(family: str = "llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()


def make_batch():
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def scores(lm, ids, mask):
    return PromptClassifier(lm, WORDS, ["no", "yes"]).eval()(ids, mask).logits


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_from_words_starts_as_the_model_with_these_words_in_front(family, method):
    ids, mask = make_batch()
    plain = make_lm(family)
    expected = [
        plain(torch.tensor([START + row[: n.item()].tolist()])).logits[0, 4:]
        for row, n in zip(ids, mask.sum(1), strict=True)
    ]
    tuned = METHODS[method](make_lm(family))
    ours = next_token_logits(tuned, ids, mask, mask.bool())
    torch.testing.assert_close(ours, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt tuning", "P-tuning"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_virtual_tokens_are_vectors_in_front_of_the_embeddings(family, method):
    ids, _ = make_batch()
    tuned = disturb(METHODS[method](make_lm(family)))
    plain = make_lm(family)
    vectors = tuned.get_prompt(batch_size=3)
    expected = plain(inputs_embeds=torch.cat([vectors, plain.get_input_embeddings()(ids)], dim=1)).logits
    last = torch.full((3, 1), 6)
    ours = next_token_logits(tuned, ids, torch.ones_like(ids), last)[:, 0]
    torch.testing.assert_close(ours, expected[:, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_scores_alone_as_it_does_beside_longer_ones(family, method):
    ids, mask = make_batch()
    tuned = disturb(METHODS[method](make_lm(family)))
    together = scores(tuned, ids, mask)
    alone = [
        scores(tuned, row[None, :n], torch.ones(1, n, dtype=int))
        for row, n in zip(ids, mask.sum(1).tolist(), strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    ids[1, 4:] = 17  # the ids under padding do not matter
    assert torch.equal(scores(tuned, ids, mask), together)


SIZES = {
    ("prompt tuning", "llama"): 4 * WIDTH,
    ("P-tuning", "llama"): 4 * WIDTH + 3 * (WIDTH * WIDTH + WIDTH),
    ("prefix tuning", "llama"): 4 * 2 * LAYERS * WIDTH // 2,  # its two attention heads share keys and values
    ("prefix tuning", "gpt2"): 4 * 2 * LAYERS * WIDTH,
}


@pytest.mark.parametrize(("method", "family"), SIZES)
def test_fit_trains_the_prompt_and_nothing_else(method, family):
    tuned = METHODS[method](make_lm(family))
    frozen = {name: p.clone() for name, p in tuned.get_base_model().named_parameters()}
    start = {name: p.clone() for name, p in trainable(tuned).items()}
    assert count_parameters(tuned)[0] == SIZES[method, family]
    model = PromptClassifier(tuned, WORDS, ["no", "yes"])
    data = {"train": make_rows(24), "validation": make_rows(16, seed=1)}
    history = fit(model, data, TrainSettings(lr=0.03, num_epochs=2, batch_size=8, weight_decay=0, keep_best=False))
    assert history.steps[-1]["loss"] < history.steps[0]["loss"]
    for name, parameter in trainable(tuned).items():
        assert not torch.equal(parameter, start[name]), name
    for name, parameter in tuned.get_base_model().named_parameters():
        assert torch.equal(parameter, frozen[name]) and parameter.grad is None, name


class Modes:
    """A callback that records which modules are in train mode during a step."""

    def __init__(self):
        self.training = {}

    def on_start(self, run): ...

    def on_epoch(self, run): ...

    def on_step(self, run):
        self.training = {name: module.training for name, module in run.model.named_modules()}


def test_while_fit_runs_the_frozen_model_has_no_dropout():
    base = make_lm("gpt2")  # its dropout is 0.1
    model = PromptClassifier(METHODS["P-tuning"](base), WORDS, ["no", "yes"])
    seen = Modes()
    fit(model, {"train": make_rows(8)}, TrainSettings(num_epochs=1), callbacks=[seen])
    assert not any(on for name, on in seen.training.items() if name.startswith("lm.base_model"))
    assert seen.training["lm.prompt_encoder.default.mlp_head"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_prompts_score_the_same_in_plain_peft_and_train_on(family, method, tmp_path):
    ids, mask = make_batch()
    tuned = disturb(METHODS[method](make_lm(family)))
    before = scores(tuned, ids, mask)
    folder = save_adapter(tuned, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = PeftModel.from_pretrained(make_lm(family), folder).eval()
    assert torch.equal(scores(plain, ids, mask), before)

    loaded = load_adapter(make_lm(family), folder)
    assert torch.equal(scores(loaded, ids, mask), before)
    model = PromptClassifier(loaded, WORDS, ["no", "yes"])
    fit(model, {"train": make_rows(16)}, TrainSettings(lr=0.03, num_epochs=1, batch_size=8))
    assert list(trainable(loaded)) == ["prompt_encoder.default.embedding.weight"]
    after = scores(loaded, ids, mask)
    assert (after - before).abs().max() > 1e-3
    again = load_adapter(make_lm(family), save_adapter(loaded, tmp_path / "again"))
    assert torch.equal(scores(again, ids, mask), after)


def test_the_seed_decides_the_start_of_p_tuning_and_the_global_random_state_is_unchanged():
    one, same, other = (add_p_tuning(make_lm(), seed=seed).get_prompt(1) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    for method in METHODS.values():
        model = make_lm()
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        method(model)
        assert torch.equal(torch.rand(1), expected)


def test_with_the_prompt_disabled_the_model_is_the_plain_one():
    ids, mask = make_batch()
    tuned = disturb(METHODS["prompt tuning"](make_lm()))
    with tuned.disable_adapter():
        assert torch.equal(scores(tuned, ids, mask), scores(make_lm(), ids, mask))
    assert (scores(tuned, ids, mask) - scores(make_lm(), ids, mask)).abs().max() > 1e-3


# Nearest words --------------------------------------------------------------------------------------------------


def test_an_untrained_prompt_is_nearest_to_the_words_it_starts_from():
    tuned = METHODS["prompt tuning"](make_lm())
    table = nearest_words(tuned, TOKENIZER, k=2)
    assert list(table["token 1"]) == ["'w5'", "'w6'", "'w7'", "'w5'"]
    torch.testing.assert_close(torch.tensor(table["cosine 1"].tolist()), torch.ones(4), rtol=0, atol=1e-5)
    assert table["distance"].max() < 1e-6
    assert list(table.index) == [1, 2, 3, 4]


def test_nearest_words_have_the_largest_cosines():
    tuned = disturb(METHODS["prompt tuning"](make_lm()))
    table = nearest_words(tuned, TOKENIZER, k=VOCABULARY)
    prompt = tuned.get_prompt(1)[0, 2].detach().double()
    vocabulary = make_lm().get_input_embeddings().weight.detach().double()
    cosines = torch.nan_to_num(
        vocabulary @ prompt / vocabulary.norm(dim=1) / prompt.norm()
    )  # the embedding of w0 is all zeros
    order = cosines.argsort(descending=True).tolist()
    assert [table.loc[3, f"token {place + 1}"] for place in range(5)] == [
        repr(TOKENIZER.decode([i])) for i in order[:5]
    ]
    assert table.loc[3, "cosine 2"] == pytest.approx(cosines[order[1]].item(), abs=1e-6)
    assert table.loc[3, "cosine 60"] == pytest.approx(cosines.min().item(), abs=1e-6)
    assert table.loc[3, "distance"] == pytest.approx((prompt - vocabulary[order[0]]).norm().item(), abs=1e-6)
    assert table.loc[3, "norm"] == pytest.approx(prompt.norm().item(), abs=1e-6)


def test_a_model_without_embeddings_of_virtual_tokens_has_no_nearest_words():
    for model in (METHODS["prefix tuning"](make_lm()), add_lora(make_lm()), make_lm()):
        with pytest.raises(ValueError, match="has no virtual tokens with embeddings: give"):
            nearest_words(model, TOKENIZER)
    with pytest.raises(ValueError, match="k is 0, and the vocabulary has 60 tokens"):
        nearest_words(METHODS["prompt tuning"](make_lm()), TOKENIZER, k=0)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_classifiers_and_encoders_are_refused(method):
    for name in ("bert", "llama", "t5 seq2seq", "bert mlm"):
        model = make_tiny(name)
        with pytest.raises(ValueError, match="is not a causal language model"):
            METHODS[method](model)
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="needs a model without adapters, and this one has some: load"):
        METHODS[method](add_lora(make_lm()))


def test_padding_in_front_is_refused():
    ids, mask = make_batch()
    tuned = METHODS["prompt tuning"](make_lm())
    with pytest.raises(ValueError, match="padding_side = 'right'"):
        scores(tuned, ids.flip(1), mask.flip(1))


def test_gradient_checkpointing_is_refused_with_prefix_tuning_alone():
    ids, mask = make_batch()
    model = make_lm()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="drops the prefix"):
        METHODS["prefix tuning"](model)
    assert all(p.requires_grad for p in model.parameters())
    model.activation_checkpointing_disable()
    tuned = METHODS["prefix tuning"](model)
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="drops the prefix"):
        scores(tuned, ids, mask)
    prompted = METHODS["prompt tuning"](make_lm())
    before = scores(prompted, ids, mask)
    prompted.get_base_model().activation_checkpointing_enable()
    prompted.train()
    torch.testing.assert_close(PromptClassifier(prompted, WORDS, ["no", "yes"])(ids, mask).logits, before)


def test_virtual_tokens_count_for_the_window():
    ids = torch.full((1, 61), 3)  # of 64
    scores(make_lm(), ids, torch.ones_like(ids))
    for method in METHODS.values():
        with pytest.raises(ValueError, match="61 tokens and 4 virtual ones, but the model's window is 64"):
            next_token_logits(method(make_lm()), ids, torch.ones_like(ids), torch.tensor([[60]]))


def test_an_architecture_that_does_not_support_a_prefix_is_refused_and_left_unchanged():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ValueError, match=r"MambaForCausalLM does not support prefix tuning \(.*use add_lora") as caught:
        METHODS["prefix tuning"](model)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_that_ignores_a_prefix_is_refused():
    def drop(module, args, kwargs):
        return args, {
            name: value for name, value in kwargs.items() if name not in ("past_key_values", "attention_mask")
        }

    model = make_lm()
    model.register_forward_pre_hook(drop, with_kwargs=True)
    with pytest.raises(ValueError, match=r"the logits differ by .* from those with the words in front"):
        METHODS["prefix tuning"](model)


@pytest.mark.parametrize("num_tokens", [0, 2.0, True])
def test_an_invalid_number_of_tokens_and_an_empty_text_are_refused(num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens is {num_tokens}: give an integer"):
        add_p_tuning(make_lm(), num_tokens=num_tokens)
    with pytest.raises(ValueError, match="init_text is '' and has no tokens"):
        add_prompt_tuning(make_lm(), TOKENIZER, init_text="")


def test_a_soft_prompt_is_not_merged():
    with pytest.raises(ValueError, match="can't be merged"):
        merge(METHODS["prompt tuning"](make_lm()))


def test_evaluate_takes_a_tuned_model():
    model = PromptClassifier(METHODS["prefix tuning"](make_lm()), WORDS, ["no", "yes"])
    rows = make_rows(20)
    evaluation = evaluate(model, rows, batch_size=6)
    alone = torch.cat(
        [scores(model.lm, torch.tensor([row["input_ids"]]), torch.tensor([row["attention_mask"]])) for row in rows]
    )
    torch.testing.assert_close(torch.from_numpy(evaluation.probabilities).float(), alone.softmax(-1), rtol=0, atol=1e-5)
