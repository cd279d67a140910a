"""Every message between hops.  Pure: shapes only (docs/broadcast.md#messages).

Each begins with the transfer id: a hop refuses what belongs to another transfer.  `tree` is the
index of a data tree, or their number for the control tree.  Who sends is known from the session.
Sets of chunks and of ranks are `chunkset` encoded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from common.messages import Catalogue

__all__ = [
    "HOP",
    "NOTHING",
    "Accept",
    "Ack",
    "Adopt",
    "Alive",
    "Attach",
    "Chunk",
    "Demote",
    "Finish",
    "Lack",
    "Leave",
    "Lend",
    "Nack",
    "PassOver",
    "Promote",
    "Refuse",
    "Report",
    "Spare",
    "Want",
]

HOP = Catalogue("hop")
NOTHING = b"\x00"
"""The set that is empty."""


@HOP.message(1)
class Attach(NamedTuple):
    """Child to parent: feed me what I do not have -> `Accept` or `Refuse`."""

    transfer: bytes
    tree: int
    attempt: int
    """Counts the sender's attaches: a higher one makes what was said under a lower one void."""
    have: bytes
    redirect_count: int
    place: int
    """The rank whose place in the tree the sender has; -1: behind everybody, it feeds nobody."""
    child_count: int


@HOP.message(2)
class Accept(NamedTuple):
    transfer: bytes
    tree: int
    attempt: int
    have_count: int


@HOP.message(3)
class Refuse(NamedTuple):
    transfer: bytes
    tree: int
    attempt: int
    instead: int
    """Whom to ask; -1 for the next ancestor."""
    place: int
    """The place of that one."""
    reason: str


@HOP.message(4)
class Chunk(NamedTuple):
    """Parent to child; the chunk is the payload."""

    transfer: bytes
    chunk: int


@HOP.message(5)
class Ack(NamedTuple):
    """Child to parent: the sink has it.  This is the credit for another chunk."""

    transfer: bytes
    chunk: int


@HOP.message(6)
class Want(NamedTuple):
    """Child to parent: send these again; they came damaged, or the sink has spoilt them."""

    transfer: bytes
    tree: int
    chunks: bytes


@HOP.message(7)
class Alive(NamedTuple):
    """Both ways, when nothing else was said for a while, and to tell progress."""

    transfer: bytes
    tree: int
    have_count: int
    """Chunks of this tree that the sender has; on the control tree: of its whole subtree."""
    child_count: int
    present: bytes = NOTHING
    """On the control tree, to the parent: ranks of the sender's subtree that it hears of."""


@HOP.message(8)
class Adopt(NamedTuple):
    """Ancestor to orphan: your parent is lost or slow, attach to me -> `Attach` or `Leave`."""

    transfer: bytes
    tree: int
    place: int
    """The place of the sender."""
    instead_of: int
    lives: bool
    """The parent is not lost but slow; if it is said to be lost, the orphan knows better."""
    reason: str


@HOP.message(9)
class Leave(NamedTuple):
    """Either way: this edge is over.  No answer."""

    transfer: bytes
    tree: int
    attempt: int
    """The attach that it ends; 0 for whichever there is."""
    reason: str


@HOP.message(10)
class Demote(NamedTuple):
    """Parent to child: you are slow; feed nobody any more, and ask another to feed you."""

    transfer: bytes
    tree: int
    instead: int
    """Whom to ask; -1: stay."""
    reason: str


@HOP.message(11)
class Report(NamedTuple):
    """Child to parent on the control tree: what is new in the sender's ledger."""

    transfer: bytes
    joined: bytes
    """Ranks that have attached."""
    verified: bytes
    """Ranks that have all of it, read back and verified."""
    others: list[Any]
    """[rank, verdict, attempt, reason] each."""
    notes: list[Any]
    """[rank, text] each."""
    ready: bytes = NOTHING
    """Ranks that listen for the multicast pass, and have said what they lack."""
    lacking: bytes = NOTHING
    """Chunks that at least one of these lacks."""


@HOP.message(12)
class Finish(NamedTuple):
    """Parent to child on the control tree: the source has closed the transfer."""

    transfer: bytes


@HOP.message(13)
class Nack(NamedTuple):
    """Child to parent on the control tree during a multicast pass: what receivers lack."""

    transfer: bytes
    gaps: list[Any]
    """[chunk, receivers that lack something of it, pieces that they lost, which ones] each."""


@HOP.message(14)
class PassOver(NamedTuple):
    """Parent to child on the control tree: the multicast pass is over, attach in the data trees."""

    transfer: bytes


@HOP.message(15)
class Promote(NamedTuple):
    """Parent of a lost relay to a leaf: take its place, attach to me -> `Attach` or `Leave`."""

    transfer: bytes
    tree: int
    place: int
    reason: str


@HOP.message(16)
class Lack(NamedTuple):
    """Child to parent: I have all of this tree, and lack these chunks of others -> `Lend`."""

    transfer: bytes
    tree: int
    chunks: bytes


@HOP.message(17)
class Lend(NamedTuple):
    """Parent to child: these come by this tree; none: ask again."""

    transfer: bytes
    tree: int
    chunks: bytes


@HOP.message(18)
class Spare(NamedTuple):
    """Child to parent: these need not be sent, another brings them."""

    transfer: bytes
    tree: int
    chunks: bytes
