"""The frame format: golden bytes, any split gives the same frames, garbage gives PROTOCOL."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.checksum import digest
from common.errors import Code, KaError
from common.framing import (
    BODY_SIZE_MAX,
    HEADER_SIZE,
    PAYLOAD_SIZE_MAX,
    RECEIVE_SIZE,
    Frame,
    FrameReceiver,
    Kind,
    encode_frame,
)

GOLDEN = (
    (Kind.REQUEST, 7, b"body", 3,
     "4b6146010200000007000000000000000400000003000000fae17f18eec8f284"
     "d862f686d7507e03626f6479"),
    (Kind.CANCEL, 2**64 - 1, b"", 0,
     "4b61460105000000ffffffffffffffff0000000000000000c294d3380580062d"
     "4ff375375b356255"),
)  # fmt: skip

WITH_PAYLOAD = (Kind.REQUEST, Kind.REPLY, Kind.NOTIFY)


class Sink:
    """A parser and what came out of it."""

    def __init__(self, body_size_max: int = BODY_SIZE_MAX) -> None:
        self.parser = FrameReceiver(body_size_max=body_size_max, payload_size_max=PAYLOAD_SIZE_MAX)
        self.taken: list[tuple[Frame, bytearray]] = []

    def feed(self, data: bytes) -> None:
        """Let the parser receive *data*, as from a socket, and take every complete frame."""
        while data:
            data = data[self.fill(data) :]
            while (frame := self.parser.next_frame()) is not None:
                payload = bytearray(frame.payload_size)
                self.taken.append((frame, payload))
                if frame.payload_size:
                    self.parser.take_payload(memoryview(payload))

    def fill(self, data: bytes) -> int:
        """Let the parser receive as much of *data* as it wants at once."""
        want = self.parser.want()
        assert want, "a parser always wants something"
        count = min(len(want), len(data))
        want[:count] = data[:count]
        self.parser.got(count)
        return count


def parse(pieces: list[bytes], body_size_max: int = BODY_SIZE_MAX) -> list[tuple[Frame, bytes]]:
    sink = Sink(body_size_max)
    for piece in pieces:
        sink.feed(piece)
    return [(frame, bytes(payload)) for frame, payload in sink.taken]


def refusal(data: bytes, body_size_max: int = BODY_SIZE_MAX) -> str:
    with pytest.raises(KaError) as caught:
        parse([data], body_size_max)
    assert caught.value.code is Code.PROTOCOL
    return caught.value.message


frames = st.lists(
    st.tuples(
        st.sampled_from(WITH_PAYLOAD),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=200) | st.integers(0, 3 * RECEIVE_SIZE).map(bytes),
        st.binary(max_size=200) | st.integers(0, 3 * RECEIVE_SIZE).map(lambda n: b"\x55" * n),
    ),
    max_size=6,
)


@pytest.mark.parametrize(("kind", "request_id", "body", "payload_size", "golden"), GOLDEN)
def test_frames_have_their_golden_bytes(
    kind: Kind, request_id: int, body: bytes, payload_size: int, golden: str
) -> None:
    encoded = encode_frame(kind, request_id, body, payload_size)
    assert encoded.hex() == golden
    assert parse([encoded])[0][0] == Frame(kind, request_id, body, payload_size)


@given(frames, st.data())
def test_any_split_gives_the_same_frames(
    sent: list[tuple[Kind, int, bytes, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(
        encode_frame(kind, request_id, body, len(payload)) + payload
        for kind, request_id, body, payload in sent
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    expected = [
        (Frame(kind, request_id, body, len(payload)), payload)
        for kind, request_id, body, payload in sent
    ]
    assert parse(pieces) == expected


def test_frames_decode_one_byte_at_a_time() -> None:
    stream = encode_frame(Kind.REPLY, 1, b"abc", 5) + b"12345" + encode_frame(Kind.CANCEL, 1, b"")
    expected = [(Frame(Kind.REPLY, 1, b"abc", 5), b"12345"), (Frame(Kind.CANCEL, 1, b"", 0), b"")]
    assert parse([stream[at : at + 1] for at in range(len(stream))]) == expected
    assert parse([stream]) == expected


def parse_garbage(data: bytes) -> None:
    sink = Sink(body_size_max=1000)
    try:
        sink.feed(data)
    except KaError as error:
        assert error.code is Code.PROTOCOL  # noqa: PT017 (both outcomes are right)
    # In the middle of a payload it wants to receive into the caller's buffer.
    assert not sink.parser.payload_complete or len(sink.parser.want()) <= RECEIVE_SIZE


@given(st.binary(max_size=300))
def test_any_bytes_give_frames_or_a_protocol_error(data: bytes) -> None:
    parse_garbage(data)


@given(
    kind=st.integers(0, 8),
    reserved=st.sampled_from((0, 0, 1)),
    flags=st.sampled_from((0, 0, 1)),
    body_size=st.integers(0, 1100) | st.integers(0, 2**32 - 1),
    payload_size=st.integers(0, 1100) | st.integers(0, 2**32 - 1),
    rest=st.binary(max_size=2000),
)
def test_any_header_with_a_valid_sum_gives_frames_or_a_protocol_error(
    kind: int, reserved: int, flags: int, body_size: int, payload_size: int, rest: bytes
) -> None:
    body_sum = digest(rest[:body_size])
    head = struct.pack(
        "<4sBBHQIIQ", b"KaF\x01", kind, reserved, flags, 1, body_size, payload_size, body_sum
    )
    parse_garbage(head + struct.pack("<Q", digest(head)) + rest)


@given(st.integers(0, HEADER_SIZE + 3), st.integers(1, 255))
def test_any_altered_byte_of_header_or_body_is_noticed(at: int, change: int) -> None:
    data = bytearray(encode_frame(Kind.REQUEST, 9, b"body"))
    data[at] ^= change
    refusal(bytes(data))


def test_a_header_is_not_believed_before_its_sum_is_checked() -> None:
    head = bytearray(encode_frame(Kind.REQUEST, 1, b"")[:32])
    head[16:20] = (2**31).to_bytes(4, "little")
    assert "checksum" in refusal(bytes(head) + bytes(8))
    assert "too large" in refusal(bytes(head) + digest(bytes(head)).to_bytes(8, "little"))


def test_limits_are_the_receivers() -> None:
    assert "too large" in refusal(encode_frame(Kind.REQUEST, 1, bytes(1025)), body_size_max=1024)
    assert parse([encode_frame(Kind.REQUEST, 1, bytes(1024))], 1024)


@pytest.mark.parametrize("kind", sorted(set(Kind) - set(WITH_PAYLOAD)))
def test_only_messages_carry_payloads(kind: Kind) -> None:
    assert "payload" in refusal(encode_frame(kind, 1, b"", 5))


def test_what_the_receiver_would_refuse_is_not_sent() -> None:
    for body, payload_size in ((bytes(BODY_SIZE_MAX + 1), 0), (b"", PAYLOAD_SIZE_MAX + 1)):
        with pytest.raises(KaError) as caught:
            encode_frame(Kind.REPLY, 1, body, payload_size)
        assert caught.value.code is Code.E2BIG


def test_memory_of_a_long_body_is_given_back() -> None:
    sink = Sink()
    sink.feed(encode_frame(Kind.REPLY, 1, bytes(BODY_SIZE_MAX)))
    assert len(sink.taken) == 1
    assert len(sink.parser.want()) == RECEIVE_SIZE


def test_memory_stays_bounded_while_a_body_trickles_in() -> None:
    sink = Sink(body_size_max=100_000)
    stream = encode_frame(Kind.REPLY, 1, bytes(100_000)) * 3
    for at in range(0, len(stream), 7_001):
        sink.feed(stream[at : at + 7_001])
        assert len(sink.parser.want()) <= 100_000 + HEADER_SIZE
    assert len(sink.taken) == 3


def test_a_discarded_payload_is_not_written_to_its_buffer() -> None:
    sink = Sink()
    parser = sink.parser
    sink.fill(encode_frame(Kind.REPLY, 1, b"", 100) + b"\x01" * 30)
    assert parser.next_frame() is not None
    target = bytearray(100)
    parser.take_payload(memoryview(target))
    assert target == b"\x01" * 30 + bytes(70)
    parser.discard_payload()
    sink.fill(b"\x02" * 70)
    sink.fill(encode_frame(Kind.CANCEL, 1, b""))
    assert target == b"\x01" * 30 + bytes(70)
    assert parser.next_frame() == Frame(Kind.CANCEL, 1, b"", 0)


def test_a_complete_payloads_buffer_is_let_go() -> None:
    sink = Sink()
    parser = sink.parser
    for split in (0, 40, 100):  # with the header, in two parts, all later
        sink.fill(encode_frame(Kind.REPLY, 1, b"", 100) + bytes(split))
        assert parser.next_frame() is not None
        target = bytearray(100)
        view = memoryview(target)
        parser.take_payload(view)
        sink.fill(bytes(100 - split))
        assert parser.payload_complete
        view.release()
        target.append(0)  # would raise BufferError if anything still pointed into it


def test_a_payload_is_received_in_place() -> None:
    sink = Sink()
    parser = sink.parser
    sink.fill(encode_frame(Kind.REPLY, 1, b"", 1 << 20))
    assert parser.next_frame() is not None
    target = bytearray(1 << 20)
    parser.take_payload(memoryview(target))
    want = parser.want()
    assert want.obj is target
    assert len(want) == 1 << 20
