"""What a node is busy with, as a row of counters from /proc.

Runs in the lean agent: imports nothing.  Counters are sent as they are and made into rates by who
asked (karun/top.py), so that nothing is kept here between two samples.  What a kernel or a
container does not tell is UNKNOWN.

The parsers take the text of a file; `sample` reads the files.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FIELDS", "UNKNOWN", "decode", "encode", "sample"]

UNKNOWN = -1

FIELDS = (
    "uptime_ms",
    "core_count",
    "load_milli",
    "running_count",
    "cpu_busy_ticks",
    "cpu_total_ticks",
    "memory_total_kib",
    "memory_available_kib",
    "swap_used_kib",
    "net_received_bytes",
    "net_sent_bytes",
    "disk_read_bytes",
    "disk_written_bytes",
)
"""Position and name of each counter; docs/karun.md#top says what they count."""

SECTOR_SIZE = 512
"""Of /proc/diskstats, whatever the disk's is."""
_VIRTUAL_LINKS = (
    "lo", "bond", "br", "cali", "cni", "docker", "dummy", "flannel", "ifb", "tap", "team", "tun",
    "veth", "virbr", "vnet", "wg",
)  # fmt: skip


def sample(read: Callable[[str], str] | None = None) -> list[int]:
    """Return the counters of this node, in the order of FIELDS; *read* gives a file's text."""
    read = read or _read
    stat = read("/proc/stat")
    return [
        _uptime_ms(read("/proc/uptime")),
        *_load(read("/proc/loadavg"), stat),
        *_cpu(stat),
        *_memory(read("/proc/meminfo")),
        *_net(read("/proc/net/dev")),
        *_disk(read("/proc/diskstats")),
    ]


def encode(counters: Sequence[int]) -> bytes:
    """Return counters as they travel: decimal numbers with a space between."""
    return " ".join(map(str, counters)).encode()


def decode(data: bytes) -> list[int]:
    """Return the counters that were sent; raises ValueError for anything else."""
    words = data.decode("ascii").split(" ")
    if len(words) != len(FIELDS) or any(len(word) > 20 for word in words):
        raise ValueError(f"not a sample of {len(FIELDS)} counters")
    return [max(UNKNOWN, int(word)) for word in words]


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(word: str, scale: int = 1) -> int:
    """Return a decimal number times a power of ten, without rounding errors."""
    whole, _, part = word.partition(".")
    part = part[: len(str(scale)) - 1].ljust(len(str(scale)) - 1, "0")
    text = whole + part
    return int(text) if text.isascii() and text.isdigit() else UNKNOWN


def _uptime_ms(text: str) -> int:
    words = text.split()
    return _number(words[0], 1000) if words else UNKNOWN


def _load(loadavg: str, stat: str) -> tuple[int, int, int]:
    """Return the number of cores, the load of a minute, and the runnable tasks."""
    cores = sum(line[:3] == "cpu" and line[3:4].isdigit() for line in stat.split("\n"))
    words = loadavg.split()
    running = words[3].partition("/")[0] if len(words) > 3 else ""
    return (
        cores or UNKNOWN,
        _number(words[0], 1000) if words else UNKNOWN,
        _number(running) if running else UNKNOWN,
    )


def _cpu(stat: str) -> tuple[int, int]:
    """Return ticks busy and in all; waiting for a disk is idle, and guests are in user already."""
    words = stat.partition("\n")[0].split()
    ticks = [_number(word) for word in words[1:9]]
    if words[:1] != ["cpu"] or len(ticks) < 4 or UNKNOWN in ticks:
        return UNKNOWN, UNKNOWN
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)


def _memory(meminfo: str) -> tuple[int, int, int]:
    values = {}
    for line in meminfo.split("\n"):
        name, _, rest = line.partition(":")
        words = rest.split()
        if words:
            values[name] = _number(words[0])
    total = values.get("MemTotal", UNKNOWN)
    available = values.get("MemAvailable", values.get("MemFree", UNKNOWN))
    swap = values.get("SwapTotal", UNKNOWN)
    return total, available, swap - values.get("SwapFree", 0) if swap >= 0 else UNKNOWN


def _net(dev: str) -> tuple[int, int]:
    """Return bytes received and sent by links of hardware, or by all but lo where there are none.

    Bridges, bonds and tunnels carry what a link of hardware carries as well.
    """
    all_links, real_links = [], []
    for line in dev.split("\n"):
        name, colon, rest = line.partition(":")
        words = rest.split()
        if not colon or len(words) < 9:
            continue
        link = name.strip()
        bytes_both = (_number(words[0]), _number(words[8]))
        if link != "lo":
            all_links.append(bytes_both)
            if not link.startswith(_VIRTUAL_LINKS) and "." not in link:
                real_links.append(bytes_both)
    found = real_links or all_links
    if not found:
        return UNKNOWN, UNKNOWN
    return sum(one[0] for one in found), sum(one[1] for one in found)


def _disk(diskstats: str) -> tuple[int, int]:
    """Return bytes read from and written to whole disks."""
    read = written = 0
    is_any = False
    for line in diskstats.split("\n"):
        words = line.split()
        if len(words) >= 10 and _is_disk(words[2]):
            is_any = True
            read += max(0, _number(words[5]))
            written += max(0, _number(words[9]))
    return (read * SECTOR_SIZE, written * SECTOR_SIZE) if is_any else (UNKNOWN, UNKNOWN)


def _is_disk(name: str) -> bool:
    """Return whether a block device is a disk: no partition, no mapping of others."""
    if name.startswith("nvme"):
        return "n" in name[4:] and "p" not in name[4:]
    if name.startswith("mmcblk"):
        return name[6:].isdigit()
    return name.startswith(("sd", "vd", "hd", "xvd")) and name.isalpha()
