"""Supervised fine-tuning, compared with the loss and the Trainer of transformers."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, VOCABULARY, disturb, make_tiny, make_word_tokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ftkit.adapters.lora import add_lora
from ftkit.errors import DataError, TrainingError
from ftkit.prompting.sft import CompletionModel, encode_completions
from ftkit.prompting.soft_prompts import add_p_tuning, add_prefix_tuning, add_prompt_tuning
from ftkit.training.batching import row_lengths, training_batches
from ftkit.training.callbacks import Checkpoint, EarlyStopping
from ftkit.training.loop import backward, evaluate, fit, prepare, token_loss
from ftkit.training.state import TrainSettings

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TOKENIZER = make_word_tokenizer()
END = TOKENIZER.eos_token_id


def make_lm(family: str = "llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family])).eval()


def make_pairs(num_pairs: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Make prompts of 1 to 12 words and answers of 0 to 6 words; an answer begins with the last word of its prompt."""
    rng = np.random.default_rng(seed)
    prompts, answers = [], []
    for _ in range(num_pairs):
        prompt = [f"w{i}" for i in rng.integers(3, VOCABULARY, size=rng.integers(1, 13))]
        answer = [prompt[-1], *(f"w{i}" for i in rng.integers(3, VOCABULARY, size=5))][: rng.integers(0, 7)]
        prompts.append(" ".join(prompt))
        answers.append("".join(f" {word}" for word in answer))
    return prompts, answers


def transformers_batch(prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Make the usual batch: the end token is an input, labels repeat the inputs, with -100 on prompt and padding."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = TOKENIZER(prompt)["input_ids"]
        rows.append((len(start), [*start, *TOKENIZER(answer)["input_ids"], END]))
    width = max(len(ids) for _, ids in rows)
    batch = {
        name: torch.full((len(rows), width), fill)
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    for i, (start, ids) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, start : len(ids)] = torch.tensor(ids[start:])
    return batch


def test_labels_stand_where_a_token_of_the_answer_is_next():
    rows = encode_completions(["w3 w4 w5", "w6"], [" w7 w8", ""], TOKENIZER)
    assert rows[0] == {
        "input_ids": [3, 4, 5, 7, 8],
        "attention_mask": [1] * 5,
        "answer_mask": [False, False, True, True, True],
        "labels": [-100, -100, 7, 8, END],
    }
    assert rows[1] == {"input_ids": [6], "attention_mask": [1], "answer_mask": [True], "labels": [END]}


@pytest.mark.parametrize("around", ["$A </s>", "<s> $A", "<s> $A </s>"])
def test_the_marks_that_a_tokenizer_adds_stand_where_they_belong(around):
    """The start of the text comes before it, and its end once after the answer."""
    tokenizer = make_word_tokenizer()
    tokenizer.bos_token = "w59"
    special = [("<s>", tokenizer.bos_token_id), ("</s>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=special)
    assert tokenizer("w3")["input_ids"] == [59] * ("<s>" in around) + [3] + [END] * ("</s>" in around)
    rows, plain = (encode_completions(["w3 w4", "w6"], [" w7 w8", ""], tok) for tok in (tokenizer, TOKENIZER))
    begin = "<s>" in around
    assert rows["input_ids"][:] == [[59] * begin + ids for ids in plain["input_ids"]]
    assert rows["labels"][:] == [[-100] * begin + labels for labels in plain["labels"]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_loss_is_that_of_transformers(family):
    lm = disturb(make_lm(family))
    prompts, answers = make_pairs(20)
    with torch.no_grad():
        expected = lm(**transformers_batch(prompts, answers)).loss.item()
    rows = encode_completions(prompts, answers, TOKENIZER)
    for batch_size in (3, 64):
        assert token_loss(CompletionModel(lm), rows, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("add", [add_prompt_tuning, add_prefix_tuning, add_p_tuning])
def test_a_soft_prompts_loss_is_that_of_peft(add):
    words = {} if add is add_p_tuning else {"tokenizer": TOKENIZER, "init_text": "w5 w6"}
    tuned = disturb(add(make_lm(), **words)).eval()
    prompts, answers = make_pairs(8)
    with torch.no_grad():
        expected = tuned(**transformers_batch(prompts, answers)).loss.item()
    assert token_loss(CompletionModel(tuned), encode_completions(prompts, answers, TOKENIZER)) == pytest.approx(
        expected, abs=1e-5
    )


def test_steps_equal_those_of_transformers_trainer(tmp_path: Path):
    """Take the same 12 steps, with clipping, accumulated over batches with different numbers of answer tokens.

    There is no dropout: the Trainer's batches have one more column, the end token, so other units would be dropped.
    """
    prompts, answers = make_pairs(35)  # 9 batches, the last one smaller; 3 steps per epoch
    rows = encode_completions(prompts, answers, TOKENIZER)
    settings = TrainSettings(
        lr=5e-3, num_epochs=4, batch_size=4, accumulation=3, warmup=0.2, max_grad_norm=0.5, weight_decay=0.1, seed=3
    )
    ours, theirs = make_lm(), make_lm()
    history = fit(CompletionModel(ours), {"train": rows}, settings)
    batches = [
        transformers_batch([prompts[i] for i in indices], [answers[i] for i in indices])
        for epoch in range(4)
        for indices in training_batches(row_lengths(rows), 4, settings.seed, epoch)
    ]

    class SameBatches(Trainer):
        def get_train_dataloader(self):
            return batches

    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=5e-3, max_steps=12, gradient_accumulation_steps=3, warmup_steps=0.2,
        max_grad_norm=0.5, weight_decay=0.1, seed=3, use_cpu=True, report_to="none", logging_steps=1,
        logging_nan_inf_filter=False, save_strategy="no", disable_tqdm=True, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer = SameBatches(model=theirs, args=args, train_dataset=batches)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history.steps) == len(logs) == 12
    assert max(step["grad_norm"] for step in history.steps) > 0.5
    np.testing.assert_allclose([step["loss"] for step in history.steps], [log["loss"] for log in logs], atol=1e-5)
    np.testing.assert_allclose([s["grad_norm"] for s in history.steps], [log["grad_norm"] for log in logs], rtol=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_batches_give_the_gradient_of_the_large_one(smoothing):
    prompts, answers = make_pairs(19)
    rows = encode_completions(prompts, answers, TOKENIZER)

    def gradient(batches):
        lm = make_lm().double()
        model = CompletionModel(lm)
        penalty = [
            lambda model, batch, outputs: batch["input_ids"][:, 0].double().mean() * lm.lm_head.weight.square().sum()
        ]
        run = prepare(model, {"train": rows}, TrainSettings(label_smoothing=smoothing), penalty)
        loss = backward(run, batches)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    large_loss, large = gradient([np.arange(19)])
    small_loss, small = gradient([np.arange(8), np.arange(8, 16), np.arange(16, 19)])
    assert small_loss == pytest.approx(large_loss, abs=1e-5)
    assert (small - large).abs().max() < 1e-5

    lm, batch = make_lm(), transformers_batch(prompts, answers)
    labels = F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = F.cross_entropy(lm(**batch).logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
        expected += batch["input_ids"][:, 0].double().mean() * lm.lm_head.weight.square().sum()
    assert large_loss == pytest.approx(expected.item(), rel=1e-5)


def test_only_answer_positions_go_through_the_output_layer():
    lm = make_lm()
    shapes = []
    lm.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    rows = encode_completions(["w3 w4 w5 w6", "w7 w8"], [" w7", " w3 w4 w5"], TOKENIZER)
    token_loss(CompletionModel(lm), rows)
    assert shapes == [(2 + 4, VOCABULARY)]


def test_it_learns_to_answer_and_keeps_the_epoch_with_the_lowest_loss():
    data = {
        name: encode_completions(*make_pairs(n, seed), TOKENIZER)
        for name, n, seed in (("train", 48, 0), ("validation", 24, 1))
    }
    lm = make_lm()
    model = CompletionModel(lm)
    before = token_loss(model, data["validation"])
    history = fit(model, data, TrainSettings(lr=0.01, num_epochs=6, batch_size=8, schedule="constant"))
    losses = [epoch["validation_loss"] for epoch in history.epochs]
    assert all("validation_accuracy" not in epoch for epoch in history.epochs)
    assert history.best_epoch == 1 + int(np.argmin(losses))
    assert min(losses) < before
    assert token_loss(model, data["validation"]) == pytest.approx(min(losses), abs=1e-6)
    assert "validation loss" in repr(history)
    with torch.no_grad():
        expected = lm(**transformers_batch(*make_pairs(24, 1))).loss.item()
    assert min(losses) == pytest.approx(expected, abs=1e-5)


def test_early_stopping_watches_the_loss():
    data = {
        "train": encode_completions(*make_pairs(8), TOKENIZER),
        "validation": encode_completions(*make_pairs(8, 1), TOKENIZER),
    }
    settings = TrainSettings(lr=0.05, num_epochs=30, batch_size=8, schedule="constant")  # memorises the 8 rows
    history = fit(CompletionModel(make_lm()), data, settings, callbacks=[EarlyStopping(patience=2)])
    assert history.ended == "stopped"
    assert len(history.epochs) == history.best_epoch + 2


def test_a_run_resumed_from_its_checkpoint_is_bitwise_the_same(tmp_path: Path):
    data = {"train": encode_completions(*make_pairs(16), TOKENIZER)}
    settings = TrainSettings(lr=0.01, num_epochs=2, batch_size=4)

    class Kill:
        steers = False

        def on_start(self, run): ...

        def on_epoch(self, run): ...

        def on_step(self, run):
            if run.step == 5:
                raise RuntimeError("killed")

    def train(callbacks):
        model = CompletionModel(add_lora(make_lm(), rank=2, dropout=0.1))
        fit(model, data, settings, callbacks=callbacks)
        return model.state_dict()

    whole = train([])
    with pytest.raises(RuntimeError, match="killed"):
        train([Checkpoint(tmp_path / "run", every=2), Kill()])
    resumed = train([Checkpoint(tmp_path / "run", every=2)])
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    other = {"train": encode_completions(*make_pairs(16, seed=9), TOKENIZER)}
    with pytest.raises(ValueError, match="of a run with training rows="):
        fit(CompletionModel(add_lora(make_lm(), rank=2)), other, settings, callbacks=[Checkpoint(tmp_path / "run")])


def test_the_perplexity_of_uniform_predictions_is_the_vocabulary_size():
    lm = make_lm()
    lm.lm_head.weight.data.zero_()
    loss = token_loss(CompletionModel(lm), encode_completions(*make_pairs(5), TOKENIZER))
    assert math.exp(loss) == pytest.approx(VOCABULARY, rel=1e-5)


# Errors -----------------------------------------------------------------------------------------------------------


def test_pairs_that_cannot_be_encoded_are_refused():
    with pytest.raises(DataError, match="2 prompts and 1 answers"):
        encode_completions(["w3", "w4"], [" w5"], TOKENIZER)
    for prompt, answer in ((None, " w3"), ("w3", None), ("w3", 5)):
        with pytest.raises(DataError, match=r"Pair 1 is .*, and not two texts"):
            encode_completions(["w4", prompt], [" w5", answer], TOKENIZER)
    with pytest.raises(DataError, match="In pair 1, no token begins where the answer '5' begins"):
        encode_completions(["w3", "w4"], [" w5", "5"], TOKENIZER)
    with pytest.raises(DataError, match="In pair 0, no token begins"):
        encode_completions([""], ["w5"], TOKENIZER)
    short = make_word_tokenizer()
    short.model_max_length = 3
    with pytest.raises(DataError, match="Pair 0 has 4 tokens, more than the model's limit of 3"):
        encode_completions(["w3 w4"], [" w5 w6"], short)
    short.eos_token = None
    with pytest.raises(DataError, match="The tokenizer has no end token"):
        encode_completions(["w3"], [" w5"], short)
    with pytest.raises(ValueError, match="is not a causal language model"):
        CompletionModel(make_tiny("llama"))


def test_rows_with_token_labels_and_with_classes_are_not_mixed_up():
    rows = encode_completions(*make_pairs(4), TOKENIZER)
    with pytest.raises(ValueError, match="use token_loss for them"):
        evaluate(CompletionModel(make_lm()), rows)
    with pytest.raises(TrainingError, match="class_weights need one class per row"):
        fit(CompletionModel(make_lm()), {"train": rows}, TrainSettings(class_weights="balanced"))
