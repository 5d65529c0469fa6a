"""The wire: OpenAI's objects field for field, and what holdtrue adds, which is marked."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

Item = TypeVar("Item")
_MOST = 2**53 - 1

FilePurpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused"]
"""As OpenAI's, and ``paused``."""


def plain(text: str) -> str:
    """Refuse control characters, NUL above all: no name needs them, and stores and terminals stumble over them."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text):
        raise ValueError("control characters are not allowed")
    return text


Plain = Annotated[StrictStr, AfterValidator(plain)]


def storable(text: str) -> str:
    """Refuse what no database takes: NUL, and halves of a character."""
    if any(letter == "\0" or unicodedata.category(letter) == "Cs" for letter in text):
        raise ValueError("NUL and lone surrogates are not allowed")
    return text


class Answer(BaseModel):
    """Root of what is answered."""

    model_config = ConfigDict(extra="forbid")


class Request(BaseModel):
    """Root of what is asked: an unknown field is refused, so that nothing is believed to act that does not."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Page(Answer, Generic[Item]):
    """A page of a list. ``after=last_id`` asks for the next one."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileObject(Answer):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal[
        "assistants",
        "assistants_output",
        "batch",
        "batch_output",
        "evals",
        "fine-tune",
        "fine-tune-results",
        "vision",
        "user_data",
    ]
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None


class FileDeleted(Answer):
    """That a file was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool


class ExpiresAfter(Request):
    """When a file goes away by itself."""

    anchor: Literal["created_at"]
    seconds: StrictInt = Field(ge=3600, le=2_592_000)


class UploadCreate(Request):
    """A file that is going to come in parts."""

    bytes: StrictInt = Field(ge=1, le=_MOST)
    filename: StrictStr = Field(min_length=1, max_length=512)
    mime_type: Plain = Field(min_length=1, max_length=200)
    purpose: FilePurpose
    expires_after: ExpiresAfter | None = None


class UploadComplete(Request):
    """The parts of a file in their order, and its MD5 where the client knows it."""

    part_ids: list[Plain] = Field(min_length=1, max_length=10_000)
    md5: Annotated[StrictStr, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


class Upload(Answer):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class UploadPart(Answer):
    """One part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class Model(Answer):
    """A model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelDeleted(Answer):
    """That a model was deleted."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool


Count = Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=1_000_000)]
Factor = Literal["auto"] | Annotated[StrictFloat, Field(gt=0, le=1_000_000)]


class Hyperparameters(Request):
    """What a customer may set, each ``"auto"`` or a number within the policy's range."""

    batch_size: Count | None = None
    learning_rate_multiplier: Factor | None = None
    n_epochs: Count | None = None


class SupervisedMethod(Request):
    """Supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(Request):
    """How to tune; only ``supervised`` is done here."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(Request):
    """Where metrics go at Weights & Biases. Neither an address nor a key: both are the provider's."""

    project: Plain = Field(min_length=1, max_length=128)
    entity: Annotated[Plain, Field(max_length=128)] | None = None
    name: Annotated[Plain, Field(max_length=128)] | None = None
    tags: list[Annotated[Plain, Field(max_length=64)]] | None = Field(default=None, max_length=16)


class Integration(Request):
    """An integration; only W&B exists."""

    type: Literal["wandb"]
    wandb: Wandb


MetadataKey = Annotated[Plain, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[StrictStr, AfterValidator(storable), Field(max_length=512)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)]


class JobCreate(Request):
    """A fine-tuning job that is wished for."""

    model: Plain = Field(min_length=1, max_length=300)
    training_file: Plain = Field(min_length=1, max_length=64)
    validation_file: Annotated[Plain, Field(min_length=1, max_length=64)] | None = None
    hyperparameters: Hyperparameters | None = Field(default=None, deprecated=True)
    method: Method | None = None
    suffix: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None


class JobError(Answer):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class HyperparametersAnswer(Answer):
    """The hyperparameters in force: ``"auto"`` until the job's data are known."""

    batch_size: Literal["auto"] | int | None = None
    learning_rate_multiplier: Literal["auto"] | float | None = None
    n_epochs: Literal["auto"] | int | None = None


class SupervisedAnswer(Answer):
    """Supervised fine-tuning."""

    hyperparameters: HyperparametersAnswer


class MethodAnswer(Answer):
    """How a job tunes."""

    type: Literal["supervised"] = "supervised"
    dpo: None = None
    reinforcement: None = None
    supervised: SupervisedAnswer


class WandbAnswer(Answer):
    """Where metrics go."""

    project: str
    entity: str | None = None
    name: str | None = None
    tags: list[str] | None = None


class IntegrationAnswer(Answer):
    """An integration of a job."""

    type: Literal["wandb"] = "wandb"
    wandb: WandbAnswer


class FineTuningJob(Answer):
    """A fine-tuning job. ``status`` may be ``paused`` beside OpenAI's."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: HyperparametersAnswer
    integrations: list[IntegrationAnswer] | None
    metadata: dict[str, str] | None
    method: MethodAnswer
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None


class JobEvent(Answer):
    """What happened to a job. ``type`` may be ``moderation_checks`` beside OpenAI's: the gate's figures."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics", "moderation_checks"]
    data: dict[str, Any] | None


class CheckpointMetrics(BaseModel):
    """Figures at a checkpoint's step."""

    model_config = ConfigDict(extra="ignore")

    step: float | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class JobCheckpoint(Answer):
    """A checkpoint. ``usable`` is ours: whether it has passed a gate of its own and can be asked for as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int
    usable: StrictBool


def plain_query(text: str) -> str:
    """Return a query's text without NUL, which no database takes in a comparison and no stored text has."""
    return text.replace("\0", "�")
