"""Published figures of two production text-to-image services, as constants for synthesis.

Source: Li et al., "Katz: Efficient Workflow Serving for Diffusion Models with Many Adapters" (USENIX ATC 2025), and the
plots in its repository, github.com/modelscope/Katz, trace/figures at commit 3552744 (Apache-2.0). The request log itself
is not public; these numbers are read off the vector coordinates of the plots, thinned to the points that carry the shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Service = Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class ServiceFigures:
    """What is published of one service over its 20 days. SDXL, 50 steps, one image a request."""

    n_requests: int
    n_instances: int
    controlnets_per_request_percent: tuple[float, ...]
    """Share of requests with 0, 1, 2, 3 ControlNets."""
    loras_per_request_percent: tuple[float, ...]
    """Share of requests with 0, 1, 2 LoRAs."""
    controlnet_top_percent: tuple[tuple[int, float], ...]
    """(k, share of all uses that go to the k most popular), from (0, 0) to (distinct, 100); straight lines in between."""
    lora_top_percent: tuple[tuple[int, float], ...]
    instance_request_quantiles: tuple[int, ...]
    """Requests per instance at the quantiles 0, 5, … 100 %."""
    mean_unique_loras_per_instance: float
    lora_reuse: float
    """Share of LoRA uses that repeat an earlier use of the same instance.

    Not published: solved for, so that the expected number of unique LoRAs, averaged over the published requests per
    instance, is the published mean. Independent draws (reuse 0) would give 857 for A and 387 for B.
    """


FIGURES: Final[dict[Service, ServiceFigures]] = {
    "A": ServiceFigures(
        n_requests=164_194,
        n_instances=165,
        controlnets_per_request_percent=(0.0, 30.5, 69.5),
        loras_per_request_percent=(0.2, 8.8, 91.0),
        controlnet_top_percent=(
            (0, 0.0), (1, 31.09), (2, 56.42), (3, 73.52), (4, 89.33), (5, 97.55), (6, 98.67), (8, 99.03), (12, 99.37),
            (16, 99.58), (47, 100.0),
        ),
        lora_top_percent=(
            (0, 0.0), (3, 9.26), (9, 19.25), (16, 25.98), (24, 30.1), (46, 36.68), (94, 44.66), (146, 49.82), (239, 55.67),
            (425, 63.15), (643, 68.52), (1105, 75.72), (1679, 81.56), (2640, 88.02), (3343, 91.59), (4501, 95.69),
            (6980, 100.0),
        ),
        instance_request_quantiles=(
            13, 32, 71, 157, 226, 311, 383, 552, 781, 830, 933, 1131, 1273, 1327, 1352, 1405, 1437, 1587, 2046, 2367, 3486,
        ),
        mean_unique_loras_per_instance=675.4,
        lora_reuse=0.276,
    ),
    "B": ServiceFigures(
        n_requests=385_239,
        n_instances=302,
        controlnets_per_request_percent=(1.9, 25.1, 69.9, 3.1),
        loras_per_request_percent=(7.2, 73.6, 19.2),
        controlnet_top_percent=(
            (0, 0.0), (1, 22.22), (3, 49.18), (4, 60.83), (5, 71.52), (6, 80.57), (7, 87.83), (8, 94.48), (9, 96.19),
            (11, 98.75), (12, 99.42), (16, 99.89), (94, 100.0),
        ),
        lora_top_percent=(
            (0, 0.0), (2, 26.63), (6, 40.44), (13, 52.48), (17, 56.1), (33, 63.4), (61, 68.51), (104, 72.28), (152, 74.88),
            (244, 78.2), (432, 82.26), (767, 85.95), (1420, 90.13), (2141, 92.98), (3356, 95.96), (4501, 97.82),
            (7463, 100.0),
        ),
        instance_request_quantiles=(
            1, 3, 24, 37, 46, 95, 102, 113, 320, 342, 724, 898, 1066, 1473, 2070, 2486, 2968, 3111, 3400, 3593, 5545,
        ),
        mean_unique_loras_per_instance=303.3,
        lora_reuse=0.277,
    ),
}  # fmt: skip
