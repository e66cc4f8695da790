"""Encoders compared with what transformers computes from the same weights."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import VOCABULARY, make_word_tokenizer
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ftkit.contrastive.rows import encode_pairs
from ftkit.contrastive.towers import TwoTowers
from ftkit.data.assets.registry import fetch
from ftkit.data.pairs import Pairs
from ftkit.errors import ModelError
from ftkit.models.encoders import load_clip, load_image_encoder, load_text_encoder

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BODY |= {"initializer_range": 0.3}  # large enough for every weight to change the output
TEXT = {**BODY, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VIT = {**BODY, "image_size": 16, "patch_size": 4}
TEXTS = ["w3 w4 w5 w6 w7 </s>", "w8 w9 </s>"]


def make_images(size: int = 16) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def save_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(**TEXT, **TOKENS)).save_pretrained(folder)
    make_word_tokenizer().save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    text = CLIPTextConfig(**TEXT, **TOKENS, projection_dim=12)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**VIT).to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    make_word_tokenizer().save_pretrained(folder)
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def test_minilm_gives_the_mean_over_tokens() -> None:
    encoder = load_text_encoder("minilm")
    texts = ["a film to see again", "dull", "neither good nor bad, though rather long"]
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = encoder(**batch)
        network = AutoModel.from_pretrained(fetch("minilm")).eval()
        tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
        for vector, text in zip(vectors, texts, strict=True):  # one at a time, so without padding
            states = network(**tokenizer(text, return_tensors="pt")).last_hidden_state
            assert torch.allclose(vector, states[0].mean(0), atol=1e-5)
    assert encoder.width == vectors.shape[1] == 384
    assert not encoder.training
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]


def test_padding_does_not_change_a_vector(tmp_path: Path) -> None:
    encoder = load_text_encoder(save_bert(tmp_path))
    alone = encoder.tokenizer(TEXTS[1:], return_tensors="pt")
    padded = encoder.tokenizer(TEXTS[1:], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        vector = encoder(**alone)
        assert torch.allclose(encoder(**padded), vector, atol=1e-5)
        assert torch.allclose(encoder(alone["input_ids"]), vector, atol=1e-5)
        assert not torch.allclose(encoder(padded["input_ids"]), vector, atol=1e-2)


def test_siglip_pads_texts_to_its_window_in_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = SiglipConfig(text_config={**TEXT, **TOKENS}, vision_config=VIT)
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    make_word_tokenizer().save_pretrained(tmp_path)
    towers = TwoTowers(load_text_encoder(tmp_path), load_image_encoder(tmp_path), dim=8)
    assert (towers.text.pooling, towers.text.window) == ("pooler", 16)
    padded = towers.text.tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_model(input_ids=padded["input_ids"]).pooler_output
        ours = towers.text(**towers.text.tokenize(TEXTS, 12, return_tensors="pt"))
        torch.testing.assert_close(ours, expected)
        head = F.normalize(towers.text_head(expected), dim=-1)
    assert (head[0] - head[1]).norm() > 0.01
    pairs = Pairs(np.zeros((2, 16, 16, 3), dtype=np.uint8), TEXTS, pd.DataFrame(index=range(2)))
    rows = encode_pairs({"test": pairs}, towers, max_length=12)["test"]
    for size in (1, 2):
        torch.testing.assert_close(towers.encode(rows, batch_size=size)[0], head)
        torch.testing.assert_close(towers.encode_texts(TEXTS, batch_size=size), head)


def test_every_weight_of_a_text_encoder_gets_a_gradient(tmp_path: Path) -> None:
    encoder = load_text_encoder(save_bert(tmp_path))
    encoder(**encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_of_an_encoder_decoder_the_encoder_is_used(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2
    )
    T5Model(config).save_pretrained(tmp_path)
    make_word_tokenizer().save_pretrained(tmp_path)
    encoder = load_text_encoder(tmp_path)
    batch = encoder.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        expected = T5Model.from_pretrained(tmp_path).eval().encoder(**batch).last_hidden_state.mean(1)
        assert torch.allclose(encoder(**batch), expected, atol=1e-5)


def test_a_random_text_encoder_depends_on_the_seed_and_dropout_is_set(tmp_path: Path) -> None:
    folder = save_bert(tmp_path)
    one, same, other = (load_text_encoder(folder, pretrained=False, dropout=0.3, seed=seed) for seed in (1, 1, 2))
    first, second, third = (encoder.network.embeddings.word_embeddings.weight for encoder in (one, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, load_text_encoder(folder).network.embeddings.word_embeddings.weight)
    assert {module.p for module in one.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


def test_efficientnet_accepts_any_size() -> None:
    encoder = load_image_encoder("efficientnet-lite0")
    assert (encoder.size, encoder.width) == (None, 1280)
    assert encoder.mean == pytest.approx((127 / 255,) * 3)
    assert encoder.std == pytest.approx((128 / 255,) * 3)
    with torch.no_grad():
        assert encoder(make_images(64)).shape == encoder(make_images(96)).shape == (3, 1280)
        assert torch.equal(encoder(make_images(64)), encoder.network(make_images(64)))
    random = load_image_encoder("efficientnet-lite0", pretrained=False)
    assert not torch.equal(random.network.head.weight, encoder.network.head.weight)


def test_small_vit_gives_the_mean_over_patches() -> None:
    encoder = load_image_encoder("small-vit", size=64, seed=1)
    assert (encoder.size, encoder.width, encoder.mean, encoder.std) == (64, 128, (0.5,) * 3, (0.5,) * 3)
    images = make_images(64).requires_grad_()
    vectors = encoder(images)
    assert torch.allclose(vectors, encoder.network(images).last_hidden_state[:, 1:].mean(1))
    vectors.square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    same, other = (load_image_encoder("small-vit", size=64, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        assert torch.equal(same(images), vectors)
        assert not torch.allclose(other(images), vectors)


def test_a_vision_model_gives_its_pooler_output(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    assert (encoder.size, encoder.width, encoder.mean, encoder.std) == (16, 16, (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        expected = ViTModel.from_pretrained(tmp_path).eval()(make_images()).pooler_output
        assert torch.allclose(encoder(make_images()), expected, atol=1e-6)


def test_a_pooler_that_is_not_in_the_checkpoint_is_not_used(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    with torch.no_grad():
        states = ViTForImageClassification.from_pretrained(tmp_path).eval().vit(make_images()).last_hidden_state
        assert torch.allclose(encoder(make_images()), states[:, 1:].mean(1), atol=1e-6)


def test_a_convolutional_model_of_transformers_gives_flat_vectors(tmp_path: Path) -> None:
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])).save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    assert (encoder.size, encoder.width) == (None, 12)
    with torch.no_grad():
        assert encoder(make_images(32)).shape == (3, 12)


def test_the_parts_of_clip_reproduce_its_logits(tmp_path: Path) -> None:
    texts, images, text_projection, image_projection, scale = load_clip(save_clip(tmp_path))
    batch = texts.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = torch.nn.functional.normalize(text_projection(texts(**batch)), dim=-1)
        image = torch.nn.functional.normalize(image_projection(images(make_images())), dim=-1)
        model = CLIPModel.from_pretrained(tmp_path).eval()
        expected = model(pixel_values=make_images(), **batch).logits_per_image
        actual = torch.tensor(scale).exp() * image @ text.T
    assert torch.allclose(actual, expected, atol=1e-4)
    assert expected.std() > 0.1  # otherwise any logits would pass
    assert (images.size, images.mean, images.std) == (16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_each_encoder_of_clip_loads_alone(tmp_path: Path) -> None:
    texts, images, *_ = load_clip(save_clip(tmp_path))
    batch = texts.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(load_text_encoder(tmp_path)(**batch), texts(**batch))
        assert torch.equal(load_image_encoder(tmp_path)(make_images()), images(make_images()))
    assert texts.pooling == "pooler"


def test_a_model_without_normalisation_has_mean_0_and_std_1(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    encoder = load_image_encoder(tmp_path)
    assert (encoder.mean, encoder.std) == ((0.0,) * 3, (1.0,) * 3)


def test_the_wrong_kind_of_encoder_is_refused(tmp_path: Path) -> None:
    bert, vit = save_bert(tmp_path / "bert"), tmp_path / "vit"
    ViTModel(ViTConfig(**VIT)).save_pretrained(vit)
    with pytest.raises(ModelError, match=r"bert.*reads input_ids.*image encoder.*efficientnet-lite0"):
        load_image_encoder(bert)
    with pytest.raises(ModelError, match=r"vit.*reads pixel_values.*text encoder.*minilm"):
        load_text_encoder(vit)
    with pytest.raises(ModelError, match="family bert, not clip"):
        load_clip(bert)
    with pytest.raises(ModelError, match=r"'minilm' is of kind 'text-encoder', not an image encoder: use efficientnet"):
        load_image_encoder("minilm")
    with pytest.raises(
        ModelError, match=r"'efficientnet-lite0' is of kind 'image-encoder', not a text encoder: use minilm"
    ):
        load_text_encoder("efficientnet-lite0")


def test_the_error_of_a_failed_load_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTKIT_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"no model 'minilmm'.*minilm"):
        load_text_encoder("minilmm")
    with pytest.raises(ModelError, match=r"no model 'resnet'.*efficientnet-lite0"):
        load_image_encoder("resnet")
    with pytest.raises(ModelError, match=r"FTKIT_OFFLINE is set.*efficientnet-lite0"):
        load_image_encoder("someone/nothing-here")
    with pytest.raises(ModelError, match="FTKIT_OFFLINE is set"):
        load_clip("someone/nothing-here")
    with pytest.raises(ModelError, match=r"The dropout is 1\.5"):
        load_text_encoder("minilm", dropout=1.5)
    with pytest.raises(ModelError, match="A size of 100 pixels"):
        load_image_encoder("small-vit", size=100)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="can't be loaded"):
        load_image_encoder(tmp_path / "empty")


def test_a_checkpoint_without_its_encoder_is_refused(tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**VIT))
    state = {name: weight for name, weight in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="lacks 16 weights of its encoder"):
        load_image_encoder(tmp_path)
