"""The sidebar: which scenario and profile, and what the visitor changes about them; kept in the address so that a link says it all."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import streamlit as st

from calibrate.profile import LatencyProfile
from calibrate.profile_file import load_profile, shipped_profiles
from dashboards import link, uploads
from dashboards.plain_text import escaped
from dashboards.settings import UPLOAD, Settings
from dashboards.words import say, translated
from planner.prices import Price, age_warning, find_price, shipped_tables
from planner.scenario import SAMPLE_PREFIX, Scenario, load_scenario, resolve, to_yaml
from planner.strict_yaml import parse_strict
from traces.problems import InputError, one_problem

FACTOR_MAX: Final = 100_000.0
LATENCY_S_MAX: Final = 86_400.0
PRICE_MAX: Final = 10_000.0
NUMBERS: Final = {"factor": FACTOR_MAX, "slo": LATENCY_S_MAX, "attainment": 100.0, "price": PRICE_MAX}
"""Fields of the address that hold a number, each from 0 to its bound; the scenario's own declaration judges them further."""


class UnansweredError(Exception):
    """Something is still to be chosen; says what."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the visitor asks: one scenario, complete, and where its relative names are found."""

    scenario: Scenario
    folder: Path
    profile: LatencyProfile
    price: Price


@dataclass(frozen=True, slots=True)
class _Defaults:
    """The scenario's own values, where the fields start and go back to when another one is chosen."""

    identity: str
    values: dict[str, Any]


def ask(settings: Settings) -> Choices:
    """Draws the sidebar.

    Raises:
        InputError: what is chosen cannot be planned; the fields stay, so that it can be repaired.
        UnansweredError: a file is still to be chosen.
    """
    with st.sidebar:
        st.header(say("side.question"), anchor=False)
        scenario, brings_trace = _ask_scenario(settings)
        profile_name, profile = _ask_profile(settings, scenario)
        folder = uploads.session_folder()
        st.subheader(say("side.what_if"), anchor=False)
        values = {"factor": scenario.traffic.scale_factor, "slo": scenario.slo.latency_s}
        values["attainment"] = round(100 * scenario.slo.attainment_ratio, 6)
        _start_at(_Defaults(f"{st.session_state['scenario']} {to_yaml(scenario)}", values))
        factor = _number("factor", 1.0)
        latency_s = _number("slo", 1.0)
        attainment = _number("attainment", 0.5)
        price = _ask_price(scenario, profile, folder)
        _put_link(brings_trace)
    if factor is None or latency_s is None or attainment is None:
        raise one_problem("Question", "a field is empty", "a number in each", "Fill it in at the sidebar")
    question = _changed(scenario, profile_name, factor, latency_s, round(attainment / 100, 8), price)
    return Choices(question, folder, profile, price)


def _put_link(brings_trace: bool) -> None:
    state = st.session_state
    has_upload = UPLOAD in (state["scenario"], state["profile"]) or brings_trace
    link.put(**{key: state[key] for key in ("scenario", "profile") if state[key] != UPLOAD})
    link.put(**{key: state.get(key) for key in NUMBERS})
    st.caption(say("side.link.uploads" if has_upload else "side.link"))


def _choose(key: str, label: str, options: list[str], preferred: str, help_text: str) -> str:
    """A select box that starts at the link's choice, then at ``preferred``."""
    if key not in st.session_state:
        wanted = link.choice(key, options)
        starts = [name for name in (wanted, preferred) if name in options]
        st.session_state[key] = starts[0] if starts else options[0]
    words = {UPLOAD: say("side.own_file")}
    chosen: str = st.selectbox(
        label, options, key=key, format_func=lambda name: words.get(name, name), help=help_text, persist_state="session"
    )
    return chosen


def _ask_scenario(settings: Settings) -> tuple[Scenario, bool]:
    files = settings.scenario_files()
    chosen = _choose("scenario", say("side.scenario"), [*files, UPLOAD], "", say("side.scenario.help"))
    upload = None
    if chosen == UPLOAD:
        limit = say("side.scenario_file.help", mib=uploads.SCENARIO_BYTES_MAX // 2**20)
        upload = st.file_uploader(
            say("side.scenario_file"), ["yaml", "yml"], key="scenario_file", help=limit, max_upload_size=1
        )
    with st.expander(say("side.own_traffic")):
        limits = uploads.TRACE_LIMITS
        trace_upload = st.file_uploader(
            say("side.trace_file"), ["parquet", "csv", "jsonl"], key="trace_file", max_upload_size=limits.file_bytes // 2**20,
            help=say("side.trace_file.help", mib=limits.file_bytes // 2**20, rows=f"{limits.rows:,}"),
        )  # fmt: skip
    if chosen == UPLOAD:
        if upload is None:
            raise UnansweredError(say("side.choose_scenario"))
        scenario = uploads.scenario_of(upload, brings_trace=trace_upload is not None)
    else:
        scenario = anchored(*load_scenario(str(files[chosen])))
    if trace_upload is not None:
        name = uploads.keep_trace(trace_upload, uploads.session_folder())
        scenario = scenario.model_copy(update={"traffic": scenario.traffic.model_copy(update={"trace": name})})
    return scenario, trace_upload is not None


def anchored(scenario: Scenario, folder: Path) -> Scenario:
    """The scenario with its relative file names made absolute, so that it means the same from any folder."""

    def absolute(reference: str, is_shipped: bool) -> str:
        return reference if is_shipped else str(resolve(reference, folder))

    trace, table, catalogue = scenario.traffic.trace, scenario.prices.table, scenario.add_ons.catalogue
    name = scenario.profile.name
    add_ons = scenario.add_ons.model_copy(update={"catalogue": catalogue and absolute(catalogue, is_shipped=False)})
    traffic = scenario.traffic.model_copy(update={"trace": absolute(trace, trace.startswith(SAMPLE_PREFIX))})
    prices = scenario.prices.model_copy(update={"table": absolute(table, table in shipped_tables())})
    is_name = name in shipped_profiles() or not resolve(name, folder).is_file()
    profile = scenario.profile.model_copy(update={"name": absolute(name, is_name)})
    return scenario.model_copy(update={"add_ons": add_ons, "traffic": traffic, "prices": prices, "profile": profile})


def _ask_profile(settings: Settings, scenario: Scenario) -> tuple[str, LatencyProfile]:
    """The profile, and the name under which the scenario finds it from the session's folder."""
    files = settings.profile_files()
    preferred = next((name for name, path in files.items() if scenario.profile.name in (name, str(path))), "")
    chosen = _choose("profile", say("side.profile"), [*files, UPLOAD], preferred, say("side.profile.help"))
    if chosen != UPLOAD:
        if chosen in shipped_profiles():
            return chosen, load_profile(chosen)
        return str(files[chosen]), load_profile(str(files[chosen]))
    limit = say("side.profile_file.help", mib=uploads.PROFILE_BYTES_MAX // 2**20)
    upload = st.file_uploader(
        say("side.profile_file"),
        ["json"],
        key="profile_file",
        help=limit,
        max_upload_size=uploads.PROFILE_BYTES_MAX // 2**20,
    )
    if upload is None:
        none = "" if files else say("side.no_profile")
        raise UnansweredError(none + say("side.choose_profile"))
    return uploads.keep_profile(upload, uploads.session_folder())


def _start_at(defaults: _Defaults) -> None:
    """Puts the fields to the scenario's values when another one is chosen; the first time the link's values win."""
    state = st.session_state
    is_other = state.get("_defaults_of") != defaults.identity
    for key, value in defaults.values.items():
        if is_other or key not in state:
            said = link.number(key, 0.0, NUMBERS[key])
            state[key] = value if said is None else said
    state["_defaults_of"] = defaults.identity


def _number(key: str, step: float) -> float | None:
    value = st.number_input(
        say(f"side.{key}"), value=None, min_value=0.0, max_value=NUMBERS[key], step=step, format="%.10g", key=key,
        help=say(f"side.{key}.help"), persist_state="session",
    )  # fmt: skip
    return None if value is None else float(value)


def _ask_price(scenario: Scenario, profile: LatencyProfile, folder: Path) -> Price:
    wanted = scenario.prices
    table = shipped_tables().get(wanted.table, resolve(wanted.table, folder))
    listed: Price | None = None
    unlisted: InputError | None = None
    try:
        listed = find_price(table, profile.gpu_kind, wanted.purchase)
    except InputError as error:
        unlisted = error  # matters only if no price is given either
    start = (
        wanted.price_usd_per_gpu_hour
        if wanted.price_usd_per_gpu_hour is not None
        else listed and listed.price_usd_per_gpu_hour
    )
    identity = f"{st.session_state['_defaults_of']} {profile.gpu_kind}"
    if st.session_state.get("_price_of") != identity or "price" not in st.session_state:
        said = link.number("price", 0.0, PRICE_MAX)
        st.session_state["price"] = start if said is None else said
        st.session_state["_price_of"] = identity
    given = st.number_input(
        say("side.price"), value=None, min_value=0.0, max_value=PRICE_MAX, step=0.1, format="%.2f", key="price", persist_state="session",
        placeholder=say("side.price.unknown"), help=say("side.price.help"),
    )  # fmt: skip
    if given is None:
        raise unlisted or one_problem("GPU price", "is empty", "a price in USD per GPU-hour", "Give it in the sidebar")
    if listed is not None and given == listed.price_usd_per_gpu_hour:
        st.caption(
            escaped(
                say(
                    "side.price.quote",
                    purchase=translated(wanted.purchase.replace("_", " ")),
                    gpu=profile.gpu_kind,
                    date=listed.as_of,
                )
            )
        )
        stale = age_warning(listed, datetime.date.today())
        if stale:
            st.warning(escaped(translated(stale)))
        return listed
    beside = say("side.price.listed", price=f"{listed.price_usd_per_gpu_hour:.2f}") if listed else ""
    st.caption(escaped(say("side.price.own") + beside))
    return find_price(table, profile.gpu_kind, wanted.purchase, float(given))


def _changed(
    scenario: Scenario, profile_name: str, factor: float, latency_s: float, attainment_ratio: float, price: Price
) -> Scenario:
    """The scenario with the visitor's values, checked again by its own declaration."""
    own_price = None if price.as_of else price.price_usd_per_gpu_hour  # a quote of the table keeps its source and date
    update = {
        "traffic": scenario.traffic.model_copy(update={"scale_factor": factor}),
        "slo": scenario.slo.model_copy(update={"latency_s": latency_s, "attainment_ratio": attainment_ratio}),
        "profile": scenario.profile.model_copy(update={"name": profile_name}),
        "prices": scenario.prices.model_copy(update={"price_usd_per_gpu_hour": own_price}),
    }
    return parse_strict(to_yaml(scenario.model_copy(update=update)), Scenario, "question")
