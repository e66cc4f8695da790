"""The typed settings of each notebook: one class a notebook, with a default per tier."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ftkit import TIERS


class NotebookSettings(BaseModel):
    """What all notebooks share: a tier picks the defaults, a value that is given wins.

    Attributes:
        DEFAULTS: values of each tier.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    tier: str = Field(description="the tier that the defaults are from")
    DEFAULTS: ClassVar[dict[str, dict[str, Any]]]

    @classmethod
    def at(cls, tier: str, **given: Any) -> Self:
        """The settings of a tier; a given value that is not None replaces its default.

        FTKIT_TIER overrides the tier: tools that execute notebooks but pass no parameters (nbval) choose it so.

        Raises:
            ValueError: no such tier, an unknown name, a value out of bounds.
        """
        tier = os.environ.get("FTKIT_TIER", tier)
        if tier not in TIERS:
            raise ValueError(f"There is no tier {tier!r}: it can be {', '.join(TIERS)}.")
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**cls.DEFAULTS[tier], **chosen, "tier": tier})

    @classmethod
    def from_cell(cls, namespace: Mapping[str, Any]) -> Self:
        """The settings of a notebook's `parameters` cell: called with ``globals()`` in the cell after it.

        Args:
            namespace: holds ``tier`` and, under the names of the settings, their values.

        Raises:
            ValueError: as for ``at``.
        """
        return cls.at(namespace["tier"], **{name: namespace.get(name) for name in cls.model_fields if name != "tier"})


class FullFineTuning(NotebookSettings):
    """Notebook 01."""

    model: str = Field(description="asset, hub id or folder")
    data: str = Field(description="asset, hub id, or your CSV, TSV, JSON Lines or Parquet file")
    text: str | None = Field(None, description="column with the texts; guessed if not named")
    label: str | None = Field(None, description="column with the labels; guessed if not named")
    rows: int = Field(ge=20, description="training rows of each seed")
    test_rows: int = Field(ge=20, description="rows that every score is measured on")
    lr: float = Field(gt=0, le=1, description="peak learning rate of full fine-tuning")
    scratch_lr: float = Field(gt=0, le=1, description="peak learning rate of the network with random weights")
    num_epochs: int = Field(ge=1, le=100, description="passes over the training rows")
    batch_size: int = Field(ge=1, le=1024, description="rows a step")
    max_length: int = Field(ge=8, le=8192, description="tokens kept of a text")
    seeds: list[int] = Field(min_length=1, description="each draws its own rows, weights and order")
    few_rows: list[int] = Field(min_length=1, description="training rows tried in the study of size")
    far_domains: list[str] = Field(description="sentiment assets that a tuned sentiment model is tried on")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds {seeds} repeat: a run that is counted twice narrows the interval")
        return seeds

    DEFAULTS: ClassVar = {
        "smoke": {
            "model": "minilm", "data": "movie-sentiment", "rows": 64, "test_rows": 100, "lr": 1e-4, "scratch_lr": 3e-4,
            "num_epochs": 1, "batch_size": 16, "max_length": 32, "seeds": [0],
            "few_rows": [20, 128], "far_domains": ["product-sentiment"],
        },
        "cpu": {
            "model": "minilm", "data": "movie-sentiment", "rows": 1000, "test_rows": 1000, "lr": 1e-4,
            "scratch_lr": 3e-4, "num_epochs": 2, "batch_size": 16, "max_length": 64,
            "seeds": [0, 1, 2], "few_rows": [50, 200, 2000],
            "far_domains": ["product-sentiment", "editorial-sentiment", "tweet-sentiment"],
        },
        "gpu": {
            "model": "google-bert/bert-base-uncased", "data": "movie-sentiment", "rows": 6000, "test_rows": 2000,
            "lr": 3e-5, "scratch_lr": 1e-4, "num_epochs": 3, "batch_size": 32, "max_length": 128,
            "seeds": [0, 1, 2, 3, 4], "few_rows": [50, 200, 2000],
            "far_domains": ["product-sentiment", "editorial-sentiment", "tweet-sentiment"],
        },
    }  # fmt: skip
