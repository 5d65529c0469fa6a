"""The service under load is measured on both databases: `benchmarks.service` starts it on either."""

from __future__ import annotations

from pathlib import Path

import httpx
from benchmarks.service import make_job, over, service


def test_a_service_to_be_measured_starts_on_either_database(database_url: str, tmp_path: Path):
    with (
        service(tmp_path / "home", "--role", "api", **over(database_url or None, tmp_path)) as (url, key),
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as http,
    ):
        assert make_job(http).startswith("ftjob-")
    assert (tmp_path / "home" / "service.db").exists() == (not database_url)
