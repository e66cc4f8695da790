"""Scores of tiny random language models, and once of smollm2, compared with running each whole text alone."""

import copy

import numpy as np
import pytest
import torch
import transformers as t
from peft import PromptTuningConfig, TaskType, get_peft_model
from scipy.special import logsumexp, softmax
from sklearn.metrics import log_loss
from tiny_bert import VOCABULARY
from tiny_models import CONFIGS, disturb, make_tiny

from ftkit.adapters.lora import add_lora
from ftkit.models.loading import load_language_model
from ftkit.prompting.scoring import calibrate, score, shared_tokens, to_evaluation
from ftkit.prompting.templates import Template, Verbalizer, encode_prompts

WORDS = {
    "one token": [[(7,)], [(9,)]],
    "many tokens": [[(7, 8), (10,)], [(9,), (7, 8, 14, 15)], [(7,), (20, 21, 22)]],
}
MISTRAL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 24, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def make_lm(family: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    if family == "mamba":
        config = t.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    elif family == "bloom":  # it has no position ids, but an attention bias that grows with the distance
        config = t.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    elif family.startswith("mistral"):
        config = t.MistralConfig(**MISTRAL, sliding_window=int(family.split()[1]))
    else:
        config = copy.deepcopy(CONFIGS[family])
    return t.AutoModelForCausalLM.from_config(config).eval()


def make_prompts(shared: int, num_rows: int = 5, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    start = rng.integers(3, VOCABULARY, shared).tolist()
    rows = [start + rng.integers(3, VOCABULARY, rng.integers(1, 12)).tolist() for _ in range(num_rows)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]


@torch.no_grad()
def naive_scores(
    model: torch.nn.Module, rows: list[dict], words: list[list[tuple[int, ...]]]
) -> dict[bool, np.ndarray]:
    """Score each prompt and word alone with plain transformers, by the sum (False) and the mean (True) over tokens."""

    def word_score(ids: list[int], word: tuple[int, ...]) -> tuple[float, float]:
        logits = model(input_ids=torch.tensor([[*ids, *word]]), use_cache=False).logits[0].double()
        log_probs = logits.log_softmax(-1)[torch.arange(len(ids) - 1, len(ids) + len(word) - 1), torch.tensor(word)]
        return float(log_probs.sum()), float(log_probs.mean())

    scores = [[logsumexp([word_score(r["input_ids"], w) for w in label], axis=0) for label in words] for r in rows]
    return {False: np.array(scores)[..., 0], True: np.array(scores)[..., 1]}


# Scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral 64", "mistral 8", "bloom", "mamba"])
@pytest.mark.parametrize("words", WORDS)
def test_scores_are_those_of_each_whole_text_alone(family: str, words: str) -> None:
    model = make_lm(family)
    for shared in (0, 10):
        rows = make_prompts(shared)
        naive = naive_scores(model, rows, WORDS[words])
        for length_normalised, expected in naive.items():
            scores = score(model, rows, WORDS[words], length_normalised=length_normalised, batch_size=3)
            assert scores.shape == expected.shape
            assert np.ptp(expected, axis=0).min() > 0.1  # so the scores of another row would fail
            np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "prints"), [("llama", False), ("mistral 64", False), ("mistral 8", True)])
def test_a_cache_that_does_not_keep_the_whole_text_is_not_used(
    family: str, prints: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    score(make_lm(family), make_prompts(10), WORDS["one token"])
    expected = "MistralForCausalLM cannot share a cache between rows: each prompt runs in full for each word.\n"
    assert capsys.readouterr().out == (expected if prints else "")


def test_the_shared_start_runs_once_and_only_needed_logits_are_computed() -> None:
    model = make_lm("llama")
    tokens, logits = [], []
    model.model.register_forward_pre_hook(lambda m, args, kw: tokens.append(kw["input_ids"].numel()), with_kwargs=True)
    model.lm_head.register_forward_hook(lambda m, args, out: logits.append(out.shape[:2].numel()))
    rows = [{"input_ids": [*range(3, 40), 40 + i, 41]} for i in range(8)]
    score(model, rows, [[(7,)], [(8, 9)]], batch_size=4)
    assert tokens == [37, 4 * 2, 4, 4 * 2, 4]
    assert logits == [1, 4, 4, 4, 4]


def test_a_lora_adapter_is_used_and_the_model_stays_in_its_mode() -> None:
    model = disturb(add_lora(make_lm("llama"), dropout=0.5)).train()
    rows = make_prompts(10)
    scores = score(model, rows, WORDS["many tokens"])
    assert model.training
    np.testing.assert_allclose(scores, naive_scores(model.eval(), rows, WORDS["many tokens"])[False], atol=1e-4)
    with model.disable_adapter():
        assert np.abs(scores - naive_scores(model, rows, WORDS["many tokens"])[False]).min() > 1e-3


def test_virtual_tokens_stand_before_each_whole_prompt() -> None:
    base = make_lm("llama")
    soft = get_peft_model(base, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    rows = make_prompts(10)
    embeddings = soft.get_prompt(batch_size=1).detach()
    with torch.no_grad():
        expected = [
            base(
                inputs_embeds=torch.cat([embeddings, base.model.embed_tokens(torch.tensor([row["input_ids"]]))], dim=1)
            )
            .logits[0, -1]
            .log_softmax(-1)[[7, 9]]
            .numpy()
            for row in rows
        ]
    np.testing.assert_allclose(score(soft, rows, WORDS["one token"]), expected, atol=1e-4)


def test_the_order_and_number_of_rows_do_not_matter() -> None:
    model, rows = make_lm("gpt2"), make_prompts(10, num_rows=20)
    scores = score(model, rows, WORDS["many tokens"], batch_size=3)
    np.testing.assert_allclose(score(model, rows[::-1], WORDS["many tokens"])[::-1], scores, atol=1e-4)
    np.testing.assert_allclose(score(model, rows[5:6], WORDS["many tokens"])[0], scores[5], atol=1e-4)
    np.testing.assert_allclose(score(model, rows[:1] * 3, WORDS["many tokens"]), scores[[0, 0, 0]], atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 1), ([[5], [5]], 0), ([[1, 2], [3, 2]], 0), ([[4, 5, 6]], 2)],
)
def test_at_least_one_token_of_each_prompt_is_not_shared(prompts: list[list[int]], shared: int) -> None:
    assert shared_tokens(prompts) == shared


def test_rows_and_models_that_cannot_be_scored_are_refused() -> None:
    rows = [{"input_ids": [4] * 5}, {"input_ids": [4] * 63}]
    assert score(make_lm("llama"), rows, [[(7,)], [(8,)]]).shape == (2, 2)
    with pytest.raises(
        ValueError, match="Row 1 has 65 tokens with the longest word, more than the model's window of 64"
    ):
        score(make_lm("llama"), rows, [[(7,)], [(8, 9)]])
    with pytest.raises(ValueError, match="The prompt of row 1 is empty"):
        score(make_lm("llama"), [{"input_ids": [3]}, {"input_ids": []}], WORDS["one token"])
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is not a causal language model"):
        score(make_tiny("llama"), rows, WORDS["one token"])


def test_smollm2_scores_a_review_as_plain_transformers_do() -> None:
    model, tokenizer = load_language_model("smollm2")
    examples = [{"text": "A dull mess.", "label": 0}, {"text": "A joy, 太好了!", "label": 1}]
    tests = [{"text": text} for text in ("I left early.", "Well {made} 😀")]
    verbalizer = Verbalizer({"negative": " underwhelming", "positive": " good"})
    rows, words = encode_prompts(tests, Template("Review: {text}\nIt was"), verbalizer, tokenizer, examples=examples)
    assert shared_tokens(rows["input_ids"]) > 15
    np.testing.assert_allclose(score(model, rows, words), naive_scores(model, list(rows), words)[False], atol=1e-4)


# Evaluation and calibration -----------------------------------------------------------------------------------


def test_an_evaluation_is_that_of_a_classifier_with_these_scores() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 3)) * 3 - 40, rng.integers(3, size=50)
    evaluation = to_evaluation(scores, labels)
    np.testing.assert_allclose(evaluation.probabilities, softmax(scores, axis=1))
    assert evaluation.loss == pytest.approx(log_loss(labels, softmax(scores, axis=1), labels=[0, 1, 2]))
    assert evaluation.accuracy == np.mean(scores.argmax(1) == labels)


def test_calibration_divides_by_the_mean_over_content_free_inputs() -> None:
    # 0.9 / 0.8 against 0.1 / 0.2 is 9 to 4; 0.6 / 0.8 against 0.4 / 0.2 is 3 to 8
    content_free = np.log([[0.9, 0.1], [0.7, 0.3]]) - [[5], [70]]  # log-scores may be unnormalised
    rows = np.log([[0.9, 0.1], [0.6, 0.4]]) - [[2], [300]]
    np.testing.assert_allclose(np.exp(calibrate(rows, content_free)), [[9 / 13, 4 / 13], [3 / 11, 8 / 11]])


def test_calibration_gives_a_content_free_input_equal_probabilities() -> None:
    content_free = np.random.default_rng(0).normal(size=(1, 4))
    np.testing.assert_allclose(np.exp(calibrate(content_free, content_free)), np.full((1, 4), 0.25))
