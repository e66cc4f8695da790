import copy

import numpy as np
import pytest
import torch
from tiny_towers import brighten, make_pairs, make_towers

from ftkit.contrastive.feature_cache import CachedPairs, cache_towers
from ftkit.contrastive.rows import encode_pairs
from ftkit.contrastive.towers import TwoTowers
from ftkit.data.pairs import Pairs
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

BOTH = ("text", "image")


def make_cached(
    *locked: str, views: int = 1, number: int = 12, dropout: float = 0.0, seed: int = 0
) -> tuple[TwoTowers, dict[str, CachedPairs]]:
    model = make_towers(dropout).lock(*locked)
    splits = {"train": make_pairs(number), "test": make_pairs(5, seed=1)}
    rows = encode_pairs(splits, model, augment=brighten if views > 1 else None)
    return model, cache_towers(model, rows, views=views, batch_size=4, seed=seed)


@pytest.mark.parametrize("locked", [("text",), ("image",), BOTH])
def test_features_equal_the_output_of_the_locked_towers(locked: tuple[str, ...]) -> None:
    model, cached = make_cached(*locked, dropout=0.5)
    rows = cached["train"].rows
    for index in (0, 7, -1):
        row, plain = cached["train"][index], rows[index]
        assert row["labels"] == plain["labels"]
        ids, pixels = torch.tensor([plain["input_ids"]]), torch.from_numpy(plain["pixel_values"])[None]
        with torch.inference_mode():
            expected = {"text": model.text(ids)[0].numpy(), "image": model.image(pixels)[0].numpy()}
        for tower, column in (("text", "input_ids"), ("image", "pixel_values")):
            assert (f"{tower}_features" in row) == (tower in locked)
            assert (column in row) == (tower not in locked)
            if tower in locked:
                np.testing.assert_allclose(row[f"{tower}_features"], expected[tower], atol=1e-5)
    with pytest.raises(IndexError):
        cached["train"][12]


@pytest.mark.parametrize("locked", [("text",), ("image",), BOTH])
def test_training_on_cached_rows_equals_training_on_rows(locked: tuple[str, ...]) -> None:
    """Captions have equal lengths, for cached texts are not batched by length and batches must be the same."""
    pairs = make_pairs(40)
    pairs = Pairs(pairs.images, [" ".join(caption.split()[:3]) for caption in pairs.captions], pairs.facts)
    splits = {"train": pairs.take(range(30)), "validation": pairs.take(range(30, 40))}
    model = make_towers(dropout=0.3).lock(*locked)
    for network in (getattr(model, tower) for tower in BOTH if tower not in locked):
        for module in network.modules():  # no dropout where it trains; the locked tower must run without its own
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    start = copy.deepcopy(model.state_dict())
    rows = encode_pairs(splits, model)
    settings = TrainSettings(lr=1e-3, num_epochs=2, batch_size=8)
    plain = fit(model, rows, settings)
    weights = copy.deepcopy(model.state_dict())

    model.load_state_dict(start)
    cached = cache_towers(model, rows)
    history = fit(model, cached, settings)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], atol=2e-5, rtol=0, msg=name)
    assert not torch.allclose(start["text_head.weight"], weights["text_head.weight"], atol=1e-3)
    assert [step["loss"] for step in history.steps] == pytest.approx([step["loss"] for step in plain.steps], abs=1e-4)
    assert history.epochs[-1]["validation_loss"] == pytest.approx(plain.epochs[-1]["validation_loss"], abs=1e-4)
    found, expected = (evaluate(model, data["validation"], batch_size=3) for data in (cached, rows))
    np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-5)
    assert found.labels.tolist() == expected.labels.tolist()


def test_only_texts_that_are_read_have_lengths() -> None:
    image, text = make_cached("image")[1]["train"], make_cached("text")[1]["train"]
    assert image.lengths.tolist() == image.rows.lengths.tolist()
    assert text.lengths.tolist() == [1] * 12


def test_a_reading_draws_one_of_several_views() -> None:
    _, cached = make_cached("image", views=3)
    views = cached["train"].features["image"]
    assert views.shape == (3, 12, 16)
    assert all(np.abs(views[i] - views[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert cached["test"].features["image"].shape == (1, 5, 16)  # test images are not augmented
    torch.manual_seed(0)
    drawn = [cached["train"][4]["image_features"] for _ in range(30)]
    numbers = [int(np.flatnonzero((views[:, 4] == row).all(axis=1))[0]) for row in drawn]
    assert set(numbers) == {0, 1, 2}
    torch.manual_seed(0)
    assert np.array_equal(cached["train"][4]["image_features"], drawn[0])
    state = torch.get_rng_state()
    _ = cached["test"][0]
    assert torch.equal(torch.get_rng_state(), state)


def test_views_depend_on_the_seed_and_leave_the_global_generator_unchanged() -> None:
    first, again, other = (make_cached("image", views=2, seed=seed)[1]["train"].features["image"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    model = make_towers().lock("image")
    rows = encode_pairs({"train": make_pairs(3)}, model, augment=brighten)
    state = torch.get_rng_state()
    cache_towers(model, rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_cached_rows_are_refused_by_a_tower_that_trains_again() -> None:
    model, cached = make_cached("image")
    model.image.requires_grad_(True)
    with pytest.raises(ValueError, match="cached features of a tower that now trains: lock it or encode them again"):
        fit(model, cached, TrainSettings(num_epochs=1, batch_size=4))


def test_texts_have_only_one_view() -> None:
    _, cached = make_cached(*BOTH, views=2)
    assert cached["train"].features["text"].shape == (1, 12, 16)
    assert cached["train"].features["image"].shape == (2, 12, 16)
    history = fit(make_towers().lock(*BOTH), cached, TrainSettings(num_epochs=1, batch_size=4))
    assert len(history.steps) == 3


def test_a_repeated_caption_is_encoded_once() -> None:
    pairs = make_pairs(6)
    pairs = Pairs(pairs.images, [pairs.captions[i] for i in (2, 0, 2, 1, 0, 2)], pairs.facts)
    model = make_towers().lock("text")
    batch_sizes = []
    model.text.register_forward_hook(lambda _, __, output: batch_sizes.append(len(output)))
    features = cache_towers(model, encode_pairs({"train": pairs}, model))["train"].features["text"][0]
    assert sum(batch_sizes) == 3
    torch.testing.assert_close(
        torch.from_numpy(features), model.text(**_tokens(model, pairs)).detach(), atol=1e-5, rtol=0
    )


def _tokens(model: TwoTowers, pairs: Pairs) -> dict[str, torch.Tensor]:
    tokens = model.text.tokenizer(pairs.captions, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def test_towers_run_in_eval_mode_and_their_mode_is_restored() -> None:
    model = make_towers(dropout=0.5).lock(*BOTH)
    rows = encode_pairs({"train": make_pairs(3)}, model)
    expected = cache_towers(model, rows)["train"].features
    model.train()
    features = cache_towers(model, rows)["train"].features  # without dropout, although in training mode
    assert all(np.array_equal(features[tower], expected[tower]) for tower in BOTH)
    assert model.text.training and model.image.training


@pytest.mark.parametrize("chosen", [[3, 0], np.arange(12) % 5 == 3])
def test_take_selects_rows_by_index_or_mask(chosen: object) -> None:
    _, cached = make_cached(*BOTH, views=2)
    numbers = [3, 0] if isinstance(chosen, list) else [3, 8]
    taken = cached["train"].take(chosen)
    assert len(taken) == len(taken.lengths) == 2
    for tower in BOTH:
        assert np.array_equal(taken.features[tower], cached["train"].features[tower][:, numbers])
    assert [taken.rows.tokens[i] for i in (0, 1)] == [cached["train"].rows.tokens[i] for i in numbers]
    assert sorted(taken.groups) == [0, 1]


def test_a_model_without_a_locked_tower_is_refused() -> None:
    model = make_towers()
    with pytest.raises(ValueError, match="Both towers train"):
        cache_towers(model, encode_pairs({"train": make_pairs(3)}, model))


@pytest.mark.parametrize(("views", "augment"), [(2, None), (0, None), (0, brighten), (-1, brighten)])
def test_an_impossible_number_of_views_is_refused(views: int, augment: object) -> None:
    model = make_towers().lock("image")
    rows = encode_pairs({"train": make_pairs(3), "test": make_pairs(3)}, model, augment=augment)
    with pytest.raises(ValueError, match=f"views={views} is not possible"):
        cache_towers(model, rows, views=views)
