"""Collectives, networks, and what one costs on the other: bytes over bandwidth, steps times latency.

Bandwidths are public specifications per direction and accelerator; one network adapter per accelerator is assumed.
InfiniBand HDR, NDR and XDR: 200, 400 and 800 Gb/s per port (InfiniBand Trade Association roadmap). NVLink of the third
and fourth generation: 600 and 900 GB/s in both directions together (NVIDIA A100 and H100 data sheets). Latencies of a
step are assumptions.
"""

import difflib
import math
from collections import Counter
from dataclasses import dataclass

from r1p_dist.errors import InputError


@dataclass(frozen=True)
class Collective:
    """kind: all_reduce, reduce, all_gather, reduce_scatter, broadcast or barrier. bytes: of the whole tensor."""

    kind: str
    bytes: int
    purpose: str


Collectives = Counter[Collective]


@dataclass(frozen=True)
class Network:
    """bandwidth: bytes per second and rank, one direction; latency: seconds per step. node_*: inside one node."""

    name: str
    bandwidth: float
    latency: float
    node_size: int = 8
    node_bandwidth: float = 450e9
    node_latency: float = 3e-6


NETWORKS = {
    network.name: network
    for network in (
        Network("infiniband-200", 25e9, 5e-6, node_bandwidth=300e9),
        Network("infiniband-400", 50e9, 5e-6),
        Network("infiniband-800", 100e9, 5e-6),
        Network("ethernet-100", 12.5e9, 20e-6),
        Network("ethernet-25", 3.125e9, 30e-6),
    )
}
_OWN_KEYS = ("bandwidth", "latency", "node_size", "node_bandwidth", "node_latency")


@dataclass(frozen=True)
class Cost:
    """Of one collective: bytes that a rank sends, latency steps, and seconds, as a ring and as a tree."""

    ring_bytes: float
    ring_steps: int
    tree_bytes: float
    tree_steps: int
    seconds: float


def parse_network(text: str) -> Network:
    """Returns a named network, or one from `bandwidth=GB/s,latency=microseconds[,node_size=…,…]`.

    InputError: neither of both, or a number that is not above zero.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    values: dict[str, float] = {}
    for part in text.split(","):
        key, separator, number = part.partition("=")
        if not separator or key not in _OWN_KEYS:
            nearest = difflib.get_close_matches(text, NETWORKS, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise InputError(
                f"--network {text}: {hint}use one of {', '.join(NETWORKS)}, or bandwidth=GB/s,latency=microseconds "
                f"(and {', '.join(_OWN_KEYS[2:])})"
            )
        try:
            values[key] = float(number)
        except ValueError:
            values[key] = 0.0
        if not 0 < values[key] < math.inf:
            raise InputError(f"--network {text}: {key}={number}: must be a number above zero")
    if "bandwidth" not in values or "latency" not in values:
        raise InputError(f"--network {text}: needs both bandwidth=GB/s and latency=microseconds")
    own = Network("own", values["bandwidth"] * 1e9, values["latency"] * 1e-6)
    return Network(
        text,
        own.bandwidth,
        own.latency,
        int(values.get("node_size", 1)),
        values.get("node_bandwidth", own.bandwidth / 1e9) * 1e9,
        values.get("node_latency", own.latency * 1e6) * 1e-6,
    )


def cost(collective: Collective, ranks: int, network: Network) -> Cost:
    """Returns what a collective costs one rank; seconds are those of the faster of ring and tree.

    A ring sends N - 1 parts of a gather, a reduce-scatter, a reduce or a broadcast in pipeline, and twice as many of an
    all-reduce, a B / N each. A tree takes ceil(log2 N) steps there (and as many back, for an all-reduce) with the
    whole tensor B in each direction; a gather by doubling sends no more than a ring.
    """
    if ranks == 1:
        return Cost(0.0, 0, 0.0, 0, 0.0)
    is_near = ranks <= network.node_size
    bandwidth = network.node_bandwidth if is_near else network.bandwidth
    latency = network.node_latency if is_near else network.latency
    rounds = 2 if collective.kind == "all_reduce" else 1
    parts = collective.bytes * (ranks - 1) / ranks
    depth = math.ceil(math.log2(ranks))
    ring_bytes, ring_steps = rounds * parts, rounds * (ranks - 1)
    tree_bytes = parts if collective.kind in ("all_gather", "reduce_scatter") else float(rounds * collective.bytes)
    tree_steps = rounds * depth
    ring, tree = ring_bytes / bandwidth + ring_steps * latency, tree_bytes / bandwidth + tree_steps * latency
    return Cost(ring_bytes, ring_steps, tree_bytes, tree_steps, min(ring, tree))
