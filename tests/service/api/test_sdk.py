"""The unmodified client of OpenAI against the running API."""

from __future__ import annotations

import datetime
import hashlib
import io
import threading
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from .conftest import BASE, ROW, Server, start, stop


def test_a_file_goes_in_and_comes_out(client: OpenAI):
    content = (ROW * 10).encode()
    made = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose, made.status) == (
        "file", len(content), "rows.jsonl", "fine-tune", "processed",
    )  # fmt: skip
    assert made.expires_at is None
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert made.id in [file.id for file in client.files.list(purpose="fine-tune")]
    assert client.files.wait_for_processing(made.id).id == made.id
    assert client.files.delete(made.id).deleted
    for lost in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            lost(made.id)
    assert made.id not in [file.id for file in client.files.list()]


def test_a_deleted_files_content_is_gone_from_the_store(server: Server, client: OpenAI):
    marker = b"a text that is nowhere else: 7d3f0c"
    made = client.files.create(file=("x.jsonl", marker), purpose="user_data")
    assert any(marker in path.read_bytes() for path in (server.home / "blobs").rglob("*") if path.is_file())
    client.files.delete(made.id)
    assert not any(marker in path.read_bytes() for path in server.home.rglob("*") if path.is_file())


def test_a_file_expires(client: OpenAI):
    made = client.files.create(
        file=("x.jsonl", b"{}"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    assert client.files.create(file=("x.jsonl", b"{}"), purpose="batch").expires_at == pytest.approx(
        made.created_at + 30 * 86_400, abs=60
    )
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(
            file=("x.jsonl", b"{}"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 60}
        )
    assert caught.value.param == "expires_after.seconds"


def test_an_upload_in_parts(client: OpenAI):
    content = (ROW * 30).encode()
    upload = client.uploads.upload_file_chunked(
        file=content,
        filename="big.jsonl",
        bytes=len(content),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=1000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert upload.status == "completed"
    assert upload.file is not None
    assert client.files.content(upload.file.id).read() == content
    assert client.uploads.complete(upload.id, part_ids=["anything"]).file == upload.file
    with pytest.raises(openai.BadRequestError):
        client.uploads.parts.create(upload.id, data=b"more")
    with pytest.raises(openai.BadRequestError):
        client.uploads.cancel(upload.id)


def test_an_upload_is_what_it_says(client: OpenAI):
    upload = client.uploads.create(bytes=6, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    one, two = (client.uploads.parts.create(upload.id, data=data).id for data in (b"abc", b"def"))
    for wrong in ([one], [one, one, two], [one, two, "part-" + "a" * 24]):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            client.uploads.complete(upload.id, part_ids=wrong)
        assert caught.value.param == "part_ids"
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload.id, part_ids=[one, two], md5="0" * 32)
    assert caught.value.param == "md5"
    done = client.uploads.complete(upload.id, part_ids=[two, one])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"defabc"
    other = client.uploads.create(bytes=6, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    assert client.uploads.cancel(other.id).status == "cancelled"
    assert client.uploads.cancel(other.id).status == "cancelled"


def test_equal_parts_of_which_one_was_sent_again(server: Server):
    """The second's first attempt never arrived: its retry is taken for the first, and has its id."""
    content = b"abcabc"
    with server.client(server.tenant("equal", storage_bytes=12)) as client:
        upload = client.uploads.create(bytes=6, filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune")
        one, two = (
            client.uploads.parts.create(upload.id, data=b"abc", extra_headers={"x-stainless-retry-count": tries}).id
            for tries in ("0", "1")
        )
        assert one == two
        with pytest.raises(openai.BadRequestError, match="9 bytes together") as caught:
            client.uploads.complete(upload.id, part_ids=[one, two, two])
        assert caught.value.param == "part_ids"
        other = client.files.create(file=("b.jsonl", b"1234567"), purpose="fine-tune")
        with pytest.raises(openai.RateLimitError) as refused:  # the file is as long as all that it is made of
            client.uploads.complete(upload.id, part_ids=[one, two])
        assert refused.value.code == "storage_bytes"
        client.files.delete(other.id)
        done = client.uploads.complete(upload.id, part_ids=[one, two], md5=hashlib.md5(content).hexdigest())
        assert done.file is not None
        assert done.file.bytes == 6
        assert client.files.content(done.file.id).read() == content
        assert client.get("/holdtrue/usage", cast_to=httpx.Response).json()["storage_bytes"] == 6


def test_parts_take_room_until_they_are_a_file(server: Server):
    with server.client(server.tenant("parts", storage_bytes=10)) as client:

        def begin(size: int) -> str:
            return client.uploads.create(bytes=size, filename="a", mime_type="text/jsonl", purpose="fine-tune").id

        first, second = begin(8), begin(8)
        part = client.uploads.parts.create(first, data=b"x" * 8).id
        with pytest.raises(openai.RateLimitError) as caught:
            client.uploads.parts.create(second, data=b"x" * 8)
        assert caught.value.code == "storage_bytes"
        with pytest.raises(openai.RateLimitError):
            client.files.create(file=("a.jsonl", b"x" * 3), purpose="fine-tune")
        assert client.uploads.complete(first, part_ids=[part]).status == "completed"
        with pytest.raises(openai.RateLimitError):
            client.uploads.parts.create(second, data=b"x" * 8)
        client.uploads.parts.create(second, data=b"x" * 2)
        client.uploads.cancel(second)
        assert client.files.create(file=("a.jsonl", b"xx"), purpose="fine-tune").bytes == 2


def test_models(client: OpenAI):
    assert BASE in [model.id for model in client.models.list()]
    assert client.models.retrieve(BASE).owned_by == "system"
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(BASE)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("ft:nothing:org:x:abcdefgh")
    assert caught.value.code == "model_not_found"


def test_a_job_from_creation_to_cancellation(client: OpenAI, file_id: str):
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        suffix="my-model",
        seed=7,
        metadata={"team": "a", "note": "größer"},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["x"]}}],
    )
    assert job.object == "fine_tuning.job"
    assert job.status == "validating_files"
    assert (job.model, job.training_file, job.seed) == (BASE, file_id, 7)
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.metadata == {"team": "a", "note": "größer"}
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "p"
    assert job.result_files == []
    assert job.error is None
    jobs = client.fine_tuning.jobs
    assert jobs.retrieve(job.id) == job
    events = list(jobs.list_events(job.id))
    assert {event.object for event in events} == {"fine_tuning.job.event"}
    assert [event.message for event in events] == ["Validating the files", f"Created fine-tuning job: {job.id}"]
    assert list(jobs.checkpoints.list(job.id)) == []
    assert jobs.pause(job.id).id == job.id
    for _ in range(2):  # as when its answer was lost and the client sends it again
        assert jobs.resume(job.id).status == "validating_files"
    assert jobs.cancel(job.id).status == "cancelled"
    assert jobs.cancel(job.id).status == "cancelled"  # as when a client sends it again
    for late in (jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError):
            late(job.id)


def test_the_deprecated_hyperparameters_count(client: OpenAI, file_id: str):
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file_id, hyperparameters={"n_epochs": 3})
    assert job.hyperparameters.n_epochs == 3
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file_id,
            hyperparameters={"n_epochs": 3},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4}}},
        )
    assert caught.value.param == "hyperparameters"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "gpt-4o-mini"}, "model"),
        ({"training_file": "file-abc"}, "training_file"),
        ({"validation_file": "file-" + "a" * 24}, "validation_file"),
        ({"suffix": "../../etc"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "nul \0"}}, "metadata.k"),
        ({"hyperparameters": {"n_epochs": 999}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "7"}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"learning_rate_multiplier": 50.0}}, "hyperparameters.learning_rate_multiplier"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 10**6}}}},
            "method.supervised.hyperparameters.batch_size",
        ),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"integrations": [{"type": "mlflow", "mlflow": {}}]}, "integrations.type"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "api_key": "s"}}]},
            "integrations.wandb.api_key",
        ),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "base_url": "http://169.254.169.254/"}}]},
            "integrations.wandb.base_url",
        ),
    ],
)
def test_a_bad_job_is_refused_with_its_field(client: OpenAI, file_id: str, change: dict, param: str):
    before = len(list(client.fine_tuning.jobs.list()))
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
        client.fine_tuning.jobs.create(**{"model": BASE, "training_file": file_id, **change})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert str(caught.value.body["message"])  # type: ignore[index]
    assert len(list(client.fine_tuning.jobs.list())) == before


def test_a_hyperparameter_that_is_none_says_what_it_should_be(client: OpenAI, file_id: str):
    number = "Input should be 'auto' or a valid integer"
    for name, value, expected in (
        ("n_epochs", 0, "Input should be greater than or equal to 1"),
        ("n_epochs", "3", number),
        ("n_epochs", 1.0, number),
        ("batch_size", 2.5, number),
        ("learning_rate_multiplier", -1, "Input should be greater than 0"),
        ("learning_rate_multiplier", "2", "Input should be 'auto' or a valid number"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.fine_tuning.jobs.create(model=BASE, training_file=file_id, hyperparameters={name: value})  # type: ignore[arg-type]
        assert caught.value.body["message"] == f"Invalid value for 'hyperparameters.{name}': {expected}"  # type: ignore[index]


def test_a_file_of_another_purpose_is_refused(client: OpenAI):
    other = client.files.create(file=("x.jsonl", b"{}"), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model=BASE, training_file=other.id)
    assert caught.value.param == "training_file"


def test_a_file_in_use_stays(client: OpenAI, file_id: str):
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file_id)
    with pytest.raises(openai.ConflictError) as caught:
        client.files.delete(file_id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    client.fine_tuning.jobs.cancel(job.id)


def test_metadata_may_have_lines_and_tabs(server: Server, client: OpenAI, file_id: str):
    value = 'first\tcolumn\r\nkzq8 {"event": "forged"}\x1b[31m'
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file_id, metadata={"note": value})
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == {"note": value}
    assert [each.id for each in client.fine_tuning.jobs.list(metadata={"note": value})] == [job.id]
    client.fine_tuning.jobs.cancel(job.id)
    assert "kzq8" not in server.log.read_text()
    for wrong in ('"nul \\u0000"', '"half \\ud800"'):
        body = f'{{"model": "{BASE}", "training_file": "{file_id}", "metadata": {{"note": {wrong}}}}}'
        headers = {"authorization": f"Bearer {server.key}", "content-type": "application/json"}
        answer = httpx.post(f"{server.url}/fine_tuning/jobs", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata.note")


def test_metadata_filters(server: Server, file_id: str):
    with server.client() as client:
        jobs = client.fine_tuning.jobs
        made = [
            jobs.create(model=BASE, training_file=file_id, metadata=pairs).id
            for pairs in ({"filter": "a", "n": "1"}, {"filter": "a", "n": "2"}, {"filter": ""}, None)
        ]

        def found(**pairs: str) -> list[str]:
            return [job.id for job in jobs.list(metadata=pairs, limit=1)]

        assert found(filter="a") == [made[1], made[0]]
        assert found(filter="a", n="1") == [made[0]]
        assert found(filter="") == [made[2]]
        assert found(filter="b") == []
        without = [job.id for job in jobs.list(extra_query={"metadata": "null"})]
        assert made[3] in without
        assert not set(made[:3]) & set(without)
        for job_id in made:
            jobs.cancel(job_id)


def test_pages_are_stable_while_rows_arrive(client: OpenAI):
    def add() -> str:
        return client.files.create(file=("p.jsonl", b"{}"), purpose="evals").id

    first = [add() for _ in range(5)]
    seen = []
    for file in client.files.list(purpose="evals", limit=2):
        seen.append(file.id)
        if len(seen) < 4:
            add()
    assert seen == first[::-1]
    client.files.delete(first[2])
    rest = client.files.list(purpose="evals", after=first[2], order="asc", limit=2)
    assert [file.id for file in rest.data] == first[3:]
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-" + "z" * 24)
    with pytest.raises(openai.BadRequestError):
        client.files.list(limit=0)


def test_errors_are_the_clients_own_types(server: Server, client: OpenAI, file_id: str):
    with server.client("sk-wrong") as wrong, pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        client.fine_tuning.jobs.retrieve("ftjob-abc")
    assert missing.value.code == "fine_tune_not_found"
    with server.client(server.tenant("busy", jobs_active=0)) as busy:
        own = busy.files.create(file=("a.jsonl", ROW.encode()), purpose="fine-tune")
        with pytest.raises(openai.RateLimitError) as full:
            busy.fine_tuning.jobs.create(model=BASE, training_file=own.id)
    assert full.value.code == "jobs_active"
    assert full.value.response.headers["x-should-retry"] == "false"
    with server.client(server.tenant("fast", requests_per_minute=3)) as fast:
        for _ in range(3):
            fast.models.list()
        with pytest.raises(openai.RateLimitError) as rate:
            fast.models.list()
    assert rate.value.code == "rate_limit_exceeded"
    assert 1 <= int(rate.value.response.headers["retry-after"]) <= 60
    with server.client(server.tenant("small", storage_bytes=10)) as small, pytest.raises(openai.RateLimitError):
        small.files.create(file=("a.jsonl", b"x" * 11), purpose="fine-tune")


def test_headers_are_openais(client: OpenAI):
    answer = client.models.with_raw_response.list()
    for name in ("x-request-id", "openai-processing-ms", "openai-version", "openai-organization", "openai-project"):
        assert answer.headers[name]
    assert int(answer.headers["x-ratelimit-remaining-requests"]) < int(answer.headers["x-ratelimit-limit-requests"])
    assert client.models.list()._request_id != answer.request_id


def test_too_large_a_file_gets_its_answer(client: OpenAI):
    for size in (4 * 2**20 + 1, 30 * 2**20):
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=("big.jsonl", b"x" * size), purpose="fine-tune")
        assert caught.value.status_code == 413


def test_a_file_does_not_pass_through_memory(tmp_path: Path):
    """Eight at once take the pieces in hand, some megabytes each, however large the files are."""
    server, size = start(tmp_path / "home"), 24 * 2**20

    def send(client: OpenAI) -> None:
        client.files.create(file=("a.jsonl", io.BytesIO(b"x" * size)), purpose="user_data")

    with server.client() as client:
        client.files.create(file=("a.jsonl", b"x"), purpose="user_data")
        before = server.peak()
        threads = [threading.Thread(target=send, args=(client,), daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        grown, files = server.peak() - before, list(client.files.list())
    assert stop(server) == 0
    assert [file.bytes for file in files].count(size) == 8
    assert grown < 8 * size / 1024 / 3  # KiB


def test_an_idempotency_key_gives_the_first_answer(server: Server, client: OpenAI, file_id: str):
    jobs = client.fine_tuning.jobs
    key = {"Idempotency-Key": "one"}
    first = jobs.create(model=BASE, training_file=file_id, extra_headers=key)
    again = jobs.with_raw_response.create(model=BASE, training_file=file_id, extra_headers=key)
    assert again.parse().id == first.id
    assert again.headers["idempotent-replayed"] == "true"
    assert jobs.create(model=BASE, training_file=file_id).id != first.id
    with pytest.raises(openai.BadRequestError) as caught:
        jobs.create(model=BASE, training_file=file_id, seed=1, extra_headers=key)
    assert caught.value.code == "idempotency_key_reused"
    with server.client(server.tenant("idem")) as other:
        own = other.files.create(file=("a.jsonl", ROW.encode()), purpose="fine-tune")
        assert other.fine_tuning.jobs.create(model=BASE, training_file=own.id, extra_headers=key).id != first.id
    for job in jobs.list():
        if job.status != "cancelled":
            jobs.cancel(job.id)


def test_one_key_at_once_makes_one_job(client: OpenAI, file_id: str):
    made: list[str] = []

    def create() -> None:
        job = client.fine_tuning.jobs.create(
            model=BASE, training_file=file_id, extra_headers={"Idempotency-Key": "race"}
        )
        made.append(job.id)

    threads = [threading.Thread(target=create, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    client.fine_tuning.jobs.cancel(made[0])


def test_a_retry_without_a_key_does_nothing_twice(server: Server, file_id: str):
    """The answer to the first POST is lost on its way; the client sends the request again by itself."""
    import httpx2

    class Losing(httpx2.BaseTransport):
        def __init__(self) -> None:
            self.inner, self.sent = httpx2.HTTPTransport(), 0

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = self.inner.handle_request(request)
            if request.method == "POST":
                self.sent += 1
                if self.sent == 1:
                    answer.read()
                    raise httpx2.ReadError("lost", request=request)
            return answer

    def lossy() -> tuple[OpenAI, Losing]:
        transport = Losing()
        return server.client(max_retries=2, http_client=httpx2.Client(transport=transport)), transport

    def count() -> int:
        with server.client() as client:
            return len(list(client.fine_tuning.jobs.list())) + 1000 * len(list(client.files.list()))

    before = count()
    client, transport = lossy()
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file_id, seed=3)
    assert (transport.sent, count() - before) == (2, 1)
    client.fine_tuning.jobs.cancel(job.id)
    client, transport = lossy()
    client.files.create(file=("once.jsonl", b"{}"), purpose="user_data")
    assert (transport.sent, count() - before) == (2, 1001)
    with server.client() as plain:
        two = [plain.files.create(file=("once.jsonl", b"{}"), purpose="user_data").id for _ in range(2)]
    assert len(set(two)) == 2


def test_times_are_whole_seconds_of_utc(client: OpenAI):
    made = client.files.create(file=("x.jsonl", b"{}"), purpose="user_data")
    assert abs(made.created_at - datetime.datetime.now(datetime.UTC).timestamp()) < 60
