"""A system whose exact behaviour is known, as a strict YAML file: what ``diffplan theory`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from planner.scenario_mechanisms import Table
from planner.strict_yaml import read_strict

SystemKind = Literal["mmc", "mmck", "mg1", "mdc", "priority", "erlang_a", "fork_join", "lru"]
NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "mmc": (), "mmck": ("waiting_places",), "mg1": (), "mdc": (), "priority": ("class_shares",), "erlang_a": ("patience_s",),
    "fork_join": (), "lru": ("popularity", "places"),
}  # fmt: skip
ALLOWED_LAWS: Final[dict[str, tuple[str, ...]]] = {
    "mmc": ("exponential",), "mmck": ("exponential",), "mg1": ("exponential", "constant", "uniform", "profile"),
    "mdc": ("constant", "profile"), "priority": ("exponential", "constant", "uniform"), "erlang_a": ("exponential",),
    "fork_join": ("exponential",), "lru": ("constant",),
}  # fmt: skip


class Service(Table):
    """How long a server is busy with a request."""

    law: Annotated[
        Literal["exponential", "constant", "uniform", "profile"],
        Field(
            description="uniform: from 0 to twice the mean; profile: what a latency profile predicts, its noise included."
        ),
    ]
    mean_s: Annotated[float | None, Field(gt=0, le=3600, description="Not with 'profile'.")] = None
    profile: Annotated[
        str | None, Field(min_length=1, max_length=4096, description="With 'profile': a file beside this one.")
    ] = None
    topology: Annotated[
        Literal["diffusers", "diffusers_tuned", "colocated"], Field(description="With 'profile': which stack's laws.")
    ] = "colocated"
    n_steps: Annotated[int, Field(ge=1, le=1000, description="With 'profile': of every request.")] = 30

    @model_validator(mode="after")
    def _one_source(self) -> Service:
        if (self.law == "profile") != (self.profile is not None) or (self.law == "profile") == (
            self.mean_s is not None
        ):
            raise ValueError(
                "needs either mean_s, or law 'profile' with profile|Give mean_s, or name the profile's file"
            )
        return self


class System(Table):
    """One system, and how long it is simulated."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    description: Annotated[str, Field(max_length=2000)] = ""
    system: SystemKind
    arrivals_per_s: Annotated[float, Field(gt=0, le=1e6, description="Poisson.")]
    n_servers: Annotated[int, Field(ge=1, le=64)] = 1
    service: Service
    waiting_places: Annotated[
        int | None, Field(ge=0, le=1000, description="mmck: requests that may wait; the next is rejected.")
    ] = None
    class_shares: Annotated[
        tuple[float, ...] | None,
        Field(min_length=2, max_length=10, description="priority: share of each class, most urgent first."),
    ] = None
    patience_s: Annotated[
        float | None, Field(gt=0, le=1e6, description="erlang_a: mean of the exponential deadlines.")
    ] = None
    popularity: Annotated[
        tuple[float, ...] | None, Field(min_length=2, max_length=8, description="lru: weight of each LoRA.")
    ] = None
    places: Annotated[int | None, Field(ge=1, le=7, description="lru: LoRAs that the host tier holds.")] = None
    replications: Annotated[int, Field(ge=5, le=1000)] = 20
    n_requests: Annotated[int, Field(ge=100, le=1_000_000, description="Of each replication; the first tenth is not counted.")] = 6000  # fmt: skip
    level: Annotated[
        float, Field(ge=0.5, le=0.99999, description="Of the t-interval: at 0.999 one in a thousand misses by chance.")
    ] = 0.999
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> System:
        needed = NEEDS[self.system]
        for name in ("waiting_places", "class_shares", "patience_s", "popularity", "places"):
            if (getattr(self, name) is None) == (name in needed):
                state = "is missing" if name in needed else "means nothing"
                raise ValueError(
                    f"{name} {state} for system {self.system}|{'Add it' if name in needed else 'Leave it out'}"
                )
        if self.service.law not in ALLOWED_LAWS[self.system]:
            raise ValueError(
                f"service.law is {self.service.law}, {self.system} is exact for {', '.join(ALLOWED_LAWS[self.system])}|Take one of these"
            )
        if self.system in ("mg1", "priority", "fork_join", "lru") and self.n_servers != 1:
            raise ValueError(f"n_servers is {self.n_servers}, {self.system} has 1|Leave it out")
        if self.class_shares is not None and abs(sum(self.class_shares) - 1.0) > 1e-9:
            raise ValueError(f"class_shares sum to {sum(self.class_shares):g}|Make them sum to 1")
        if min(self.class_shares or (1.0,)) <= 0 or min(self.popularity or (1.0,)) <= 0:
            raise ValueError("a share or weight is 0 or less|Make every one larger than 0")
        if self.places is not None and self.places >= len(self.popularity or ()):
            raise ValueError(
                f"places is {self.places} for {len(self.popularity or ())} LoRAs|Hold fewer than there are"
            )
        mean_s = self.service.mean_s
        is_stable = self.system in ("mmck", "erlang_a") or mean_s is None
        if not is_stable and self.arrivals_per_s * (mean_s or 0.0) >= 0.98 * self.n_servers:
            raise ValueError(
                f"the load is {self.arrivals_per_s * (mean_s or 0.0) / self.n_servers:.3g} of the servers, needs less than 0.98"
                "|Lower arrivals_per_s"
            )
        return self


def load_system(path: Path) -> System:
    """Reads one; raises :class:`InputError` with every problem, file and line."""
    return read_strict(path, System)


def shipped_systems() -> list[Path]:
    """The files of examples/theory, in a checkout; none elsewhere."""
    return sorted((Path(__file__).resolve().parent.parent / "examples" / "theory").glob("*.yaml"))
