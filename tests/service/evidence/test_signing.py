import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.errors import SpecError
from holdtrue.models.digest import tree_digest
from holdtrue.service.evidence import signing

STATEMENT = {
    "_type": "x",
    "subject": [{"name": "m", "digest": {"sha256": "0"}}],
    "predicate": {"a": [1, 2.5, None, "é"]},
}


@pytest.fixture(scope="module")
def key(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "signing.pem"
    signing.make_key(path)
    return path


@pytest.fixture(scope="module")
def signed(key: Path):
    signer = signing.load_signer(key)
    return signing.sign(STATEMENT, signer), key.with_name("signing.pem.pub").read_bytes()


def test_what_was_signed_comes_back(signed):
    envelope, public = signed
    assert signing.verify(envelope, public) == STATEMENT


def test_the_private_key_is_its_owners_alone_and_is_made_once(key: Path):
    before = key.read_bytes()
    signing.make_key(key)
    assert key.read_bytes() == before
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in key.parent.iterdir()) == ["signing.pem", "signing.pem.pub"]


def test_another_key_verifies_nothing(signed, tmp_path: Path):
    signing.make_key(tmp_path / "other.pem")
    with pytest.raises(signing.SignatureError, match="another key"):
        signing.verify(signed[0], (tmp_path / "other.pem.pub").read_bytes())


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_payload_shows(signed, place, bit):
    import base64

    envelope, public = signed
    payload = bytearray(base64.b64decode(envelope["payload"]))
    payload[place % len(payload)] ^= 1 << bit
    forged = {**envelope, "payload": base64.b64encode(bytes(payload)).decode()}
    with pytest.raises(signing.SignatureError):
        signing.verify(forged, public)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["payload", "payloadType", "signatures", "x"]), JSON))
def test_rubbish_is_no_envelope(signed, rubbish):
    with pytest.raises(signing.SignatureError):
        signing.verify(rubbish, signed[1])


def test_an_envelope_without_signatures_is_refused(signed):
    with pytest.raises(signing.SignatureError):
        signing.verify({**signed[0], "signatures": []}, signed[1])


def test_the_key_may_come_from_the_environment(key: Path, monkeypatch: pytest.MonkeyPatch, signed):
    monkeypatch.setenv(signing.VARIABLE, key.read_text())
    signer = signing.load_signer(Path("/nowhere"))
    assert signing.public_pem(signer) == signed[1]


@pytest.mark.parametrize("text", ["", "rubbish", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_faulty_key_is_named(tmp_path: Path, text: str):
    (tmp_path / "k.pem").write_text(text)
    with pytest.raises(SpecError, match=r"k\.pem"):
        signing.load_signer(tmp_path / "k.pem")


def test_an_adapter_is_checked_byte_by_byte(tmp_path: Path, key: Path, signed):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "weights").write_bytes(b"abc")
    statement = {**STATEMENT, "subject": [{"name": "m", "digest": {"sha256": tree_digest(folder)}}]}
    envelope = signing.sign(statement, signing.load_signer(key))
    assert signing.check_adapter(folder, envelope, signed[1]) == statement
    (folder / "weights").write_bytes(b"abd")
    with pytest.raises(signing.SignatureError, match="not what was signed"):
        signing.check_adapter(folder, envelope, signed[1])


def test_equal_statements_give_equal_envelopes(key: Path):
    signer = signing.load_signer(key)
    shuffled = json.loads(json.dumps(STATEMENT, sort_keys=True))
    assert signing.sign(STATEMENT, signer) == signing.sign(shuffled, signer)
