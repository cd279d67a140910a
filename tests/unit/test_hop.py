"""Laws of one hop: what it does, event by event, and that nonsense changes nothing."""

from __future__ import annotations

from typing import Any, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.broadcast import chunkset
from common.broadcast.hop import Hop
from common.broadcast.manifest import Algorithm, Manifest
from common.broadcast.node import (
    END,
    Action,
    BreakOff,
    Disconnect,
    Finished,
    HopOptions,
    Send,
    SendChunk,
    SendPast,
    VerifySink,
    WriteChunk,
)
from common.broadcast.outcome import Verdict
from common.broadcast.topology import SOURCE, Kind, Shape, build
from common.broadcast.wire import (
    HOP,
    Accept,
    Ack,
    Adopt,
    Alive,
    Attach,
    Chunk,
    Demote,
    Finish,
    Leave,
    Refuse,
    Report,
    Want,
)
from common.errors import Code, KaError

ID = bytes(range(16))
CHAIN = build(Shape(Kind.CHAIN, (6,)))
CONTROL = 1
NOTHING = chunkset.encode(0)
OPTIONS = HopOptions(window_count=3)


def manifest(chunk_count: int) -> Manifest:
    return Manifest(ID, "x", chunk_count * 10, 10, Algorithm.XXH3, bytes(8 * chunk_count))


def hop(rank: int, chunk_count: int = 8, **more: Any) -> Hop:
    made = Hop(rank, CHAIN, manifest(chunk_count), OPTIONS, **more)
    made.start(0.0)
    return made


def relay(chunk_count: int = 8, **more: Any) -> Hop:
    """Rank 2 of a chain, fed by 1, feeding 3, which has nothing."""
    made = hop(2, chunk_count, **more)
    made.message_received(1, Accept(ID, 0, 1, 0), 0.0)
    made.message_received(0, Accept(ID, CONTROL, 1, 0), 0.0)
    made.message_received(3, Attach(ID, 0, 1, NOTHING, 0, 3, 0), 0.0)
    return made


def chunks_to(peer: int, actions: list[Action]) -> list[int]:
    return [one.chunk for one in actions if isinstance(one, SendChunk) and one.peer == peer]


def said_to(peer: int, actions: list[Action], kind: type) -> list[Any]:
    sent = (one for one in actions if isinstance(one, Send | SendPast) and one.peer == peer)
    return [one.message for one in sent if isinstance(one.message, kind)]


def run_until(made: Hop, now: float, until: float, *alive: int) -> list[Action]:
    """Tick along; the neighbours in *alive* say so."""
    found: list[Action] = []
    while now < until:
        now += 0.1
        for peer in alive:
            found += made.message_received(peer, Alive(ID, 0, 0, 0), now)
        found += made.tick(now)
    return found


# ---------------------------------------------------------------- chunks


def test_a_receiver_speaks_first_and_says_what_it_has() -> None:
    made = Hop(2, CHAIN, manifest(8), OPTIONS, have=0b1011)
    asked = said_to(1, made.start(0.0), Attach)
    assert [chunkset.decode(one.have, 8) for one in asked] == [0b1011]


def test_a_chunk_is_passed_on_at_once_and_acknowledged_when_the_sink_has_it() -> None:
    made = relay()
    actions = made.chunk_received(1, 0, True, 0.1)
    assert WriteChunk(0) in actions
    assert chunks_to(3, actions) == [0]
    assert said_to(1, actions, Ack) == []
    assert said_to(1, made.sink_wrote(0, 0.2), Ack) == [Ack(ID, 0)]


def test_a_child_is_never_sent_more_than_its_window_before_it_acknowledges() -> None:
    source = hop(0)
    actions = source.message_received(1, Attach(ID, 0, 1, NOTHING, 0, 1, 0), 0.0)
    assert chunks_to(1, actions) == [0, 1, 2]
    assert chunks_to(1, source.message_received(1, Ack(ID, 1), 0.1)) == [3]
    assert chunks_to(1, source.message_received(1, Ack(ID, 1), 0.1)) == []


def test_a_child_is_sent_only_what_it_lacks() -> None:
    source = hop(0)
    have = chunkset.encode(0b11100101)
    actions = source.message_received(1, Attach(ID, 0, 1, have, 0, 1, 0), 0.0)
    assert chunks_to(1, actions) == [1, 3, 4]


def test_a_child_that_lags_does_not_hold_back_its_parent() -> None:
    made = relay()
    for chunk in range(6):
        made.chunk_received(1, chunk, True, 0.1)
        assert said_to(1, made.sink_wrote(chunk, 0.1), Ack) == [Ack(ID, chunk)]
    assert len(made.downs[0].children[3].in_flight) == OPTIONS.window_count


def test_a_damaged_chunk_is_asked_for_again_and_neither_written_nor_passed_on() -> None:
    made = relay()
    actions = made.chunk_received(1, 0, False, 0.1)
    assert said_to(1, actions, Want) == [Want(ID, 0, chunkset.encode(1))]
    assert len(actions) == 1
    assert made.damaged_count == 1


def test_a_parent_that_sends_damage_again_and_again_is_left() -> None:
    made = relay()
    for _ in range(2):
        made.chunk_received(1, 0, False, 0.1)
    actions = made.chunk_received(1, 0, False, 0.1)
    assert said_to(1, actions, Leave)
    assert said_to(0, actions, Attach)
    assert "damaged" in made.node.ledger.summary().notes[1]


def test_a_chunk_that_is_there_already_is_dropped_and_acknowledged() -> None:
    made = relay(have=0b1)
    actions = made.chunk_received(1, 0, True, 0.1)
    assert actions == [Send(1, Ack(ID, 0))]
    assert made.duplicate_count == 1


def test_a_chunk_that_two_parents_have_sent_is_acknowledged_to_the_one_that_feeds() -> None:
    made = relay()
    made.chunk_received(1, 0, True, 0.1)
    made.neighbour_lost(1, "reset", 0.2)
    made.message_received(0, Accept(ID, 0, made.node.attempt, 8), 0.2)
    assert said_to(0, made.chunk_received(0, 0, True, 0.3), Ack) == []
    assert said_to(0, made.sink_wrote(0, 0.4), Ack) == [Ack(ID, 0)]


def test_a_chunk_from_a_stranger_counts_and_the_stranger_is_told() -> None:
    made = relay()
    actions = made.chunk_received(5, 0, True, 0.1)
    assert WriteChunk(0) in actions
    assert said_to(5, actions, Leave)


def test_wanted_chunks_are_sent_again() -> None:
    made = relay()
    made.chunk_received(1, 0, True, 0.1)
    actions = made.message_received(3, Want(ID, 0, chunkset.encode(0b1)), 0.2)
    assert chunks_to(3, actions) == [0]


# ---------------------------------------------------------------- the sink and the end


def whole(made: Hop, count: int) -> list[Action]:
    found: list[Action] = []
    for chunk in range(count):
        found += made.chunk_received(1, chunk, True, 0.1)
        found += made.sink_wrote(chunk, 0.1)
    return found


def test_verified_is_said_only_after_the_sink_was_read_back() -> None:
    made = relay(2)
    actions = whole(made, 2)
    assert VerifySink() in actions
    assert said_to(0, actions, Report) == []
    (report,) = said_to(0, made.sink_verified((), 0.2), Report)
    assert chunkset.decode(report.verified, 7) == 1 << 2
    assert made.verdict is Verdict.VERIFIED


def test_what_was_read_back_damaged_is_asked_for_again() -> None:
    made = relay(2)
    whole(made, 2)
    actions = made.sink_verified([1], 0.2)
    assert said_to(1, actions, Want) == [Want(ID, 0, chunkset.encode(0b10))]
    assert made.verdict is Verdict.PENDING
    made.chunk_received(1, 1, True, 0.3)
    assert VerifySink() in made.sink_wrote(1, 0.3)


def test_a_sink_that_fails_takes_this_node_out_and_sends_its_children_on() -> None:
    made = relay()
    made.chunk_received(1, 0, True, 0.1)
    actions = made.sink_failed("no space left", 0.2)
    assert said_to(3, actions, Leave)
    assert said_to(1, actions, Leave)
    (report,) = said_to(0, actions, Report)
    assert report.others == [[2, Verdict.FAILED, 1, "no space left"]]
    refusals = made.message_received(3, Attach(ID, 0, 2, NOTHING, 0, 3, 0), 0.3)
    assert said_to(3, refusals, Refuse)


def test_a_copy_that_is_complete_already_is_only_read_back() -> None:
    made = Hop(2, CHAIN, manifest(8), OPTIONS, have=0xFF)
    assert VerifySink() in made.start(0.0)


def test_the_end_comes_down_and_late_comers_are_told() -> None:
    made = relay()
    made.message_received(3, Attach(ID, CONTROL, 1, NOTHING, 0, 3, 0), 0.1)
    actions = made.message_received(0, Finish(ID), 0.2)
    assert said_to(3, actions, Finish)
    assert isinstance(actions[-1], Finished)
    late = made.message_received(4, Attach(ID, 0, 2, NOTHING, 0, 4, 0), 0.3)
    assert late == [Send(4, Finish(ID))]


# ---------------------------------------------------------------- neighbours


def test_a_silent_parent_is_lost_within_a_second_and_an_ancestor_is_asked() -> None:
    made = relay()
    actions = run_until(made, 0.0, 0.95, 3)
    assert any(isinstance(one, Disconnect) and one.peer == 1 for one in actions)
    assert said_to(0, actions, Attach)


def test_a_silent_child_is_lost_and_its_children_are_adopted() -> None:
    made = relay()
    actions = run_until(made, 0.0, 0.95, 1)
    (adopt,) = said_to(4, actions, Adopt)
    assert (adopt.instead_of, adopt.lives) == (3, False)
    assert made.node.ledger.entry(3).verdict is Verdict.LOST


def test_a_child_that_takes_nothing_for_a_second_is_made_a_leaf() -> None:
    made = relay()
    made.chunk_received(1, 0, True, 0.0)
    actions = run_until(made, 0.0, 1.2, 1, 3)
    (demote,) = said_to(3, actions, Demote)
    (adopt,) = said_to(4, actions, Adopt)
    assert adopt.lives
    # Another has room: what is under way is taken back, so that the link is free.
    assert demote.instead > 0
    assert not any(isinstance(one, Send) and one.message is demote for one in actions)
    assert 3 not in made.downs[0].children


def test_a_parent_that_has_more_and_sends_nothing_is_left() -> None:
    made = relay()
    found: list[Action] = []
    for tenth in range(1, 12):
        found += made.message_received(1, Alive(ID, 0, 5, 1), tenth / 10)
        found += made.message_received(3, Alive(ID, 0, 0, 0), tenth / 10)
        found += made.tick(tenth / 10)
    assert said_to(1, found, Leave)
    assert said_to(0, found, Attach)


def test_a_parent_that_has_nothing_itself_is_not_left() -> None:
    made = relay()
    actions = run_until(made, 0.0, 5.0, 1, 3)
    assert said_to(1, actions, Leave) == []


def test_a_hop_that_slept_blames_nobody() -> None:
    made = relay()
    actions = made.tick(30.0)
    assert not any(isinstance(one, Disconnect) for one in actions)


def test_a_well_fed_child_declines_an_offer_and_a_starving_one_takes_it() -> None:
    fed = hop(3)
    fed.message_received(2, Accept(ID, 0, 1, 5), 0.0)
    fed.chunk_received(2, 0, True, 0.3)
    offer = Adopt(ID, 0, 1, 2, False, "silent")
    assert said_to(1, fed.message_received(1, offer, 0.4), Leave)
    starving = hop(3)
    starving.message_received(2, Accept(ID, 0, 1, 5), 0.0)
    starving.tick(0.3)
    assert said_to(1, starving.message_received(1, offer, 0.6), Attach)


def test_a_node_feeds_nobody_that_comes_before_it() -> None:
    made = relay()
    actions = made.message_received(1, Attach(ID, 0, 9, NOTHING, 0, 1, 0), 0.1)
    assert said_to(1, actions, Refuse)
    assert said_to(4, made.message_received(4, Adopt(ID, 0, 4, 1, True, ""), 0.1), Attach) == []


def test_orphans_beyond_what_a_node_can_feed_are_referred_to_its_children() -> None:
    made = relay()
    for peer in (4, 5):
        made.message_received(peer, Attach(ID, 0, 2, NOTHING, 0, peer, 1), 0.1)
    (refusal,) = said_to(
        6, made.message_received(6, Attach(ID, 0, 2, NOTHING, 0, 6, 1), 0.1), Refuse
    )
    assert refusal.instead in (3, 4, 5)
    persistent = made.message_received(6, Attach(ID, 0, 2, NOTHING, 3, 6, 0), 0.1)
    assert said_to(6, persistent, Accept)


@pytest.mark.parametrize(("place", "is_relay"), [(1, True), (END, False)])
def test_other_trees_win_a_lead_while_a_relay_is_new_and_not_while_a_leaf_is(
    place: int, is_relay: bool
) -> None:
    made = Hop(SOURCE, build(Shape(Kind.STRIPES, (8,), 2)), manifest(8), OPTIONS)
    made.start(0.0)
    made.message_received(4, Attach(ID, 0, 2, NOTHING, 0, place, 0), 5.0)
    assert 4 in made.downs[0].children
    assert (made.downs[0].settled_s > 5.0) is is_relay
    made.neighbour_lost(4, "gone", 7.0)
    assert (made.downs[0].settled_s > 7.0) is is_relay


def test_an_accept_that_comes_too_late_is_declined() -> None:
    made = hop(3)
    made.neighbour_lost(2, "connection refused", 1.5)
    actions = made.message_received(2, Accept(ID, 0, 1, 0), 1.6)
    assert said_to(2, actions, Leave)


def test_a_parent_that_has_not_started_is_asked_again_for_a_moment() -> None:
    made = hop(3)
    assert said_to(1, made.neighbour_lost(2, "connection refused", 0.1), Attach) == []
    assert said_to(2, made.tick(0.4), Attach)


def test_who_has_failed_is_asked_once_more_when_others_refer_to_it_and_not_again() -> None:
    made = hop(3)
    made.neighbour_lost(2, "did not answer", 1.5)
    referral = Refuse(ID, 0, made.node.attempt, 2, 2, "full")
    assert said_to(2, made.message_received(1, referral, 1.6), Attach)
    assert said_to(0, made.neighbour_lost(2, "did not answer", 1.9), Attach)
    referral = Refuse(ID, 0, made.node.attempt, 2, 2, "full")
    (asked,) = said_to(0, made.message_received(0, referral, 2.0), Attach)
    assert asked.redirect_count == 1


# ---------------------------------------------------------------- nonsense


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (1, Alive(bytes(16), 0, 0, 0)),
        (1, Alive(ID, 2, 0, 0)),
        (1, Alive(ID, -1, 0, 0)),
        (2, Alive(ID, 0, 0, 0)),
        (7, Alive(ID, 0, 0, 0)),
        (1, Ack(ID, 8)),
        (1, Chunk(ID, 0)),
        (1, Refuse(ID, 0, 1, 7, 0, "")),
        (3, Attach(ID, 0, 1, b"\x00\x00\x09", 0, 3, 0)),
        (3, Attach(ID, 0, 1, NOTHING, 0, 7, 0)),
        (3, Attach(ID, 0, 1, NOTHING, 0, -2, 0)),
        (3, Report(ID, NOTHING, NOTHING, [[1, 3, 1, ""]], [])),
        (3, Report(ID, NOTHING, NOTHING, [[7, 1, 1, ""]], [])),
        (3, Report(ID, NOTHING, NOTHING, [], ["note"])),
    ],
)
def test_what_is_not_of_this_transfer_is_refused(peer: int, message: Any) -> None:
    made = relay()
    before = (made.node.have, made.ups[0].parent, list(made.downs[0].children))
    with pytest.raises(KaError) as refused:
        made.message_received(peer, message, 0.1)
    assert refused.value.code is Code.PROTOCOL
    assert (made.node.have, made.ups[0].parent, list(made.downs[0].children)) == before


def test_a_chunk_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KaError):
        relay().chunk_received(1, 8, True, 0.1)


SMALL = st.integers(-2, 9)
SETS = st.integers(0, 255).map(chunkset.encode)
JUNK = st.lists(st.one_of(SMALL, st.text(max_size=2), st.lists(SMALL, max_size=4)), max_size=4)
FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    int: SMALL,
    bytes: st.one_of(SETS, st.binary(max_size=3)),
    str: st.text(max_size=3),
    bool: st.booleans(),
    list: JUNK,
}


def messages() -> st.SearchStrategy[Any]:
    """Messages of every kind, well formed as far as the catalogue sees to it."""

    def one(kind: Any) -> st.SearchStrategy[Any]:
        hints = list(get_type_hints(kind).values())[1:]
        fields = [FIELDS[get_origin(hint) or hint] for hint in hints]
        return st.tuples(*fields).map(lambda values: kind(ID, *values))

    return st.one_of([one(kind) for kind in HOP.classes().values()])


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 6), messages()), max_size=25), st.integers(0, 6))
def test_whatever_neighbours_say_only_protocol_errors_come_of_it(
    said: list[tuple[int, Any]], rank: int
) -> None:
    made = hop(rank)
    now = 0.0
    for peer, message in said:
        assert HOP.decode(HOP.encode(message)) == message
        now += 0.07
        try:
            actions = made.message_received(peer, message, now)
            actions += made.tick(now)
        except KaError as error:
            assert error.code is Code.PROTOCOL  # noqa: PT017
            continue
        for action in actions:
            if isinstance(action, SendChunk):
                assert made.node.have >> action.chunk & 1
    assert made.verdict is Verdict.PENDING


def test_a_chunk_is_passed_on_while_it_comes_and_once() -> None:
    made = relay()
    assert chunks_to(3, made.chunk_begins(1, 0, 0.1)) == [0]
    assert made.node.have == 0
    actions = made.chunk_received(1, 0, True, 0.2)
    assert WriteChunk(0) in actions
    assert chunks_to(3, actions) == []


def test_who_has_another_parent_is_not_kept_waiting_for_the_rest_of_a_chunk() -> None:
    made = relay()
    made.chunk_received(1, 0, True, 0.1)
    made.chunk_begins(1, 1, 0.2)
    assert made.message_received(3, Leave(ID, 0, 1, "adopted by another"), 0.3) == [BreakOff(3, 1)]


def test_what_a_former_parent_broke_off_is_not_held_against_it() -> None:
    made = relay()
    for _ in range(2):
        made.chunk_received(4, 0, False, 0.1)
    made.message_received(1, Leave(ID, 0, 1, "made a leaf"), 0.2)
    made.message_received(0, Accept(ID, 0, 2, 8), 0.3)
    assert chunks_to(3, made.chunk_begins(0, 0, 0.4)) == [0]
    assert made.damaged_count == 2


def test_after_two_damaged_chunks_nothing_is_passed_on_before_it_was_found_right() -> None:
    made = relay()
    made.chunk_begins(1, 0, 0.1)
    made.chunk_received(1, 0, False, 0.2)
    assert chunks_to(3, made.chunk_begins(1, 1, 0.3)) == [1]
    made.chunk_received(1, 1, False, 0.4)
    assert chunks_to(3, made.chunk_begins(1, 2, 0.5)) == []
    assert chunks_to(3, made.chunk_received(1, 2, True, 0.6)) == [2]
    made.message_received(3, Ack(ID, 2), 0.7)
    assert chunks_to(3, made.chunk_begins(1, 3, 0.7)) == [3]


def test_what_a_child_complains_about_is_sent_again_when_it_is_there() -> None:
    made = relay()
    made.chunk_begins(1, 0, 0.1)
    made.chunk_broke_off(0)
    want = Want(ID, 0, chunkset.encode(1))
    assert chunks_to(3, made.message_received(3, want, 0.2)) == []
    assert chunks_to(3, made.chunk_received(1, 0, True, 0.3)) == [0]


def test_only_the_parent_and_only_what_is_lacking_is_passed_on_early() -> None:
    made = relay(have=1)
    assert made.chunk_begins(1, 0, 0.1) == []
    assert made.chunk_begins(4, 1, 0.1) == []


def test_a_child_that_waits_for_what_is_still_coming_is_not_blamed() -> None:
    made = relay()
    made.message_received(1, Alive(ID, 0, 8, 1), 0.0)
    made.chunk_begins(1, 0, 0.1)
    now = 0.1
    while now < 3.0:
        now += 0.1
        made.bytes_arrived(1, now)
        made.message_received(0, Alive(ID, CONTROL, 8, 1), now)
        actions = made.message_received(3, Alive(ID, 0, 0, 1), now) + made.tick(now)
        assert said_to(3, actions, Demote) == []
