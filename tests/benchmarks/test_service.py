import pytest
from benchmarks.service import growth


@pytest.mark.slow
def test_every_read_finds_what_it_is_meant_to_find():
    """It insists on its own counts: a list that is empty by mistake would be quick."""
    found = growth([100, 2200], [], rounds=2)
    assert set(found["latency"]) == {100, 2200}
    assert set(found["growth"]) == set(found["latency"][100])
    assert all(each["n"] == 2 for each in found["latency"][2200].values())
