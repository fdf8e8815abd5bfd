"""Which side of a traffic split a request belongs to: a fixed function of who asks and of the stated shares.

A key is hashed into one of 10,000 buckets; variants own consecutive runs of buckets in the order in which they are listed.
So a key stays on its side while shares stay, and if the last share grows only keys that move to it change sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from traces.problems import InputError, Problem

N_BUCKETS: Final = 10_000
N_VARIANTS_MAX: Final = 16
NAME_CHARACTERS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Variant:
    """One side of a split."""

    name: str
    share: float
    """Of the traffic, in steps of 1/10000."""
    engine: str = "main"
    """Name of the engine (allocation) that serves it."""
    add_ons: Mapping[str, str] = field(default_factory=dict)
    """Add-on or model named in a request, to what it means on this side: ``{"ink": "ink@2"}``."""

    @property
    def n_buckets(self) -> int:
        """Buckets that it owns."""
        return round(self.share * N_BUCKETS)


@dataclass(frozen=True, slots=True)
class Split:
    """All sides; shares add up to 1."""

    variants: tuple[Variant, ...] = (Variant("main", 1.0),)
    salt: str = ""
    """Changes who is on which side; two experiments with different salts are independent."""

    def variant_of(self, key: str) -> Variant:
        """The side of a key: the same one for the same salt and shares, on any machine."""
        bucket = bucket_of(key, self.salt)
        edge = 0
        for variant in self.variants:
            edge += variant.n_buckets
            if bucket < edge:
                return variant
        raise AssertionError(f"the shares cover {edge} of {N_BUCKETS} buckets")  # check_split refuses such a split

    def to_plain(self) -> dict[str, Any]:
        """JSON values; the inverse of :func:`split_from_plain`."""
        variants = [
            {"name": v.name, "share": v.share, "engine": v.engine, "add_ons": dict(v.add_ons)} for v in self.variants
        ]
        return {"salt": self.salt, "variants": variants}


def bucket_of(key: str, salt: str = "") -> int:
    """0..9999 from SHA-256. The modulo's bias is below 1e-15: 2^64 buckets' worth of hash over 10^4."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % N_BUCKETS


def sticky_key(tenant_id: str, user: str, request_id: str) -> str:
    """A user stays on one side; without ``user`` every request is drawn anew. Tenants' users are told apart."""
    return f"user\0{tenant_id}\0{user}" if user else f"request\0{request_id}"


def split_from_plain(plain: object, engines: Mapping[str, Any], where: str = "split") -> Split:
    """Builds a split from decoded JSON.

    Args:
        engines: Names that a variant may send its traffic to.

    Raises:
        InputError: with every problem found: unknown fields, shares that do not add up to 1, an engine that is not there.
    """
    problems: list[Problem] = []

    def refuse(place: str, what: str, allowed: str, repair: str = "Set it.") -> None:
        problems.append(Problem(f"{where} {place}".rstrip(), what, allowed, repair))

    top = _table(plain, {"salt", "variants"}, "", refuse)
    salt = top.get("salt", "")
    if not isinstance(salt, str) or len(salt) > NAME_CHARACTERS_MAX:
        refuse("salt", f"got {salt!r}", f"a text of at most {NAME_CHARACTERS_MAX} characters")
        salt = ""
    items = top.get("variants")
    if not isinstance(items, list) or not 1 <= len(items) <= N_VARIANTS_MAX:
        refuse("variants", f"got {items!r:.200}", f"a list of 1..{N_VARIANTS_MAX} variants")
        items = []
    variants: list[Variant] = []
    for index, item in enumerate(items):
        place = f"variants[{index}]"
        table = _table(item, {"name", "share", "engine", "add_ons"}, place, refuse)
        name, share, engine = table.get("name"), table.get("share"), table.get("engine", "main")
        add_ons = table.get("add_ons", {})
        n_before = len(problems)
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX or not name.isprintable():
            refuse(f"{place}.name", f"got {name!r:.80}", f"1..{NAME_CHARACTERS_MAX} printable characters")
        elif any(name == variant.name for variant in variants):
            refuse(f"{place}.name", f"got {name!r} a second time", "every name once", "Rename one.")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            refuse(f"{place}.share", f"got {share!r:.80}", "a number from 0 to 1")
        elif Fraction(str(share)) * N_BUCKETS % 1:
            refuse(f"{place}.share", f"got {share!r}", f"a multiple of 1/{N_BUCKETS}", "Round it.")
        if not isinstance(engine, str) or engine not in engines:
            refuse(f"{place}.engine", f"got {engine!r:.80}", f"one of {sorted(engines)}")
        if not isinstance(add_ons, dict) or not all(
            isinstance(k, str) and isinstance(v, str) for k, v in add_ons.items()
        ):
            refuse(f"{place}.add_ons", f"got {add_ons!r:.80}", "an object of texts")
        if len(problems) == n_before:
            variants.append(Variant(str(name), float(share or 0.0), str(engine), dict(add_ons)))
    if not problems:
        total = sum(variant.n_buckets for variant in variants)
        if total != N_BUCKETS:
            refuse("variants", f"shares add up to {total / N_BUCKETS}", "1", "Set the last one to the rest.")
    if problems:
        raise InputError(problems)
    return Split(tuple(variants), salt)


def _table(plain: object, known: set[str], place: str, refuse: Any) -> Mapping[str, Any]:
    if not isinstance(plain, dict):
        refuse(place, f"got {type(plain).__name__}", "a JSON object")
        return {}
    for key in sorted(set(plain) - known):
        refuse(f"{place}.{key}".lstrip("."), "is not a known field", f"one of {sorted(known)}", "Remove or rename it.")
    return plain
