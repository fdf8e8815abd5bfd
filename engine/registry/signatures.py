"""Detached Ed25519 signatures of add-ons: who vouches for a file under a name. Needs ``pip install 'diffplan[sign]'``.

A signature covers what does not change during an add-on's life (:func:`statement`), not its stage or tenants, and lies in a file of
its own beside the catalogue, one for each add-on and signer. The engine does not look at signatures: ``diffplan addons verify`` does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.catalogue import SHA256, CatalogueEntry
from engine.json_records import read_json
from traces.problems import InputError, Problem, one_problem

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

KEY_BYTES_MAX: Final = 64 * 2**10
PEM_BLOCK: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\s*", re.DOTALL)
SIGNED: Final = ("id", "kind", "architecture", "bytes", "name", "version", "file", "owner", "licence", "source")


@dataclass(frozen=True, slots=True)
class Trusted:
    """A public key that an operator trusts, and its short name: the first 16 digits of its sha256."""

    key_id: str
    key: Ed25519PublicKey


def statement(entry: CatalogueEntry) -> bytes:
    """What is signed: one spelling in JSON of the fields ``SIGNED``."""
    plain = {"what": "diffplan add-on, 1", **{name: getattr(entry, name) for name in SIGNED}}
    return json.dumps(plain, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")


def signatures_folder(path: Path) -> Path:
    """Where the signatures for a catalogue file are."""
    return path.with_name(f"{path.name}.signatures")


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """An unencrypted PEM key that only its owner can read, as ``openssl genpkey -algorithm ed25519`` writes it.

    Raises:
        InputError: it is not, or the package ``cryptography`` is missing.
    """
    _need_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    allowed = "an unencrypted Ed25519 key in PEM"
    repair = "Make one with: openssl genpkey -algorithm ed25519 -out KEY.pem"
    data = _key_file(path, allowed, repair)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise one_problem(str(path), "can be read by others", "mode 0600", f"chmod 600 {path}")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise one_problem(str(path), "is no key that can be used", allowed, repair) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise one_problem(str(path), f"is of type {type(key).__name__}", allowed, repair)
    return key


def read_trusted_keys(path: Path) -> tuple[Trusted, ...]:
    """Public keys in PEM, one after the other, as ``openssl pkey -pubout`` writes them.

    Raises:
        InputError: there is none, one is of another kind, or the package ``cryptography`` is missing.
    """
    _need_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    allowed, repair = "public Ed25519 keys in PEM", "Make one with: openssl pkey -in KEY.pem -pubout"
    blocks = PEM_BLOCK.findall(_key_file(path, allowed, repair))
    if not blocks:
        raise one_problem(str(path), "holds no public key", allowed, repair)
    trusted = []
    for number, block in enumerate(blocks, 1):
        try:
            key = load_pem_public_key(block)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise one_problem(f"{path} key {number}", "cannot be read", allowed, repair) from None
        if not isinstance(key, Ed25519PublicKey):
            raise one_problem(f"{path} key {number}", f"is of type {type(key).__name__}", allowed, repair)
        trusted.append(Trusted(key_id(key), key))
    return tuple(trusted)


def key_id(key: Ed25519PublicKey) -> str:
    """A short name of a public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(path: Path, entry: CatalogueEntry, key: Ed25519PrivateKey) -> Path:
    """Writes the signature of an add-on of a catalogue file; returns its path.

    Raises:
        InputError: the add-on's id is not the sha256 of a file, so that a signature would say nothing; or nothing can be
            written there.
    """
    if not SHA256.fullmatch(entry.id):
        raise one_problem(
            entry.title,
            f"has the id {entry.id!r}",
            "the sha256 of its file as id",
            "Add the file with `diffplan addons add`.",
        )
    name = key_id(key.public_key())
    plain = {
        "schema_version": 1, "key_id": name, "statement": json.loads(statement(entry)),
        "signature": base64.b64encode(key.sign(statement(entry))).decode("ascii"),
    }  # fmt: skip
    target = signatures_folder(path) / f"{entry.id}.{name}.json"
    beside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(exist_ok=True)
        beside.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="ascii")
        beside.replace(target)
    except OSError as error:
        raise one_problem(
            str(target), f"cannot be written: {error.strerror}", "a writable folder", "Check it."
        ) from None
    return target


def unsigned(path: Path, entries: Sequence[CatalogueEntry], trusted: Sequence[Trusted]) -> Iterator[Problem]:
    """Add-ons that no trusted key has signed as the catalogue has them; those without a file of their own are left out.

    Only a signature's bytes count; what its file says beside them is for people.
    """
    from cryptography.exceptions import InvalidSignature

    for entry in entries:
        if not SHA256.fullmatch(entry.id):
            continue
        wrong = []
        for signer in trusted:
            file = signatures_folder(path) / f"{entry.id}.{signer.key_id}.json"
            if not file.exists():
                continue
            try:
                signer.key.verify(_signature(file), statement(entry))
                break
            except InvalidSignature:
                wrong.append(f"the signature by {signer.key_id} is not of this entry")
            except InputError as error:
                wrong.append(error.problems[0].what)
        else:
            yield Problem(
                entry.title, "; ".join(wrong) or "has no signature",
                f"one by {' or '.join(signer.key_id for signer in trusted[:5])}", "Sign it, or retire it.",
            )  # fmt: skip


def _signature(file: Path) -> bytes:
    plain: Any = read_json(file)
    text = plain.get("signature") if isinstance(plain, dict) else None
    try:
        return base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except ValueError:
        raise one_problem(str(file), "holds no signature in base64") from None


def _key_file(path: Path, allowed: str, repair: str) -> bytes:
    try:
        if not path.is_file():
            raise one_problem(str(path), "is no file", allowed, repair)
        with path.open("rb") as file:
            data = file.read(KEY_BYTES_MAX + 1)
    except OSError as error:
        raise one_problem(str(path), f"cannot be read: {error.strerror}", allowed, repair) from None
    if len(data) > KEY_BYTES_MAX:
        raise one_problem(str(path), f"has more than {KEY_BYTES_MAX} bytes", allowed, repair)
    return data


def _need_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError:
        raise one_problem(
            "signatures", "need the package 'cryptography', which is not installed",
            repair="Install it with: pip install 'diffplan[sign]'",
        ) from None  # fmt: skip
