"""LoRAs in host memory and on their way: by hand, and against what is known of caches and of processor sharing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.allocation import Allocation, Policies
from planner.service import build_service
from planner.simulator import SimulationResult, simulate
from planner.simulator.environment import ARRIVAL, ExactEnvironment
from planner.simulator.lora_tiers import HostTier, Store
from planner.simulator.world import LoraStore, World
from planner.statistics import t_interval
from tests.simulation_builders import (
    CONSTANT_S,
    FACTS,
    GIB,
    SIZES,
    base_pool,
    constant_profile,
    controlnet_pool,
    workload_of,
)
from traces.problems import InputError

FETCH_S = 2 * CONSTANT_S["lora_fetch"]  # remote, and our engine's own check and pin
PATCH_S = CONSTANT_S["lora_attach"] + CONSTANT_S["lora_detach"]


def simulated(
    arrival_s: list[float], loras: list[Any], n: int = 1, topology: str = "colocated", *, policies: Policies | None = None,
    gib_per_s: float | None = None, pools: tuple[Any, ...] = (), **columns: Any,
) -> SimulationResult:  # fmt: skip
    workload = workload_of(arrival_s, n_steps=10, base_model_id="m", lora_ids=loras, **columns)
    service = build_service(workload, topology, constant_profile(), SIZES)  # type: ignore[arg-type]
    world = World(lora_store=LoraStore(gib_per_s)) if gib_per_s else World()
    allocation = Allocation((base_pool(n, topology, base_model_ids=("m",)), *pools), policies=policies or Policies())
    return simulate(workload, allocation, {"base": service}, SIZES, FACTS, world=world)


def fetches(flows: list[tuple[float, float, float]], bandwidth: float) -> list[float]:
    """Ends of fetches given as (start, bytes, seconds alone)."""
    env = ExactEnvironment()
    store = Store(env, bandwidth)
    ends = [float("nan")] * len(flows)

    def land(k: int) -> Any:
        def there(now_s: float) -> None:
            ends[k] = now_s

        return there

    for k, (start_s, n_bytes, alone_s) in enumerate(flows):
        env.call_at(start_s, ARRIVAL, lambda _, k=k, b=n_bytes, a=alone_s: store.fetch(b, a, env.now, land(k)), None)
    env.run()
    return ends


def test_fetches_share_the_stores_bandwidth_evenly() -> None:
    # 10 bytes/s; the first is alone for a second, then both get 5: the first has 30 left at 1, ends at 7; the second then 10
    ends = fetches([(0.0, 40.0, 4.0), (1.0, 60.0, 6.0)], 10.0)
    assert ends == pytest.approx([7.0, 10.0], rel=1e-12)


def test_a_slow_fetch_leaves_what_it_cannot_use_to_the_others() -> None:
    # caps 2 and 10 of 10 bytes/s: the first takes 2, the second 8
    ends = fetches([(0.0, 10.0, 5.0), (0.0, 40.0, 4.0)], 10.0)
    assert ends == pytest.approx([5.0, 5.0], rel=1e-12)


def test_without_a_limit_every_fetch_takes_what_it_takes_alone() -> None:
    assert fetches([(0.0, 10.0, 5.0), (1.0, 40.0, 4.0)], float("inf")) == [5.0, 5.0]


def test_mean_fetch_under_processor_sharing_is_size_over_free_bandwidth() -> None:
    # M/G/1-PS (Kleinrock 1967): a fetch of x bytes takes x / (B (1 − ρ)) on average, whatever the law of the sizes
    load, n, means = 0.6, 1500, []
    for child in np.random.SeedSequence(3).spawn(15):
        rng = np.random.default_rng(child)
        start_s = np.cumsum(rng.exponential(1.0 / load, n))
        sizes = rng.choice([0.25, 2.5], n, p=[2 / 3, 1 / 3])  # mean 1 at a bandwidth of 1
        ends = np.array(fetches([(s, b, 1e-9) for s, b in zip(start_s.tolist(), sizes.tolist(), strict=True)], 1.0))
        kept = slice(n // 10, None)
        means.append([((ends - start_s)[kept][sizes[kept] == size] / size).mean() for size in (0.25, 2.5)])
    for k in (0, 1):
        found = t_interval([pair[k] for pair in means], 0.999)
        assert found.low < 1.0 / (1.0 - load) < found.high
        assert found.high - found.low < 1.0


def test_a_lora_that_is_on_its_way_is_fetched_once_for_all_of_a_host() -> None:
    both = simulated([0.0, 1.0], [("a",), ("a",)], 2, policies=Policies(replicas_per_host=2))
    # the second joins at 1 the fetch that ends at 4
    assert both.requests["n_lora_misses"].tolist() == [1, 0]
    assert both.requests["lora_wait_s"].tolist() == pytest.approx(
        [FETCH_S + PATCH_S, FETCH_S - 1.0 + PATCH_S], rel=1e-12
    )
    apart = simulated([0.0, 1.0], [("a",), ("a",)], 2)
    assert apart.requests["n_lora_misses"].tolist() == [1, 1]


def test_replicas_of_other_hosts_fetch_for_themselves() -> None:
    result = simulated([0.0, 0.0, 0.0], [("a",)] * 3, 3, policies=Policies(replicas_per_host=2))
    assert result.requests["n_lora_misses"].tolist() == [1, 0, 1]


def test_a_shared_tier_has_the_room_of_all_its_replicas() -> None:
    # a quarter GiB each; 0.3 GiB a replica hold one, two replicas' 0.6 GiB hold two
    policies = Policies(lora_cache_gib=0.3, replicas_per_host=2)
    result = simulated([0.0, 50.0, 100.0], [("a",), ("b",), ("a",)], 2, policies=policies)
    assert result.requests["n_lora_misses"].tolist() == [1, 1, 0]
    assert simulated([0.0, 50.0, 100.0], [("a",), ("b",), ("a",)], 1, policies=Policies(lora_cache_gib=0.3)).requests[
        "n_lora_misses"
    ].tolist() == [1, 1, 1]


def test_a_busy_store_makes_fetches_longer() -> None:
    # a quarter GiB in 4 s is 1/16 GiB/s alone; a store of 1/16 GiB/s halves two at once
    result = simulated([0.0, 0.0], [("a",), ("b",)], 2, gib_per_s=1 / 16)
    assert result.requests["lora_wait_s"].tolist() == pytest.approx([2 * FETCH_S + PATCH_S] * 2, rel=1e-12)
    roomy = simulated([0.0, 0.0], [("a",), ("b",)], 2, gib_per_s=1 / 8)
    assert roomy.requests["lora_wait_s"].tolist() == pytest.approx([FETCH_S + PATCH_S] * 2, rel=1e-12)


def test_with_room_for_all_the_store_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(3.0, 120)).tolist()
    loras = [tuple(str(x) for x in rng.choice(9, rng.integers(0, 4), replace=False)) for _ in arrival_s]
    for topology, pools in (("colocated", ()), ("decoupled", (controlnet_pool(2),))):
        columns: dict[str, Any] = {"controlnet_ids": [("c",), ()] * 60} if topology == "decoupled" else {}
        policies = Policies(lora_cache_gib=1.1)
        plain = simulated(arrival_s, loras, 4, topology, policies=policies, pools=pools, **columns).requests
        stored = simulated(
            arrival_s, loras, 4, topology, policies=policies, pools=pools, gib_per_s=1e6, **columns
        ).requests
        assert stored["n_lora_misses"].sum() > 50
        assert (stored["n_lora_misses"] == plain["n_lora_misses"]).all() or topology == "decoupled"
        if topology == "colocated":
            # the same numbers added in another order
            assert stored["latency_s"].to_numpy() == pytest.approx(plain["latency_s"].to_numpy(), rel=1e-9)


def test_what_denoising_hides_is_not_waited_for_with_controlnet_workers_either() -> None:
    # ten steps of 0.122 s: a patch before step 10 hides them all; the fetch of 4 s is exposed by the rest
    result = simulated(
        [0.0], [("a",)], 1, "decoupled", gib_per_s=100.0, pools=(controlnet_pool(1),), controlnet_ids=("c",)
    )
    row = result.requests.iloc[0]
    denoise_s = 10 * (0.06 + 0.06 + 0.002)
    assert row["denoise_s"] == pytest.approx(denoise_s, rel=1e-12)
    assert row["lora_wait_s"] == pytest.approx(FETCH_S - denoise_s + PATCH_S, rel=1e-12)


def test_a_lora_too_large_for_the_tier_is_fetched_every_time_and_evicts_nothing() -> None:
    tier = HostTier([5, 50], 20)
    assert tier.reserve(0, 0.0)
    assert not tier.reserve(1, 1.0)
    assert tier.holds(0, 2.0)
    assert tier.used_bytes == 5


def test_least_recently_used_least_frequently_used_and_idle_time_pick_different_victims() -> None:
    def after(policy: Any, ttl_s: float | None = None) -> list[int]:
        tier = HostTier([1] * 4, 3, policy, ttl_s)
        for now_s, lora in enumerate([0, 0, 1, 2, 1, 0, 2, 2, 1]):  # last uses: 0 at 5, 2 at 7, 1 at 8; uses 3, 3, 3
            if not tier.use(lora, float(now_s)):
                tier.reserve(lora, float(now_s))
        tier.use(0, 9.0)
        tier.use(1, 9.5)
        tier.use(3, 10.0)
        tier.reserve(3, 10.0)
        return [lora for lora in range(4) if tier.holds(lora, 10.0)]

    assert after("lru") == [0, 1, 3]  # 2 was used longest ago, at 7
    assert after("lfu") == [0, 1, 3]  # 2 three times, 0 and 1 four times
    assert after("ttl", 1.8) == [
        1,
        3,
    ]  # 0, unused from 5 to 9, and 2, from 7 on, are past their time; 1 never was


def test_the_least_frequently_used_leaves_though_it_was_used_last() -> None:
    tier = HostTier([1] * 3, 2, "lfu")
    for now_s, lora in enumerate([0, 0, 1]):
        if not tier.use(lora, float(now_s)):
            tier.reserve(lora, float(now_s))
    tier.reserve(2, 3.0)
    assert [lora for lora in range(3) if tier.holds(lora, 3.0)] == [0, 2]


def test_hit_ratio_of_an_idle_timeout_is_one_minus_exp() -> None:
    # Poisson uses of rate λ: the gap is shorter than T with probability 1 − e^(−λT) (room for all)
    rng = np.random.default_rng(7)
    rates = np.array([0.02, 0.1, 0.5])
    tier = HostTier([1, 1, 1], 10, "ttl", 8.0)
    hits, uses = np.zeros(3), np.zeros(3)
    now_s = 0.0
    for gap_s, lora in zip(
        rng.exponential(1 / rates.sum(), 30_000), rng.choice(3, 30_000, p=rates / rates.sum()), strict=True
    ):
        now_s += gap_s
        uses[lora] += 1
        if tier.use(int(lora), now_s):
            hits[lora] += 1
        else:
            tier.reserve(int(lora), now_s)
    exact = 1.0 - np.exp(-rates * 8.0)
    # a share of n uses has a standard error of √(p(1−p)/n); four of them, one in 16 000 by chance
    assert (np.abs(hits / uses - exact) < 4 * np.sqrt(exact * (1 - exact) / uses)).all()


def test_least_frequently_used_keeps_the_popular() -> None:
    # independent references: perfect LFU holds the C most popular, one place short because a newcomer always gets in
    rng = np.random.default_rng(8)
    p = 1.0 / np.arange(1, 31) ** 1.2
    p /= p.sum()
    tier = HostTier([1] * 30, 6, "lfu")
    hits = 0
    for k, lora in enumerate(rng.choice(30, 20_000, p=p).tolist()):
        if tier.use(lora, float(k)):
            hits += k >= 5000
        else:
            tier.reserve(lora, float(k))
    # four standard errors of a share of 15 000
    slack = 4 * 0.5 / np.sqrt(15_000)
    assert p[:5].sum() - slack < hits / 15_000 < p[:6].sum() + slack


def test_the_store_and_the_cache_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"lora_cache_ttl_s: got None with lora_cache_policy 'ttl'"):
        simulated([0.0], [("a",)], policies=Policies(lora_cache_policy="ttl"))
    with pytest.raises(InputError, match=r"bandwidth_gib_per_s: got -1"):
        simulated([0.0], [("a",)], gib_per_s=-1.0)
    with pytest.raises(InputError, match=r"replicas_per_host: got 0"):
        simulated([0.0], [("a",)], policies=Policies(replicas_per_host=0))
    assert SIZES.lora_bytes == GIB // 4
