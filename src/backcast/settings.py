"""Every setting of every process: one model, unknown keys refused, read at the composition root only.

Sources, later ones win: defaults, the YAML file named by `BACKCAST_CONFIG`, environment variables
(`BACKCAST_WORKER__SLOTS=20`; two underscores go one level down; an empty one is not set, and `none` means no value
where a setting may have none). Secrets belong in the environment.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from backcast import database_urls
from backcast.errors import ConfigurationError, did_you_mean
from backcast.variables import CONFIG_VARIABLE, KEY_VARIABLE, URL_VARIABLE

PREFIX = "BACKCAST_"


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _cache_folder() -> Path:
    """As the XDG Base Directory Specification has it; a user without a home has the folder for temporary files."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir())


def _seconds(value: Any) -> Any:
    """Convert a number that the environment gives as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Duration = Annotated[timedelta, BeforeValidator(_seconds), Field(ge=timedelta(0), le=timedelta(days=36_500))]
"""Seconds, or ISO 8601 (`PT15S`); a hundred years at most, so that the time before or after it can be computed. The
bounds come last: before the validator they would take the place of a field's own."""


def _host(value: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[^\s:/?#@*\[\]]+|\[?[0-9A-Fa-f:.]+\]?", value):
        raise ValueError("a host name is wanted, without scheme, port and path")
    return value.lower().strip("[]")


def _origin(value: str) -> str:
    if not re.fullmatch(r"\*|https?://[^\s/?#@*]+/?", value, re.IGNORECASE):
        raise ValueError("an origin is wanted, such as https://app.example.org")
    return value.lower().removesuffix("/")


def _database_url(value: SecretStr) -> SecretStr:
    database_urls.check(value.get_secret_value())
    return value


def _prefects_url(value: SecretStr) -> SecretStr:
    database_urls.check_for_prefect(value.get_secret_value())
    return value


DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
Host = Annotated[str, AfterValidator(_host)]
Origin = Annotated[str, AfterValidator(_origin)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _none(cls, given: Any) -> Any:
        """`none`, where a setting may be none: the environment has no other way to say it."""
        if not isinstance(given, dict):
            return given
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        values: dict[Any, Any] = given
        return {name: None if name in optional and value == "none" else value for name, value in values.items()}


class Database(_Section):
    url: DatabaseUrl = SecretStr("postgresql://localhost/backcast")
    """PostgreSQL 15 to 18, as `postgresql://user:password@host:port/database`."""
    pool: int = Field(default=10, ge=2, le=200)
    """Connections that an API process may hold open, besides one that listens. A worker holds up to 4, a steward 7."""
    timeout: Duration = Field(default=timedelta(seconds=10), ge=timedelta(seconds=1), le=timedelta(seconds=30))
    """How long a statement may take, 1 to 30 s, including the wait for a connection, before the database counts as
    unavailable."""


class Fallback(_Section):
    url: str | None = None
    """Another store, as in `store.url`: objects that the store lacks are read here, while the one moves to the other.
    Nothing is written or removed here. None: there is none."""
    create: bool = False
    """Whether `backcast setup` creates the folder or bucket, as for one that will become the store."""
    endpoint: str | None = None
    """As `store.endpoint`."""
    region: str | None = None
    """As `store.region`."""
    path_style: bool = True
    """As `store.path_style`."""
    ca_bundle: Path | None = None
    """As `store.ca_bundle`."""
    access_key: SecretStr | None = None
    """As `store.access_key`."""
    secret_key: SecretStr | None = None
    """As `store.secret_key`."""


class Store(_Section):
    url: str = "file://./.backcast/store"
    """`file:///folder`, or `s3://bucket/prefix` for any S3."""
    endpoint: str | None = None
    """S3 endpoint as a URL; none means AWS."""
    public_endpoint: str | None = None
    """URL at which callers reach that S3 themselves: results too large for their row (32 KiB) are then answered with a
    redirect to it, signed for 5 minutes. None: they pass through the API."""
    region: str | None = None
    """S3 region; none leaves it to the environment."""
    path_style: bool = True
    """Address buckets as `endpoint/bucket` (MinIO, SeaweedFS) and not as `bucket.endpoint`."""
    ca_bundle: Path | None = None
    """File with the certificate authorities to trust for the endpoint."""
    access_key: SecretStr | None = None
    """S3 access key; none uses the ambient identity (environment, profile, workload identity)."""
    secret_key: SecretStr | None = None
    """S3 secret key."""
    timeout: Duration = timedelta(seconds=10)
    """How long one call may take before the store counts as unavailable."""
    patience: Duration = timedelta(minutes=5)
    """How long a worker keeps trying to store a finished result before it gives up, and the run is executed again."""
    fallback: Fallback = Fallback()


class Api(_Section):
    host: str = "127.0.0.1"
    """Address that the API listens on; 0.0.0.0 or :: in a cluster."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port that the API listens on."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics port; 0.0.0.0 or :: in a cluster. Nobody else should reach it: it asks for no key."""
    metrics_port: int = Field(default=8084, ge=0, le=65535)
    """Port of /metrics, and of /livez and /readyz once more; 0 takes a free one, which the log names."""
    prefix: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Path below which the API is served too, such as `/backcast`: what a proxy in front of it sends on unchanged."""
    max_body: int = Field(default=1024 * 1024, ge=1024)
    """Largest request body, in bytes; more is refused before it is read."""
    max_batch: int = Field(default=50_000, ge=1, le=100_000)
    """Most lines of one batch: its runs, and the wrong lines that it leaves out."""
    max_batch_body: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Largest body of a batch, in bytes."""
    max_waiting: int = Field(default=1_000_000, ge=1)
    """Runs that may wait in all; more are refused with 429 until some have left the queue. Each API process counts
    them about once a second, so the submissions of that time may exceed the limit."""
    max_waiting_per_owner: int = Field(default=100_000, ge=1)
    """Runs of one owner that may wait."""
    header_timeout: Duration = Field(default=timedelta(seconds=10), gt=timedelta(0))
    """How long request line and headers may take to arrive before the connection is closed."""
    body_timeout: Duration = Field(default=timedelta(seconds=30), gt=timedelta(0))
    """How long a request body may take to arrive; each 16 KiB of it add a second."""
    max_waits: int = Field(default=1000, ge=0)
    """Requests of one API process that may wait at once for the end of a run (`Prefer: wait=N`); further ones are
    answered without waiting."""
    max_streams: int = Field(default=2000, ge=0)
    """Streams of events (`/v1/runs/{id}/events`) that one API process sends at once; more are refused with 503."""
    longest_stream: Duration = Field(default=timedelta(minutes=30), gt=timedelta(0))
    """How long a stream of events lasts. Its reader then connects again, perhaps to another process, and misses
    nothing."""
    keys: Annotated[list[SecretStr], NoDecode, BeforeValidator(_split)] = []
    """Keys that open the API, comma-separated: a request sends one as `Authorization: Bearer KEY`. None: it is open."""
    read_keys: Annotated[list[SecretStr], NoDecode, BeforeValidator(_split)] = []
    """Further keys, with which a request can look at everything and change nothing."""
    allowed_hosts: Annotated[list[Host], NoDecode, BeforeValidator(_split)] = []
    """Names by which the API is reached beside `localhost` and `host`, comma-separated: `jobs.example.org`,
    `*.example.org`, or `*` for any. Requests for other names are refused. None: with keys any; without keys, if `host`
    is not a loopback address, IP addresses and names without a dot."""
    cors_origins: Annotated[list[Origin], NoDecode, BeforeValidator(_split)] = []
    """Web pages that may use the API from a browser, comma-separated, as `https://app.example.org`, or `*` for all
    (with keys only). Without keys, requests from all other pages are refused."""
    prefect_ui: str | None = Field(default=None, pattern=r"^https?://[^\s/]\S*$")
    """Address at which browsers reach Prefect's pages: the console links each run there. None: it has no such link."""

    @field_validator("keys", "read_keys")
    @classmethod
    def _are_hard_to_guess(cls, keys: list[SecretStr]) -> list[SecretStr]:
        texts = [key.get_secret_value() for key in keys]
        if any(len(text) < 16 or not (text.isascii() and text.isprintable()) for text in texts):
            raise ValueError("a key must have 16 characters or more, all of them printable ASCII")
        return keys

    @model_validator(mode="after")
    def _lets_somebody_change_things(self) -> Self:
        if self.read_keys and not self.keys:
            raise ValueError("read_keys need keys beside them: without keys the API is open to all")
        if set(self.read_keys) & set(self.keys):
            raise ValueError("a key is among keys or among read_keys, not in both")
        return self

    @model_validator(mode="after")
    def _is_not_open_to_every_page(self) -> Self:
        if "*" in self.cors_origins and not self.keys:
            raise ValueError("cors_origins can't be * without keys: any web page could then submit and read runs")
        return self


class Worker(_Section):
    pool: str = Field(default="default", pattern=r"^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$")
    """The pool this worker serves; its tasks' runs are queued there."""
    slots: int = Field(default=10, ge=1, le=1000)
    """Runs that may execute user code at the same time in this process."""
    host: str = "127.0.0.1"
    """Address of the health and metrics port; 0.0.0.0 or :: in a cluster."""
    port: int = Field(default=8081, ge=0, le=65535)
    """Port of /livez, /readyz and /metrics; 0 takes a free one."""
    grace: Duration = timedelta(seconds=30)
    """After SIGTERM: how long running work may go on before its runs are released to the queue."""
    processes: int = Field(default=1, ge=1, le=64)
    """Executor processes that share the slots; more than one lets tasks that compute use several cores."""
    start: Duration = Field(default=timedelta(minutes=2), ge=timedelta(seconds=1))
    """How long an executor may take to start and to import the modules of the tasks. Then it is ended, and another one
    is started; if it was the first one, the worker ends."""
    stall: Duration = Field(default=timedelta(seconds=10), ge=timedelta(seconds=1))
    """How long the event loop of an executor may give no answer; then the process is ended, with the run that blocks
    it, and its other runs go on elsewhere."""
    max_runs_per_process: int | None = Field(default=None, ge=1)
    """Attempts after which an executor is replaced by a fresh one, without a gap; none: it is not."""
    max_memory: int | None = Field(default=None, ge=64 * 1024 * 1024)
    """Bytes of memory, with the processes of its runs, above which an executor is replaced by a fresh one; a quarter
    above, it is ended at once."""


class Steward(_Section):
    host: str = "127.0.0.1"
    """Address of the health and metrics port; 0.0.0.0 or :: in a cluster."""
    port: int = Field(default=8082, ge=0, le=65535)
    """Port of /livez, /readyz and /metrics; 0 takes a free one."""
    keep_runs: Duration | None = timedelta(days=30)
    """How long runs and their results are kept after their end: if it is a week or more, for up to two days longer,
    because days go whole. None keeps them for ever."""
    keep_failed: Duration | None = None
    """How long runs that did not complete are kept, if longer than `keep_runs`."""
    keep_keys: Duration | None = None
    """How long an Idempotency-Key is remembered, and until its run has ended; none: as long as the run is kept."""
    keep_tasks: Duration = Field(default=timedelta(days=30), ge=timedelta(hours=1))
    """How long a task stays known, and inputs for it are accepted, after the last worker that had it."""
    keep_history: Duration | None = None
    """How long the Prefect server keeps this ledger's task runs and logs after their end; runs of others stay.
    None: for ever, because Prefect itself removes nothing. `backcast up` and the chart set 30 days for their server."""
    sweep: Duration = Field(default=timedelta(hours=1), ge=timedelta(seconds=1))
    """Time between two sweeps, which remove everything past its retention (runs, results, cached values, history), and
    objects that no run needs."""
    deletion_cost: bool = False
    """Mark busy worker pods for Kubernetes, so that it removes idle ones first when it scales down. Needs a service
    account that may get and patch pods."""


class Prefect(_Section):
    api_url: str | None = "http://127.0.0.1:4200/api"
    """Prefect server that shows the history of runs; none keeps no history. Its absence never stops a run."""
    auth_string: SecretStr | None = None
    """`user:password` of the Prefect server, when it has one."""
    api_key: SecretStr | None = None
    """Key of Prefect Cloud."""
    history: bool = True
    """Publish every run to the Prefect server."""
    spool: int = Field(default=128 * 1024 * 1024, ge=0)
    """Bytes of events that one process keeps in temporary files while the server is away and 16 MiB of memory are full;
    the oldest are dropped first. The steward publishes the ends of their runs again later."""

    def environment(self) -> dict[str, str]:
        """Prefect's own variables for a worker; they must be set before prefect is imported."""
        variables = {
            "PREFECT_API_URL": self.api_url or "http://127.0.0.1:9/api",  # a client is made in any case, never called
            "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",  # or no worker starts while the server is away
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_LOGGING_TO_API_ENABLED": str(self.api_url is not None and self.history).lower(),
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        }
        if self.auth_string is not None:
            variables["PREFECT_API_AUTH_STRING"] = self.auth_string.get_secret_value()
        if self.api_key is not None:
            variables["PREFECT_API_KEY"] = self.api_key.get_secret_value()
        return variables


class Model(_Section):
    backend: Literal["auto", "openai", "embedded", "none"] = "auto"
    """`openai`: any compatible provider. `embedded`: the small local model (demo quality). `auto`: a provider if
    `api_key` or `base_url` is set, else the embedded one. `none`: casts fail at once."""
    size: Literal["0.5b", "1.5b"] = "0.5b"
    """The embedded model, by its number of parameters: 0.5 GB of disk and 0.9 GB of memory, or 1.1 and 2.4 GB."""
    name: str = "gpt-4o-mini"
    """The provider's name of the model; the embedded backend ignores it."""
    base_url: str | None = None
    """The provider's URL, with /v1 at its end; none means OpenAI, or the embedded server's own address."""
    api_key: SecretStr | None = None
    """The provider's key. It is never logged or stored."""
    timeout: Duration = timedelta(seconds=60)
    """How long one answer of the model may take."""
    max_tokens: int = Field(default=1024, ge=16)
    """Longest answer, in tokens; one that is cut is asked for once more, with four times as many."""
    excerpt: int = Field(default=200, ge=0, le=1000)
    """Characters of an unusable answer that the error of its run quotes, never with the key in them; 0 quotes nothing.
    An answer may repeat what was to be cast, and errors are kept in the ledger and shown in Prefect."""
    cache: Path = Field(default_factory=lambda: _cache_folder() / "backcast")
    """Folder where the embedded model's file is kept, shared between projects."""
    weights: Path | None = None
    """The embedded model's file itself, as in an image that has it; then nothing is searched for or downloaded."""
    host: str = "127.0.0.1"
    """Address that the embedded model's server listens on; 0.0.0.0 or :: in a cluster."""
    port: int = Field(default=8083, ge=0, le=65535)
    """Port of the embedded model's server."""
    slots: int = Field(default=2, ge=1, le=16)
    """Answers that the embedded server computes at the same time; more does not make two cores faster."""

    @property
    def embedded(self) -> bool:
        return self.backend == "embedded" or self.is_unset

    @property
    def is_unset(self) -> bool:
        """Nobody has chosen a model: the embedded one is tried, which may not be there."""
        return self.backend == "auto" and self.api_key is None and self.base_url is None

    @property
    def embedded_url(self) -> str:
        return self.base_url or f"http://127.0.0.1:{self.port}/v1"


class Tracing(_Section):
    endpoint: str | None = None
    """URL of an OpenTelemetry collector that takes OTLP over HTTP, such as http://collector:4318; none sends no traces.
    Headers are in `OTEL_EXPORTER_OTLP_HEADERS`, as OpenTelemetry has it."""
    sample: float = Field(default=0.1, ge=0, le=1)
    """Share of the requests that begin a trace. A request with a `traceparent` goes on with its caller's trace, or
    has none, as that decides."""


class Setup(_Section):
    """Read by `backcast setup` only: the roles and databases that it makes beside the schema and the bucket."""

    admin_url: DatabaseUrl | None = None
    """URL of a PostgreSQL role that may create roles and databases: it makes those that the other URLs name. None: they
    must exist."""
    prefect_url: Annotated[SecretStr, AfterValidator(_prefects_url)] | None = None
    """URL of the Prefect server's own database, as that server takes it:
    `postgresql+asyncpg://user:password@host:port/database`, and `ssl=require` in place of `sslmode=require`."""
    api_url: DatabaseUrl | None = None
    """URL of the API's own role in the database of `database.url`: what the API itself gets as `database.url`. It gets
    the rights that the API needs, and no others. None: the API has the role of `database.url`, which owns the schema.
    """
    worker_url: DatabaseUrl | None = None
    """As `setup.api_url`, for workers."""
    steward_url: DatabaseUrl | None = None
    """As `setup.api_url`, for the steward."""
    scaler_url: DatabaseUrl | None = None
    """As `setup.api_url`, for an autoscaler: its role may read the view `backlog` only."""
    patience: Duration = timedelta(minutes=5)
    """How long to wait for the database and the store."""

    @property
    def roles(self) -> dict[str, str]:
        """The URLs of the roles that only some part uses, by part."""
        urls = {"api": self.api_url, "worker": self.worker_url, "steward": self.steward_url, "scaler": self.scaler_url}
        return {part: url.get_secret_value() for part, url in urls.items() if url is not None}


class Settings(BaseSettings):
    """All settings. Build it with `load()`; tests may pass values directly."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,  # a variable that a template leaves empty is not set: an empty key is no key
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        nested_model_default_partial_update=True,
    )

    database: Database = Database()
    store: Store = Store()
    api: Api = Api()
    worker: Worker = Worker()
    steward: Steward = Steward()
    prefect: Prefect = Prefect()
    model: Model = Model()
    tracing: Tracing = Tracing()
    setup: Setup = Setup()
    tasks: Annotated[list[str], NoDecode, BeforeValidator(_split)] = []
    """Python modules whose Prefect tasks the worker serves, beside the built-in ones; comma-separated in a variable."""
    builtin_tasks: bool = True
    """Serve the built-in tasks (`cast`). The runs of a task go to one pool: workers of other pools switch this off."""
    lease: Duration = Field(default=timedelta(seconds=15), ge=timedelta(seconds=2))
    """A worker without a heartbeat for this long is dead, and its runs are ready again."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a run may be lost together with its worker before it fails as `worker_lost`."""
    unknown_after: Duration = Field(default=timedelta(hours=1), ge=timedelta(seconds=1), le=timedelta(days=365))
    """How long a run waits for a worker that has its task, in a version that accepts its input, while the workers of
    its pool do not; then it fails. The wait counts as no attempt."""
    max_result: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Largest result, in bytes of JSON."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe messages that backcast itself logs; the API logs each request as info."""
    log_format: Literal["text", "json"] = "text"
    """How log lines look. Each has a time and a level and, if it is about a run, the run, its task and its worker."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # .env files are not read: secrets have one way in
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = [init_settings, env_settings]
        if path := os.environ.get(CONFIG_VARIABLE):
            sources.append(InitSettingsSource(settings_cls, _read(Path(path))))
        return tuple(sources)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else "not YAML"
        raise ConfigurationError(
            f"{CONFIG_VARIABLE} names {file}, which can't be read ({why}): correct it or unset the variable."
        ) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigurationError(f"{file} must hold settings by name, such as `worker: {{slots: 20}}`.")
    return content


def load() -> Settings:
    """Read the settings of this process.

    Raises:
        ConfigurationError: an unknown or wrong setting, named with its environment variable and without its value.
    """
    for variable in map(str.upper, os.environ):
        if variable.startswith(PREFIX) and variable.split("__")[0] not in _ROOTS:
            raise _unknown(variable)
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = PREFIX + "__".join(str(part).upper() for part in first["loc"])
        raise (
            _unknown(name) if first["type"] == "extra_forbidden" else ConfigurationError(f"{name}: {first['msg']}.")
        ) from None
    except SettingsError as error:
        section = str(error).split('"')[1]  # error parsing value for field "model" from source …
        raise ConfigurationError(f"{PREFIX}{section.upper()}: a whole section is written as a JSON object.") from None


def _unknown(name: str) -> ConfigurationError:
    if name in _VARIABLES:  # a file has `worker__slots`, the environment's spelling
        return ConfigurationError(f"{name} is written in a file as `section: {{name: value}}`.")
    hint = did_you_mean(name, {*_VARIABLES, *_ROOTS}) or " Remove it or correct its name."
    return ConfigurationError(f"{name} is not a setting of backcast.{hint}")


def _names() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        section = field.annotation if isinstance(field.annotation, type) else object
        if issubclass(section, BaseModel):
            yield from (f"{PREFIX}{name}__{each}".upper() for each in section.model_fields)
        else:
            yield f"{PREFIX}{name}".upper()


_VARIABLES = (CONFIG_VARIABLE, URL_VARIABLE, KEY_VARIABLE, *_names())
_ROOTS = {variable.split("__")[0] for variable in _VARIABLES}
