"""What a report says, section by section, from a plan and its return: question, answer, why, evidence, risks, roadmap, ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from planner.explain import gpus_words, pools_words, usd
from planner.money.roi import Roi
from planner.plan_record import PhaseRow, PlanRecord
from planner.report_blocks import Block, Bullets, Card, Cards, Grid, Heading, Paragraph, Section
from planner.report_charts import (
    cost_against_latency,
    cost_bars,
    latency_of,
    phase_bars,
    promised_quantile,
    racks,
    saving_bars,
)
from planner.report_choices import checkpoint_blocks, kind_blocks, purchasing_blocks, settings_blocks
from planner.report_decisions import add_on_blocks, autoscaling_blocks
from planner.report_playbook import playbook
from planner.report_risks import headroom_words, risks
from planner.report_words import (
    TOPOLOGY_HEADER,
    at_least_words,
    doubt_rows,
    grades_words,
    money_words,
    plain_notes,
    probability_words,
    profile_notes,
    seconds_words,
    share_words,
    topology_cells,
    words_of_test,
)
from planner.sentences import chance_words, decision
from planner.waterfall import holds_more

COMPETITORS: Final = {
    "diffusers": "the stock Diffusers pipeline, one process a GPU",
    "diffusers_tuned": "the same, compiled, with LoRAs fused",
    "colocated": "this engine; ControlNets and LoRAs on the GPU of the base model",
    "decoupled": "this engine; ControlNets on GPUs of their own that base replicas share",
    "decoupled_cfg2": "as decoupled, and the two halves of guidance on two GPUs",
}
ROI_COMMAND: Final = "diffplan roi PLAN --into-plan"


def answer(plan: PlanRecord, roi: Roi | None) -> Section:
    """The plan's own sentence, the decision sentences, and the figures at a glance."""
    blocks: list[Block] = [Paragraph(plan.sentence, "answer")]
    if roi is not None:
        said = decision(roi)
        blocks += [Paragraph(said.english, "answer", twin="ja"), Paragraph(said.japanese, "answer", "ja")]
    if plan.recommended is not None:
        blocks.append(Cards(tuple(_cards(plan, roi))))
    if plan.infeasible is not None:
        found = plan.infeasible
        nearest = found.nearest
        if found.nearest_cost_usd_per_month is not None:
            nearest += f" ({usd(found.nearest_cost_usd_per_month)} a month)"
        blocks += [
            Heading("What binds"),
            Bullets((f"binding: {found.binds}", f"why: {found.why}", f"nearest feasible plan: {nearest}")),
        ]
    return Section("Answer", tuple(blocks))


def _cards(plan: PlanRecord, roi: Roi | None) -> Iterable[Card]:
    assert plan.recommended is not None  # noqa: S101 - answer has seen to it
    row = plan.row(plan.recommended)
    short = promised_quantile(plan)
    pools = pools_words(row)
    yield Card("recommended", row.topology, pools if "base" in pools else f"{pools} base")
    yield Card("GPUs", f"{row.n_gpus}", plan.ids.profile_gpu_kind)
    yield Card(
        "GPU cost a month",
        usd(row.cost_usd_per_month),
        f"{money_words(row.cost_usd_per_1000_images)} per 1000 images in time",
    )
    for label, words, promised in (
        (f"{short} latency", seconds_words(latency_of(row, short)), f"promised {plan.slo_latency_s:g} s"),
        ("in time", share_words(row.slo_attainment_ratio), f"promised {100 * plan.slo_attainment_ratio:g} %"),
    ):
        value, _, interval = words.partition(" (")
        yield Card(
            label,
            value,
            f"{100 * plan.confidence:g} % interval {interval.rstrip(')')}; {promised}" if interval else promised,
        )
    if roi is not None and roi.returns is not None:
        found = roi.returns
        low, high = usd(found.spread.saving_p05_usd_per_month), usd(found.spread.saving_p95_usd_per_month)
        yield Card("saving a month", usd(found.saving_usd_per_month), f"90 % of the draws: {low} to {high}")
        back = "not within the horizon" if found.payback_months is None else f"{found.payback_months:.1f} months"
        chance = chance_words(found.spread.probability_npv_positive)[0]
        yield Card("payback", back, f"{chance} of the draws have a positive net present value")


def question(plan: PlanRecord) -> Section:
    """The traffic, the promise, the price, and what competed."""
    ids, traffic = plan.ids, plan.traffic
    asked = (
        f"Which GPUs should run what, so that {100 * plan.slo_attainment_ratio:g} % of the offered requests have their image within "
        f"{plan.slo_latency_s:g} s, for the least money? On {ids.profile_gpu_kind} at ${ids.price_usd_per_gpu_hour:.2f} per GPU-hour "
        f"({ids.purchase.replace('_', ' ')}) compete:"
    )

    def figure(value: float | None, words: str) -> str:
        return "–" if value is None else format(value, words)

    rows = (
        (
            f"trace {traffic.trace}", f"{traffic.n_requests_before:,}", f"{traffic.mean_per_s_before:.4g}",
            figure(traffic.interarrival_cv_before, ".3g"), f"{traffic.peak_to_mean_before:.3g}",
        ),
        (
            f"planned for (×{traffic.scale_factor:g}, {traffic.shift_law})", f"{traffic.n_requests:,}", f"{traffic.mean_per_s:.4g}",
            figure(traffic.interarrival_cv, ".3g"), f"{traffic.peak_to_mean:.3g}",
        ),
    )  # fmt: skip
    return Section(
        "Question",
        (
            Paragraph(asked),
            Bullets(tuple(f"{row.topology}: {COMPETITORS[row.topology]}" for row in plan.topologies)),
            Grid(("traffic", "requests", "mean per s", "inter-arrival CV", "peak to mean"), rows),
            Paragraph(f"Source: {traffic.source}", "muted"),
            Bullets(traffic.notes),
        ),
    )


def why(plan: PlanRecord) -> Section | None:
    """Where the saving comes from, what limits the fleet, and which GPUs run what; None for a plan that recommends nothing."""
    if plan.recommended is None:
        return None
    row = plan.row(plan.recommended)
    blocks: list[Block] = []
    if plan.waterfall is not None:
        blocks.append(Heading("Where the saving comes from"))
        bars = saving_bars(plan)
        if bars is not None:
            blocks.append(bars)
        steps = tuple(
            (
                step.topology, step.what, "–" if step.n_gpus is None else str(step.n_gpus), usd(step.cost_usd_per_month),
                usd(step.saving_usd_per_month), step.note,
            )
            for step in plan.waterfall.steps
        )  # fmt: skip
        blocks.append(Grid(("step", "what", "GPUs", "$/month", "saving/month", "note"), steps))
        if plan.waterfall.baseline:
            apart = (
                "what kernels earn is not credited to decoupling."
                if not any(
                    holds_more(step.note) for step in plan.waterfall.steps if step.saving_usd_per_month is not None
                )
                else "where a row between has no price, the note says whose part is in the step."
            )
            blocks.append(
                Paragraph(
                    f"Sum of the steps: {usd(plan.waterfall.saving_usd_per_month)} a month ({100 * plan.waterfall.saving_ratio:.1f} % of "
                    f"{plan.waterfall.baseline}). Each row is compared with the one before it: {apart}"
                )
            )
    blocks += [Heading("Which GPUs run what"), racks(row), Heading("What limits it"), Paragraph(plan.limited_by)]
    headroom = headroom_words(row)
    if headroom:
        blocks.append(Paragraph(headroom))
    blocks += [*autoscaling_blocks(plan.autoscaling, row), *add_on_blocks(plan.add_ons)]
    blocks += [
        *checkpoint_blocks(plan.checkpoints),
        *purchasing_blocks(plan.purchasing),
        *settings_blocks(plan.settings),
    ]
    return Section("Why", tuple(blocks))


def evidence(plan: PlanRecord) -> Section:
    """The competitors side by side, how sure the choice is, what would change it, and how well the numbers are known."""
    names = [row.topology for row in plan.topologies]
    chosen = names.index(plan.recommended) if plan.recommended is not None else None
    blocks: list[Block] = [
        Paragraph(
            f"Means over {plan.n_replications} repetitions or more, with {100 * plan.confidence:g} % intervals in parentheses.",
            "muted",
        ),
        Grid(TOPOLOGY_HEADER, tuple(topology_cells(row) for row in plan.topologies), chosen),
        Bullets(tuple(f"{row.topology}: {row.why}" for row in plan.topologies if row.verdict != "meets_slo")),
    ]
    blocks += [chart for chart in (cost_against_latency(plan), cost_bars(plan)) if chart is not None]
    plain = tuple(
        f"{row.topology}: p50 {seconds_words(row.plain_latency_p50_s)}, p99 {seconds_words(row.plain_latency_p99_s)}"
        for row in plan.topologies
        if row.plain_latency_p50_s.mean is not None
    )
    if plain:
        blocks += [Heading("Requests without add-ons, which must not pay for those with"), Bullets(plain)]
    blocks += [*kind_blocks(plan.kinds), *_selection(plan), *_flips(plan)]
    grades = tuple(f"{row.topology}: {grades_words(row)}" for row in plan.topologies)
    blocks += [Heading("How well the latencies are known"), Bullets((*grades, *profile_notes(plan)))]
    return Section("Evidence", tuple(blocks))


def _selection(plan: PlanRecord) -> list[Block]:
    blocks: list[Block] = []
    if plan.recommended is not None:
        blocks += [Heading("How sure the choice is"), Paragraph(f"Runner-up: {plan.runner_up or 'none'}.")]
    if plan.selection is not None:
        own = plan.selection.chosen
        is_own = own.topology == plan.recommended
        who = "The recommendation" if is_own else f"{own.topology}, which costs as much as the recommendation,"
        rows = tuple(
            (
                words, str(row.n_gpus), usd(row.cost_usd_per_month), share_words(row.slo_attainment_ratio), str(row.n_repetitions),
                probability_words(row.probability_meets_slo),
            )
            for words, row in doubt_rows(plan)
        )  # fmt: skip
        blocks += [
            Paragraph(
                f"{who} keeps the promise with probability {probability_words(own.probability_meets_slo)}. That "
                "no cheaper allocation that came near keeps it too: "
                f"{at_least_words(plan.selection.probability_of_correct_selection)}. Checked: {plan.selection.checked_by}."
            ),
            Grid(
                ("allocation", "GPUs", "$/month", "in time", "repetitions", "keeps the promise with probability"),
                rows,
                0 if is_own else None,
            ),
        ]
    if plan.alternatives:
        close = tuple(
            f"{row.topology}, {gpus_words(row.n_gpus)} ({', '.join(f'{n} {name}' for name, n in row.pools.items())}): "
            f"{usd(row.cost_usd_per_month)} a month, {100 * row.slo_attainment_ratio:.2f} % in time"
            for row in plan.alternatives
        )
        blocks += [Paragraph("Close in cost (one simulation each, from the search):"), Bullets(close)]
    return blocks


def _flips(plan: PlanRecord) -> list[Block]:
    if not plan.flip_points:
        return []
    rows = tuple(
        (
            flip.what, "never" if flip.winner_until is None else f"at ×{flip.winner_until:.2g}", flip.then or "–",
            f"×{flip.looked_from:g} … ×{flip.looked_to:g}", flip.simulated or flip.how,
        )
        for flip in plan.flip_points
    )  # fmt: skip
    return [
        Heading("What would change the choice"),
        Paragraph("All else as planned, a factor of 1 is what was planned for. Laws that are not listed change nothing between ×0.5 and ×2.", "muted"),
        Grid(("what", "another topology is cheaper", "which", "looked from … to", "rests on"), rows),
    ]  # fmt: skip


def risk_section(plan: PlanRecord, roi: Roi | None) -> Section:
    """What could make the plan wrong, and what its numbers leave out."""
    blocks: list[Block] = []
    found = risks(plan, roi)
    if found:
        blocks.append(Grid(("risk", "shown by", "do"), tuple((risk.what, risk.shown_by, risk.do) for risk in found)))
    blocks += [Heading("What the numbers leave out or take for granted"), Bullets(plain_notes(plan))]
    return Section("Risks", tuple(blocks))


def roadmap(plan: PlanRecord) -> Section | None:
    """The phases; what to type where there are none yet; None for a plan that recommends nothing."""
    if plan.recommended is None:
        return None
    if not plan.roadmap:
        said = (
            "The phases from today's fleet to the recommendation are not simulated yet. They take seconds to a minute:"
        )
        return Section("Roadmap", (Paragraph(said), Paragraph(ROI_COMMAND, "command")))
    rows = tuple(
        (
            f"{phase.number}. {phase.name}", "yes" if phase.is_worthwhile else "no", str(phase.n_gpus_today), str(phase.n_gpus_new),
            usd(phase.cost_usd_per_month), seconds_words(phase.latency_p50_s), seconds_words(phase.latency_p95_s),
            share_words(phase.slo_attainment_ratio),
        )
        for phase in plan.roadmap
    )  # fmt: skip
    header = ("phase", "worthwhile", "GPUs as today", "new GPUs", "$/month", "p50", "p95", "in time")
    bars = phase_bars(plan.roadmap)
    blocks: list[Block] = [Grid(header, rows), *([bars] if bars is not None else [])]
    for phase in plan.roadmap:
        blocks += [Heading(f"{phase.number}. {phase.name.capitalize()}"), Paragraph(phase.what)]
        if phase.is_worthwhile:
            blocks.append(Bullets(tuple(_phase_lines(phase))))
    return Section("Roadmap", tuple(blocks))


def _phase_lines(phase: PhaseRow) -> Iterable[str]:
    if phase.watch:
        yield f"watch: {'; '.join(phase.watch)}"
    yield f"go on when: {phase.gate}"
    yield f"roll back when: {phase.roll_back}"
    if phase.topology is not None:
        yield f"test: {words_of_test(phase)}"


def playbook_section(plan: PlanRecord, roi: Roi | None) -> Section | None:
    """The playbook with this plan's answers; None for a plan that recommends nothing."""
    chapters = playbook(plan, roi, plan.roadmap)
    if not chapters:
        return None
    blocks: list[Block] = []
    for number, chapter in enumerate(chapters, start=1):
        blocks += [Heading(f"{number}. {chapter.title}"), Bullets(chapter.lines)]
    return Section("Playbook", tuple(blocks))


def reproduction(plan: PlanRecord) -> Section:
    """The ids and the command that give the same numbers again."""
    ids = plan.ids
    as_of = f" of {ids.price_as_of}" if ids.price_as_of else ""
    rows = (
        ("scenario", f"{ids.scenario_name} (sha256 {ids.scenario_sha256[:12]})"),
        ("requests", ids.trace_digest),
        ("profile", f"{ids.profile_name} ({ids.profile_id}, {ids.profile_gpu_kind}; raw data sha256 {ids.profile_raw_sha256[:12]})"),
        ("price", f"${ids.price_usd_per_gpu_hour:.2f} per GPU-hour, {ids.purchase}, table {ids.price_table_id}{as_of}; {ids.price_source}"),
        ("hours billed a month", f"{ids.hours_per_month:g}"),
        ("seed", str(ids.seed)),
        ("diffplan", ids.diffplan_version),
    )  # fmt: skip
    return Section(
        "What reproduces this",
        (
            Grid(("", ""), rows),
            Paragraph("In the plan's folder, with this version and profile, these give the same numbers again:"),
            Paragraph("diffplan plan scenario.resolved.yaml --out AGAIN", "command"),
            *([Paragraph(ROI_COMMAND.replace("PLAN", "AGAIN"), "command")] if plan.recommended is not None else []),
        ),
    )
