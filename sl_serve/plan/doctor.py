"""From what is known of a machine to what is wrong with it: facts in, findings out."""

from __future__ import annotations

from dataclasses import dataclass

from sl_serve.plan.budget import GIB, MIB, gib

# Nominal bytes/s of one lane by PCI Express generation, after line coding.
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
GOOD_LINK_SHARE = 0.7  # pinned copies reach 0.75 to 0.87 of nominal
SLOW_DISK_BYTES_PER_S = 1e9
LOW_FREE_SHARE = 0.3
SOME_SWAP_BYTES = 256 * MIB
SMALL_MEMLOCK_BYTES = GIB


@dataclass(frozen=True, slots=True)
class Facts:
    """None: not known, or not there."""

    total_bytes: int  # physical memory
    available_bytes: int
    swap_used_bytes: int
    cgroup_limit_bytes: int | None
    memlock_bytes: int | None  # None: unlimited
    huge_pages: str | None  # "always", "madvise" or "never"
    native_target: str | None  # instruction set of the native core; None: not built
    n_cores: int  # that this process may use
    n_machine_cores: int
    n_threads: int  # that arithmetic runs on
    host_read_bytes_per_s: float
    has_device: bool = False
    device_name: str | None = None
    link_bytes_per_s: float | None = None  # host to device, pinned
    pcie_generation: int | None = None  # that card and slot have in common
    pcie_width: int | None = None  # lanes now
    pcie_max_width: int | None = None
    disk_dir: str | None = None
    disk_read_bytes_per_s: float | None = None
    disk_free_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """`what` has the numbers, `advice` the way out."""

    name: str
    what: str
    advice: str


def examine(facts: Facts) -> list[Finding]:
    """Everything that is wrong; empty on a healthy machine."""
    return [finding for check in CHECKS if (finding := check(facts)) is not None]


def check_link_rate(facts: Facts) -> Finding | None:
    if facts.link_bytes_per_s is None or not facts.pcie_generation or not facts.pcie_width:
        return None
    lane = LANE_BYTES_PER_S.get(facts.pcie_generation)
    if lane is None or facts.link_bytes_per_s >= GOOD_LINK_SHARE * lane * facts.pcie_width:
        return None
    return Finding(
        "slow link",
        f"copies to the accelerator run at {_rate(facts.link_bytes_per_s)}, {facts.pcie_width} "
        f"lanes of PCI Express {facts.pcie_generation} carry {_rate(lane * facts.pcie_width)}",
        "check for another busy process, a riser, a slot behind a switch, or memory of the other "
        "socket (numactl --cpunodebind)",
    )


def check_link_width(facts: Facts) -> Finding | None:
    now, most = facts.pcie_width, facts.pcie_max_width
    if now is None or most is None or now >= most:
        return None
    return Finding(
        "narrow link",
        f"the accelerator uses {now} of its {most} lanes",
        "put it into a slot with all lanes, and seat it well",
    )


def check_memlock(facts: Facts) -> Finding | None:
    """Pinned memory of a driver is not bound by it; memory that is locked by others is."""
    limit = facts.memlock_bytes
    if not facts.has_device or limit is None or limit >= SMALL_MEMLOCK_BYTES:
        return None
    return Finding(
        "locked memory",
        f"this process may lock {gib(limit)} of memory; copies at the link's full rate need "
        "locked memory",
        "raise it: ulimit -l unlimited, or --ulimit memlock=-1 for a container",
    )


def check_cgroup(facts: Facts) -> Finding | None:
    limit = facts.cgroup_limit_bytes
    if limit is None or limit >= facts.total_bytes:
        return None
    return Finding(
        "container limit",
        f"the control group allows {gib(limit)} of the machine's {gib(facts.total_bytes)}",
        "raise the container's memory limit (docker run --memory) if the rest is free",
    )


def check_free_memory(facts: Facts) -> Finding | None:
    most = min(facts.total_bytes, facts.cgroup_limit_bytes or facts.total_bytes)
    if facts.available_bytes >= LOW_FREE_SHARE * most:
        return None
    return Finding(
        "little free memory",
        f"{gib(facts.available_bytes)} of {gib(most)} are free",
        "stop other programs: layers and KV that have no room in memory come from disk, or wait",
    )


def check_swap(facts: Facts) -> Finding | None:
    if facts.swap_used_bytes < SOME_SWAP_BYTES:
        return None
    return Finding(
        "swap in use",
        f"{gib(facts.swap_used_bytes)} of memory are swapped out",
        "free memory, then turn swap off and on again (swapoff -a && swapon -a), or run without",
    )


def check_huge_pages(facts: Facts) -> Finding | None:
    if facts.huge_pages != "never":
        return None
    return Finding(
        "huge pages",
        "transparent huge pages are off (never): every pass over weights and KV misses in the TLB",
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )


def check_native(facts: Facts) -> Finding | None:
    if facts.native_target is not None:
        return None
    return Finding(
        "no native core",
        "the native core is not built: attention and products of few rows run in plain torch",
        "install a C++ compiler and install sl-serve again",
    )


def check_threads(facts: Facts) -> Finding | None:
    if facts.n_threads < facts.n_cores:
        return Finding(
            "few threads",
            f"arithmetic uses {facts.n_threads} threads, this process has {facts.n_cores} cores",
            "unset OMP_NUM_THREADS, or give --threads",
        )
    if facts.n_cores < facts.n_machine_cores:
        return Finding(
            "few cores",
            f"this process may use {facts.n_cores} of the machine's {facts.n_machine_cores} cores",
            "widen its affinity or the container's --cpuset-cpus if the others are idle",
        )
    return None


def check_disk(facts: Facts) -> Finding | None:
    rate = facts.disk_read_bytes_per_s
    if rate is None or rate >= SLOW_DISK_BYTES_PER_S:
        return None
    return Finding(
        "slow disk",
        f"{facts.disk_dir} reads at {_rate(rate)}; layers on it would be read once per step",
        "use a local NVMe drive (2 to 12 GB/s), or keep all layers in memory",
    )


CHECKS = (
    check_link_rate,
    check_link_width,
    check_memlock,
    check_cgroup,
    check_free_memory,
    check_swap,
    check_huge_pages,
    check_native,
    check_threads,
    check_disk,
)


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"
