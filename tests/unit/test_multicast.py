"""The multicast pass: what many lack is sent again, what few lack is left, nobody is held up."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.broadcast.datagram import HEADER_SIZE, Datagram, DatagramCodec, DatagramKind
from common.broadcast.multicast import MulticastOptions, Receiver, Sender, SendNack
from common.broadcast.scenario import Scenario
from common.broadcast.topology import Kind, Shape
from common.broadcast.wire import Nack
from common.errors import KaError
from tests.support.multicast import TOKEN, Group, image
from tests.support.simulate import play

RATE = 25e6
OPTIONS = MulticastOptions(rate_max=RATE)
DATA, MANIFEST = image(2 << 20, 1 << 16)
PIECES = sum(-(-MANIFEST.extent(chunk)[1] // 1400) for chunk in range(MANIFEST.chunk_count))
EVERYTHING = (1 << MANIFEST.chunk_count) - 1


def group(receivers: int = 24, **settings: object) -> Group:
    return Group(DATA, MANIFEST, receivers, OPTIONS, **settings).run()  # type: ignore[arg-type]


# ---------------------------------------------------------------- whole passes


def test_without_loss_each_piece_is_sent_once_at_the_rate() -> None:
    found = group()
    assert found.datagram_count == PIECES
    assert found.nack_count == 0
    assert not any(found.lacking)
    assert found.seconds < len(DATA) / RATE * 1.1 + OPTIONS.settle_s + 0.3


@pytest.mark.parametrize("loss", [0.001, 0.01, 0.03])
def test_what_is_lost_is_sent_again_until_all_but_few_have_it(loss: float) -> None:
    found = group(loss=lambda rank: loss)
    assert sum(found.lacking) <= 24 * MANIFEST.chunk_count / 100
    # Each lost piece is repeated for all at once: fewer repeats than losses.
    assert found.sender.repeat_count < 1.5 * loss * PIECES * 24


def test_thousand_receivers_that_lack_the_same_piece_ask_for_it_but_few_times() -> None:
    lost = Receiver.datagram_received
    first = DatagramKind.DATA, 3, 5

    def deaf_once(receiver: Receiver, datagram: Datagram, now: float) -> list[object]:
        if datagram[:3] == first and now < 0.05:
            return []
        return list(lost(receiver, datagram, now))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Receiver, "datagram_received", deaf_once)
        small, manifest = image(1 << 18, 1 << 16)
        found = Group(small, manifest, 1000, OPTIONS).run()
    assert not any(found.lacking)
    assert found.sender.repeat_count == 1
    assert found.nack_count <= 4 * 16  # the source has sixteen children


def test_one_receiver_that_hears_little_costs_the_others_nothing() -> None:
    found = group(100, loss=lambda rank: 0.9 if rank == 7 else 0.0)
    assert found.sender.repeat_count == 0
    assert found.sender.rate == RATE
    assert [index for index, count in enumerate(found.lacking, 1) if count] == [7]


@pytest.mark.parametrize("receivers", [3, 6, 40])
def test_one_bad_receiver_of_few_is_helped_when_the_others_have_everything(receivers: int) -> None:
    data, manifest = image(8 << 20, 1 << 16)
    losses = {1: 0.05}
    found = Group(data, manifest, receivers, OPTIONS, loss=lambda rank: losses.get(rank, 0.0)).run()
    assert max(found.complete_s[rank] for rank in range(2, receivers + 1)) < 1.1 * len(data) / RATE
    assert found.lacking[0] < manifest.chunk_count / 20
    assert found.sender.rate == RATE


def test_where_nothing_arrives_the_pass_ends_all_the_same() -> None:
    found = group(10, loss=lambda rank: 1.0)
    assert found.lacking == [MANIFEST.chunk_count] * 10
    assert found.seconds < len(DATA) / RATE * 1.1 + OPTIONS.settle_s + 0.3


def test_the_rate_falls_to_what_the_network_carries() -> None:
    data, manifest = image(24 << 20, 1 << 18)
    found = Group(data, manifest, 4, OPTIONS, capacity=RATE / 4).run()
    assert found.sender.rate < RATE / 2
    assert found.sender.repeat_count <= OPTIONS.repeat_share * 24e6 / 1400 * 1.1


def test_a_chunk_that_comes_out_damaged_is_asked_for_anew() -> None:
    assert not any(group(damage=0.0005).lacking)


def test_what_all_have_already_is_not_sent() -> None:
    half = EVERYTHING >> MANIFEST.chunk_count // 2
    found = group(have=dict.fromkeys(range(1, 25), half))
    assert found.datagram_count == PIECES // 2
    assert not any(found.lacking)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.lists(st.sampled_from([0.0, 0.01, 0.2, 0.7, 1.0]), min_size=12, max_size=12),
)
def test_after_any_pass_hops_bring_what_is_lacking_and_only_that(
    seed: int, receivers: int, losses: list[float]
) -> None:
    small, manifest = image(300_000, 1 << 15)
    few = MulticastOptions(rate_max=RATE, partial_count_max=3)
    passed = Group(
        small, manifest, receivers, few, loss=lambda rank: losses[rank - 1], seed=seed
    ).run()
    have = {rank: one.have for rank, one in enumerate(passed.receivers, 1)}
    shape = Shape(Kind.MULTICAST, (receivers,))
    found = play(Scenario(shape, manifest.chunk_count, manifest.chunk_size), have=have)
    assert found.summary.exit_code == 0
    assert found.chunks_sent == sum(passed.lacking)


# ---------------------------------------------------------------- the parts


def test_a_late_shell_does_not_send_a_burst() -> None:
    sender = Sender(MANIFEST, 4, OPTIONS, chunks=EVERYTHING)
    sender.start(0.0)
    now, count = 5.0, 0
    while sender.next_datagram(now) is not None:
        count += 1
    assert count <= OPTIONS.burst_size / 1400 + 1


def test_a_sender_that_does_not_know_the_network_begins_slowly_until_something_is_lost() -> None:
    options = MulticastOptions(rate_max=RATE, rate_start=1e6)
    found = Group(DATA * 4, image(8 << 20, 1 << 16)[1], 4, options, capacity=RATE / 4)
    found.data, found.manifest = image(8 << 20, 1 << 16)
    found.run()
    assert found.sender.repeat_count < 0.25 * (8 << 20) / 1400
    assert found.seconds < 3 * (8 << 20) / (RATE / 4)


def test_who_begins_to_listen_late_does_not_ask_for_what_was_sent_before() -> None:
    receiver = Receiver(MANIFEST, OPTIONS, have=0)
    receiver.start(0.0)
    piece = memoryview(bytes(1400))
    for chunk in (20, 21):
        receiver.datagram_received(Datagram(DatagramKind.DATA, chunk, 0, piece), 0.0)
    (action,) = receiver.tick(0.1)
    assert isinstance(action, SendNack)
    assert [gap[0] for gap in action.message.gaps] == [20]


def test_a_receiver_holds_a_bounded_number_of_incomplete_chunks() -> None:
    options = MulticastOptions(partial_count_max=4)
    receiver = Receiver(MANIFEST, options, have=0)
    receiver.start(0.0)
    piece = memoryview(bytes(1400))
    for chunk in range(10):
        receiver.datagram_received(Datagram(DatagramKind.DATA, chunk, 1, piece), 0.0)
    assert len(receiver._partial) == 4


GAPS = st.lists(
    st.one_of(
        st.lists(st.one_of(st.integers(-5, 40), st.binary(max_size=8)), max_size=5),
        st.integers(),
    ),
    max_size=4,
)


@given(GAPS)
def test_whatever_a_nack_says_the_sender_goes_on(gaps: list[object]) -> None:
    sender = Sender(MANIFEST, 1, OPTIONS, chunks=EVERYTHING)
    sender.start(0.0)
    with contextlib.suppress(KaError):
        sender.nack_received(Nack(bytes(16), gaps), 0.0)
    for tick in range(60):
        sender.next_datagram(tick / 1000)


@given(st.binary(max_size=1500), st.integers(0, 40), st.integers(0, 60))
def test_datagrams_come_out_as_they_went_in(payload: bytes, chunk: int, piece: int) -> None:
    codec = DatagramCodec(MANIFEST.transfer_id, TOKEN)
    whole = codec.header(DatagramKind.DATA, chunk, piece, payload) + payload
    assert len(whole) == HEADER_SIZE + len(payload)
    assert codec.decode(memoryview(whole)) == (DatagramKind.DATA, chunk, piece, payload)


def test_datagrams_of_strangers_and_other_transfers_are_dropped() -> None:
    codec = DatagramCodec(MANIFEST.transfer_id, TOKEN)
    other = DatagramCodec(bytes([1]) * 16, TOKEN)
    stranger = DatagramCodec(MANIFEST.transfer_id, b"u" * 32)
    for one in (other, stranger):
        whole = one.header(DatagramKind.DATA, 0, 0, b"x" * 1400) + b"x" * 1400
        assert codec.decode(memoryview(whole)) is None


@given(st.data())
def test_no_bit_of_a_datagram_can_be_changed(data: st.DataObject) -> None:
    codec = DatagramCodec(MANIFEST.transfer_id, TOKEN)
    payload = random.Random(1).randbytes(50)
    whole = bytearray(codec.header(DatagramKind.DATA, 1, 2, payload) + payload)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    assert codec.decode(memoryview(whole)) is None
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert codec.decode(memoryview(whole)[:cut]) is None
