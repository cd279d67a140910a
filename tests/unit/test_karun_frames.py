"""karun's wire: frames, fields, proofs, and what a parent tells an agent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karun.agent import frames, proof
from karun.agent.setup import AUTO, Dialling, Setup

FIELDS = st.lists(st.binary(max_size=40), max_size=8)
FRAMES = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=60)), max_size=8
)


@given(FIELDS)
def test_fields_come_back_as_they_were(fields: list[bytes]) -> None:
    assert frames.unpack(frames.pack(*fields)) == fields


@given(st.binary(max_size=60))
def test_garbage_is_fields_or_a_frame_error(data: bytes) -> None:
    try:
        assert frames.pack(*frames.unpack(data)) == data
    except frames.FrameError:
        pass


@given(FRAMES, st.integers(1, 30))
def test_frames_decode_in_pieces_of_any_size(sent: list[tuple[int, int, bytes]], size: int) -> None:
    data = b"".join(frames.encode(*one) for one in sent)
    decoder = frames.Decoder()
    found = []
    for at in range(0, len(data), size):
        found += list(decoder.feed(data[at : at + size]))
    assert found == sent


@given(FRAMES)
def test_frames_that_were_not_taken_are_given_again(sent: list[tuple[int, int, bytes]]) -> None:
    decoder = frames.Decoder()
    data = b"".join(frames.encode(*one) for one in sent)
    found = []
    while one := next(decoder.feed(data), None):
        found.append(one)
        data = b""
    assert found == sent


def test_a_frame_that_is_too_long_is_refused_before_it_is_held() -> None:
    decoder = frames.Decoder(100)
    with pytest.raises(frames.FrameError):
        list(decoder.feed(frames.HEADER.pack(101, 1, 0)))


def test_a_frame_is_these_very_bytes() -> None:
    data = frames.encode(frames.EVENT, 7, frames.pack(12, "é", b"\xff"))
    assert data.hex(" ", 1) == (
        "11 00 00 00 11 07 00 00 00 02 00 00 00 31 32 02 00 00 00 c3 a9 01 00 00 00 ff"
    )


@pytest.mark.parametrize("field", [b"", b"x", b"1" * 21, b"0x1", b"1.5", b"--1"])
def test_what_is_no_number_is_a_frame_error(field: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.number(field)


def test_each_side_of_a_proof_convinces_who_holds_the_token_only() -> None:
    token, other = b"t" * 32, b"o" * 32
    theirs, ours = b"a" * proof.NONCE_SIZE, b"n" * proof.NONCE_SIZE
    challenge = frames.pack(theirs)
    answer = proof.prove(token, 5, challenge, ours)
    assert proof.proved(token, 5, theirs, answer) == ours
    assert proof.proved(other, 5, theirs, answer) is None
    assert proof.proved(token, 6, theirs, answer) is None
    assert proof.proved(token, 5, b"b" * proof.NONCE_SIZE, answer) is None
    accept = proof.accept(token, 2, 5, theirs, ours)
    assert proof.accepted(token, 5, challenge, ours, accept) == 2
    assert proof.accepted(other, 5, challenge, ours, accept) is None
    mac = frames.unpack(answer)[1]
    assert proof.accepted(token, 5, challenge, ours, frames.pack(2, mac)) is None, "reflected"


@pytest.mark.parametrize("said", [b"", frames.pack(b"a", b"b"), b"\xff"])
def test_nonsense_of_a_stranger_proves_nothing_and_ends_nothing_else(said: bytes) -> None:
    token, nonce = b"t" * 32, b"n" * 16
    with pytest.raises(frames.FrameError):  # on which the channel closes
        proof.prove(token, 5, said, nonce)
    try:
        assert proof.accepted(token, 5, frames.pack(nonce), nonce, said) is None
    except frames.FrameError:
        pass


def sealed(count: int) -> tuple[list[bytes], frames.Decoder]:
    """Frames as they go down a sealed connection, and who hears them."""
    ends = [proof.seals(b"t" * 32, 5, b"a" * 16, b"n" * 16)[0] for _ in range(2)]
    decoder = frames.Decoder()
    decoder.fits = ends[1].fits
    said = [frames.encode(frames.ORDER, 5, b"%d" % number) for number in range(count)]
    return [frame + ends[0].tag(frame) for frame in said], decoder


@given(st.data())
def test_sealed_frames_come_through_whatever_pieces_they_come_in(data: st.DataObject) -> None:
    said, decoder = sealed(5)
    stream = b"".join(said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += decoder.feed(stream[begin:end])
    assert found == [(frames.ORDER, 5, b"%d" % number) for number in range(5)]


@given(st.integers(min_value=0))
def test_a_sealed_stream_with_one_bit_changed_ends_before_it(at: int) -> None:
    said, decoder = sealed(3)
    stream = bytearray(b"".join(said))
    at %= 8 * len(stream)
    stream[at // 8] ^= 1 << at % 8
    found = []
    try:
        for frame in decoder.feed(bytes(stream)):
            found.append(frame)
    except frames.FrameError:
        pass
    assert found == [(frames.ORDER, 5, b"%d" % number) for number in range(at // 8 // len(said[0]))]


@pytest.mark.parametrize("heard", [(1,), (0, 0), (0, 2), (0, 1, 0)])
def test_a_sealed_frame_left_out_or_repeated_is_an_error(heard: tuple[int, ...]) -> None:
    said, decoder = sealed(3)
    with pytest.raises(frames.FrameError, match="tag"):
        list(decoder.feed(b"".join(said[number] for number in heard)))


def test_each_direction_of_each_connection_has_a_key_of_its_own() -> None:
    connections = [(5, b"a", b"n"), (6, b"a", b"n"), (5, b"b", b"n"), (5, b"a", b"m")]
    tags = [
        seal.tag(b"frame")
        for rank, theirs, ours in connections
        for seal in proof.seals(b"t" * 32, rank, theirs * 16, ours * 16)
    ]
    assert len(set(tags)) == 8


def test_a_tag_is_these_very_bytes() -> None:
    down, _up = proof.seals(bytes(range(32)), 5, b"a" * 16, b"n" * 16)
    said = [down.tag(b"one").hex(), down.tag(b"two").hex()]
    assert said == ["c91e71476efe5365f2a09c44fb3f68af", "108ddff8d47d57439dc1d882adb2133c"]


def test_a_setup_comes_back_as_it_was() -> None:
    setup = Setup("run", b"t" * 32, 3, "n3", 10, 1, [("", 4000), ("10.0.0.1", 5)], 2.0, 10.0)
    found = Setup.decode(setup.encode())
    assert [getattr(found, name) for name in Setup.__slots__] == [
        getattr(setup, name) for name in Setup.__slots__
    ]


def dialling(argv: list[str], *, lined: bool) -> Dialling:
    return Dialling(
        argv, lined=lined, python="/usr/bin/python3", loader='exec("x")', digest="d",
        connect_s=1.5, window=8, tree=AUTO,
    )  # fmt: skip


def test_a_dialling_comes_back_as_it_was() -> None:
    one = dialling(["ssh", "%h"], lined=True)
    found = Dialling.decode(one.encode())
    assert [getattr(found, name) for name in Dialling.__slots__] == [
        getattr(one, name) for name in Dialling.__slots__
    ]


def test_the_node_stands_where_the_template_says() -> None:
    words = dialling(["x", "%h:%%h", "100%%"], lined=False).command("n1", search=False)
    assert words[:3] == ["x", "n1:%h", "100%"]
    assert words[3:] == ["/usr/bin/python3", "-I", "-S", "-c", 'exec("x")']


def test_a_line_for_a_shell_is_one_word() -> None:
    (host, line) = dialling(["%h"], lined=True).command("n1", search=False)
    assert (host, line) == ("n1", "exec /usr/bin/python3 -I -S -c 'exec(\"x\")'")
