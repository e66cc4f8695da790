"""Loading and saving: real weights for what a reader does, tiny random networks of many families for the rest."""

import copy
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import make_tiny_bert
from tiny_models import disturb
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MBartConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    TextClassificationPipeline,
    ViTConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

import ftkit
from ftkit.adapters.bottleneck import add_adapters, save_bottleneck
from ftkit.adapters.lora import add_lora, merge, save_adapter
from ftkit.data.assets.registry import fetch
from ftkit.errors import ModelError
from ftkit.models.device import choose_device
from ftkit.models.loading import load, load_classifier, load_language_model, save
from ftkit.models.modules import count_parameters

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SOURCES = sorted(Path(ftkit.__file__).parent.rglob("*.py"))
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "film", "to", "see", "again", "dull", "and", "long"]
TEXTS = ["a film to see again", "dull"]
SIZES = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GPT2 = SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(**SMALL),
    "distilbert": DistilBertConfig(**SIZES, dim=32, n_layers=2, n_heads=2, hidden_dim=48),
    "gpt2": GPT2Config(**GPT2),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "t5": T5Config(**SIZES, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "bart": BartConfig(
        **SIZES, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=2,
    ),
}  # fmt: skip


def make_tokenizer(**special: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in (tokens | special).items() if token}
    )


@pytest.fixture
def save_tiny(tmp_path: Path) -> Callable[..., Path]:
    """Save a network of that config, with random weights and no head, beside a tokenizer."""

    def save_it(config: PreTrainedConfig, **special: str | None) -> Path:
        folder = tmp_path / config.model_type
        torch.manual_seed(0)
        lm = AutoModelForCausalLM if config.model_type in {"gpt2", "llama", "roberta"} else AutoModel
        lm.from_config(config).save_pretrained(folder)
        make_tokenizer(**special).save_pretrained(folder)
        return folder

    return save_it


def logits_of(model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str] = TEXTS) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt").to(model.device)).logits


def head_of(model: nn.Module) -> torch.Tensor:
    return model.classifier.weight.detach().cpu()


# A real model -------------------------------------------------------------------------------------------------


def test_minilm_gets_a_new_head_and_keeps_all_weights_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_classifier("minilm", ["negative", "positive"])
    assert capsys.readouterr().out == ""
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert model.device.type == choose_device().device.type
    checkpoint = BertModel.from_pretrained(fetch("minilm")).state_dict()
    for name, weight in model.bert.state_dict().items():
        torch.testing.assert_close(weight.cpu(), checkpoint[name], rtol=0, atol=0)
    assert tokenizer.tokenize("An unwatchable film") == ["an", "un", "##watch", "##able", "film"]


def test_the_seed_sets_the_head_and_leaves_the_global_random_state_unchanged() -> None:
    before = torch.get_rng_state()
    heads = [head_of(load_classifier("minilm", 3, seed=seed)[0]) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (3, 384)


def test_from_scratch_is_the_same_architecture_with_seeded_weights(capsys: pytest.CaptureFixture[str]) -> None:
    tuned, _ = load_classifier("minilm", 2)
    capsys.readouterr()
    first, same, other = (load_classifier("minilm", 2, pretrained=False, seed=seed)[0] for seed in (0, 0, 1))
    assert capsys.readouterr().out == ""
    assert {n: w.shape for n, w in first.state_dict().items()} == {n: w.shape for n, w in tuned.state_dict().items()}
    layer = "bert.encoder.layer.3.output.dense.weight"
    weights = [model.state_dict()[layer] for model in (first, same, other, tuned)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert first.config.hidden_act == tuned.config.hidden_act
    assert not first.training


LOADING = """
import os
os.environ["FTKIT_OFFLINE"] = "1"
from transformers.utils import logging
logging.set_verbosity_info()
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
from ftkit.models.loading import load, load_classifier, save
model, tokenizer = load_classifier("minilm", 2)
load(save(model, tokenizer, {folder!r}))
load_classifier("minilm", 2, pretrained=False)
assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled()), before
"""


@pytest.mark.parametrize("bars", [None, "1"])
def test_loading_and_saving_print_nothing_and_restore_the_verbosity_of_transformers(
    tmp_path: Path, bars: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    if bars:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", bars)
    script = LOADING.format(folder=str(tmp_path / "saved"))
    done = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


# Families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_classifies_a_padded_batch_like_single_texts(family: str, save_tiny: Callable[..., Path]) -> None:
    model, tokenizer = load_classifier(save_tiny(FAMILIES[family]), ["bad", "good", "odd"])
    together = logits_of(model, tokenizer)
    assert together.shape == (2, 3)
    for row, text in zip(together, TEXTS, strict=True):
        torch.testing.assert_close(row, logits_of(model, tokenizer, [text])[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0, 0.37])
def test_dropout_is_set_everywhere(family: str, dropout: float, save_tiny: Callable[..., Path]) -> None:
    model, tokenizer = load_classifier(save_tiny(FAMILIES[family]), 2, dropout=dropout)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {dropout}
    # dropout inside the attention function, and dropped layers, show in the logits only
    expected = logits_of(model, tokenizer)
    torch.manual_seed(0)
    assert torch.equal(logits_of(model.train(), tokenizer), expected) == (dropout == 0)


def test_dropout_does_not_change_layerdrop(save_tiny: Callable[..., Path]) -> None:
    model, _ = load_classifier(save_tiny(FAMILIES["bart"]), 2, dropout=0.3)
    assert model.config.encoder_layerdrop == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_without_a_padding_token_pads_with_its_end_token(
    family: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    config = type(FAMILIES[family])(**(GPT2 if family == "gpt2" else SMALL) | {"pad_token_id": None})
    model, tokenizer = load_classifier(save_tiny(config, pad_token=None), 2)
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    for row, text in zip(logits_of(model, tokenizer), TEXTS, strict=True):
        torch.testing.assert_close(row, logits_of(model, tokenizer, [text])[0], atol=1e-6, rtol=1e-5)
    again, tokenizer_again = load(save(model, tokenizer, tmp_path / "saved"))
    assert again.config.pad_token_id == tokenizer_again.pad_token_id == 2


def test_weights_missing_below_the_head_are_named(
    save_tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(FAMILIES["bert"])
    BertModel(FAMILIES["bert"], add_pooling_layer=False).save_pretrained(folder)
    load_classifier(folder, 2)
    assert capsys.readouterr().out == (
        f"{folder}: 2 weights below the head are not in the checkpoint and start at random: "
        "bert.pooler.dense.bias, bert.pooler.dense.weight\n"
    )


def test_shared_parameters_are_counted_once_and_frozen_ones_not_as_trainable(save_tiny: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(FAMILIES["gpt2"]))
    assert model.lm_head.weight is model.transformer.wte.weight
    tied = len(WORDS) * 32
    trainable, total = count_parameters(model)
    assert trainable == total == sum(w.numel() for w in model.state_dict().values()) - tied
    model.transformer.wte.weight.requires_grad_(False)
    assert count_parameters(model) == (total - tied, total)


# Save and load ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_a_saved_model_loads_in_plain_transformers_with_identical_logits(
    family: str, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_classifier(save_tiny(FAMILIES[family]), ["good", "bad"], seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)  # as training would
    expected = logits_of(model, tokenizer).cpu()
    folder = save(model, tokenizer, tmp_path / "new" / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits_of(plain, AutoTokenizer.from_pretrained(folder)), expected)
    assert plain.config.id2label == {0: "good", 1: "bad"}

    capsys.readouterr()
    again, tokenizer_again = load(folder)
    assert capsys.readouterr().out == ""  # no head is new
    assert again.config.id2label == {0: "good", 1: "bad"}
    assert torch.equal(logits_of(again, tokenizer_again).cpu(), expected)

    more, _ = load_classifier(folder, 5)
    assert capsys.readouterr().out == f"{folder}: its head is for 2 classes, not 5: a new one replaces it\n"
    assert logits_of(more, tokenizer).shape == (2, 5)

    reordered, _ = load_classifier(folder, ["bad", "good"])
    assert capsys.readouterr().out == ""  # nothing to say: each class keeps its logit
    assert torch.equal(logits_of(reordered, tokenizer).cpu(), expected[:, [1, 0]])

    renamed, _ = load_classifier(folder, ["dull", "fine"])
    told = f"{folder}: its head is kept, its classes ['good', 'bad'] are now called ['dull', 'fine']\n"
    assert capsys.readouterr().out == told
    assert torch.equal(logits_of(renamed, tokenizer).cpu(), expected)


@pytest.mark.parametrize(
    ("problem", "outputs"), [("regression", 1), ("multi_label_classification", 3), ("single_label_classification", 3)]
)
def test_a_new_head_for_classes_does_not_inherit_the_problem_of_the_old_one(
    problem: str, outputs: int, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(BertConfig(**SMALL))
    config = BertConfig(**SMALL, num_labels=outputs, problem_type=problem)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    model, tokenizer = load_classifier(folder, ["bad", "good"])
    saved = save(disturb(model), tokenizer, tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(saved)
    scores = TextClassificationPipeline(model=plain, tokenizer=tokenizer)(TEXTS, top_k=None)
    expected = logits_of(model, tokenizer).softmax(-1)
    for row, wanted in zip(scores, expected, strict=True):
        assert {score["label"]: pytest.approx(score["score"], abs=1e-5) for score in row} == {
            "bad": wanted[0].item(), "good": wanted[1].item(),
        }  # fmt: skip
    assert "problem_type" not in json.loads((saved / "config.json").read_text())

    capsys.readouterr()
    kept, _ = load_classifier(folder, max(outputs, 2))
    told = capsys.readouterr().out
    assert kept.config.problem_type is None
    assert ("was trained for multi_label_classification: its classes now exclude each other" in told) == (
        problem == "multi_label_classification"
    )


@pytest.mark.parametrize("change", ["adapters", "lora", "the base of lora", "layer", "head"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_a_config_does_not_describe_is_not_saved(
    family: str, change: str, save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = load_classifier(save_tiny(FAMILIES[family]), 2)
    message = r"are not those that its config describes .*: save .*save_bottleneck\(\), .*save_adapter\(\)\.$"
    if change == "adapters":
        add_adapters(model, 4)
    elif change == "layer":
        model.base_model.extra = nn.Linear(2, 2)
    elif change == "head":
        name = "classifier" if family == "bert" else "score"
        setattr(model, name, nn.Linear(32, 3))
    else:
        adapted = add_lora(model)
        if change == "lora":
            model, message = (
                adapted,
                r"is not a plain .*: save its adapter with save_adapter\(\), or .*merge\(\) returns\.$",
            )
    with pytest.raises(ModelError, match=message) as caught:
        save(model, tokenizer, tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_a_network_around_a_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"A Sequential is not a plain transformers model: give save\(\) a model from"):
        save(nn.Sequential(make_tiny_bert()), make_tokenizer(), tmp_path / "saved")


def test_saving_leaves_the_global_random_state_unchanged(tmp_path: Path) -> None:
    model, before = make_tiny_bert(), torch.get_rng_state()
    save(model, make_tokenizer(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_and_an_adapter_do_not_share_a_folder(tmp_path: Path) -> None:
    adapted = disturb(add_lora(make_tiny_bert()))
    save_adapter(adapted, tmp_path / "adapter")
    with pytest.raises(ModelError, match="holds an adapter already: save the model in another folder"):
        save(merge(adapted), make_tokenizer(), tmp_path / "adapter")
    folder = save(merge(adapted), make_tokenizer(), tmp_path / "model")
    with pytest.raises(ModelError, match="holds a model already: save the adapter in another folder"):
        save_adapter(adapted, folder)
    adapted.save_pretrained(folder)  # as plain peft would
    with pytest.raises(ModelError, match=r"holds an adapter, not a model of its own: .*load_adapter\(\)"):
        load(folder)  # transformers would add the update a second time


@pytest.mark.parametrize("read", [load, lambda folder: load_classifier(folder, 2), load_language_model])
def test_a_folder_with_an_adapter_is_refused_by_what_loads_models(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    save_adapter(add_lora(make_tiny_bert()), tmp_path / "lora")
    save_bottleneck(add_adapters(make_tiny_bert(), 4), tmp_path / "bottleneck")
    for folder, call in [("lora", "load_adapter"), ("bottleneck", "load_bottleneck")]:
        with pytest.raises(
            ModelError, match=rf"holds an adapter, .*: load the model .*, and give both to {call}\(\)\.$"
        ):
            read(tmp_path / folder)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "bert.encoder.layer.0.output.dense.adapter.up.bias"
BIAS = "bert.pooler.dense.bias"
DAMAGES = {
    "more": (lambda weights: weights.update({KEY: torch.ones(32)}), rf"\(1 too many, such as {KEY}\)"),
    "fewer": (lambda weights: weights.pop(BIAS), rf"\(1 missing, such as {BIAS}\)"),
    "no head": (lambda weights: weights.pop("classifier.weight"), r"\(1 missing, such as classifier\.weight\)"),
    "other shape": (lambda weights: weights.update({BIAS: torch.ones(3)}), rf"\(1 missing, such as {BIAS}\)"),
    "renamed": (
        lambda weights: weights.update({"bert.pooler.dense.base_layer.bias": weights.pop(BIAS)}),
        rf"\(1 too many, such as .*base_layer\.bias and 1 missing, such as {BIAS}\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_with_other_weights_than_those_of_its_network_is_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    folder = save(make_tiny_bert(), make_tokenizer(), tmp_path)
    change_weights(folder, change)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_buffers_that_other_versions_of_transformers_saved_do_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = make_tiny_bert(), make_tokenizer()
    folder = save(model, tokenizer, tmp_path)
    buffers = ("embeddings.position_ids", "embeddings.token_type_ids", "encoder.rotary_emb.inv_freq")
    change_weights(folder, lambda weights: weights.update({f"bert.{name}": torch.arange(9)[None] for name in buffers}))
    assert torch.equal(logits_of(load(folder)[0], tokenizer), logits_of(model, tokenizer))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("headless", "key"), [(False, KEY), (True, KEY.removeprefix("bert."))])
def test_weights_that_a_new_classifier_leaves_out_are_named(
    headless: bool, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(make_tiny_bert(), make_tokenizer(), tmp_path)
    if headless:
        make_tiny_bert().bert.save_pretrained(folder)
    change_weights(folder, lambda weights: weights.update({key: torch.ones(32), "cls.predictions.bias": torch.ones(9)}))
    load_classifier(folder, 2, seed=3)
    said = capsys.readouterr().out
    assert f"{folder}: the network has no place for 1 of the checkpoint's weights: {key}\n" in said


def test_a_language_model_with_weights_of_adapters_is_not_called_a_model_of_another_kind(
    save_tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(FAMILIES["llama"])
    name = "model.layers.0.mlp.down_proj"
    change_weights(folder, lambda weights: weights.update({f"{name}.adapter.up.bias": torch.ones(32)}))
    capsys.readouterr()
    load_language_model(folder)
    assert f"no place for 1 of the checkpoint's weights: {name}.adapter.up.bias\n" in capsys.readouterr().out
    change_weights(folder, lambda w: w.update({f"{name}.base_layer.weight": w.pop(f"{name}.weight")}))
    with pytest.raises(ModelError, match=r"2 too many, .* and 1 missing, .*save_adapter\(\)"):
        load_language_model(folder)


def test_saving_over_the_folder_that_was_loaded_keeps_the_new_weights(tmp_path: Path) -> None:
    model, tokenizer = load(save(make_tiny_bert(), make_tokenizer(), tmp_path / "saved"))
    torch.nn.init.constant_(model.classifier.weight, 0.5)
    again, _ = load(save(model, tokenizer, tmp_path / "saved"))
    assert torch.equal(head_of(again), torch.full((2, 32), 0.5))


def test_a_folder_with_the_name_of_an_asset_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = load(save(make_tiny_bert(), make_tokenizer(), "minilm"))
    assert model.config.hidden_size == 32


def test_saving_to_the_path_of_a_file_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("")
    with pytest.raises(OSError, match="saved"):
        save(make_tiny_bert(), make_tokenizer(), tmp_path / "saved")


# Tokenizers that are a SentencePiece file -----------------------------------------------------------------------

MARKED = {"bos_piece": "[CLS]", "eos_piece": "[SEP]", "pad_piece": "[PAD]", "unk_piece": "[UNK]"}
PIECES: dict[str, tuple[PreTrainedConfig, str, dict[str, object]]] = {
    "deberta-v3": (
        DebertaV2Config(**SMALL), "spm.model", {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, **MARKED},
    ),
    "albert": (
        AlbertConfig(**SMALL), "spiece.model", {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, **MARKED},
    ),
    "xlnet": (
        XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=48), "spiece.model",
        {"pad_id": -1, "unk_id": 0, "control_symbols": "<cls>,<sep>,<pad>,<mask>"},
    ),
    "t5": (
        T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0), "spiece.model",
        {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    ),
    "mbart": (
        MBartConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48,
        ),
        "sentencepiece.bpe.model", {},
    ),
    "xlm-roberta": (XLMRobertaConfig(**SMALL | {"pad_token_id": 1}), "sentencepiece.bpe.model", {}),
}  # fmt: skip


def save_pieces(family: str, folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Save a tiny network beside a SentencePiece file only."""
    config, file, options = PIECES[family]
    config = copy.deepcopy(config)
    config.vocab_size = 200  # more than the pieces and the marks that a tokenizer adds
    AutoModel.from_config(config).save_pretrained(folder)
    texts = ["a film to see again", "dull and long", "the best film of the year", "it was long and very dull"] * 5
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=45, hard_vocab_limit=False, minloglevel=2,
        **options,
    )  # fmt: skip
    (folder / file).write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.mark.parametrize("family", PIECES)
def test_a_folder_with_only_a_sentencepiece_file_loads_and_is_saved(family: str, tmp_path: Path) -> None:
    pieces = save_pieces(family, tmp_path / "given")
    model, tokenizer = load_classifier(tmp_path / "given", 2)
    for text in [*TEXTS, "the film was very long"]:
        assert tokenizer.tokenize(text) == pieces.encode(text, out_type=str)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert set(ids) & set(tokenizer.all_special_ids)  # the network's own marks are added
    expected = logits_of(model, tokenizer)
    again, tokenizer_again = load(save(model, tokenizer, tmp_path / "saved"))
    assert torch.equal(logits_of(again, tokenizer_again), expected)


def test_a_damaged_sentencepiece_file_is_refused_for_what_it_is(tmp_path: Path) -> None:
    save_pieces("t5", tmp_path)
    file = tmp_path / "spiece.model"
    file.write_bytes(file.read_bytes()[:200])
    refuse(tmp_path, "can't be loaded .*its vocabulary file is damaged")


def test_a_package_that_is_missing_is_named(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(FAMILIES["bert"])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    for kind, package in [("mecab", "fugashi"), ("sudachi", "sudachipy"), ("jumanpp", "rhoknp")]:
        settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": kind}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        refuse(folder, rf"needs a package that is not installed \(.*{package}[^.]*\): install it with pip\.$")


# Errors -------------------------------------------------------------------------------------------------------


def refuse(source: str | Path, message: str, labels: object = 2, **options: object) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_classifier(source, labels, **options)
    assert "\n" not in str(caught.value)


def test_the_error_for_a_wrong_name_or_argument_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    refuse("minilmm", r"no model 'minilmm': give an asset \(minilm, smollm2\), a folder, or a hub id")
    refuse("movie-sentiment", "is of kind 'text-classification', not a text model: use minilm")
    refuse(tmp_path / "none" / "such", "There is no model '.*such'")
    refuse("minilm", "2 or more different labels, not .*: check the label column", labels=["all"])
    refuse("minilm", "2 or more different labels", labels=0)
    refuse("minilm", "2 or more different labels, not .'a', 'b', 'a'.", labels=["a", "b", "a"])
    refuse("minilm", r"dropout is 1\.5, not a probability .*try 0\.1", dropout=1.5)


def test_a_folder_without_a_complete_model_is_refused(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    advice = "give a folder that save"
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", advice)
    with pytest.raises(ModelError, match=r"no saved model in '.*empty'"):
        load(tmp_path / "empty")

    folder = save_tiny(FAMILIES["bert"])
    with pytest.raises(ModelError, match="no classification head: add one with load_classifier"):
        load(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuse(folder, advice)
    (folder / "model.safetensors").unlink()
    refuse(folder, f"no file named model.safetensors.*{advice}")
    (folder / "config.json").write_text("{")
    refuse(folder, f"not a valid JSON.*{advice}")
    with pytest.raises(ModelError, match="not a valid JSON"):
        load(folder)

    ViTConfig().save_pretrained(folder)
    refuse(folder, f"ViTConfig.*{advice}")


def test_a_model_without_a_tokenizer_or_padding_is_refused(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    make_tiny_bert().save_pretrained(tmp_path / "bare")
    refuse(tmp_path / "bare", "has no tokenizer: save")
    config = GPT2Config(**GPT2 | {"pad_token_id": None, "eos_token_id": None})
    refuse(save_tiny(config, pad_token=None, eos_token=None), "can't pad a batch: set its pad_token")


CODE = "from pathlib import Path\nPath(__file__).with_name('was-run').write_text('run')\n"


def test_code_that_comes_with_a_model_is_not_run_and_the_reader_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "own.py").write_text(CODE + "from transformers import PretrainedConfig as OwnConfig\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    refuse(tmp_path, "contains custom code")
    assert not (tmp_path / "was-run").exists()


def test_no_source_trusts_remote_code_or_unpickles() -> None:
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        assert not re.search(r"trust_remote_code(?!\": False)", text), source
        assert all("weights_only=True" in line for line in text.splitlines() if "torch.load(" in line), source


# The hub ------------------------------------------------------------------------------------------------------

HUB = """
import hashlib, http.server, json, os, threading, time
from pathlib import Path

FILES = Path({folder!r})

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        start, _, name = self.path.partition("/resolve/main/")
        known = "acme/tiny" in start
        body = b'{{"id": "acme/tiny"}}' if self.path == "/api/models/acme/tiny" else None
        if known and name and (FILES / name).is_file():
            body = (FILES / name).read_bytes()
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        else:
            self.send_header("ETag", hashlib.sha256(body).hexdigest())
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {{"HF_ENDPOINT": f"http://127.0.0.1:{{server.server_port}}", "HF_HUB_DISABLE_XET": "1"}}

from ftkit.errors import ModelError
from ftkit.models.loading import load_classifier

def load(name):
    try:
        load_classifier(name, 2)
        print("loaded")
    except ModelError as error:
        print(error)

load("acme/tiny")
load("acme/none")
load("acme/no good!")
server.shutdown()
server.server_close()
time.sleep = lambda _: print("waited")
load("acme/tiny")
load("acme/other")
os.environ["FTKIT_OFFLINE"] = "1"
load("acme/tiny")
load("acme/other")
"""


def test_a_hub_id_is_downloaded_once_and_a_missing_network_is_reported_at_once(
    tmp_path: Path, save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for variable in ("FTKIT_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    script = HUB.format(folder=str(save_tiny(FAMILIES["bert"])))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, none, bad, cached, other, cached_offline, other_offline = done.stdout.splitlines()
    assert first == cached == cached_offline == "loaded"
    assert none.startswith("The hub shows no model 'acme/none': check the name")
    assert bad.startswith("The hub shows no model 'acme/no good!': check the name")
    assert re.search(r"'acme/other' can't be loaded .*the hub did not answer .*: check the network", other)
    assert re.search(r"'acme/other' can't be loaded .*FTKIT_OFFLINE is set: unset it", other_offline)


# The device ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "bf16", "mps", "forced", "device", "precision", "why"),
    [
        (True, True, False, "", "cuda", "bf16", "Test GPU"),
        (True, False, False, "", "cuda", "fp16", "loss scaling"),
        (False, False, True, "", "mps", "fp32", "Apple"),
        (False, False, False, "", "cpu", "fp32", "no CUDA or MPS device found"),
        (True, True, True, "on", "cpu", "fp32", "ACCELERATE_USE_CPU is set"),
        (True, True, False, "0", "cuda", "bf16", "Test GPU"),
    ],
)
def test_the_best_device_is_chosen_and_the_reason_given(
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool,
    bf16: bool,
    mps: bool,
    forced: str,
    device: str,
    precision: str,
    why: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if forced:
        monkeypatch.setenv("ACCELERATE_USE_CPU", forced)
    chosen = choose_device()
    assert (chosen.device.type, chosen.precision) == (device, precision)
    assert why in str(chosen) == chosen.reason
    assert "\n" not in chosen.reason


@pytest.mark.parametrize(("threads", "said"), [(1, "cpu, 1 thread ("), (2, "cpu, 2 threads (")])
def test_the_number_of_threads_is_said(monkeypatch: pytest.MonkeyPatch, threads: int, said: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert choose_device().reason.startswith(said)


# Language models ----------------------------------------------------------------------------------------------


def test_smollm2_has_the_weights_that_transformers_loads_and_takes_half_of_their_memory() -> None:
    before = psutil.Process().memory_info().rss
    model, tokenizer = load_language_model("smollm2")
    grown = psutil.Process().memory_info().rss - before
    assert grown < 0.5 * 4 * count_parameters(model)[1]  # memory-mapped: weights not used yet are not in memory
    expected = AutoModelForCausalLM.from_pretrained(fetch("smollm2"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight.cpu(), expected.state_dict()[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())
    assert model.device.type == choose_device().device.type
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 8192)
    assert tokenizer.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_is_saved_and_loaded(
    family: str, save_tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = type(FAMILIES[family])(**(GPT2 if family == "gpt2" else SMALL) | {"pad_token_id": None})
    folder = save_tiny(config, pad_token=None)
    capsys.readouterr()
    model, tokenizer = load_language_model(folder)
    assert (tokenizer.pad_token, model.config.pad_token_id) == ("</s>", 2)
    assert tokenizer.model_max_length == (64 if family == "gpt2" else 2048)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    again, tokenizer = load_language_model(save(model, tokenizer, tmp_path / "saved"))
    assert torch.equal(logits_of(again, tokenizer), logits_of(model, tokenizer))
    assert tokenizer.padding_side == "right"
    assert "".join(capsys.readouterr()) == ""


def test_a_model_in_half_precision_becomes_float32(save_tiny: Callable[..., Path]) -> None:
    folder = save_tiny(FAMILIES["llama"])
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    model, _ = load_language_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_that_predicts_no_next_token_is_refused(save_tiny: Callable[..., Path], tmp_path: Path) -> None:
    def refuse(name: str | Path, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            load_language_model(name)

    masked = tmp_path / "masked"
    AutoModelForMaskedLM.from_config(FAMILIES["roberta"]).save_pretrained(masked)
    make_tokenizer().save_pretrained(masked)
    refuse("minilm", r"'minilm' \(BertModel\) was not trained to predict the next token: use smollm2")
    refuse(masked, r"\(RobertaForMaskedLM\) was not trained to predict the next token")
    refuse(save_tiny(FAMILIES["t5"]), "can't be loaded")
    refuse("nonsense", "There is no model 'nonsense'")
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(tmp_path / "bare")
    refuse(tmp_path / "bare", r"can't be loaded \(.*tokenizer.*\): give a folder that save")
