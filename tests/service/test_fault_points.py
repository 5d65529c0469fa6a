"""The points at which tests kill are there: most of those tests are slow, and a renamed function would hide in them."""

from __future__ import annotations

import pytest

from .api import test_faults as of_api
from .jobs import killed, test_detours, test_faults

TARGETS = {
    point[0]
    for point in (
        *test_faults.POINTS,
        *test_faults.VALIDATED,
        *test_faults.REMOVED,
        *test_faults.CREATED,
        *(point for _, point in test_detours.WAYS),
        *(point for _, point in of_api.POINTS),
    )
}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_point_is_where_it_is_named(target: str):
    owner, name = killed.find(target)
    assert callable(getattr(owner, name))
