"""What the server's own endpoints take and give. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Hard ceilings; the settings of a server lower them.
MOST_CHARS = 1_000_000
MOST_TOKENS = 65_536
_LIST = 64

# A NUL is no text that anybody means; lone surrogates pydantic refuses by itself.
Line = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=r"^[^\x00]+$")]
Key = Annotated[
    str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/ -]*$")
]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARS)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    """A body: no fields but those named, no numbers as text, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class InferRequest(Strict):
    """A text to continue, and how."""

    prompt: Prompt
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 50
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    seed: Seed | None = None
    use_knowledge: bool = True
    beliefs: Annotated[
        list[Key] | None,
        Field(max_length=1000, description="Keys or ids; null: those that the prompt is about."),
    ] = None
    min_confidence: Annotated[
        float | None, Field(ge=0, le=1, description="Below it nothing is written.")
    ] = None


class BaseInferRequest(Strict):
    """A text to continue without any belief."""

    prompt: Prompt
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 50
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    seed: Seed | None = None


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Source(BaseModel):
    """A belief that went into an answer; `score` is its similarity to the prompt, null where the
    client named it. `effect`: see `Provenance`."""

    id: str
    key: str
    version: int
    category: str
    score: float | None
    effect: float | None = None


class Provenance(BaseModel):
    """Where an answer comes from.

    `confidence` is calibrated, null where nothing was calibrated. `uncertain`: below the calibrated
    threshold, or nothing vouches for the answer. `effect` of a source, in nats: how far the first
    token's distribution moves when that belief alone is left out.
    """

    confidence: float | None
    uncertain: bool
    stale: bool
    components: dict[str, float]
    sources: list[Source]


class InferResponse(BaseModel):
    """A text with its provenance."""

    text: str
    finish_reason: Literal["stop", "length", "abstained"]
    usage: Usage
    provenance: Provenance
    layers: list[str]
    base_only: bool
    latency_ms: float
    base_digest: str
    store_revision: int
    request_id: str


class BeliefIn(Strict):
    """A fact to encode: `prompt` is a beginning that `answer` completes."""

    key: Key
    prompt: Line
    answer: Line
    aliases: Annotated[list[Line], Field(max_length=_LIST)] = []
    paraphrases: Annotated[list[Line], Field(max_length=_LIST)] = []
    unrelated: Annotated[list[Line], Field(max_length=_LIST)] = []
    source: Annotated[str, StringConstraints(max_length=2000)] = ""


class BeliefPatch(Strict):
    """Another answer to the same prompt."""

    answer: Line
    source: Annotated[str | None, StringConstraints(max_length=2000)] = None


class BeliefOut(BaseModel):
    """A belief of the store."""

    id: str
    key: str
    version: int
    category: str
    prompt: str | None
    answer: str | None
    aliases: list[str]
    paraphrases: list[str]
    source: str
    target_layers: list[str]
    parameters: int
    report: dict[str, Any]


class BeliefList(BaseModel):
    """Beliefs, and the revision of the store that they are of."""

    count: int
    revision: int
    beliefs: list[BeliefOut]


class Removed(BaseModel):
    """What is gone."""

    id: str
    key: str
    purged: bool
    revision: int


class DeltaSummary(BaseModel):
    """A belief's delta in short."""

    delta_id: str
    category: str
    description: str
    target_layers: list[str]
    param_count: int
    orthogonality_score: float | None
    confidence: float | None


class DeltaList(BaseModel):
    """All deltas."""

    count: int
    deltas: list[DeltaSummary]


class DeltaDetail(DeltaSummary):
    """A belief's delta; `incompatible_with` are ids that share more directions than allowed."""

    version: int
    delta_rank: int
    tags: list[str]
    composable_with: int
    incompatible_with: list[str]


class Capacity(BaseModel):
    """How many further deltas find directions that no other uses."""

    registered_deltas: int
    theoretical_max_per_layer: dict[str, int]
    per_layer_remaining: dict[str, int]
    total_remaining: int


class ConsolidateRequest(Strict):
    """Beliefs to merge into one: a category, or keys."""

    category: Key | None = None
    keys: Annotated[list[Key] | None, Field(min_length=2, max_length=1000)] = None
    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    dry_run: bool = False


class Consolidated(BaseModel):
    """What was merged, or would be."""

    dry_run: bool
    report: dict[str, Any]
    registry_count: int
    revision: int


class Health(BaseModel):
    """What the server is and whether its base is the pinned one."""

    status: Literal["ok", "damaged", "not_ready"]
    model: str
    model_loaded: bool
    base_digest: str
    base_hash_verified: bool
    verified_seconds_ago: float
    registry_count: int
    store_revision: int
    routing: Literal["calibrated", "by_name_only"]
    calibration_stale: bool
    waiting: int
    active: int
    version: str


class State(BaseModel):
    """A probe's answer."""

    status: str


class LogPage(BaseModel):
    """The newest entries of the provenance log, oldest first; `head` is where the file's chain
    ends."""

    entries: int
    head: dict[str, Any] | None
    log: list[dict[str, Any]]


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    code: str
    message: str
    type: str
    param: str | None = None
    request_id: str | None = None


class ErrorBody(BaseModel):
    """A refusal."""

    error: ErrorDetail
