"""Detached signatures: who vouches for a file under its name, and what takes the signature away."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.catalogue import CatalogueEntry, read_catalogue
from engine.registry.changes import update_catalogue
from engine.registry.signatures import sign, signatures_folder, statement


def test_without_the_library_a_sentence_says_what_to_install(
    enter: Callable, addons: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(1)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    done = addons("sign", "ink@1", "--key", tmp_path / "key.pem")
    assert done.code == 2
    assert "pip install 'diffplan[sign]'" in done.err


def test_the_statement_covers_what_does_not_change_and_not_stage_or_tenants() -> None:
    entry = CatalogueEntry("1" * 64, "lora", name="ink", version="1", file="ink.safetensors", licence="MIT")
    assert statement(entry) == statement(replace(entry, stage="retired", tenants=("red",)))
    for field, value in {"id": "2" * 64, "name": "ink2", "version": "2", "licence": "CC0-1.0", "file": "x"}.items():
        assert statement(entry) != statement(replace(entry, **{field: value}))


class TestWithTheLibrary:
    """Each test makes keys of its own."""

    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("cryptography", reason="signatures need the extra 'sign' (package cryptography)")

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
        """A private and a public key file by name."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        def make(name: str) -> tuple[Path, Path]:
            key = Ed25519PrivateKey.generate()
            private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
            private.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                )
            )
            private.chmod(0o600)
            public.write_bytes(
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
            )
            return private, public

        return make

    def test_a_signed_add_on_passes_also_after_its_stage_has_changed(
        self, enter: Callable, addons: Callable, store: Path, keys: Callable
    ) -> None:
        private, public = keys("ann")
        enter(1)
        assert addons("sign", "ink@1", "--key", private).code == 0
        addons("promote", "ink@1")
        assert addons("verify", "--store", store, "--trusted", public).out == "as admitted, and signed: 1\n"

    def test_an_add_on_that_no_trusted_key_signed_is_named(
        self, enter: Callable, addons: Callable, store: Path, keys: Callable, tmp_path: Path
    ) -> None:
        (ann, ann_public), (eve, eve_public) = keys("ann"), keys("eve")
        enter(1)
        enter(2)
        addons("sign", "ink@1", "--key", ann)
        addons("sign", "ink@2", "--key", eve)
        done = addons("verify", "--store", store, "--trusted", ann_public)
        assert done.code == 2
        assert done.err.startswith("ink@2: has no signature, needs one by")
        assert "ink@1" not in done.err
        both = tmp_path / "both.pem"
        both.write_bytes(ann_public.read_bytes() + eve_public.read_bytes())
        assert addons("verify", "--store", store, "--trusted", both).code == 0

    def test_a_changed_entry_or_signature_no_longer_passes(
        self, enter: Callable, addons: Callable, store: Path, keys: Callable, catalogue: Path
    ) -> None:
        private, public = keys("ann")
        enter(1)
        addons("sign", "ink@1", "--key", private)
        (entry,) = read_catalogue(catalogue).entries.values()
        forged = replace(entry, licence="MIT")
        update_catalogue(catalogue, lambda known: replace(known, entries={entry.id: forged}), who="eve", what="licence")
        assert "is not of this entry" in addons("verify", "--store", store, "--trusted", public).err
        (file,) = signatures_folder(catalogue).iterdir()
        for text in ('{"signature": "AAAA"}', '{"signature": "not base64"}', "[]", "{", '{"signature": 5}'):
            file.write_text(text)
            done = addons("verify", "--store", store, "--trusted", public)
            assert done.code == 2
            assert "ink@1" in done.err

    def test_ids_that_are_no_sha256_cannot_be_signed(self, keys: Callable, catalogue: Path) -> None:
        from engine.registry.signatures import read_private_key

        with pytest.raises(Exception, match="needs the sha256 of its file as id"):
            sign(catalogue, CatalogueEntry("canny", "controlnet"), read_private_key(keys("ann")[0]))

    def test_a_key_file_that_is_none_is_refused(
        self, enter: Callable, addons: Callable, store: Path, keys: Callable, tmp_path: Path
    ) -> None:
        private, public = keys("ann")
        enter(1)
        private.chmod(0o644)
        assert "can be read by others, needs mode 0600" in addons("sign", "ink@1", "--key", private).err
        private.chmod(0o600)
        private.write_bytes(public.read_bytes())
        assert "is no key that can be used" in addons("sign", "ink@1", "--key", private).err
        public.write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
        assert "key 1: cannot be read" in addons("verify", "--store", store, "--trusted", public).err
        public.write_text("")
        assert "holds no public key" in addons("verify", "--store", store, "--trusted", public).err
        assert "is no file" in addons("verify", "--store", store, "--trusted", tmp_path).err

    def test_a_signature_file_holds_all_that_another_program_needs_to_check_it(
        self, enter: Callable, addons: Callable, keys: Callable, catalogue: Path
    ) -> None:
        import base64

        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        private, public = keys("ann")
        enter(1)
        addons("sign", "ink@1", "--key", private)
        (file,) = signatures_folder(catalogue).iterdir()
        plain = json.loads(file.read_text())
        said = json.dumps(plain["statement"], sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
        load_pem_public_key(public.read_bytes()).verify(base64.b64decode(plain["signature"]), said)  # type: ignore[union-attr, call-arg]
