"""PMI-1: transcripts, barriers over a tree, and ranks that write garbage."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karun.agent.barrier import Gathering
from karun.agent.frames import FrameError
from karun.pmi import (
    KEY_SIZE_MAX,
    LINE_SIZE_MAX,
    Abort,
    Action,
    BarrierUp,
    Proxy,
    Reply,
    process_mapping,
)
from tests.support.pmi_world import Tree

INIT = b"cmd=init pmi_version=1 pmi_subversion=1\n"
BARRIER = b"cmd=barrier_in\n"
OUT = b"cmd=barrier_out\n"


class Alone:
    """The only node: its barriers are passed as soon as it is in them."""

    def __init__(self, *ranks: int) -> None:
        self._proxy = Proxy("kvs_7", len(ranks), ranks)

    def receive(self, rank: int, data: bytes) -> list[Action]:
        found: list[Action] = []
        for piece in data.splitlines(keepends=True):  # a rank waits for its answer
            found += self._passed(self._proxy.receive(rank, piece))
        return found

    def closed(self, rank: int) -> list[Action]:
        return self._passed(self._proxy.closed(rank))

    def exited(self, rank: int, code: int, signal: int = 0) -> list[Action]:
        return self._passed(self._proxy.exited(rank, code, signal))

    def _passed(self, actions: list[Action]) -> list[Action]:
        found: list[Action] = []
        for action in actions:
            if isinstance(action, BarrierUp):
                found += self._proxy.released(action.payload) if action.left < 0 else []
            else:
                found.append(action)
        return found


def alone(*ranks: int) -> Alone:
    return Alone(*ranks)


def replies(actions: list[Action]) -> list[bytes]:
    assert all(isinstance(action, Reply) for action in actions)
    return [action.data for action in actions if isinstance(action, Reply)]


def abort_of(actions: list[Action]) -> Abort:
    assert isinstance(actions[-1], Abort)
    return actions[-1]


TRANSCRIPT = """\
> cmd=init pmi_version=1 pmi_subversion=1
< cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0
> cmd=get_maxes
< cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=1024
> cmd=get_appnum
< cmd=appnum appnum=0
> cmd=get_universe_size
< cmd=universe_size size=1
> cmd=get_my_kvsname
< cmd=my_kvsname kvsname=kvs_7
> cmd=put kvsname=kvs_7 key=P0-card value=host#a=b$12
< cmd=put_result rc=0 msg=success
> cmd=put kvsname=kvs_7 key=P0-card value=again
< cmd=put_result rc=-1 msg=duplicate_key_P0-card
> cmd=put kvsname=other key=k value=v
< cmd=put_result rc=-1 msg=kvs_not_found
> cmd=getbyidx kvsname=kvs_7 idx=0
< cmd=getbyidx_results rc=-2 reason=no_more_keyvals
> cmd=barrier_in
< cmd=barrier_out
> cmd=get kvsname=kvs_7 key=P0-card
< cmd=get_result rc=0 msg=success value=host#a=b$12
> cmd=get kvsname=kvs_7 key=nosuch
< cmd=get_result rc=-1 msg=key_nosuch_not_found value=unknown
> cmd=getbyidx kvsname=kvs_7 idx=0
< cmd=getbyidx_results rc=0 nextidx=1 key=P0-card val=host#a=b$12
> cmd=lookup_name service=x
< cmd=lookup_result rc=-1 info=not_supported msg=not_supported
> mcmd=spawn
> nprocs=2
> execname=/bin/true
> endcmd
< cmd=spawn_result rc=-1 status=not_supported
> cmd=finalize
< cmd=finalize_ack
"""


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_the_transcript_of_one_rank(piece: int) -> None:
    proxy, answers = alone(0), b""
    asked = "".join(line[2:] for line in TRANSCRIPT.splitlines(keepends=True) if line[0] == ">")
    for begin in range(0, len(asked), piece):
        answers += b"".join(replies(proxy.receive(0, asked[begin : begin + piece].encode())))
    expected = [line[2:] for line in TRANSCRIPT.splitlines() if line[0] == "<"]
    assert answers.decode().splitlines() == expected
    assert proxy.closed(0) == []


def test_another_version_is_refused_and_may_be_followed_by_ours() -> None:
    proxy = alone(0)
    answer = replies(proxy.receive(0, b"cmd=init pmi_version=2 pmi_subversion=0\n"))
    assert answer == [b"cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=-1\n"]
    assert b"rc=0" in replies(proxy.receive(0, INIT))[0]


def test_a_barrier_waits_for_every_rank_of_the_node() -> None:
    proxy = alone(0, 1)
    for rank in (0, 1):
        proxy.receive(rank, INIT)
    assert proxy.receive(1, BARRIER) == []
    assert replies(proxy.receive(0, BARRIER)) == [OUT, OUT]


def test_what_is_put_anywhere_is_known_everywhere_after_a_barrier() -> None:
    tree = Tree([2, 1, 3, 1, 2])
    for rank in range(9):
        tree.receive(rank, INIT + b"cmd=put kvsname=kvs_0 key=card-%d value=at-%d\n" % (rank, rank))
    tree.replies.clear()
    for rank in range(9):
        assert tree.replies == []
        tree.receive(rank, BARRIER)
    assert sorted(tree.replies) == [(rank, OUT) for rank in range(9)]
    tree.replies.clear()
    for rank in range(9):
        for other in range(9):
            tree.receive(rank, b"cmd=get kvsname=kvs_0 key=card-%d\n" % other)
            assert tree.replies[-1][1].endswith(b"rc=0 msg=success value=at-%d\n" % other)
    tree.receive(0, b"cmd=get kvsname=kvs_0 key=PMI_process_mapping\n")
    assert tree.replies[-1][1].endswith(
        b" value=(vector,(0,1,2),(1,1,1),(2,1,3),(3,1,1),(4,1,2))\n"
    )


def test_a_barrier_is_one_message_each_way_on_each_edge() -> None:
    tree = Tree([16] * 7)
    for barrier in range(3):
        for rank in range(16 * 7):
            tree.receive(rank, (b"" if barrier else INIT) + BARRIER)
        assert tree.messages == 12 * (barrier + 1)


def test_a_key_is_not_seen_on_other_nodes_before_the_barrier() -> None:
    tree = Tree([1, 1])
    tree.receive(0, INIT + b"cmd=put kvsname=kvs_0 key=a value=b\n")
    tree.receive(1, INIT + b"cmd=get kvsname=kvs_0 key=a\n")
    assert b"rc=-1" in tree.replies[-1][1]
    tree.receive(0, b"cmd=get kvsname=kvs_0 key=a\n")
    assert b"rc=0" in tree.replies[-1][1]


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_the_order_of_arrival_makes_no_difference(first: list[int], second: list[int]) -> None:
    tree = Tree([1, 0, 2, 3]) if first[0] % 2 else Tree([2, 2, 2])
    for order in (first, second):
        for count, rank in enumerate(order):
            tree.receive(rank, (INIT if order is first else b"") + BARRIER)
            assert not any(data == OUT for _, data in tree.replies) or count == 5
        assert sum(data == OUT for _, data in tree.replies) == 6
        tree.replies.clear()
    assert tree.aborts == []


def test_abort_stops_the_run_with_its_code_and_is_said_once() -> None:
    proxy = alone(0, 1)
    proxy.receive(0, INIT)
    proxy.receive(1, INIT)
    proxy.receive(1, BARRIER)
    found = abort_of(proxy.receive(1, b"cmd=abort exitcode=42\n"))
    assert (found.rank, found.code) == (1, 42)
    assert proxy.receive(0, b"nonsense\n") == proxy.closed(0) == proxy.receive(0, BARRIER) == []


@pytest.mark.parametrize("said", [INIT, INIT + BARRIER])
def test_a_rank_that_ends_before_finalize_aborts_the_run(said: bytes) -> None:
    proxy = alone(0, 1)
    proxy.receive(0, said)
    assert "without MPI_Finalize" in abort_of(proxy.closed(0)).reason


def test_a_program_without_mpi_may_come_and_go() -> None:
    proxy = alone(0, 1)
    assert proxy.closed(0) == proxy.closed(1) == []


def test_a_barrier_that_can_never_complete_aborts_the_run() -> None:
    proxy = alone(0, 1)
    proxy.closed(0)
    proxy.receive(1, INIT)
    assert abort_of(proxy.receive(1, BARRIER)).rank == 0


@pytest.mark.parametrize(
    "line",
    [
        b"cmd=get_maxes\n",
        INIT + INIT,
        INIT + BARRIER + b"cmd=get_maxes\n",
        INIT + b"cmd=finalize\ncmd=get_maxes\n",
        INIT + b"cmd=nosuch\n",
        INIT + b"\n",
        INIT + b"cmd=put key=\xff\n",
        INIT + b"nprocs=1\n",
        INIT + b"mcmd=spawn\nmcmd=spawn\n",
        b"mcmd=spawn\n",
        b"x" * (LINE_SIZE_MAX + 1),
        b"x" * (LINE_SIZE_MAX + 1) + b"\n",
    ],
)
def test_a_broken_protocol_aborts_the_run(line: bytes) -> None:
    assert abort_of(alone(0, 1).receive(0, line)).reason.startswith("PMI: ")


@pytest.mark.parametrize("put", [b"key= value=a", b"key=" + b"k" * KEY_SIZE_MAX + b" value=a"])
def test_a_put_beyond_the_limits_is_refused(put: bytes) -> None:
    proxy = alone(0)
    assert b"rc=-1" in replies(proxy.receive(0, INIT + b"cmd=put kvsname=kvs_7 " + put + b"\n"))[1]


garbage = st.lists(
    st.sampled_from(
        [INIT, BARRIER, b"cmd=", b"put ", b"kvsname=kvs_7 ", b"key=a ", b"value=b", b"\n", b" ",
         b"cmd=get kvsname=kvs_7 key=a\n", b"cmd=finalize\n", b"mcmd=spawn\n", b"endcmd\n",
         b"cmd=abort exitcode=-1\n", b"cmd=getbyidx kvsname=kvs_7 idx=-1\n", b"=", b"\0"]
    )
    | st.binary(max_size=8),
    max_size=25,
)  # fmt: skip


@given(garbage)
def test_garbage_gives_replies_or_one_abort(pieces: list[bytes]) -> None:
    proxy = alone(0)
    actions: list[Action] = []
    for piece in pieces:
        actions += proxy.receive(0, piece)
    actions += proxy.closed(0)
    assert sum(isinstance(action, Abort) for action in actions) <= 1
    for action in actions:
        if isinstance(action, Reply):
            assert action.data.endswith(b"\n")
            assert action.data.count(b"\n") == 1
        else:
            assert "\n" not in abort_of([action]).reason


@given(st.binary(max_size=100))
def test_garbage_from_a_neighbour_is_an_error_of_frames_or_nothing(payload: bytes) -> None:
    with contextlib.suppress(FrameError):
        Gathering().take(payload, 8)
    proxy = Proxy("k", 1, [0])
    proxy.receive(0, INIT + BARRIER)
    proxy.released(payload)


@pytest.mark.parametrize("end", [{"code": 3}, {"code": 0, "signal": 11}])
def test_a_rank_that_fails_before_init_aborts_the_run_with_its_code(end: dict[str, int]) -> None:
    proxy = alone(0, 1)
    assert proxy.closed(0) == []
    found = abort_of(proxy.exited(0, **end))
    assert (found.rank, found.code) == (0, 139 if "signal" in end else 3)
    assert proxy.exited(1, 0) == []


def test_a_rank_that_fails_after_finalize_ends_for_itself() -> None:
    proxy = alone(0)
    proxy.receive(0, INIT + b"cmd=finalize\n")
    assert proxy.closed(0) == proxy.exited(0, 3) == []


def test_a_node_whose_ranks_are_over_ends_a_barrier_that_others_wait_in() -> None:
    tree = Tree([1, 1, 2])
    for rank in (0, 2, 3):
        tree.receive(rank, INIT + BARRIER)
    assert tree.aborts == []
    tree.closed(1)
    assert [(one.rank, one.code) for one in tree.aborts] == [(1, 1)]


def test_a_program_that_ends_everywhere_ends_in_peace() -> None:
    tree = Tree([1, 1, 2])
    for rank in range(4):
        tree.receive(rank, INIT + BARRIER)
    for rank in range(4):
        tree.receive(rank, b"cmd=finalize\n")
        tree.closed(rank)
        tree.exited(rank, 0)
    assert tree.aborts == []


# What relays gather.


def gathered(*nodes: int, left: int = -1) -> Gathering:
    found = Gathering()
    for node in nodes:
        found.bring(1 << node, b"key-%d value\n" % node, left)
    return found


def test_what_is_brought_twice_or_over_two_ways_counts_once() -> None:
    head = Gathering()
    for part in (gathered(1, 2), gathered(1, 2), gathered(2, 1), gathered(3)):
        news = part.news(9)
        assert news is not None
        head.take(news, 4)
    assert head.has(0b1110)
    assert not head.has(0b1111)
    assert sorted(head.puts.splitlines()) == [b"key-1 value", b"key-2 value", b"key-3 value"]


def test_nodes_that_the_run_has_not_bring_nothing() -> None:
    head = Gathering()
    news = gathered(4).news(9)
    assert news is not None
    with pytest.raises(FrameError):
        head.take(news, 4)
    head.take(news, 5)
    assert head.has(1 << 4)


def test_news_is_told_once_and_again_only_to_another_parent() -> None:
    ours = gathered(1)
    first = ours.news(9)
    assert first is not None
    assert ours.news(9) is None
    ours.forget()
    assert ours.news(9) == first
    ours.bring(1 << 2, b"", -1)
    assert ours.news(9) is not None


def test_an_earlier_barrier_is_passed_over_and_a_later_one_begins_anew() -> None:
    late, early, relay = gathered(1), gathered(2), Gathering()
    late.passed(1)
    late.bring(1 << 1, b"second 1\n", -1)
    for part in (late, early):
        news = part.news(9)
        assert news is not None
        relay.take(news, 4)
    assert (relay.number, relay.nodes, relay.puts) == (2, 0b10, b"second 1\n")


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([4], "(vector,(0,1,4))"),
        ([2, 2, 2, 1], "(vector,(0,3,2),(3,1,1))"),
        ([1, 0, 1], "(vector,(0,2,1))"),
        ([], ""),
        ([1, 2] * 500, ""),
    ],
)
def test_the_mapping_of_ranks_to_nodes(counts: list[int], expected: str) -> None:
    assert process_mapping(counts) == expected
