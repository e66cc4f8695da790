"""The settings of each notebook, with their bounds and their defaults at each tier."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from ftkit.lab.schema import Dataset, ImageModel, Images, Model, NotebookSettings, OwnFile, Source, setting
from ftkit.training.state import MAX_EPOCHS


def settings_of(notebook: str | Path) -> type[NotebookSettings] | None:
    """Settings class of a notebook, given by name or path; None for a notebook that is not part of the kit."""
    classes = [item for item in globals().values() if isinstance(item, type) and hasattr(item, "NOTEBOOK")]
    return next((cls for cls in classes if Path(notebook).stem == cls.NOTEBOOK), None)


# every recorded rate, 3e-5 to 0.1, stays a rate that `fit` takes
_LR_SCALES = (0.01, 10)


def _keep() -> Any:
    """Declare the setting ``keep``; each notebook that has it declares it last."""
    return setting("keep the model that is best on validation, in the run's folder", False)


class TextSettings(NotebookSettings):
    """Settings shared by the notebooks on text classification."""

    model: Model = setting("an asset, a hub id (owner/name) or a folder", "minilm", gpu="google-bert/bert-base-uncased")
    dataset: Dataset = setting("an asset or a hub id (owner/name)", "movie-sentiment")
    data: OwnFile | None = setting("your own file of texts instead (CSV, TSV, JSON, Parquet, Excel; .gz)", None)
    text: str | None = setting("column with the texts, guessed if None", None)
    label: str | None = setting("column with the labels, guessed if None", None)
    rows: int = setting(
        "training rows of each seed", 1000, smoke=64, gpu=6000, between=(2, 1_000_000), unit="rows", log=True
    )
    test_rows: int = setting(
        "test rows of every score",
        1000,
        smoke=100,
        gpu=2000,
        between=(2, 1_000_000),
        unit="rows",
        log=True,
    )
    max_length: int = setting(
        "maximum length of a text", 64, smoke=32, gpu=128, between=(8, 8192), unit="tokens", log=True
    )
    seed: int = setting("the first seed", 0, between=(0, 1_000_000))
    num_seeds: int = setting(
        "seeds; each draws its own rows, weights and order", 3, smoke=1, gpu=5, between=(1, 100), unit="seeds"
    )

    @property
    def source(self) -> str:
        """The reader's own file if there is one, else the data set."""
        return self.data or self.dataset


class TrainedText(TextSettings):
    """Settings shared by the notebooks that compare ways to train a text classifier."""

    lr: float = setting("peak learning rate", 1e-4, gpu=3e-5, between=(1e-7, 1), log=True)
    schedule: Literal["linear", "cosine", "constant"] = setting("learning rate after warm-up", "linear")
    warmup: float = setting("share of the steps in which the rate rises from 0", 0.1, between=(0, 0.9))
    num_epochs: int = setting("passes over the training rows", 2, smoke=1, gpu=3, between=(1, 100), unit="epochs")
    batch_size: int = setting("rows per step", 16, gpu=32, between=(1, 1024), unit="rows", log=True)
    keep_best: bool = setting("keep the weights of the best epoch on validation", True)


class FullFineTuning(TrainedText):
    """Settings of notebook 01, full fine-tuning."""

    NOTEBOOK: ClassVar = "01_full_fine_tuning"
    PANEL: ClassVar = (
        "lr", "pretrained", "schedule", "warmup", "rows", "num_epochs", "batch_size", "keep_best", "seed", "num_seeds",
    )  # fmt: skip

    seed: int = setting("the first seed; the record has 0 to 4", 5, between=(0, 1_000_000))
    pretrained: bool = setting("start from the pretrained weights; if not, from random ones", True)
    scratch_lr: float = setting("peak learning rate from random weights", 1e-4, between=(1e-7, 1), log=True)
    scratch_seeds: int = setting("seeds of the network from scratch; the record has five", 1, between=(1, 100))
    live_rates: list[float] = setting(
        "rates trained live, next to the study", [1e-5, 1e-2], gpu=[1e-6, 1e-3], between=(1e-7, 1)
    )
    few_rows: int = setting(
        "training rows of the run that overfits", 200, smoke=32, between=(2, 1_000_000), unit="rows", log=True
    )
    many_epochs: int = setting("its passes over them", 12, smoke=3, between=(1, 100), unit="epochs")
    keep: bool = _keep()


class RowsAndDomains(TrainedText):
    """Settings of the notebook that goes deeper into full fine-tuning."""

    NOTEBOOK: ClassVar = "01_rows_and_domains"
    PANEL: ClassVar = ()  # it has no control panel

    seed: int = setting("the first seed; the record has 0 to 4", 5, between=(0, 1_000_000))
    live_rows: list[int] = setting(
        "rows trained live, next to the study", [100, 500], smoke=[20], gpu=[500, 2000], between=(2, 1_000_000)
    )
    far_domains: list[Dataset] = setting(
        "other sentiment data that the tuned model is tested on",
        ["product-sentiment", "editorial-sentiment", "tweet-sentiment"],
        smoke=["product-sentiment"],
    )


class Freezing(TrainedText):
    """Settings of notebook 02, freezing."""

    NOTEBOOK: ClassVar = "02_freezing"
    PANEL: ClassVar = (
        "method", "lr", "groups", "decay", "schedule", "warmup", "rows", "num_epochs", "batch_size", "keep_best",
        "seed", "num_seeds",
    )  # fmt: skip

    rows: int = setting(
        "training rows of each seed", 400, smoke=64, gpu=4000, between=(2, 1_000_000), unit="rows", log=True
    )
    seed: int = setting("the first seed; the record has 0 to 4", 5, between=(0, 1_000_000))
    lr: float = setting("peak learning rate of the panel's runs", 3e-4, gpu=1e-4, between=(1e-7, 1), log=True)
    num_epochs: int = setting("passes over the training rows", 3, smoke=2, between=(1, 100), unit="epochs")
    method: Literal["linear_probe", "last_1", "last_2", "last_4", "full", "gradual", "llrd"] = setting(
        "what the panel trains", "last_2"
    )
    groups: int = setting(
        "layer groups that gradual unfreezing adds each epoch", 3, smoke=4, between=(1, 100), unit="groups"
    )
    decay: float = setting("llrd: rate of a layer divided by that of the layer above", 0.7, between=(0.05, 1))
    lr_scale: float = setting(
        "factor on the best recorded rate of each method", 1.0, gpu=0.3, between=_LR_SCALES, log=True
    )
    keep: bool = _keep()


class Adapters(TrainedText):
    """Settings of notebook 03, LoRA and adapters."""

    NOTEBOOK: ClassVar = "03_lora_and_adapters"
    PANEL: ClassVar = (
        "method", "lr", "rank", "alpha", "targets", "width", "rows", "num_epochs", "batch_size", "keep_best", "seed",
        "num_seeds",
    )  # fmt: skip

    rows: int = setting(
        "training rows of each seed", 400, smoke=64, gpu=4000, between=(2, 1_000_000), unit="rows", log=True
    )
    test_rows: int = setting(  # from 10: the lesson looks at eight of them
        "test rows of every score", 1000, smoke=100, gpu=2000, between=(10, 1_000_000), unit="rows", log=True
    )
    seed: int = setting("the first seed; the record has 0 to 4", 5, between=(0, 1_000_000))
    lr: float = setting("peak learning rate of the panel's runs", 1e-3, gpu=3e-4, between=(1e-7, 1), log=True)
    num_epochs: int = setting("passes over the training rows", 3, smoke=2, between=(1, 100), unit="epochs")
    method: Literal["bitfit", "ia3", "lora", "adapter", "full"] = setting("what the panel trains", "lora")
    rank: int = setting("rank of LoRA's update", 8, between=(1, 256), log=True)
    alpha: float = setting("LoRA's update is scaled by alpha / rank", 16.0, between=(0.1, 1024), log=True)
    targets: Literal["query-value", "all-linear"] = setting("the layers that LoRA adapts", "query-value")
    width: int = setting("width of a bottleneck adapter", 16, between=(1, 1024), unit="units", log=True)
    lr_scale: float = setting(
        "factor on the best recorded rate of each method", 1.0, gpu=0.3, between=_LR_SCALES, log=True
    )
    second_dataset: Dataset = setting("data set of the second task's adapter", "bbc-topics")
    keep: bool = _keep()


class Prompting(TextSettings):
    """Settings of notebook 04, prompt learning."""

    NOTEBOOK: ClassVar = "04_prompt_learning"
    PANEL: ClassVar = (
        "method", "template", "lr", "num_tokens", "rank", "rows", "steps", "batch_size", "seed", "num_seeds",
    )  # fmt: skip

    model: Model = setting(
        "a causal language model: an asset, a hub id or a folder", "smollm2", gpu="HuggingFaceTB/SmolLM2-1.7B-Instruct"
    )
    encoder: Model = setting(
        "encoder for full fine-tuning, as a comparison", "minilm", gpu="google-bert/bert-base-uncased"
    )
    rows: int = setting("labelled training rows", 128, smoke=16, between=(2, 1_000_000), log=True)
    test_rows: int = setting(  # from 10: the lesson picks a template on eight of them
        "test rows of every score", 200, smoke=16, gpu=1000, between=(10, 1_000_000), unit="rows", log=True
    )
    seed: int = setting("the first seed; the record has 0 to 2", 5, between=(0, 1_000_000))
    num_seeds: int = setting("seeds; each draws its own rows", 1, gpu=3, between=(1, 100), unit="seeds")
    template: Literal["heading", "rating", "question", "instruction", "cloze"] = setting(
        "prompt template used in training", "heading"
    )
    examples: int = setting("solved examples in a few-shot prompt", 8, smoke=2, between=(1, 64), unit="examples")
    method: Literal["prompt_tuning", "prefix_tuning", "p_tuning", "lora", "encoder_full", "few_shot", "calibrated"] = (
        setting("what the panel trains or scores", "prompt_tuning")
    )
    lr: float = setting("peak learning rate of the panel's runs", 1e-2, between=(1e-7, 1), log=True)
    num_tokens: int = setting("vectors in front of the text", 8, between=(1, 100), unit="tokens")
    rank: int = setting("rank of LoRA's update", 8, between=(1, 256), log=True)
    steps: int = setting(
        "approximate optimiser steps; four times as many for the encoder",
        50,
        smoke=2,
        between=(1, 100_000),
        unit="steps",
        log=True,
    )
    batch_size: int = setting("rows per step", 8, between=(1, 1024), unit="rows", log=True)
    keep: bool = _keep()

    @model_validator(mode="after")
    def _fit_takes_all_steps(self) -> Self:
        """Refuse what the lesson would turn into more passes over the rows than `fit` takes."""
        epochs = max(1, round(4 * self.steps * self.batch_size / self.rows))  # of the encoder, in the lesson
        if epochs > MAX_EPOCHS:
            raise ValueError(
                f"steps={self.steps} with batch_size={self.batch_size} and rows={self.rows} is not allowed: the "
                f"encoder would pass over the rows {epochs:,} times, and {MAX_EPOCHS:,} is the most: give fewer steps, "
                "smaller batches or more rows."
            )
        return self


class Continual(NotebookSettings):
    """Settings of notebook 05, catastrophic forgetting."""

    NOTEBOOK: ClassVar = "05_catastrophic_forgetting"
    PANEL: ClassVar = (
        "sequence", "strategy", "strength", "buffer", "rank", "lr", "rows", "num_epochs", "batch_size", "seed",
        "num_seeds",
    )  # fmt: skip

    model: Model = setting("an asset, a hub id (owner/name) or a folder", "minilm", gpu="google-bert/bert-base-uncased")
    sequence: Literal["tasks", "domains", "classes"] = setting(
        "each task has a head, domains share one, classes come in parts", "tasks"
    )
    sources: list[Source] = setting("what is learned: assets, hub ids or files; [] for the default", [])
    reverse: bool = setting("learn it in the reverse order", False)
    rows: int = setting(
        "training rows of each task", 300, smoke=24, gpu=2000, between=(2, 1_000_000), unit="rows", log=True
    )
    test_rows: int = setting(
        "test rows of each task", 200, smoke=32, gpu=1000, between=(2, 1_000_000), unit="rows",
        log=True,
    )  # fmt: skip
    max_length: int = setting(
        "maximum length of a text", 32, smoke=16, gpu=128, between=(8, 8192), unit="tokens", log=True
    )
    seed: int = setting("the first seed; the record has 0 to 2", 5, between=(0, 1_000_000))
    num_seeds: int = setting(
        "seeds; each draws its own rows, weights and order", 1, gpu=3, between=(1, 100), unit="seeds"
    )
    strategy: Literal[
        "naive", "joint", "frozen", "low_rate", "l2sp", "ewc", "lwf", "replay", "replay_distillation", "lora",
        "lora_per_task", "wise_ft",
    ] = setting("what is done against forgetting", "ewc")  # fmt: skip
    strength: float = setting(
        "strength of low_rate, l2sp, ewc, lwf, wise_ft; scales differ", 1e4, between=(1e-3, 1e7), log=True
    )
    buffer: int = setting("rows in the replay buffer", 100, smoke=8, between=(1, 1_000_000), unit="rows", log=True)
    rank: int = setting("rank of the LoRA strategies", 8, between=(1, 256), log=True)
    lr: float = setting("peak learning rate", 3e-4, gpu=5e-5, between=(1e-7, 1), log=True)
    num_epochs: int = setting("passes over the rows of a task", 2, smoke=1, between=(1, 100), unit="epochs")
    batch_size: int = setting("rows per step", 16, gpu=32, between=(1, 1024), unit="rows", log=True)


class Contrastive(NotebookSettings):
    """Settings of notebook 06, the CLIP loss."""

    NOTEBOOK: ClassVar = "06_clip_loss"
    PANEL: ClassVar = (
        "method", "loss", "head", "dim", "temperature", "learn_temperature", "augment", "lr", "batch_size",
        "num_epochs", "seed", "num_seeds",
    )  # fmt: skip

    text_model: Model = setting("the text tower: an asset, a hub id or a folder", "minilm")
    image_model: ImageModel = setting("the image tower: efficientnet-lite0, a hub id or a folder", "efficientnet-lite0")
    images: Images = setting("emoji, a folder of images with a CSV of captions, or a hub id", "emoji")
    captions: OwnFile | None = setting("the CSV of a folder's captions; None for the only one in it", None)
    # from 32: the lesson compares batches of several sizes, the smallest of 16 pairs
    rows: int | None = setting("training pairs; None for all", None, smoke=96, between=(32, 10_000_000))
    test_rows: int = setting(
        "images to search in, never used in training", 300, smoke=64, gpu=1000, between=(8, 100_000),
        unit="images",
    )  # fmt: skip
    size: int = setting("width and height of an image", 128, smoke=64, gpu=224, between=(32, 1024), unit="pixels")
    method: Literal["heads_only", "locked_image", "both", "from_scratch"] = setting("what is trained", "heads_only")
    loss: Literal["clip", "siglip", "one_line"] = setting("loss of a batch of pairs", "clip")
    head: Literal["linear", "mlp"] = setting("projection head on each tower", "linear")
    dim: int = setting("width of the common space", 128, between=(2, 4096), log=True)
    temperature: float = setting("temperature at the start of training", 0.07, between=(0.01, 1), log=True)
    learn_temperature: bool = setting("whether training changes the temperature", True)
    augment: bool = setting("turn, shift and scale the training images", False)
    lr: float = setting("peak learning rate of the panel's runs", 1e-3, between=(1e-7, 1), log=True)
    num_epochs: int = setting(
        "passes over the training pairs", 15, smoke=6, between=(1, 250), times=4, unit="epochs"
    )  # once, the lesson trains four times as long
    batch_size: int = setting("pairs per step, each other's negatives", 64, gpu=256, between=(2, 4096), log=True)
    seed: int = setting("the first seed; the record has 0 to 2", 5, between=(0, 1_000_000))
    num_seeds: int = setting("seeds; each draws its own weights and order", 1, gpu=3, between=(1, 100), unit="seeds")
    keep: bool = _keep()
