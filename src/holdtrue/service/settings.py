"""Where a service keeps its things and whom it listens to; read from ``HOLDTRUE_*`` variables and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from holdtrue.service.quotas import Limits

Role = Literal["all", "api", "dispatcher", "worker", "inference"]
MEBIBYTE = 2**20


class ServiceSettings(BaseSettings):
    """Settings of all roles; every one has a default that is right on a laptop.

    Attributes:
        home: local folder of the service: database, blobs, work of the workers.
        database_url: SQLAlchemy URL; empty means SQLite in ``home``.
        blob_url: fsspec URL of the object store; empty means the folder ``home/blobs``.
        host, port: where the API listens; any host but a loopback one needs ``behind_tls`` and real keys.
        inference_url: where the inference process listens; on this machine.
        inference_secret: what the API shows it.
        inference_engine: what answers in it.
        signing_key: path of an Ed25519 private key in PEM; when empty, one is made in ``home`` over SQLite, and no role
            that signs starts over a database that hosts share.
        lease_seconds: how long a worker may be silent before its job is taken over.
        upload_bytes: largest file, in bytes.
        limits: what a project may use unless it has limits of its own, as JSON.
        rate_limit_storage: where requests are counted, as a URL of the library ``limits``: memory is right for one API
            process, ``redis://…`` for several.
        threads: of torch in a worker and in the inference process; 0 leaves torch's default.
    """

    model_config = SettingsConfigDict(env_prefix="HOLDTRUE_", extra="ignore", frozen=True)

    home: Path = Field(default_factory=lambda: Path.home() / ".holdtrue")
    database_url: str = ""
    blob_url: str = ""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    behind_tls: bool = False
    inference_url: str = "http://127.0.0.1:8001"
    inference_secret: SecretStr = SecretStr("")
    inference_engine: Literal["transformers", "vllm"] = "transformers"
    signing_key: Path | None = None
    lease_seconds: float = Field(default=60.0, gt=0)
    upload_bytes: int = Field(default=512 * MEBIBYTE, gt=0)
    limits: Limits = Limits()
    rate_limit_storage: str = "memory://"
    threads: int = Field(default=0, ge=0)

    @property
    def database(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.database_url or f"sqlite:///{self.home.absolute() / 'service.db'}"

    @property
    def is_local(self) -> bool:
        """Whether the database is a file of this machine, which no other host shares."""
        return self.database.startswith("sqlite")

    @property
    def blobs(self) -> str:
        """The fsspec URL in force."""
        return self.blob_url or f"file://{self.home.absolute() / 'blobs'}"
