import hashlib
import json
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from holdtrue.defenses import available, parse
from holdtrue.errors import RunError, SpecError
from holdtrue.service import ids
from holdtrue.service.policy import default_document, parse_policy, store
from holdtrue.service.policy.document import read_policy
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Policy

BASE = "smollm2-135m-instruct"
FIRST = default_document(BASE)
PLAIN = f"base_model: {BASE}\ndefenses: []\ngate: {{margin_fall: {{max: 0.1}}}}\n"
SECOND = FIRST.replace("weight: 3.0", "weight: 5.0")


@pytest.fixture
def database(db: Database) -> Database:
    return db


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
        row = session.get_one(Policy, identity)
        assert row.meaning is not None
        row.document = FIRST.replace("weight: 3.0", "weight: 0.0")
    with database.write() as session:
        row = session.get_one(Policy, identity)
        assert store.document_of(row) == parse_policy(FIRST)  # the text is for people
        row.meaning = str(row.meaning).replace('"weight":3.0', '"weight":0.0')
    with database.read() as session, pytest.raises(RunError, match="no longer means"):
        store.document_of(session.get_one(Policy, identity))


def saved_by_another_version(session: Session, *, meaning: bool, **changes: Any) -> Policy:
    """Write a version as one of holdtrue saved it whose defaults differ from today's."""
    values = {**parse_policy(PLAIN).canonical(), **changes}
    text = json.dumps({key: value for key, value in values.items() if value is not ...}, sort_keys=True)
    row = Policy(
        id=ids.new("policy"), base_model=BASE, version=1, document=PLAIN, meaning=text if meaning else None,
        digest=hashlib.sha256(text.encode()).hexdigest(), created_by="a", created_at=1,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


def test_a_version_is_read_as_it_was_meant_by_a_version_with_other_defaults(database: Database):
    other = {"min_rows": 77, "max_rows": 50_000, "max_bytes": 10**9}
    assert parse_policy(PLAIN).limits.min_rows == 10
    with database.write() as session:
        row = saved_by_another_version(session, meaning=True, limits=other, screen=...)  # it knew no screen
        document = store.document_of(row)
        assert document.limits.min_rows == 77
        assert document.screen is None
        assert document == parse_policy(PLAIN).model_copy(update={"limits": document.limits})


def test_what_cannot_be_read_is_said_to_be_so_and_not_guessed(database: Database):
    with database.write() as session:
        row = saved_by_another_version(session, meaning=True, tomorrow=1)
        with pytest.raises(store.PolicyUnreadableError, match="tomorrow"):
            store.document_of(row)
        session.delete(row)
        session.flush()
        row = saved_by_another_version(session, meaning=False, checkpoints=False)
        with pytest.raises(store.PolicyUnreadableError, match="no longer means"):
            store.document_of(row)
    store.keep_meanings(database)
    with database.read() as session:
        assert session.scalars(select(Policy.meaning)).one() is None


def test_versions_of_before_get_their_meaning_while_it_is_known(database: Database):
    with database.write() as session:
        row = store.save(session, FIRST, actor="a", now=1)
        meant, row.meaning = row.meaning, None
    with database.read() as session:
        assert store.document_of(session.scalars(select(Policy)).one()) == parse_policy(FIRST)
    store.keep_meanings(database)
    with database.read() as session:
        assert session.scalars(select(Policy.meaning)).one() == meant


@pytest.mark.parametrize("name", sorted(available()))
def test_every_defense_comes_back_from_what_is_stored(name: str):
    (defense,) = parse([name])
    document = parse_policy(PLAIN).model_copy(update={"defenses": (defense,)})
    assert read_policy(json.loads(store.meaning(document))) == document


def test_a_defense_that_a_further_training_adds_is_stored_with_all_its_values():
    document = parse_policy(PLAIN + "on_fail: {retrain: [{kl: {weight: 2.0}}, {kl: {weight: 4.0}}]}\n")
    stored = document.canonical()
    (added,) = parse([{"kl": {"weight": 2.0}}])
    assert stored["on_fail"]["retrain"][0] == {"kl": added.model_dump(mode="json")}
    assert read_policy(stored).defenses_of(2) == document.defenses_of(2)
    assert read_policy(stored).canonical() == stored
    changing = parse_policy(FIRST).canonical()
    assert changing["on_fail"]["retrain"] == [{"kl": {"weight": 10.0}}]  # the rest is the first training's


def test_an_invalid_policy_is_not_written(database: Database):
    with database.write() as session, pytest.raises(SpecError, match="gate"):
        store.save(session, f"base_model: {BASE}\ndefenses: []\n", actor="a", now=1)
    with database.read() as session:
        assert store.history(session, BASE) == []
