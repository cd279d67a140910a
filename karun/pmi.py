"""PMI-1, the language in which MPICH's start-up speaks to its launcher.  Sans-I/O.

A `Proxy` on every node serves the ranks there.  Each rank writes commands into its descriptor
(PMI_FD), a line each, and waits for the answer:

    cmd=init pmi_version=1 pmi_subversion=1      cmd=response_to_init rc=0 ...
    cmd=put kvsname=K key=card-0 value=V         cmd=put_result rc=0 msg=success
    cmd=barrier_in                               (when all ranks are there) cmd=barrier_out
    cmd=get kvsname=K key=card-1                 cmd=get_result rc=0 msg=success value=V

What is put travels only at a barrier: up with it, merged on the way (karun/agent/barrier.py), and
from the head down to everybody; so a `get` is answered on the node.

Invariants
  * an answer depends on what was put before the last barrier, and by the node's own ranks since;
  * a rank that breaks the protocol, or is gone before it has finalized, aborts the run, once;
  * whatever a rank writes, nothing but an `Abort` comes of it, and what is held is bounded.

Runs in the lean agent: imports nothing.  Not here: spawning more processes and name publishing,
which are refused as PMI allows; PMI-2 and PMIx.  docs/karun.md#mpi says how a run uses this.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "MISSED",
    "Abort",
    "Action",
    "BarrierUp",
    "Proxy",
    "Reply",
    "environment",
    "process_mapping",
]

LINE_SIZE_MAX = 8 << 10
"""Of a command; MPICH's own lines have at most 1 KiB and a value."""
KVSNAME_SIZE_MAX, KEY_SIZE_MAX, VALUE_SIZE_MAX = 256, 64, 1024
"""What MPICH's Hydra offers."""
PUT_COUNT_MAX = 4096
"""Of each rank between two barriers."""

MISSED = "ended while others wait for it in a barrier"

_NEW, _RUNNING, _IN_BARRIER, _DONE, _GONE = range(5)
_REFUSED = {
    "publish_name": "publish_result",
    "unpublish_name": "unpublish_result",
    "lookup_name": "lookup_result",
}


class Reply:
    """Bytes for a rank's descriptor."""

    __slots__ = ("data", "rank")

    def __init__(self, rank: int, data: bytes) -> None:
        self.rank, self.data = rank, data


class BarrierUp:
    """All ranks of this node are in the barrier, and this is what they put; or all are over."""

    __slots__ = ("left", "payload")

    def __init__(self, payload: bytes, left: int) -> None:
        self.payload = payload
        self.left = left
        """A rank that will be in no barrier any more, as no other of this node will; or -1."""


class Abort:
    """The run is to be stopped with an exit code; a rank is why."""

    __slots__ = ("code", "rank", "reason")

    def __init__(self, rank: int, code: int, reason: str) -> None:
        self.rank, self.code, self.reason = rank, code, reason


Action = Reply | BarrierUp | Abort


def environment(rank: int, size: int, fd: int, local: tuple[int, int]) -> dict[str, str]:
    """Return what a rank finds in its environment; *local*: index and number on its node."""
    return {
        "PMI_FD": str(fd),
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(size),
        "MPI_LOCALRANKID": str(local[0]),
        "MPI_LOCALNRANKS": str(local[1]),
    }


def process_mapping(ranks_per_node: Sequence[int]) -> str:
    """Return PMI_process_mapping: which ranks share a node; empty when it would be too long.

    Ranks go node by node.  Without a mapping MPICH compares host names, which works as well.
    """
    blocks: list[list[int]] = []
    for node, count in enumerate(count for count in ranks_per_node if count):
        if blocks and blocks[-1][2] == count:
            blocks[-1][1] += 1
        else:
            blocks.append([node, 1, count])
    text = ",".join("({},{},{})".format(*block) for block in blocks)
    text = f"(vector,{text})"
    return text if blocks and len(text) < VALUE_SIZE_MAX else ""


class _Rank:
    """A process on this node."""

    __slots__ = ("buffer", "has_spoken", "in_spawn", "put_count", "state")

    def __init__(self) -> None:
        self.state = _NEW
        self.has_spoken = False
        self.buffer = b""
        self.in_spawn = False
        self.put_count = 0


class _Broken(Exception):
    """A rank broke the protocol."""


class Proxy:
    """The ranks of one node."""

    def __init__(
        self, kvs_name: str, size: int, ranks: Iterable[int], *, mapping: str = ""
    ) -> None:
        self._kvs_name = kvs_name
        self._size = size
        self._ranks = {rank: _Rank() for rank in ranks}
        self._stored: dict[str, str] = {"PMI_process_mapping": mapping} if mapping else {}
        self._fresh: dict[str, str] = {}
        """What ranks here put since the last barrier."""
        self._aborted = False

    def receive(self, rank: int, data: bytes) -> list[Action]:
        """Take what a rank wrote; return what is to be done, in order."""
        process = self._ranks[rank]
        if self._aborted or process.state == _GONE:
            return []
        *lines, process.buffer = (process.buffer + data).split(b"\n")
        actions: list[Action] = []
        try:
            for line in lines:
                if self._aborted:
                    break
                actions += self._line(rank, process, line)
            if len(process.buffer) > LINE_SIZE_MAX:
                raise _Broken("a line without end")
        except _Broken as error:
            actions += self._abort(rank, 1, f"PMI: {error}")
        return actions

    def closed(self, rank: int) -> list[Action]:
        """A rank closed its descriptor; that is right before init and after finalize."""
        process = self._ranks[rank]
        before, process.state = process.state, _GONE
        if before in (_RUNNING, _IN_BARRIER):
            return self._abort(rank, 1, "ended without MPI_Finalize")
        return self._advance()

    def exited(self, rank: int, code: int, signal: int = 0) -> list[Action]:
        """A rank's process has ended, after its descriptor."""
        if self._ranks[rank].has_spoken or not (code or signal):
            return []
        how = f"was killed by signal {signal}" if signal else f"ended with exit code {code}"
        return self._abort(rank, 128 + signal if signal else code, f"{how} before MPI_Init")

    def released(self, payload: bytes) -> list[Action]:
        """Every rank of the run is in the barrier; this is what all of them put."""
        if self._aborted:
            return []
        for key, value in _unpack(payload):
            self._stored.setdefault(key, value)
        self._fresh.clear()
        actions: list[Action] = []
        for rank, process in self._ranks.items():
            if process.state == _IN_BARRIER:
                process.state, process.put_count = _RUNNING, 0
                actions.append(Reply(rank, b"cmd=barrier_out\n"))
        return actions

    def _line(self, rank: int, process: _Rank, line: bytes) -> list[Action]:
        if len(line) > LINE_SIZE_MAX:
            raise _Broken("a line too long")
        words = _words(line)
        if process.in_spawn or "mcmd" in words:
            return self._spawn(rank, process, line, words)
        command = words.get("cmd", "")
        if process.state == _NEW and command != "init":
            raise _Broken(f"{command[:40]!r} before init")
        if process.state in (_IN_BARRIER, _DONE) and command != "abort":
            where = "in a barrier" if process.state == _IN_BARRIER else "after finalize"
            raise _Broken(f"{command[:40]!r} {where}")
        if command == "barrier_in":
            process.state = _IN_BARRIER
            return self._advance()
        if command == "abort":
            code = words.get("exitcode", "1")
            is_code = code.isascii() and code.isdigit() and len(code) < 10
            return self._abort(rank, int(code) if is_code else 1, "called MPI_Abort")
        return [Reply(rank, self._answer(process, command, words).encode() + b"\n")]

    def _answer(self, process: _Rank, command: str, words: Mapping[str, str]) -> str:
        if command == "init":
            return self._init(process, words)
        if command == "finalize":
            process.state = _DONE
            return "cmd=finalize_ack"
        if command == "get_maxes":
            return (
                f"cmd=maxes kvsname_max={KVSNAME_SIZE_MAX} keylen_max={KEY_SIZE_MAX}"
                f" vallen_max={VALUE_SIZE_MAX}"
            )
        if command == "get_appnum":
            return "cmd=appnum appnum=0"
        if command == "get_universe_size":
            return f"cmd=universe_size size={self._size}"
        if command == "get_my_kvsname":
            return f"cmd=my_kvsname kvsname={self._kvs_name}"
        if command == "put":
            return "cmd=put_result " + self._put(process, words)
        if command == "get":
            return "cmd=get_result " + self._get(words)
        if command == "getbyidx":
            return "cmd=getbyidx_results " + self._getbyidx(words)
        if command in _REFUSED:
            return f"cmd={_REFUSED[command]} rc=-1 info=not_supported msg=not_supported"
        raise _Broken(f"unknown command {command[:40]!r}")

    def _init(self, process: _Rank, words: Mapping[str, str]) -> str:
        if process.state != _NEW:
            raise _Broken("init twice")
        process.state, process.has_spoken = _RUNNING, True
        version = "pmi_version=1 pmi_subversion=1"
        if words.get("pmi_version") != "1":
            process.state = _NEW
            return f"cmd=response_to_init {version} rc=-1"
        return f"cmd=response_to_init {version} rc=0"

    def _put(self, process: _Rank, words: Mapping[str, str]) -> str:
        key, value = words.get("key", ""), words.get("value", "")
        process.put_count += 1
        if words.get("kvsname") != self._kvs_name:
            return "rc=-1 msg=kvs_not_found"
        if not key or len(key) >= KEY_SIZE_MAX or len(value) >= VALUE_SIZE_MAX:
            return "rc=-1 msg=too_long"
        if process.put_count > PUT_COUNT_MAX:
            return "rc=-1 msg=too_many"
        if key in self._stored or key in self._fresh:
            return f"rc=-1 msg=duplicate_key_{key}"
        self._fresh[key] = value
        return "rc=0 msg=success"

    def _get(self, words: Mapping[str, str]) -> str:
        key = words.get("key", "")
        if words.get("kvsname") != self._kvs_name:
            return "rc=-1 msg=kvs_not_found value=unknown"
        value = self._stored.get(key, self._fresh.get(key))
        if value is None:
            return f"rc=-1 msg=key_{key[:KEY_SIZE_MAX]}_not_found value=unknown"
        return f"rc=0 msg=success value={value}"

    def _getbyidx(self, words: Mapping[str, str]) -> str:
        text = words.get("idx", "")
        index = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
        if words.get("kvsname") != self._kvs_name or not 0 <= index < len(self._stored):
            return "rc=-2 reason=no_more_keyvals"
        key = list(self._stored)[index]
        return f"rc=0 nextidx={index + 1} key={key} val={self._stored[key]}"

    def _spawn(
        self, rank: int, process: _Rank, line: bytes, words: Mapping[str, str]
    ) -> list[Action]:
        """MPI_Comm_spawn is many lines up to `endcmd`; it is refused when all have come."""
        if process.state != _RUNNING or ("mcmd" in words) == process.in_spawn:
            raise _Broken("a spawn out of place")
        process.in_spawn = line.strip() != b"endcmd"
        if process.in_spawn:
            return []
        return [Reply(rank, b"cmd=spawn_result rc=-1 status=not_supported\n")]

    def _advance(self) -> list[Action]:
        """Pass the barrier on if all ranks are in it, or never will be."""
        states = {rank: process.state for rank, process in self._ranks.items()}
        waiting = [rank for rank, state in states.items() if state == _IN_BARRIER]
        left = [rank for rank, state in states.items() if state in (_DONE, _GONE)]
        if left and waiting:
            return self._abort(left[0], 1, MISSED)
        if self._aborted or max(len(waiting), len(left)) < len(states):
            return []
        return [BarrierUp(_pack(self._fresh), left[0] if left else -1)]

    def _abort(self, rank: int, code: int, reason: str) -> list[Action]:
        if self._aborted:
            return []
        self._aborted = True
        return [Abort(rank, code, reason)]


def _words(line: bytes) -> dict[str, str]:
    """Return the `key=value` words of a command; others have an empty value."""
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError:
        raise _Broken("not ASCII") from None
    if "\0" in text or "\r" in text:
        raise _Broken("control characters")
    found = {}
    for word in text.split(" "):
        if word:
            key, _, value = word.partition("=")
            found[key] = value
    return found


def _pack(puts: Mapping[str, str]) -> bytes:
    """Keys and values as lines: neither can hold a space or a newline."""
    return "".join(f"{key} {value}\n" for key, value in puts.items()).encode("latin-1")


def _unpack(payload: bytes) -> list[tuple[str, str]]:
    found = []
    for line in payload.decode("latin-1").split("\n"):
        key, space, value = line.partition(" ")
        if space:
            found.append((key, value))
    return found
