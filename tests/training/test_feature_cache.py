import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import TEXT_CLASSIFIERS, WIDTH, disturb, make_tiny

from ftkit.errors import FeatureCacheError, FreezingError
from ftkit.models.architecture import head_names
from ftkit.training.batching import make_batch
from ftkit.training.callbacks import Callback, Checkpoint
from ftkit.training.feature_cache import cache_frozen_layers
from ftkit.training.freezing import GradualUnfreezing, LayerwiseRates, freeze
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings


def make_data() -> dict[str, list[dict[str, object]]]:
    return {"train": make_rows(45), "validation": make_rows(20, seed=1)}


def freeze_all_but(model: torch.nn.Module, train: int) -> torch.nn.Module:
    """So many groups train; 0 stands for the new layers alone, above a body of which all is frozen."""
    return freeze(model, train or [f"{name}.*" for name in head_names(model)])


@pytest.mark.parametrize("train", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", TEXT_CLASSIFIERS)
def test_logits_equal_the_uncached_ones(name: str, train: int) -> None:
    if name == "albert" and train > 2:
        pytest.skip("its one block is one group")
    model, data = freeze_all_but(disturb(make_tiny(name)), train), make_data()
    rest, cached = cache_frozen_layers(model, data, batch_size=7)
    for split, rows in data.items():
        assert cached[split].lengths.tolist() == [len(row["input_ids"]) for row in rows]
        assert [row["labels"] for row in cached[split]] == [row["labels"] for row in rows]
        for indices in (np.arange(6), np.array([9, 3, 17])):
            whole = make_batch(model, rows, indices, model.device)
            ours = make_batch(rest, cached[split], indices, model.device)
            labels = [batch.pop("labels").tolist() for batch in (whole, ours)]
            assert labels[0] == labels[1]
            with torch.no_grad():
                torch.testing.assert_close(rest(**ours).logits, model(**whole).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert", "llama", "albert"])
def test_training_the_rest_trains_the_whole_model_as_without_a_cache(name: str, train: int) -> None:
    if name == "albert" and train > 2:
        pytest.skip("its one block is one group")

    def prepare() -> torch.nn.Module:
        model = freeze_all_but(disturb(make_tiny(name)), train)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for attribute in ("attention_dropout", "dropout_prob", "drop_prob", "out_drop"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        return model

    settings = TrainSettings(lr=1e-3, num_epochs=2, batch_size=8)
    data, whole, ours = make_data(), prepare(), prepare()
    expected = fit(whole, data, settings, callbacks=[LayerwiseRates(0.8)])
    rest, cached = cache_frozen_layers(ours, data)
    history = fit(rest, cached, settings, callbacks=[LayerwiseRates(0.8)])
    losses = [[step["loss"] for step in run.steps] for run in (expected, history)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    assert history.trainable_parameters == expected.trainable_parameters
    for (key, a), (_, b) in zip(whole.state_dict().items(), ours.state_dict().items(), strict=True):
        if not key.endswith(("key.bias", "key_proj.bias")):  # softmax cancels them: their gradient is rounding alone
            torch.testing.assert_close(a, b, atol=2e-4, rtol=0, msg=key)
    result = evaluate(rest, cached["validation"])
    np.testing.assert_allclose(result.probabilities, evaluate(ours, data["validation"]).probabilities, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "deberta-v2", "gpt2", "llama", "qwen2"])
def test_of_a_linear_probe_one_token_a_row_is_kept(name: str) -> None:
    _, cached = cache_frozen_layers(freeze(make_tiny(name), 1), make_data())
    assert {row["frozen_states"].shape for row in cached["train"]} == {(1, WIDTH)}
    assert {len(row["attention_mask"]) for row in cached["train"]} == {1}


def test_a_head_that_reads_all_tokens_gets_them() -> None:
    data = make_data()
    _, cached = cache_frozen_layers(freeze(make_tiny("modernbert"), 1), data)
    assert [len(row["frozen_states"]) for row in cached["train"]] == cached["train"].lengths.tolist()

    for row in data["train"][:5]:  # a decoder then classifies from a token before the last
        row["input_ids"][-1] = 0
    model = freeze(make_tiny("llama"), 1)
    rest, cached = cache_frozen_layers(model, data)
    ours, whole = evaluate(rest, cached["train"]), evaluate(model, data["train"])
    np.testing.assert_allclose(ours.probabilities, whole.probabilities, atol=1e-5)


def test_dropout_of_the_rest_still_fires_in_training_and_that_of_the_prefix_does_not() -> None:
    model = freeze(make_tiny("bert"), 2)
    rest, cached = cache_frozen_layers(model, {"train": make_rows(16)})
    passes: list[torch.Tensor] = []

    class Look(Callback):
        def on_step(self, run) -> None:
            if run.step == 1:
                batch = make_batch(rest, cached["train"], np.arange(8), rest.model.device)
                batch.pop("labels")
                passes.extend(rest(**batch).logits.detach() for _ in range(2))

    fit(rest, cached, TrainSettings(num_epochs=1, batch_size=8), callbacks=[Look()])
    assert not torch.equal(*passes)


def test_beyond_the_bound_activations_are_mapped_from_disk_and_the_files_go_with_the_rows(tmp_path: Path) -> None:
    model, data = freeze(make_tiny("bert"), 2), make_data()
    rest, in_memory = cache_frozen_layers(model, data)
    assert not list(tmp_path.iterdir())
    rest, on_disk = cache_frozen_layers(model, data, max_memory_mib=0.01, folder=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    tokens = sum(len(row["input_ids"]) for rows in data.values() for row in rows)
    assert sum(path.stat().st_size for path in files) == tokens * WIDTH * 4
    for split in data:
        for ours, theirs in zip(in_memory[split], on_disk[split], strict=True):
            np.testing.assert_array_equal(ours["frozen_states"], theirs["frozen_states"])
    fit(rest, on_disk, TrainSettings(num_epochs=1))
    del on_disk, ours, theirs
    assert not list(tmp_path.iterdir())


def test_a_data_set_of_the_datasets_library_is_read_too_and_the_model_saves_as_usual(tmp_path: Path) -> None:
    model = freeze(make_tiny_bert(), 2)
    data = {name: datasets.Dataset.from_list(rows) for name, rows in make_data().items()}
    rest, cached = cache_frozen_layers(model.train(), data)
    assert model.training
    fit(rest, cached, TrainSettings(num_epochs=1))
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    ours, theirs = evaluate(rest, cached["validation"]), evaluate(loaded, data["validation"])
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-6)


def test_a_rest_resumes_from_a_checkpoint_without_the_weights_of_the_prefix(tmp_path: Path) -> None:
    settings, results = TrainSettings(num_epochs=3, batch_size=8), []

    class StopAt(Callback):
        steers = False

        def on_step(self, run) -> None:
            run.stop = run.step == 8

    for stops in ([], [StopAt()]):
        path = tmp_path / f"{len(stops)}.ckpt"
        for callbacks in [stops, []] if stops else [[]]:
            model = freeze(make_tiny("bert"), 2)
            rest, cached = cache_frozen_layers(model, make_data())
            fit(rest, cached, settings, callbacks=[Checkpoint(path, every=4), *callbacks])
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    names = rest.state_dict()
    assert not [name for name in names if "layer.0" in name or "word_embeddings" in name]
    assert [name for name in names if "layer.2" in name]


# What is refused ----------------------------------------------------------------------------------------------


def test_what_cannot_be_cached_is_refused() -> None:
    data = make_data()
    with pytest.raises(FeatureCacheError, match=r"The embeddings train \(bert\.embeddings\.word_embeddings\.weight\)"):
        cache_frozen_layers(make_tiny("bert"), data)
    with pytest.raises(FeatureCacheError, match=r"The embeddings train \(bert\.embeddings\.LayerNorm\.bias\)"):
        cache_frozen_layers(freeze(make_tiny("bert"), ["*.bias", "head"]), data)
    with pytest.raises(FeatureCacheError, match="There is nothing to train"):
        cache_frozen_layers(make_tiny("bert").requires_grad_(False), data)
    with pytest.raises(FeatureCacheError, match="encoder-decoder"):
        cache_frozen_layers(freeze(make_tiny("t5"), 1), data)
    with pytest.raises(FeatureCacheError, match="no input_ids"):
        cache_frozen_layers(
            freeze(make_tiny("vit"), 1), {"train": [{"pixel_values": np.zeros((3, 16, 16)), "labels": 0}]}
        )


def test_augmented_rows_are_refused() -> None:
    class Augmented(list):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "input_ids": [int.from_bytes(os.urandom(4)) % 60 for _ in row["input_ids"]]}

    model = freeze(make_tiny("bert"), 1)
    with pytest.raises(FeatureCacheError, match=r"'train' change at each reading \(augmentation\)"):
        cache_frozen_layers(model, {"train": Augmented(make_rows(9))})
    lazy = datasets.Dataset.from_list(make_rows(9)).with_transform(lambda rows: rows)
    with pytest.raises(FeatureCacheError, match=r"\(augmentation\)"):
        cache_frozen_layers(model, {"train": lazy})


def test_unfreezing_past_the_prefix_is_refused() -> None:
    model = freeze(make_tiny("bert"), 1)
    rest, cached = cache_frozen_layers(model, make_data())
    with pytest.raises(FreezingError, match="only one group is trainable"):
        fit(rest, cached, TrainSettings(num_epochs=2), callbacks=[GradualUnfreezing()])
    freeze(model, 2)
    with pytest.raises(FeatureCacheError, match="Some cached layers are trainable now"):
        fit(rest, cached, TrainSettings(num_epochs=1))
