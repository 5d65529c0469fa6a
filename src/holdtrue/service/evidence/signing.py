"""Signatures: DSSE envelopes with Ed25519, through securesystemslib."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey  # pyright: ignore[reportPrivateImportUsage]

from holdtrue.errors import HoldtrueError, RunError, SpecError
from holdtrue.models.digest import tree_digest
from holdtrue.service.settings import ServiceSettings

PAYLOAD_TYPE = "application/vnd.in-toto+json"
VARIABLE = "HOLDTRUE_SIGNING_KEY_PEM"
"""The environment variable that may hold the private key itself, in PEM."""
HOME_KEY = "signing-key.pem"
"""The file in a service's home with the key that it made for itself."""


class SignatureError(HoldtrueError, ValueError):
    """An envelope is not what its key would have signed."""


def load_signer(path: Path) -> CryptoSigner:
    """Return the signer of the key in ``HOLDTRUE_SIGNING_KEY_PEM`` if that is set, else of the PEM file.

    Raises:
        SpecError: no key there, or none of Ed25519.
    """
    text = os.environ.get(VARIABLE, "").encode()
    where = VARIABLE if text else str(path)
    if not text:
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise SpecError(f"{path}: no such key; set {VARIABLE}, or make one with `holdtrue serve`") from None
        except OSError as error:
            raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SpecError(f"{where}: not an unencrypted private key in PEM: {type(error).__name__}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SpecError(f"{where}: receipts are signed with Ed25519; this is another kind of key")
    return CryptoSigner(key)


def signer_of(settings: ServiceSettings) -> CryptoSigner:
    """Return a service's signer; its key is made at the first call where the settings name none.

    Raises:
        SpecError: as :func:`check_key`.
    """
    check_key(settings)
    path = settings.signing_key or settings.home / HOME_KEY
    if not _is_named(settings):
        make_key(path)
    return load_signer(path)


def check_key(settings: ServiceSettings) -> None:
    """Refuse a key that cannot be read, and a key of this host's own where several hosts may sign.

    Raises:
        SpecError: so; or no key is named, and the database is one that other hosts share.
    """
    if _is_named(settings):
        load_signer(settings.signing_key or settings.home / HOME_KEY)
    elif not settings.is_local:
        raise SpecError(
            "no signing key is named, and the database can be shared by several hosts: each would sign with a key of "
            "its own, and `holdtrue verify` would refuse the receipts of the others. Name one key for all of them: "
            f"HOLDTRUE_SIGNING_KEY is a file's path, {VARIABLE} the key itself. Take {settings.home / HOME_KEY} where "
            "an earlier start has signed with it, or make one: openssl genpkey -algorithm ed25519 -out signing-key.pem"
        )


def _is_named(settings: ServiceSettings) -> bool:
    return settings.signing_key is not None or bool(os.environ.get(VARIABLE))


def make_key(path: Path) -> None:
    """Write a new private key, readable by its owner alone, and its public half beside it as ``NAME.pub``.

    A key that is there stays: two processes that start at once end with the same one.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(private)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # Fails where another process was faster; its key stays.
    except FileExistsError:
        return
    finally:
        draft.unlink()
    path.with_name(f"{path.name}.pub").write_bytes(public_pem(CryptoSigner(key)))


def public_pem(signer: CryptoSigner) -> bytes:
    """Return the public key in PEM: what those who verify need."""
    key = signer.public_key
    assert isinstance(key, SSlibKey)
    raw = bytes.fromhex(key.keyval["public"])
    return Ed25519PublicKey.from_public_bytes(raw).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def sign(statement: Mapping[str, Any], signer: CryptoSigner) -> dict[str, Any]:
    """Return the DSSE envelope of a statement, as JSON values."""
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    envelope = Envelope(payload.encode(), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return envelope.to_dict()


def verify(envelope: Mapping[str, Any], public_key: bytes) -> dict[str, Any]:
    """Return the statement of an envelope that the key signed.

    Args:
        envelope: as :func:`sign` returns it; nothing in it is trusted.
        public_key: PEM.

    Raises:
        SignatureError: another key signed, the content was changed, or this is no envelope.
        SpecError: the public key cannot be read.
    """
    try:
        key = SSlibKey.from_crypto(serialization.load_pem_public_key(public_key))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SpecError("the public key is none in PEM that this can read") from None
    try:
        opened = Envelope.from_dict(json.loads(json.dumps(envelope)))
        opened.verify([key], 1)
    except VerificationError:
        raise SignatureError("the signature does not match: another key signed it, or it was changed since") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise SignatureError(f"this is no signed envelope: {error!r}") from None
    if opened.payload_type != PAYLOAD_TYPE:
        raise SignatureError(f"the envelope holds {opened.payload_type!r}, not {PAYLOAD_TYPE!r}")
    return json.loads(opened.payload)


def payload(envelope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statement of one of our own envelopes, unverified: to issue it anew with more in it."""
    return json.loads(Envelope.from_dict(json.loads(json.dumps(envelope))).payload)


def check_adapter(folder: Path, envelope: Mapping[str, Any], public_key: bytes) -> dict[str, Any]:
    """Return the statement when the key signed it and it speaks of exactly this folder's content.

    Raises:
        SignatureError: as :func:`verify`, or the folder holds anything else than what was signed.
    """
    statement = verify(envelope, public_key)
    found = tree_digest(folder)
    try:
        signed = [subject["digest"]["sha256"] for subject in statement["subject"]]
    except (KeyError, TypeError):
        raise SignatureError("the statement names no subject with a SHA-256") from None
    if signed != [found]:
        raise SignatureError(f"{folder} is not what was signed: its digest is {found}, the receipt's {signed}")
    return statement


def read_envelope(path: Path) -> dict[str, Any]:
    """Return the envelope in a file; ``RunError`` when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such receipt") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: the receipt cannot be read: {error}") from None
