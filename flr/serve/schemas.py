"""What comes in and what goes out. Requests are built from the settings, so that OpenAPI states the limits in force."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    create_model,
    model_validator,
)

from .settings import Settings

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_ATTRIBUTES = 8  # of a filter
_VALUES = 100  # of an attribute
_FIELDS = 100  # of a body; each that is unknown costs an error


def _bounded(body: Any) -> Any:
    if isinstance(body, dict) and len(body) > _FIELDS:
        raise ValueError(f"expected at most {_FIELDS} fields, got {len(body)}")
    return body


def request_models(settings: Settings) -> tuple[type[BaseModel], type[BaseModel]]:
    """Bodies of /v1/recommend and /v1/explain under these limits."""
    text = Annotated[str, Field(min_length=1, max_length=settings.max_text)]
    names = Annotated[list[text], Field(max_length=settings.max_filter)]
    value = StrictStr | StrictInt | StrictFloat | StrictBool
    where = Annotated[
        dict[Annotated[str, Field(max_length=200)], Annotated[list[value], Field(max_length=_VALUES)]],
        Field(max_length=_ATTRIBUTES),
    ]
    fields: dict[str, Any] = {
        "history": (
            Annotated[list[text], Field(max_length=settings.max_history)],
            Field(description="Item ids or titles, oldest first.", examples=[["item_3", "item_7"]]),
        ),
        "k": (int, Field(min(10, settings.max_k), ge=1, le=settings.max_k, description="Items to recommend.")),
        "num_beams": (
            int,
            Field(settings.num_beams, ge=1, le=settings.max_num_beams, description="At least k are used."),
        ),
        "scoring": (Literal["auto", "full", "catalogue"], Field(settings.scoring)),
        "exclude_seen": (bool, Field(False, description="Leave out the history's items.")),
        "allow": (names | None, Field(None, description="Only these items; a title stands for all that bear it.")),
        "deny": (names, Field(default_factory=list, description="None of these items.")),
        "where": (where, Field(default_factory=dict, description="Only items whose attribute has one of the values.")),
        "on_unknown": (Literal["raise", "skip"], Field("raise", description="Names that the catalogue lacks.")),
        "timeout_ms": (
            int,
            Field(settings.timeout_ms, ge=1, le=settings.timeout_ms, description="504 if it waits longer than that."),
        ),
    }
    shares: Any = (bool, Field(False, description="Add every factor's share; costs some forward passes."))
    same: dict[str, Any] = {
        "__config__": _STRICT,
        "__validators__": {"bounded": model_validator(mode="before")(_bounded)},
    }
    recommend = create_model("RecommendRequest", **same, shares=shares, **fields)
    explain = create_model("ExplainRequest", **same, **fields)
    return recommend, explain


class Item(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str


class RecommendedItem(Item):
    """A recommended item; the last three are empty where shares were not asked for or the model has no factors."""

    index: int = Field(description="In the catalogue, from 0.")
    score: float = Field(description="Log-probability.")
    factor_shares: list[float] = Field(
        description="Of the factors' influence on the score, or in a mixture their responsibilities; they sum to 1."
    )
    contributions: list[float] = Field(description="By how much each factor raised the score (Shapley values, nats).")
    base_score: float | None = Field(description="The score without any factor's part.")


class RecommendResponse(BaseModel):
    """Best first."""

    items: list[RecommendedItem]
    unknown: list[str] = Field(description="Names that were skipped.")
    generation: int = Field(description="Which load of the model answered, from 1.")
    request_id: str


class HistoryEntry(Item):
    """An entry of the history; used is false where it lies too far back for the prompt."""

    index: int
    used: bool


class ItemEffect(BaseModel):
    """What the K factors did to one item's score."""

    bars: list[tuple[float, float]] = Field(description="[K], left end and width, as shares of the axis.")
    times: list[str] = Field(description="[K], contributions in words: ×1.3 as likely.")
    total: float = Field(description="Sum of the contributions, nats.")
    total_times: str
    base_score: float
    score: float


class Effects(BaseModel):
    """Figures of the contributions, as the page shows them: stacked bars on an axis in nats."""

    ticks: list[float] = Field(description="Of the axis, evenly spaced, in nats.")
    zero: float = Field(description="Where 0 lies, as a share of the axis.")
    items: list[ItemEffect] = Field(description="One a recommendation.")
    notice: str = Field(description="Says so where the factors barely matter; else empty.")


class ExplainResponse(BaseModel):
    """N thoughts, T refinements, K factors, M history items."""

    variant: Literal["flr", "offsets", "latentr3", "anchor", "none"]
    aggregation: Literal["thought", "mixture"]
    num_factors: int
    history: list[HistoryEntry]
    unknown: list[str]
    attention: list[list[list[list[float]]]] = Field(description="[N][T][K][M], of a factor over the history's items.")
    gates: list[list[list[float]]] = Field(description="[N][T][K], sums to 1.")
    norms: list[list[float]] = Field(description="[N][K], length of a factor's part in input embeddings.")
    recommendations: list[RecommendedItem]
    effects: Effects | None = Field(description="None where no factor did anything to show.")
    generation: int
    request_id: str


class ItemsResponse(BaseModel):
    """A page of a search."""

    items: list[Item]
    total: int = Field(description="Hits, or at least so many where complete is false.")
    complete: bool


class InfoResponse(BaseModel):
    """What is served, for the page and for people."""

    version: str
    generation: int
    variant: str
    num_factors: int
    num_items: int
    codec: str
    max_history: int = Field(description="Longest history that is accepted.")
    used_history: int = Field(description="Latest entries that enter the prompt.")
    max_k: int
    scoring: str = Field(description="Where a request does not say.")
    attributes: list[str] = Field(description="What where may name.")
    examples: list[list[Item]]


class StatusResponse(BaseModel):
    """Of /health and /ready."""

    status: str


class ReloadResponse(BaseModel):
    """The generation that answers from now on."""

    generation: int
    num_items: int
    seconds: float


class Problem(BaseModel):
    """Any answer that is not 200."""

    error: str = Field(description="What went wrong, for people.")
    details: list[dict[str, Any]] = Field(
        description="Which parts of the request, where that is known: loc, msg, type."
    )
    request_id: str
