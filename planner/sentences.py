"""The decision in one sentence for a meeting, in English and Japanese, generated from a plan and its return.

Gains are rounded down and costs up to two digits; a range comes with every gain; no probability is given as certainty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.money.roi import Returns, Roi
from planner.plan_record import PlanRecord, TopologyRow


@dataclass(frozen=True, slots=True)
class Decision:
    """The same sentence twice."""

    english: str
    japanese: str


def rounded(value: float, *, is_gain: bool) -> float:
    """Two significant digits, a gain downwards and a cost upwards."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    share = round(value / step, 9)
    return (math.floor(share) if is_gain else math.ceil(share)) * step


def _usd(value: float, *, is_gain: bool) -> str:
    shown = rounded(value, is_gain=is_gain)
    return f"−${-shown:,.0f}" if shown < 0 else f"${shown:,.0f}"


def chance_words(probability: float) -> tuple[str, str]:
    """Never 0 % or 100 %: draws are not the world."""
    if probability > 0.99:
        return "more than 99 %", "99%超"
    if probability < 0.01:
        return "less than 1 %", "1%未満"
    shown = math.floor(100 * probability)
    return f"{shown} %", f"{shown}%"


def decision(roi: Roi) -> Decision:
    """The decision sentence; raises ValueError for a plan that recommends nothing (``make_roi`` refuses it)."""
    plan = roi.plan
    if plan.recommended is None:
        raise ValueError("the plan recommends nothing")
    row = plan.row(plan.recommended)
    if roi.returns is None:
        return _without_saving(roi, row)
    returns = roi.returns
    if not returns.pays:
        return _stay(plan, row, returns)
    return _change(roi, row, returns)


def _promise(plan: PlanRecord) -> tuple[str, str]:
    share, seconds = 100 * plan.slo_attainment_ratio, plan.slo_latency_s
    return f"{share:g} % of the requests within {seconds:g} s", f"リクエストの{share:g}%を{seconds:g}秒以内"


def _kept(plan: PlanRecord, row: TopologyRow) -> tuple[str, str]:
    found = row.slo_attainment_ratio
    if found.mean is None:
        return "", ""
    if found.low == found.high == 1.0:  # the interval knows only what was drawn
        n = plan.n_replications
        return f"no late request in {n} simulated repetitions", f"シミュレーション{n}回で遅延リクエストなし"
    level = 100 * plan.confidence
    # cut, not rounded: 99.996 % is not 100 %
    mean, low, high = (
        math.floor(10_000 * value) / 100 for value in (found.mean, found.low or found.mean, found.high or found.mean)
    )
    return (
        f"{mean:.2f} % in simulation, {level:g} % interval {low:.2f}–{high:.2f} %",
        f"シミュレーションでは{mean:.2f}%、{level:g}%信頼区間{low:.2f}〜{high:.2f}%",
    )


def _basis(plan: PlanRecord, row: TopologyRow) -> tuple[str, str]:
    n_unsure = sum(grade in {"assumed", "extrapolated"} for grade in row.grades.values())
    english = (
        f"This is a simulation of {plan.traffic.duration_s / 3600:.3g} h of traffic, not a measurement in production"
    )
    japanese = f"これは{plan.traffic.duration_s / 3600:.3g}時間分のトラフィックのシミュレーションであり、本番環境での実測ではありません"
    if n_unsure:
        english += f"; {n_unsure} of the {len(row.grades)} latency laws behind it are assumed or extrapolated"
        japanese += f"。根拠となる{len(row.grades)}個のレイテンシ則のうち{n_unsure}個は仮定または外挿です"
    return english + ".", japanese + "。"


def _gpus(n: int) -> str:
    return f"{n} GPU{'' if n == 1 else 's'}"


def _change(roi: Roi, row: TopologyRow, returns: Returns) -> Decision:
    plan, spread = roi.plan, returns.spread
    saving = _usd(returns.saving_usd_per_month, is_gain=True)
    low, high = (
        _usd(spread.saving_p05_usd_per_month, is_gain=True),
        _usd(spread.saving_p95_usd_per_month, is_gain=True),
    )
    once = _usd(returns.investment_usd, is_gain=False)
    chance_en, chance_ja = chance_words(spread.probability_npv_positive)
    promise_en, promise_ja = _promise(plan)
    kept_en, kept_ja = _kept(plan, row)
    basis_en, basis_ja = _basis(plan, row)
    from_gpus, to_gpus, old = returns.today_gpus, row.n_gpus or 0, returns.today_topology
    if roi.assumptions.today.n_gpus is not None:  # stated by its owner; else it is the fewest GPUs that would do
        start_en = f"Moving from {_gpus(from_gpus)} of {old} to"
        start_ja = f"{old}のGPU {from_gpus}台から{row.topology}のGPU {to_gpus}台へ移行すると"
    else:
        start_en = f"Against the {_gpus(from_gpus)} that {old} would need,"
        start_ja = f"{old}で必要となるGPU {from_gpus}台に対し、{row.topology}のGPU {to_gpus}台にすると"
    if returns.payback_months is None:
        back_en, back_ja = "is not paid back within the horizon", "は期間内に回収できません"
    else:
        months = math.ceil(10 * returns.payback_months) / 10
        back_en, back_ja = f"is back after about {months:g} months", f"は約{months:g}か月で回収できます"
    part_en, part_ja = _of_it_by_compiling(roi, row, returns)
    doubt_en = doubt_ja = ""
    if spread.saving_p05_usd_per_month <= 0:
        doubt_en, doubt_ja = " A saving is likely, not certain.", "節約は見込まれますが、確実ではありません。"
    return Decision(
        f"{start_en} {_gpus(to_gpus)} of {row.topology} should save about {saving} "
        f"a month (90 % of the draws: {low} to {high}) and keep {promise_en} ({kept_en}); the one-time cost of about {once} "
        f"{back_en}, and {chance_en} of the draws have a positive net present value.{part_en}{doubt_en} {basis_en}",
        f"{start_ja}、月額約{saving}の節約が見込まれ"
        f"（試行の90%で{low}〜{high}）、{promise_ja}に処理する目標を満たします（{kept_ja}）。一時費用の約{once}{back_ja}。"
        f"試行の{chance_ja}で正味現在価値が正になります。{part_ja}{doubt_ja}{basis_ja}",
    )


def _of_it_by_compiling(roi: Roi, row: TopologyRow, returns: Returns) -> tuple[str, str]:
    """What the stock pipeline would save by being compiled, so that it is not taken for this engine's gain."""
    tuned = next((item for item in roi.waterfall if item.topology == "diffusers_tuned"), None)
    if returns.today_topology != "diffusers" or row.topology.startswith("diffusers") or tuned is None:
        return "", ""
    part = min(returns.saving_usd_per_month, returns.today_cost.total_usd - tuned.cost.total_usd)
    if part <= 0:
        return "", ""
    shown = _usd(part, is_gain=False)
    return (
        f" Compiling Diffusers alone would give about {shown} of that saving.",
        f"この節約のうち約{shown}はDiffusersのコンパイルだけで得られます。",
    )


def _stay(plan: PlanRecord, row: TopologyRow, returns: Returns) -> Decision:
    low, high = returns.spread.npv_p05_usd, returns.spread.npv_p95_usd
    shown = f"{_usd(low, is_gain=True)} to {_usd(high, is_gain=True)}"
    shown_ja = f"{_usd(low, is_gain=True)}〜{_usd(high, is_gain=True)}"
    basis_en, basis_ja = _basis(plan, row)
    promise_en, promise_ja = _promise(plan)
    if returns.today_topology == row.topology:
        what_en = f"{_gpus(returns.today_gpus)} of {returns.today_topology} is what the plan recommends too"
        what_ja = f"計画の推奨も現状と同じ{returns.today_topology}です"
    else:
        what_en = f"moving to {row.topology} does not pay for itself (net present value {shown} in 90 % of the draws)"
        what_ja = f"{row.topology}への移行は採算が取れません（正味現在価値は試行の90%で{shown_ja}）"
    faster_en, faster_ja = _faster(plan, row, returns)
    return Decision(
        f"On cost alone there is no reason to leave {_gpus(returns.today_gpus)} of {returns.today_topology}: {what_en}; the promise "
        f"is {promise_en}.{faster_en} {basis_en}",
        f"費用だけを見れば、{returns.today_topology}のGPU {returns.today_gpus}台を変える理由はありません。{what_ja}。目標は"
        f"{promise_ja}です。{faster_ja}{basis_ja}",
    )


def _faster(plan: PlanRecord, row: TopologyRow, returns: Returns) -> tuple[str, str]:
    """That users would wait less, if the intervals of the medians lie apart and today's fleet is the one that was simulated."""
    today = plan.row(returns.today_topology)
    old, new = today.latency_p50_s, row.latency_p50_s
    if today.n_gpus != returns.today_gpus or None in (old.low, old.mean, new.high, new.mean):
        return "", ""
    if (new.high or 0.0) >= (old.low or 0.0):
        return "", ""
    before, after = rounded(old.mean or 0.0, is_gain=True), rounded(new.mean or 0.0, is_gain=False)
    return (
        f" The median latency would fall from {before:.3g} s to {after:.3g} s; what that is worth is not in this cost.",
        f"レイテンシの中央値は{before:.3g}秒から{after:.3g}秒に下がりますが、その価値はこの費用に含まれていません。",
    )


def _without_saving(roi: Roi, row: TopologyRow) -> Decision:
    plan = roi.plan
    promise_en, promise_ja = _promise(plan)
    kept_en, kept_ja = _kept(plan, row)
    basis_en, basis_ja = _basis(plan, row)
    cost = next(item.cost.total_usd for item in roi.waterfall if item.is_recommended)
    shown = _usd(cost, is_gain=False)
    n_other = sum(item.topology != row.topology for item in roi.waterfall)
    why_en = (
        "no other topology that was looked at keeps it, so there is no saving to state" if not n_other else
        "no fleet to compare with is given, so there is no saving to state"
    )  # fmt: skip
    why_ja = "検討した他の構成では満たせないため" if not n_other else "比較対象となる現状の構成が示されていないため"
    return Decision(
        f"To keep {promise_en} ({kept_en}), use {_gpus(row.n_gpus or 0)} of {row.topology} for about {shown} a month; {why_en}. {basis_en}",
        f"{promise_ja}に処理するには（{kept_ja}）、{row.topology}のGPU {row.n_gpus or 0}台、月額約{shown}が必要です。{why_ja}、"
        f"節約額は示せません。{basis_ja}",
    )
