from pathlib import Path

import pytest

from holdtrue.errors import RunError, SpecError
from holdtrue.service.policy import default_document, store
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Base, Policy

BASE = "smollm2-135m-instruct"
FIRST = default_document(BASE)
SECOND = FIRST.replace("weight: 3.0", "weight: 5.0")


@pytest.fixture
def database(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'service.db'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.close()


def test_versions_count_up_and_an_equal_document_is_no_new_one(database: Database):
    with database.write() as session:
        first = store.save(session, FIRST, actor="a", now=1)
        again = store.save(session, "# another comment\n" + FIRST, actor="a", now=2)
        second = store.save(session, SECOND, actor="a", now=3)
    assert (first.id, first.version, second.version) == (again.id, 1, 2)
    with database.read() as session:
        assert [policy.version for policy in store.history(session, BASE)] == [2, 1]


def test_one_version_is_in_force(database: Database):
    with database.write() as session:
        assert store.active(session, BASE) is None
        first = store.save(session, FIRST, actor="a", now=1)
        second = store.save(session, SECOND, actor="a", now=1)
        assert store.activate(session, first, actor="a", now=1) is None
        before = store.activate(session, second, actor="b", now=2)
        assert before is not None
        assert before.id == first.id
    with database.read() as session:
        found = store.active(session, BASE)
        assert found is not None
        assert found.id == second.id


def test_a_difference_names_the_value(database: Database):
    with database.write() as session:
        first, second = (store.save(session, text, actor="a", now=1) for text in (FIRST, SECOND))
        change = store.change(first, second)
    assert len(change.values) == 1
    assert "weight" in change.values[0]
    assert "+  - kl: {weight: 5.0, tokens: response}" in change.text


def test_a_policy_changed_in_the_database_is_not_used(database: Database):
    with database.write() as session:
        identity = store.save(session, FIRST, actor="a", now=1).id
    with database.write() as session:
        session.get_one(Policy, identity).document = FIRST.replace("weight: 3.0", "weight: 0.0")
    with database.read() as session, pytest.raises(RunError, match="no longer means"):
        store.document_of(session.get_one(Policy, identity))


def test_an_invalid_policy_is_not_written(database: Database):
    with database.write() as session, pytest.raises(SpecError, match="gate"):
        store.save(session, f"base_model: {BASE}\ndefenses: []\n", actor="a", now=1)
    with database.read() as session:
        assert store.history(session, BASE) == []
