from __future__ import annotations

import pytest

ON_BOTH = (
    "test_a_job_succeeds_and_leaves_evidence",
    "test_leases",
    "test_nobody_takes_a_job_before",
    "test_projects_take_turns",
    "test_several_sweep_at_once",
    "test_a_sweep_and_an_erasure",
    "test_a_statement_that_is_refused",
    "test_an_upload_to_an_api_that_is_killed_leaves",
)
"""What every run of the tests tries on PostgreSQL too; the rest is slow there, and for `make test-service`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        here = "tests/service/jobs" in item.nodeid or "tests/service/store/test_retention" in item.nodeid
        if here and "postgresql" in item.nodeid and not any(name in item.nodeid for name in ON_BOTH):
            item.add_marker(pytest.mark.slow)
