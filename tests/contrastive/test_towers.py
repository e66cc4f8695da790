import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from tiny_models import CONFIGS, disturb, make_word_tokenizer
from tiny_towers import make_pairs, make_towers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from ftkit.contrastive.losses import clip_loss, siglip_loss
from ftkit.contrastive.retrieval import Retrieval
from ftkit.contrastive.rows import PairRows, encode_pairs
from ftkit.contrastive.towers import TwoTowers
from ftkit.data.pairs import Pairs
from ftkit.errors import TrainingError
from ftkit.models.encoders import TextEncoder
from ftkit.models.modules import train_mode
from ftkit.training.batching import make_batch
from ftkit.training.loop import evaluate, fit, make_optimizer
from ftkit.training.state import TrainSettings

SCALE = torch.tensor(2.0)


def make_embeddings(number: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 5, generator=generator), torch.randn(number, 5, generator=generator)


def by_hand(logits: np.ndarray, negatives: np.ndarray) -> float:
    """The CLIP loss in float64, row by row and column by column; ``negatives`` masks the combinations that count."""
    counted = negatives | np.eye(len(logits), dtype=bool)
    losses = []
    for scores, mask in ((logits, counted), (logits.T, counted.T)):
        losses += [math.log(np.exp(row[kept]).sum()) - row[i] for i, (row, kept) in enumerate(zip(scores, mask))]  # noqa: B905
    return float(np.mean(losses))


def logits_by_hand(text: Tensor, image: Tensor) -> np.ndarray:
    text, image = (part.double().numpy() for part in (text, image))
    norms = np.linalg.norm(text, axis=1)[:, None] * np.linalg.norm(image, axis=1)
    return math.exp(SCALE) * text @ image.T / norms


def batch_of(model: TwoTowers, number: int = 32) -> dict[str, Tensor]:
    rows = encode_pairs({"train": make_pairs(number)}, model)["train"]
    return make_batch(model, rows, np.arange(number), model.device)


def gradients(model: TwoTowers) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The losses -------------------------------------------------------------------------------------------------


def test_clip_loss_equals_that_of_transformers_and_one_in_float64() -> None:
    text, image = make_embeddings()
    loss = clip_loss(text, image, SCALE)
    logits = SCALE.exp() * F.normalize(text) @ F.normalize(image).T
    torch.testing.assert_close(loss, image_text_contrastive_loss(logits))
    everything = np.ones((6, 6), dtype=bool)
    assert loss.item() == pytest.approx(by_hand(logits_by_hand(text, image), everything), rel=1e-6)
    assert clip_loss(3 * text, image / 7, SCALE).item() == pytest.approx(loss.item(), rel=1e-6)


def test_losses_without_normalising_use_dot_products() -> None:
    text, image = make_embeddings()
    logits = SCALE.exp() * text @ image.T
    torch.testing.assert_close(clip_loss(text, image, SCALE, normalise=False), image_text_contrastive_loss(logits))
    signs = 2 * torch.eye(6) - 1
    expected = -F.logsigmoid(signs * (logits - 3)).sum() / 6
    torch.testing.assert_close(siglip_loss(text, image, SCALE, None, torch.tensor(-3.0), normalise=False), expected)


@pytest.mark.parametrize("number", [1, 2, 50])
def test_clip_loss_of_equal_embeddings_is_ln_b(number: int) -> None:
    same = torch.ones(number, 4)
    assert clip_loss(same, same, torch.tensor(4.6)).item() == pytest.approx(math.log(number), abs=1e-5)


def test_pairs_of_one_group_are_not_negatives() -> None:
    text, image = make_embeddings()
    groups = torch.tensor([7, 1, 7, 2, 1, 7])
    negatives = (groups[:, None] != groups).numpy()
    loss = clip_loss(text, image, SCALE, groups)
    assert loss.item() == pytest.approx(by_hand(logits_by_hand(text, image), negatives), rel=1e-6)
    assert loss < clip_loss(text, image, SCALE)
    torch.testing.assert_close(clip_loss(text, image, SCALE, torch.arange(6)), clip_loss(text, image, SCALE))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_batch_of_one_group_has_a_finite_loss_and_gradient(kind: str) -> None:
    text, image = (part.requires_grad_() for part in make_embeddings())
    groups = torch.zeros(6, dtype=torch.int64)
    bias = torch.tensor(-1.0)
    loss = clip_loss(text, image, SCALE, groups) if kind == "clip" else siglip_loss(text, image, SCALE, groups, bias)
    loss.backward()
    own_logits = torch.tensor(logits_by_hand(text.detach(), image.detach()).diagonal() - 1)
    expected = 0 if kind == "clip" else F.softplus(-own_logits).mean().item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert text.grad.isfinite().all() and image.grad.isfinite().all()


def test_siglip_loss_equals_that_of_transformers() -> None:
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 60, "max_position_embeddings": 8, "projection_size": 16}
    config = t.SiglipConfig(text_config=text, vision_config={**shared, "image_size": 8, "patch_size": 4})
    model = disturb(t.SiglipModel(config)).eval()
    model.logit_scale.data.fill_(1.3)
    model.logit_bias.data.fill_(-0.7)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.randint(3, 60, (5, 8)), pixel_values=torch.randn(5, 3, 8, 8), return_loss=True
        )  # fmt: skip
    text, image, scale, bias = theirs.text_embeds, theirs.image_embeds, model.logit_scale[0], model.logit_bias[0]
    assert theirs.logits_per_text.std() > 0.1
    torch.testing.assert_close(siglip_loss(2 * text, 3 * image, scale, None, bias), theirs.loss)
    groups = torch.tensor([0, 1, 0, 2, 3])
    both_ways = F.softplus(theirs.logits_per_text[0, 2]) + F.softplus(theirs.logits_per_text[2, 0])
    torch.testing.assert_close(siglip_loss(text, image, scale, groups, bias), theirs.loss - both_ways / 5)


# Two towers -------------------------------------------------------------------------------------------------


def test_the_initial_temperature_is_that_of_the_papers() -> None:
    assert make_towers().logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert make_towers().temperature == pytest.approx(0.07)
    assert not hasattr(make_towers(), "logit_bias")
    siglip = make_towers(loss="siglip")
    assert siglip.logit_scale.item() == pytest.approx(math.log(10))
    assert siglip.logit_bias.item() == -10
    assert make_towers(loss="siglip", temperature=0.5).temperature == pytest.approx(0.5)
    assert make_towers(temperature=0.2).temperature == pytest.approx(0.2)


@pytest.mark.parametrize(("direction", "expected"), [(-1, 0.01), (1, 1.0)])
def test_the_temperature_stays_within_bounds(direction: int, expected: float) -> None:
    def push(text: Tensor, image: Tensor, logit_scale: Tensor, groups: Tensor | None) -> Tensor:
        return direction * logit_scale

    model = make_towers(loss=push).lock("text", "image")
    seen = []

    class Watch:
        def on_start(self, run: Any) -> None: ...
        def on_epoch(self, run: Any) -> None: ...
        def on_step(self, run: Any) -> None:
            seen.append(run.model.logit_scale.item())

    rows = encode_pairs({"train": make_pairs(8)}, model)
    fit(
        model, rows, TrainSettings(lr=1, num_epochs=6, batch_size=4, warmup=0, schedule="constant"), callbacks=[Watch()]
    )
    assert model.temperature == pytest.approx(expected)
    assert len(seen) == 12
    assert all(0 <= scale <= math.log(100) + 1e-6 for scale in seen)


def test_a_fixed_temperature_does_not_change() -> None:
    model = make_towers(temperature=0.2, learn_temperature=False)
    fit(model, encode_pairs({"train": make_pairs(8)}, model), TrainSettings(lr=0.1, num_epochs=1, batch_size=4))
    assert model.temperature == pytest.approx(0.2)
    moved = make_towers(temperature=0.2)
    fit(moved, encode_pairs({"train": make_pairs(8)}, moved), TrainSettings(lr=0.1, num_epochs=1, batch_size=4))
    assert moved.temperature != pytest.approx(0.2)


def test_scale_and_bias_have_no_weight_decay() -> None:
    model = make_towers(loss="siglip")
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, TrainSettings(weight_decay=0.3)).param_groups
        for p in group["params"]
    }
    assert decays[id(model.logit_scale)] == decays[id(model.logit_bias)] == 0
    assert decays[id(model.text_head.weight)] == decays[id(model.image_head.weight)] == 0.3


def test_heads_are_linear_or_have_one_hidden_layer() -> None:
    linear, mlp = make_towers(dim=6), make_towers(dim=6, head="mlp")
    assert [tuple(p.shape) for p in linear.text_head.parameters()] == [(6, 16)]
    assert [tuple(p.shape) for p in mlp.image_head.parameters()] == [(16, 16), (16,), (6, 16), (6,)]
    features = torch.randn(3, 16)
    layers = mlp.text_head
    expected = layers[2](F.gelu(layers[0](features)))
    torch.testing.assert_close(mlp.lock("text").embed_text(text_features=features), F.normalize(expected))
    assert not torch.equal(linear.text_head.weight, linear.image_head.weight)


def test_the_seed_determines_the_weights_of_the_heads() -> None:
    one, same, other = (make_towers(seed=seed).text_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_unknown_names_and_impossible_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match="no loss 'triplet'"):
        make_towers(loss="triplet")
    with pytest.raises(ValueError, match="no head 'deep'"):
        make_towers(head="deep")
    for temperature in (0.001, 2.0):
        with pytest.raises(ValueError, match=f"temperature of {temperature} is outside"):
            make_towers(temperature=temperature)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_without_normalising_uses_dot_products(kind: str) -> None:
    cosines, products = (make_towers(loss=kind, normalise=normalise, temperature=1.0) for normalise in (True, False))
    rows = encode_pairs({"test": make_pairs(5)}, cosines)["test"]
    text, image = products.encode(rows)
    assert not torch.allclose(text.norm(dim=-1), torch.ones(5))
    np.testing.assert_allclose(evaluate(products, rows).similarities, text @ image.T, rtol=1e-5)
    np.testing.assert_allclose(
        evaluate(cosines, rows).similarities, F.normalize(text) @ F.normalize(image).T, atol=1e-6
    )
    logits = (text @ image.T).double()  # the temperature is 1
    if kind == "clip":
        expected = image_text_contrastive_loss(logits)
    else:
        expected = F.softplus((1 - 2 * torch.eye(5)) * (logits - 10)).sum() / 5
    assert evaluate(products, rows).loss == pytest.approx(expected.item(), rel=1e-5)
    batch = make_batch(products, rows, np.arange(5), products.device)
    assert products(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_custom_loss_gets_embeddings_scale_and_groups() -> None:
    def loss(text: Tensor, image: Tensor, logit_scale: Tensor, groups: Tensor | None) -> Tensor:
        return (text - image).square().sum() * logit_scale + groups.sum()

    model = make_towers(loss=loss)
    output = model(**batch_of(model, 4))
    expected = (output.text - output.image).square().sum() * math.log(1 / 0.07) + 6  # 0 + 1 + 2 + 3
    torch.testing.assert_close(output.loss, expected)


def test_from_clip_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shared, "vocab_size": 60, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**shared, "hidden_size": 20, "image_size": 8, "patch_size": 4}
    config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, logit_scale_init_value=1.7)
    clip = disturb(t.CLIPModel(config)).eval()
    clip.save_pretrained(tmp_path)
    make_word_tokenizer().save_pretrained(tmp_path)
    scale = clip.logit_scale.item()

    model = TwoTowers.from_clip(str(tmp_path), chunk_size=2)
    assert model.chunk_size == 2
    assert model.temperature == pytest.approx(math.exp(-scale))
    pairs = make_pairs(5)
    captions = [caption + " </s>" for caption in pairs.captions]
    tokens = make_word_tokenizer()(captions, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(pairs.images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        theirs = clip(**tokens, pixel_values=pixels, return_loss=True)
    ours = math.exp(scale) * model.encode_texts(captions) @ model.encode_images(pairs.images).T
    assert theirs.logits_per_text.std() > 0.01
    torch.testing.assert_close(ours, theirs.logits_per_text, atol=1e-5, rtol=1e-4)
    batch = {**tokens, "pixel_values": pixels}
    torch.testing.assert_close(model(**batch).loss, theirs.loss, atol=1e-5, rtol=1e-4)


# Encoding ---------------------------------------------------------------------------------------------------


def test_an_image_with_several_captions_is_ranked_once_and_is_correct_for_each() -> None:
    """A perfect model finds all ten images, although each has three captions and so stands in three pairs."""
    model, ten = make_towers(dim=10), make_pairs(10)
    numbers = np.arange(30) % 10
    captions = [f"{ten.captions[i]} {k // 10}" for k, i in enumerate(numbers)]
    pairs = Pairs(ten.images[numbers], captions, ten.facts.iloc[numbers], image_ids=numbers)
    rows = encode_pairs({"test": pairs}, model)["test"]
    perfect = torch.eye(10)[numbers]
    model.encode = lambda rows, batch_size: (perfect, perfect)
    found = evaluate(model, rows)
    assert found.similarities.shape == (30, 10)
    assert (found.accuracy, found.turned.accuracy) == (1, 1)
    shifted = perfect.roll(1, dims=1) + 0.9 * perfect  # the correct image is the second
    model.encode = lambda rows, batch_size: (shifted, perfect)
    assert [evaluate(model, rows).recall(k) for k in (1, 2)] == [0, 1]
    assert [evaluate(model, rows).turned.recall(k) for k in (3, 4)] == [0, 1]  # after three of another image


def test_embeddings_have_the_order_of_the_rows_for_any_batch_size() -> None:
    model = make_towers(dropout=0.5)
    model.train()
    pairs = make_pairs(11)
    rows = encode_pairs({"test": pairs}, model)["test"]
    assert len(set(rows.lengths)) > 1  # otherwise batching would not change the order
    one_by_one = [model.encode(rows.take([i])) for i in range(11)]
    text, image = (torch.cat(parts) for parts in zip(*one_by_one, strict=True))
    assert text.unique(dim=0).shape == image.unique(dim=0).shape == (11, 8)
    for size in (1, 3, 64):
        ours = model.encode(rows, batch_size=size)
        torch.testing.assert_close(ours[0], text, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours[1], image, atol=1e-5, rtol=0)
        found = evaluate(model, rows, batch_size=size)
        np.testing.assert_allclose(found.similarities, text @ image.T, atol=1e-5)
        assert found.labels.tolist() == pairs.groups.tolist()
        assert found.loss == pytest.approx(clip_loss(text, image, model.logit_scale).item(), abs=1e-4)
        torch.testing.assert_close(model.encode_texts(pairs.captions, batch_size=size), text, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_images(pairs.images, batch_size=size), image, atol=1e-5, rtol=0)
    assert model.training


def test_images_are_encoded_without_running_the_text_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_towers()
    expected = model.encode_images(make_pairs(3).images)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the text tower ran")

    monkeypatch.setattr(TextEncoder, "forward", refuse)
    model.text.tokenizer.model_max_length = 4
    assert torch.equal(model.encode_images(make_pairs(3).images), expected)


# Gradient caching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_gradients_with_chunks_equal_those_of_the_whole_batch(kind: str) -> None:
    whole, chunked = make_towers(loss=kind), make_towers(loss=kind, chunk_size=4)
    losses = []
    for model in (whole, chunked):
        train_mode(model)
        output = model(**batch_of(model))
        output.loss.backward()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    expected, found = gradients(whole), gradients(chunked)
    assert expected.keys() == found.keys() == dict(whole.named_parameters()).keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_the_second_pass_over_a_chunk_repeats_its_dropout() -> None:
    """The reference encodes each chunk once and keeps all graphs; a whole batch would drop other units."""
    cached, kept = make_towers(dropout=0.3, chunk_size=4), make_towers(dropout=0.3)
    tower_of = {"text": ("input_ids", "attention_mask"), "image": ("pixel_values",)}
    batch = {name: column for name, column in batch_of(kept).items() if name != "token_type_ids"}
    for model in (cached, kept):
        train_mode(model)
    torch.manual_seed(5)
    loss = cached(**batch).loss
    loss.backward()
    torch.manual_seed(5)
    embedded = []
    for name, columns in tower_of.items():
        tower, head = getattr(kept, name), getattr(kept, f"{name}_head")
        parts = [tower(**{column: batch[column][i : i + 4] for column in columns}) for i in range(0, 32, 4)]
        embedded.append(head(torch.cat(parts)))
    expected = clip_loss(*embedded, kept.logit_scale)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    found = gradients(cached)
    for name, gradient in gradients(kept).items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)
    torch.manual_seed(6)
    assert cached(**batch).loss.item() != pytest.approx(expected.item(), abs=1e-3)  # other dropout, other loss


def test_fit_in_chunks_gives_the_same_weights() -> None:
    weights = []
    for size in (None, 4):
        model = make_towers(chunk_size=size)
        rows = encode_pairs({"train": make_pairs(32)}, model)
        history = fit(model, rows, TrainSettings(lr=1e-3, num_epochs=3, batch_size=16))
        weights.append(dict(model.state_dict()))
    assert len(history.steps) == 6
    moved = weights[0]["text_head.weight"] - make_towers().text_head.weight
    assert moved.abs().max() > 1e-3
    for name, tensor in weights[0].items():
        if not name.endswith(("key.bias", "k_proj.bias")):  # no effect in softmax: AdamW scales up rounding errors
            torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0, msg=name)


def test_a_tower_only_sees_one_chunk_at_a_time() -> None:
    model = make_towers(chunk_size=4)
    sizes: list[int] = []
    for tower in (model.text, model.image):
        tower.register_forward_pre_hook(
            lambda _, args, given: sizes.append(len(next(iter(given.values())))), with_kwargs=True
        )
    batch = batch_of(model, 10)
    model(**batch).loss.backward()
    assert sorted(sizes) == [2] * 4 + [4] * 8  # both towers, forward and again for the backward pass
    sizes.clear()
    with torch.no_grad():
        model(**batch)
    assert sizes == [4, 4, 2] * 2
    sizes.clear()
    model.lock("image")(**batch).loss.backward()
    assert sorted(sizes) == [2] * 3 + [4] * 6  # the locked tower only forward


def test_out_of_memory_advice_keeps_the_loss() -> None:
    model = make_towers()
    model.register_forward_pre_hook(lambda *_: torch.empty(2**60))  # more than the allocator can give
    rows = encode_pairs({"train": make_pairs(16)}, model)
    with pytest.raises(TrainingError, match="with batches of 8 rows: give the model a chunk_size") as refused:
        fit(model, rows, TrainSettings(num_epochs=1, batch_size=8))
    assert "accumulation" not in str(refused.value)  # fewer negatives per step would be another loss


# Training ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [("text",), ("image",), ("text", "image")])
def test_locked_towers_do_not_change_and_the_rest_does(locked: tuple[str, ...]) -> None:
    model = make_towers(dropout=0.1)
    before = copy.deepcopy(model.state_dict())
    assert model.lock(*locked) is model
    fit(model, encode_pairs({"train": make_pairs(16)}, model), TrainSettings(lr=1e-2, num_epochs=1, batch_size=8))
    for name, tensor in model.state_dict().items():
        part = name.split(".")[0]
        assert torch.equal(tensor, before[name]) == (part in locked), name


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_training_learns_the_pairs_and_keeps_the_best_epoch(kind: str) -> None:
    model = make_towers(loss=kind)
    rows: dict[str, PairRows] = encode_pairs({"train": make_pairs(128), "validation": make_pairs(20)}, model)
    before = evaluate(model, rows["validation"])
    history = fit(model, rows, TrainSettings(lr=3e-3, num_epochs=20, batch_size=32))
    after = evaluate(model, rows["validation"])
    assert isinstance(after, Retrieval)
    accuracies = [epoch["validation_accuracy"] for epoch in history.epochs]
    assert history.best_epoch == 1 + int(np.argmax(accuracies))
    assert after.recall(1) == max(accuracies) > before.recall(1) + 0.2
    best = history.epochs[history.best_epoch - 1]
    assert after.loss == pytest.approx(best["validation_loss"], abs=1e-6)
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"]


def test_a_bert_tower_also_reads_token_types() -> None:
    model = make_towers()
    model.text = TextEncoder(t.BertModel(copy.deepcopy(CONFIGS["bert"])).eval(), make_word_tokenizer())
    batch = batch_of(model, 4)
    types = torch.ones_like(batch["input_ids"])
    plain, typed = model.embed_text(**batch), model.embed_text(**batch, token_type_ids=types)
    assert not torch.allclose(plain, typed)
    torch.testing.assert_close(model(**batch, token_type_ids=types).text, typed)
