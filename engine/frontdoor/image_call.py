"""From the decoded JSON of ``POST /v1/images/generations`` to a checked :class:`~engine.serving.job.Job`.

The fields are those of the OpenAI images API plus what SDXL services need (``docs/engine.md`` lists them). Every field is
known, typed and bounded; a request with several mistakes is told all of them at once.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from engine.allocation import AddOnKind
from engine.frontdoor.image_header import NotAnImageError, read_header
from engine.frontdoor.settings import Defaults, Limits
from engine.serving.job import ControlUse, Job, LoraUse
from traces.problems import InputError, Problem

FIELDS: Final = frozenset({
    "model", "prompt", "n", "size", "response_format", "user", "negative_prompt", "steps", "guidance_scale", "seed",
    "controlnets", "loras", "deadline_s", "priority",
})  # fmt: skip
NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "background": ("auto",), "moderation": ("auto",), "output_format": ("png",), "quality": ("auto", "standard"),
    "stream": (False,),
}  # fmt: skip
"""Fields of the OpenAI API that are accepted with the values that mean what is done anyway."""
SEED_MAX: Final = 2**63 - 1
SIZE: Final = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
PRIORITY_RANGE: Final = (-100, 100)
Resolve = Callable[[AddOnKind, str], str]
"""Kind and the text of a request to an id of the catalogue; raises InputError."""


@dataclass(frozen=True, slots=True)
class ImageCall:
    """A request as it was asked, before names are resolved: they depend on the side of a traffic split."""

    job: Job
    """Ids are still the texts of the request."""
    user: str


def read_call(
    plain: object, request_id: str, tenant_id: str, limits: Limits, defaults: Defaults, default_model: str
) -> ImageCall:
    """Checks a request against the limits.

    Raises:
        InputError: with every problem found; ``where`` is the field.
    """
    fields = _Fields(plain, limits)
    fields.known()
    prompt = fields.text("prompt", limits.prompt_characters_max, None)
    negative = fields.text("negative_prompt", limits.prompt_characters_max, "")
    user = fields.text("user", limits.user_characters_max, "")
    model = fields.text("model", limits.user_characters_max, default_model)
    n_images = fields.whole("n", 1, limits.n_images_max, 1)
    width_px, height_px = fields.size(defaults, n_images)
    fields.response_format()
    seed = fields.whole("seed", 0, SEED_MAX, None)
    job = Job(
        request_id=request_id,
        base_model_id=model,
        prompt=prompt,
        negative_prompt=negative or None,
        n_images=n_images,
        n_steps=fields.whole("steps", 1, limits.n_steps_max, defaults.n_steps),
        width_px=width_px,
        height_px=height_px,
        guidance_scale=fields.number("guidance_scale", 0.0, limits.guidance_scale_max, defaults.guidance_scale),
        controls=fields.controls(width_px, height_px),
        loras=fields.loras(),
        seed=secrets.randbits(32) if seed is None else seed,
        tenant_id=tenant_id,
        priority=fields.whole("priority", *PRIORITY_RANGE, 0),
        deadline_s=fields.number("deadline_s", 0.001, limits.deadline_s_max, min(defaults.deadline_s, limits.deadline_s_max)),
        blobs=tuple(fields.blobs),
    )  # fmt: skip
    fields.finish()
    return ImageCall(job, user)


class _Fields:
    """Reads one JSON object field by field and collects problems; a bad value is replaced by a harmless one until then."""

    def __init__(self, plain: object, limits: Limits, place: str = "") -> None:
        self._problems: list[Problem] = []
        self._place = place
        self._limits = limits
        self.blobs: list[bytes] = []
        self._table: Mapping[str, Any] = {}
        if isinstance(plain, dict):
            self._table = plain
        else:
            self._refuse(place or "body", f"got {_kind(plain)}", "a JSON object")

    def finish(self) -> None:
        if self._problems:
            raise InputError(self._problems)

    def known(self, known: frozenset[str] = FIELDS) -> None:
        for name, value in self._table.items():
            if name in known:
                continue
            if not self._place and name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    self._refuse(name, f"got {_seen(value)}", f"{_seen(NEUTRAL[name][0])}, or nothing", "Remove it.")
                continue
            self._refuse(
                self._at(name[:80]), "is not a known field", f"one of {', '.join(sorted(known))}", "Remove it."
            )

    def text(self, name: str, characters_max: int, default: str | None) -> str:
        """A field that is absent, null or empty has its default; ``None`` as default makes it required."""
        value = self._table.get(name)
        if value is None or value == "":
            if default is None:
                self._refuse(self._at(name), "is missing", "a text", "Add it.")
            return default or ""
        if not isinstance(value, str):
            self._refuse(self._at(name), f"got {_kind(value)}", "a text")
        elif len(value) > characters_max:
            self._refuse(self._at(name), f"has {len(value)} characters", f"at most {characters_max}", "Shorten it.")
        elif any("\ud800" <= character <= "\udfff" for character in value):
            self._refuse(self._at(name), "holds half a surrogate pair", "Unicode text", "Encode it anew.")
        else:
            return value
        return ""

    def whole(self, name: str, least: int, most: int, default: Any) -> Any:
        value = self._table.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._refuse(self._at(name), f"got {_seen(value)}", f"a whole number, {least}..{most}")
            return default
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self._table.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            self._refuse(self._at(name), f"got {_seen(value)}", f"a number, {least:g}..{most:g}")
            return default
        return float(value)

    def size(self, defaults: Defaults, n_images: int) -> tuple[int, int]:
        limits = self._limits
        value = self._table.get("size")
        sides = defaults.width_px, defaults.height_px
        match = SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is not None:
            sides = int(match[1]), int(match[2])
        elif value is not None and value != "auto":
            self._refuse("size", f"got {_seen(value)}", "WIDTHxHEIGHT in pixels, as 1024x1024")
        multiple = limits.size_multiple_px
        if any(side % multiple or not limits.side_px_min <= side <= limits.side_px_max for side in sides):
            allowed = f"multiples of {multiple} from {limits.side_px_min} to {limits.side_px_max}"
            self._refuse("size", f"got {sides[0]}x{sides[1]}", allowed, "Round it.")
        elif math.prod(sides) * n_images > limits.pixels_max:
            allowed = f"at most {limits.pixels_max} in all images together"
            got = f"asks for {math.prod(sides) * n_images} pixels"
            self._refuse("size", got, allowed, "Ask for fewer or smaller images.")
        return sides

    def response_format(self) -> None:
        value = self._table.get("response_format")
        if value == "url":
            self._refuse(
                "response_format", "got 'url'", "'b64_json': no image is stored, so there is no address to give"
            )
        elif value not in (None, "b64_json"):
            self._refuse("response_format", f"got {_seen(value)}", "'b64_json'")

    def controls(self, width_px: int, height_px: int) -> tuple[ControlUse, ...]:
        uses: list[ControlUse] = []
        for item in self._items("controlnets", self._limits.n_controlnets_max):
            item.known(frozenset({"id", "image", "scale", "start", "end"}))
            name = item.text("id", self._limits.user_characters_max, None)
            scale = item.number("scale", -self._limits.scale_max, self._limits.scale_max, 1.0)
            start, end = item.number("start", 0.0, 1.0, 0.0), item.number("end", 0.0, 1.0, 1.0)
            if start >= end:
                item._refuse(item._at("start"), f"got {start:g} and end {end:g}", "start < end", "Swap them.")
            if name and any(use.controlnet_id == name for use in uses):
                item._refuse(item._at("id"), f"names {name!r} a second time", "each ControlNet once", "Remove one.")
            image = item.image(width_px, height_px)
            if image is not None:
                self.blobs.append(image)
            self._problems.extend(item._problems)
            uses.append(ControlUse(name, scale, start, end, None if image is None else len(self.blobs) - 1))
        return tuple(uses)

    def loras(self) -> tuple[LoraUse, ...]:
        uses: list[LoraUse] = []
        for item in self._items("loras", self._limits.n_loras_max):
            item.known(frozenset({"id", "scale"}))
            name = item.text("id", self._limits.user_characters_max, None)
            scale = item.number("scale", -self._limits.scale_max, self._limits.scale_max, 1.0)
            if name and any(use.lora_id == name for use in uses):
                item._refuse(item._at("id"), f"names {name!r} a second time", "each LoRA once", "Remove one.")
            self._problems.extend(item._problems)
            uses.append(LoraUse(name, scale))
        return tuple(uses)

    def image(self, width_px: int, height_px: int) -> bytes | None:
        """The control image's bytes; a ``data:`` prefix is allowed."""
        value = self._table.get("image")
        where = self._at("image")
        most = self._limits.control_image_bytes_max
        if not isinstance(value, str) or not value:
            self._refuse(where, f"got {_kind(value)}" if value else "is missing", "an image file in base64", "Add it.")
            return None
        if value.startswith("data:"):
            value = value[:100].partition(",")[2] + value[100:]
        if len(value) > most * 4 // 3 + 4:
            self._refuse(where, f"has about {len(value) * 3 // 4} bytes", f"at most {most}", "Compress it.")
            return None
        try:
            header = read_header(base64.b64decode(value, validate=True))
        except (binascii.Error, ValueError):
            self._refuse(where, "is not base64", "an image file in base64", "Encode it.")
            return None
        except NotAnImageError as error:
            self._refuse(where, str(error), repair="")
            return None
        if (header.width_px, header.height_px) != (width_px, height_px):
            got = f"has {header.width_px}x{header.height_px} pixels"
            self._refuse(where, got, f"the size of the request, {width_px}x{height_px}", "Resize it.")
            return None
        return header.content

    def _items(self, name: str, n_max: int) -> list[_Fields]:
        value = self._table.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > n_max:
            got = f"got {len(value)} items" if isinstance(value, list) else f"got {_kind(value)}"
            self._refuse(name, got, f"a list of at most {n_max}")
            return []
        return [_Fields(item, self._limits, f"{name}[{index}]") for index, item in enumerate(value)]

    def _at(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def _refuse(self, where: str, what: str, allowed: str = "", repair: str = "Set it.") -> None:
        self._problems.append(Problem(where, what, allowed, repair))


def _kind(value: object) -> str:
    """What JSON calls the type of a decoded value."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _seen(value: object) -> str:
    """A value as an error message may show it: short, and never a whole image."""
    return repr(value)[:80] if isinstance(value, str | int | float | bool) and len(str(value)) <= 80 else _kind(value)
