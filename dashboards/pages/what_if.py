"""The page What-if: sliders, two fleets side by side, what binds, and cost against latency; answered by the compiled tier while dragging."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final

import pandas as pd
import streamlit as st

from dashboards import fleets, link, plan_job
from dashboards.elements import draw_chart, draw_csv, draw_grades, draw_problem
from dashboards.fleets import Fleets
from dashboards.here import Here
from dashboards.plain_text import escaped
from dashboards.planning import LAST, compute_plan, known_plan
from dashboards.uploads import session_folder
from dashboards.what_if_charts import frontier, frontier_words
from dashboards.what_if_job import changed_of, ground_of, guess_of, outcome_of
from dashboards.words import say, translated
from planner.candidates import Counts
from planner.explain import usd
from planner.fast import NotModelledError
from planner.scenario import Scenario
from planner.what_if import Change, Ground, Outcome, Terms, sizes_around, trace_with_share
from traces.problems import InputError
from traces.writer import write_trace

TRAFFIC: Final = (0.1, 5.0)
PRICE_USD: Final = (0.1, 20.0)
LATENCY_S: Final = (0.5, 60.0)
"""Bounds of the sliders; those of price and latency grow with the question's own."""
HALF: Final = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class _Moved:
    """Where the sliders and choices stand."""

    change: Change
    terms: Terms
    baseline: str
    topology: str
    counts: Counts


def draw(here: Here) -> None:
    """The whole page below the frame."""
    if here.asked is None:
        return
    scenario, folder = here.asked.scenario, here.asked.folder
    key = plan_job.plan_key(scenario, folder)
    try:
        with st.spinner(say("what_if.laying_out"), show_time=True):
            ground = ground_of(key, scenario, folder)
            at_hand = _fleets(here, ground, key)
        moved = _ask(here, ground, at_hand)
        began_s = time.perf_counter()
        changed = changed_of(key, moved.change, ground)
        asked = [(topology, counts) for topology, counts in at_hand.items() if topology != moved.baseline]
        asked = [(moved.baseline, at_hand[moved.baseline]), *asked, (moved.topology, moved.counts)]
        found = [outcome_of(key, moved.change, *one, moved.terms, ground, changed) for one in asked]
        took_s = time.perf_counter() - began_s
    except InputError as error:
        draw_problem(say("what_if.cannot"), str(error))
        return
    except NotModelledError as error:
        draw_problem(say("what_if.not_modelled"), str(error))
        return
    baseline, candidate = found[0], found[-1]
    _draw_pair(baseline, candidate)
    st.caption(say("what_if.took", ms=f"{1000 * took_s:.0f}", n=len(changed.workload), runs=len(asked)))
    place = st.container()
    _draw_search(here, ground, moved)
    _draw_table(found)
    with place:
        around = sizes_around(moved.counts, 0, scenario.search.gpus_max)
        curve = [
            outcome_of(key, moved.change, moved.topology, counts, moved.terms, ground, changed) for counts in around
        ]
        st.subheader(say("what_if.frontier"), anchor=False)
        words = frontier_words(found, candidate, moved.terms)
        draw_chart(frontier(found, curve, candidate, moved.terms), words, "frontier")
        st.caption(say("what_if.frontier.note"))


def _fleets(here: Here, ground: Ground, key: str) -> Fleets:
    """The fleets at hand: the address's, then the plan's, then a first guess; another question brings its own."""
    state, asked = st.session_state, here.asked
    assert asked is not None  # noqa: S101  draw has looked
    if state.get("_what_if_of") != key:
        is_first = "_what_if_of" not in state
        state["_what_if_of"] = key
        own = {"wt": 1.0, "ws": asked.scenario.slo.latency_s, "wp": asked.price.price_usd_per_gpu_hour, "wc": 100.0}
        for name, value in own.items():
            said = link.number(name, 0.0, 86_400.0) if is_first else None
            state[f"_{name}"] = value if said is None else said
        for name in [name for name in state if str(name).startswith("what_if_w")]:
            del state[name]
        state["_fleets"] = None
        said_text = link.text("fleets") if is_first else None
        if said_text is not None:
            state["_fleets"] = fleets.from_text(said_text, ground)
            if state["_fleets"] is None:
                link.ignore("fleets", said_text)
    terms = Terms(asked.scenario.slo.latency_s, asked.scenario.slo.attainment_ratio, asked.price.price_usd_per_gpu_hour)
    if state["_fleets"] is None:
        plan = known_plan(here)
        known = fleets.of_plan(plan, ground) if plan is not None else {}
        state["_fleets"] = {
            topology: known.get(topology) or guess_of(key, topology, terms, ground) for topology in ground.shapes
        }  # fmt: skip
    found: Fleets = state["_fleets"]
    link.put(fleets=fleets.to_text(found))
    return found


def _ask(here: Here, ground: Ground, at_hand: Fleets) -> _Moved:
    """Draws the choices of topology and the sliders."""
    asked = here.asked
    assert asked is not None  # noqa: S101  draw has looked
    names = list(at_hand)
    left, right = st.columns(2)
    with left:
        baseline = _choose("baseline", names, names[0])
    with right:
        topology = _choose("topology", names, names[-2] if len(names) > 2 else names[-1])
    slo_s, price_usd = asked.scenario.slo.latency_s, asked.price.price_usd_per_gpu_hour
    first, second = st.columns(3), st.columns(3)
    with first[0]:
        traffic = _slide("wt", *TRAFFIC, 0.05, "×%.2f")
    with first[1]:
        top_s = min(86_400.0, max(LATENCY_S[1], 4 * slo_s))
        latency_s = _slide("ws", min(LATENCY_S[0], slo_s), top_s, 0.5 if top_s <= 600 else 5.0, "%.1f s")
    with first[2]:
        price = _slide("wp", min(PRICE_USD[0], price_usd), max(PRICE_USD[1], 2 * price_usd), 0.05, "$%.2f")
    with second[0]:
        share = _slide("wc", 0.0, 100.0, 1.0, "%.0f %%", is_disabled=not ground.has_controlnets)
    own = at_hand[topology]
    with second[1]:
        base = _count("wn", topology, own[0])
    with second[2]:
        others = _controlnet_counts(topology, own[1:])
    terms = Terms(latency_s, asked.scenario.slo.attainment_ratio, price)
    return _Moved(Change(traffic, share / 100), terms, baseline, topology, (base, *others))


def _choose(name: str, options: list[str], preferred: str) -> str:
    key = f"what_if_{name}"
    if key not in st.session_state:
        st.session_state[key] = link.choice(name, options) or preferred
    chosen: str = st.selectbox(
        say(f"what_if.{name}"), options, key=key, help=say(f"what_if.{name}.help"), persist_state="session"
    )
    link.put(**{name: chosen})
    return chosen


def _slide(name: str, low: float, high: float, step: float, form: str, *, is_disabled: bool = False) -> float:
    key = f"what_if_{name}"
    if key not in st.session_state:
        st.session_state[key] = min(max(float(st.session_state[f"_{name}"]), low), high)
    value = float(
        st.slider(
            say(f"what_if.{name}"), low, high, step=step, format=form, key=key, disabled=is_disabled, help=say(f"what_if.{name}.help"),
            persist_state="session",
        )
    )  # fmt: skip
    st.session_state[f"_{name}"] = value
    link.put(**{name: value})
    return value


def _count(name: str, topology: str, own: int, pool: str = "") -> int:
    """GPUs of one pool of the candidate; starts at the fleet at hand."""
    key = f"what_if_{name}_{topology}_{pool}"
    high = max(2 * own, own + 8)
    if key not in st.session_state:
        said = link.number(name, 1, high)
        st.session_state[key] = own if said is None else int(said)
    words = say(f"what_if.{name}", topology=escaped(topology), pool=escaped(pool))
    value = int(st.slider(words, 1, high, step=1, key=key, help=say(f"what_if.{name}.help"), persist_state="session"))
    link.put(**{name: value})
    return value


def _controlnet_counts(topology: str, own: Counts) -> Counts:
    if not own:
        st.slider(
            say("what_if.wk.none"),
            0,
            1,
            0,
            key=f"what_if_none_{topology}",
            disabled=True,
            help=say("what_if.wk.none.help"),
        )
        return ()
    if len(own) == 1:
        return (_count("wk", topology, own[0]),)
    total = _count("wk", topology, sum(own))
    return spread_over(own, total)


def spread_over(own: Counts, total: int) -> Counts:
    """As many replicas in all over several pools in the proportion of ``own``, at least one each; largest remainders first."""
    total = max(total, len(own))
    exact = [n * total / sum(own) for n in own]
    found = [max(1, math.floor(x)) for x in exact]
    order = sorted(range(len(own)), key=lambda k: (math.floor(exact[k]) - exact[k], k))
    k = 0
    while sum(found) < total:
        found[order[k % len(order)]] += 1
        k += 1
    while sum(found) > total:
        found[max(range(len(found)), key=lambda j: (found[j], -j))] -= 1
    return tuple(found)


def _draw_pair(baseline: Outcome, candidate: Outcome) -> None:
    """Both fleets in one table, then what holds each of them up."""

    def cells(one: Outcome) -> list[str]:
        return [
            escaped(_pools(one)), f"{one.n_gpus}", usd(one.cost_usd_per_month), _money(one.cost_usd_per_1000_images), _seconds(one.latency_p50_s),
            _seconds(one.latency_p95_s), f"{one.attainment_ratio:.2%}", f"**{say('verdict.meets_slo' if one.is_kept else 'verdict.misses_slo')}**",
        ]  # fmt: skip

    gaps = (
        ("{:+.0f}", candidate.n_gpus - baseline.n_gpus),
        ("{:+,.0f} USD", candidate.cost_usd_per_month - baseline.cost_usd_per_month),
        ("{:+,.2f} USD", candidate.cost_usd_per_1000_images - baseline.cost_usd_per_1000_images),
        ("{:+.2f} s", candidate.latency_p50_s - baseline.latency_p50_s),
        ("{:+.2f} s", candidate.latency_p95_s - baseline.latency_p95_s),
        (f"{{:+.2f}} {say('what_if.points')}", 100 * (candidate.attainment_ratio - baseline.attainment_ratio)),
    )
    table = pd.DataFrame(
        {
            f"{say('what_if.baseline')}: {escaped(baseline.topology)}": cells(baseline),
            f"{say('what_if.topology')}: {escaped(candidate.topology)}": cells(candidate),
            say("what_if.difference"): ["", *(form.format(gap) if math.isfinite(gap) else "–" for form, gap in gaps), ""],
        },
        index=[
            say("plan.pools"), say("plan.gpus"), say("plan.cost"), say("plan.per_1000"), say("plan.latency", quantile="p50"), say("plan.latency", quantile="p95"),
            say("plan.in_time"), say("plan.promise"),
        ],
    )  # fmt: skip
    st.table(table.map(lambda text: text.replace("$", "\\$")), alt=say("what_if.side_by_side"))
    for title, one in (("baseline", baseline), ("topology", candidate)):
        icon = ":material/check_circle:" if one.is_kept else ":material/block:"
        st.markdown(f"{icon} **{say(f'what_if.{title}')}**: {_binds(one)}")
    draw_grades([grade for one in (baseline, candidate) for grade in one.grades], say("plan.these_figures"))


def _pools(one: Outcome) -> str:
    return " + ".join(f"{n} {name}" for name, n in zip(one.pool_names, one.counts, strict=True))


def _binds(one: Outcome) -> str:
    """What holds the fleet up, or will next, in words."""
    if one.is_saturated and not one.is_kept:
        return say("what_if.bottleneck.saturated")
    if one.bottleneck == "pool":
        at = one.pool_names.index(one.busiest_pool)
        busy = one.busy_ratios[at]
        key = "what_if.bottleneck.pool" if busy >= HALF else "what_if.bottleneck.room"
        return say(key, pool=escaped(one.busiest_pool), busy=f"{busy:.0%}")
    return say(f"what_if.bottleneck.{one.bottleneck}")


def _money(value_usd: float) -> str:
    return f"${value_usd:,.2f}" if math.isfinite(value_usd) else "–"


def _seconds(value_s: float) -> str:
    return f"{value_s:.2f} s" if math.isfinite(value_s) else "–"


def _draw_table(found: list[Outcome]) -> None:
    st.subheader(say("what_if.all"), anchor=False)
    rows = []
    for position, one in enumerate(found):
        is_last = position == len(found) - 1
        rows.append({
            say("plan.topology"): one.topology + (f" ({say('what_if.topology')})" if is_last else ""),
            say("plan.pools"): _pools(one),
            say("plan.promise"): say("verdict.meets_slo" if one.is_kept else "verdict.misses_slo"),
            f"{say('plan.cost')} (USD)": round(one.cost_usd_per_month, 2),
            f"{say('plan.per_1000')} (USD)": round(one.cost_usd_per_1000_images, 2) if math.isfinite(one.cost_usd_per_1000_images) else None,
            "p50 (s)": round(one.latency_p50_s, 2),
            "p95 (s)": round(one.latency_p95_s, 2),
            "p99 (s)": round(one.latency_p99_s, 2),
            f"{say('plan.in_time')} (%)": round(100 * one.attainment_ratio, 2),
            say("what_if.binds"): _binds(one).replace("\\", ""),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    st.dataframe(frame, hide_index=True, alt=say("what_if.all"))
    draw_csv(frame, "what-if.csv")


def _draw_search(here: Here, ground: Ground, moved: _Moved) -> None:
    """The button that searches under what the sliders say, and what it found."""
    asked = here.asked
    assert asked is not None  # noqa: S101  draw has looked
    st.subheader(say("what_if.search"), anchor=False)
    st.caption(say("what_if.search.note"))
    if st.button(say("what_if.search.button"), key="search_again", type="primary", icon=":material/travel_explore:"):
        question = _moved_question(asked.scenario, ground, moved)
        plan = compute_plan(
            question, asked.folder if moved.change.controlnet_share == 1 else session_folder(), here.settings.jobs
        )
        if plan is not None:
            found = fleets.of_plan(plan, ground)
            st.session_state["_searched"] = (plan.record.sentence, found)
    if moved.change.controlnet_share == 1 and (moved.change.traffic_ratio, moved.terms.latency_s, moved.terms.price_usd_per_gpu_hour) != (
        1.0, asked.scenario.slo.latency_s, asked.price.price_usd_per_gpu_hour,
    ):  # fmt: skip
        st.button(
            say("what_if.adopt"), key="adopt", on_click=_adopt, help=say("what_if.adopt.help"), icon=":material/push_pin:",
            args=(asked.scenario.traffic.scale_factor * moved.change.traffic_ratio, moved.terms.latency_s, moved.terms.price_usd_per_gpu_hour),
        )  # fmt: skip
    if "_searched" in st.session_state:
        sentence, found = st.session_state["_searched"]
        with st.container(border=True):
            st.text(translated(sentence))
            if found:
                st.button(say("what_if.take"), key="take", on_click=_take, args=(found,), help=say("what_if.take.help"))


def _moved_question(scenario: Scenario, ground: Ground, moved: _Moved) -> Scenario:
    """The question that the sliders ask, complete; a changed share of ControlNets becomes a trace of the session's own."""
    factor = scenario.traffic.scale_factor * moved.change.traffic_ratio
    traffic = scenario.traffic.model_copy(update={"scale_factor": factor})
    if moved.change.controlnet_share < 1:
        cut = trace_with_share(ground.trace, moved.change.controlnet_share, scenario.simulation.seed)
        name = f"trace-share-{100 * moved.change.controlnet_share:.0f}-{st.session_state['_what_if_of'][:16]}.parquet"
        write_trace(cut, session_folder() / name)
        traffic = traffic.model_copy(update={"trace": name})
    slo = scenario.slo.model_copy(update={"latency_s": moved.terms.latency_s})
    prices = scenario.prices
    if moved.terms.price_usd_per_gpu_hour != st.session_state.get("price"):
        prices = prices.model_copy(update={"price_usd_per_gpu_hour": moved.terms.price_usd_per_gpu_hour})
    return scenario.model_copy(update={"traffic": traffic, "slo": slo, "prices": prices})


def _adopt(factor: float, latency_s: float, price_usd: float) -> None:
    """Makes what the sliders say the question of all pages; the traffic slider then stands at one again."""
    st.session_state.update({"factor": factor, "slo": latency_s, "price": price_usd})
    st.session_state.pop(LAST, None)


def _take(found: Fleets) -> None:
    """Makes the fleets that a search found the fleets at hand."""
    st.session_state["_fleets"] = {**st.session_state["_fleets"], **found}
    for name in [name for name in st.session_state if str(name).startswith(("what_if_wn", "what_if_wk"))]:
        del st.session_state[name]
