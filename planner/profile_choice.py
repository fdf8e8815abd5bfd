"""Which latency profile a scenario means by a name: a shipped one, a file, or one of them carried over to another GPU."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Final

from calibrate.profile import LatencyProfile
from calibrate.profile_file import load_profile, shipped_profiles
from calibrate.roofline import transfer_profile
from traces.problems import InputError, Problem

CARRIED: Final = " as "
"""``h200 as l40s``: profile h200, carried over to the L40S by datasheet rates, as ``diffplan calibrate transfer`` does."""
WORKER_LAWS: Final = ("engine.controlnet_step", "engine.controlnet_load", "engine.controlnet_read")
"""Laws of the work that a ControlNet worker does itself; everything else of a request is its base replica's."""


def profile_of(reference: str, folder: Path) -> LatencyProfile:
    """The profile; relative files start from ``folder``.

    Raises:
        InputError: it cannot be read, or there is no datasheet of the GPU it is carried over to.
    """
    source, gpu = _parts(reference)
    if gpu:
        return _carried_over(_place(source, folder), gpu)
    return load_profile(_place(source, folder))


def absolute_reference(reference: str, folder: Path) -> str:
    """The reference with its file, if it has one, named so that it can be read from any folder."""
    source, gpu = _parts(reference)
    if source in shipped_profiles():
        return reference
    path = Path(source).expanduser()
    whole = str((path if path.is_absolute() else folder / path).resolve())
    return f"{whole}{CARRIED}{gpu}" if gpu else whole


def file_of(reference: str, folder: Path) -> Path:
    """The file that the reference rests on."""
    source, _ = _parts(reference)
    return shipped_profiles().get(source, Path(_place(source, folder)))


def is_carried_over(profile: LatencyProfile) -> bool:
    """Whether it was carried over by datasheet rates from another GPU's: every law is assumed."""
    return "transferred_from" in profile.fingerprint


def with_workers_of(base: LatencyProfile, worker: LatencyProfile) -> LatencyProfile:
    """The profile of base replicas on one GPU kind whose ControlNets run on workers of another.

    The workers' forwards, loads and reads are theirs; encoder, decoder, joining and the link are the base's, as the SimPy model takes
    them. The k-th joint draw of one goes with the k-th of the other: profiles carried over from one measurement share its draws.
    """
    own = {name: worker.laws[name] for name in WORKER_LAWS if name in worker.laws}
    keys = tuple(f"{name}:" for name in WORKER_LAWS)
    draws = {key: values for key, values in base.draws.items() if not key.startswith(keys)}
    theirs = {key: values for key, values in worker.draws.items() if key.startswith(keys)}
    n = base.n_draws
    for key, values in theirs.items():
        if n and len(values):
            draws[key] = tuple(values[k % len(values)] for k in range(n))
    rest = {name: law for name, law in base.laws.items() if name not in WORKER_LAWS}
    return dataclasses.replace(base, laws={**rest, **own}, draws=dict(sorted(draws.items())))


def _parts(reference: str) -> tuple[str, str]:
    """The profile's name or file, and the GPU that it is carried over to; empty if it is taken as it is."""
    source, _, gpu = reference.rpartition(CARRIED)
    is_file_name = reference.endswith(".json")  # of which " as " may be a part
    return (reference, "") if is_file_name or not source.strip() or not gpu.strip() else (source.strip(), gpu.strip())


def _place(source: str, folder: Path) -> str:
    if source in shipped_profiles():
        return source
    path = Path(source).expanduser()
    return str(path if path.is_absolute() else folder / path)


@functools.lru_cache(maxsize=16)
def _carried_over(place: str, gpu: str) -> LatencyProfile:
    try:
        return transfer_profile(load_profile(place), gpu)
    except InputError as error:
        raise InputError(
            [Problem(f"profile '{place}{CARRIED}{gpu}'", str(problem)) for problem in error.problems]
        ) from None
