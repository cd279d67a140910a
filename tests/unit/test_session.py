"""The handshake: each side proves the key, in one order, once, over exactly what was said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import codec
from common.errors import Code, KaError
from common.session import (
    HANDSHAKE_BODY_SIZE_MAX,
    NONCE_SIZE,
    ClientHandshake,
    Identity,
    ServerHandshake,
)

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
IDENTITY = Identity("lab", "client", "node1:/mnt", b"i" * 16)


def client(key: bytes = KEY, nonce: bytes = b"c" * NONCE_SIZE) -> ClientHandshake:
    return ClientHandshake(IDENTITY, key, connection=3, nonce=nonce)


def server(
    key: bytes = KEY, cluster: str = "lab", nonce: bytes = b"s" * NONCE_SIZE
) -> ServerHandshake:
    return ServerHandshake(cluster, key, nonce=nonce)


def messages(one: ClientHandshake, other: ServerHandshake) -> list[bytes]:
    """Run a handshake to its end; return hello, challenge, proof and welcome."""
    hello = one.start()
    challenge = other.receive(hello)
    proof = one.receive(challenge)
    assert proof is not None
    welcome = other.receive(proof)
    assert one.receive(welcome) is None
    return [hello, challenge, proof, welcome]


def refused(side: ClientHandshake | ServerHandshake, body: bytes) -> Code:
    with pytest.raises(KaError) as caught:
        side.receive(body)
    assert not side.done
    return caught.value.code


def altered(body: bytes, index: int, value: object) -> bytes:
    """Return a message with field *index* (0 is its number) replaced."""
    fields = codec.decode(body)
    fields[index] = value
    return codec.encode(fields)


def test_both_sides_end_with_the_same_version_and_the_server_knows_who() -> None:
    one, other = client(), server()
    messages(one, other)
    assert one.done
    assert other.done
    assert one.version == 1
    assert other.hello is not None
    hello = other.hello
    assert (hello.role, hello.name, hello.incarnation, hello.connection) == (
        "client", "node1:/mnt", b"i" * 16, 3,
    )  # fmt: skip


def test_handshake_has_its_golden_bytes() -> None:
    hello, challenge, proof, welcome = messages(client(), server())
    assert hello.hex() == (
        "99019101a36c6162a6636c69656e74aa6e6f6465313a2f6d6e74c41069696969696969696969696969696969"
        "03c420" + "63" * 32 + "90"
    )
    assert challenge.hex() == "940201c420" + "73" * 32 + "90"
    assert proof.hex() == "9203c4201aa5d1046afd3b786820ca5fe1d7b5cfa86cdf76a7b4dc39f1623a5748af171f"
    assert welcome.hex() == (
        "9204c420667cf6d09de6f3a7b0566e36cbbff49a3142540f610282796706e9ceff0d0d2f"
    )


def test_messages_fit_what_a_stranger_may_send() -> None:
    name = "n" * 255 + ":/" + "m" * 255
    one = ClientHandshake(
        Identity("c" * 64, "client", name, b"i" * 16), KEY, connection=2**63, nonce=b"c" * 32
    )
    assert all(
        len(body) <= HANDSHAKE_BODY_SIZE_MAX for body in messages(one, server(cluster="c" * 64))
    )


def test_a_client_with_another_key_is_refused() -> None:
    one, other = client(OTHER_KEY), server()
    proof = one.receive(other.receive(one.start()))
    assert proof is not None
    assert refused(other, proof) is Code.AUTH


def test_a_server_with_another_key_is_refused() -> None:
    one = client()
    one.receive(server(OTHER_KEY).receive(one.start()))
    forged = messages(client(OTHER_KEY), server(OTHER_KEY))[3]
    assert refused(one, forged) is Code.AUTH


def test_another_cluster_is_refused_before_anything_is_proved() -> None:
    assert refused(server(cluster="home"), client().start()) is Code.WRONG_CLUSTER


def test_no_common_version_is_refused() -> None:
    hello = client().start()
    for versions in ([], [2, 99], ["1"], [None]):
        assert refused(server(), altered(hello, 1, versions)) is Code.WRONG_VERSION
    one = client()
    challenge = server().receive(one.start())
    assert refused(one, altered(challenge, 1, 2)) is Code.WRONG_VERSION


def test_the_best_common_version_is_chosen() -> None:
    challenge = server().receive(altered(client().start(), 1, [7, 1, 0]))
    assert codec.decode(challenge)[1] == 1


@pytest.mark.parametrize("step", range(4))
def test_a_server_takes_messages_only_in_their_order(step: int) -> None:
    said = messages(client(), server())
    hello, _, proof, _ = said
    for body in (said[step], b"", b"\xc1", codec.encode([99])):
        if body != hello:
            assert refused(server(), body) is Code.PROTOCOL
        other = server()
        other.receive(hello)
        if body != proof:
            assert refused(other, body) is Code.PROTOCOL


@pytest.mark.parametrize("step", range(4))
def test_a_client_takes_messages_only_in_their_order(step: int) -> None:
    said = messages(client(), server())
    _, challenge, _, welcome = said
    for body in (said[step], b"", b"\xc1", codec.encode([99])):
        if body != challenge:
            assert refused(client(), body) is Code.PROTOCOL
        one = client()
        one.receive(challenge)
        if body != welcome:
            assert refused(one, body) is Code.PROTOCOL


def test_nothing_is_taken_after_the_end() -> None:
    one, other = client(), server()
    said = messages(one, other)
    for body in said:
        with pytest.raises(KaError):
            one.receive(body)
        with pytest.raises(KaError):
            other.receive(body)


def test_a_server_lets_a_client_guess_once() -> None:
    one, other = client(), server()
    proof = one.receive(other.receive(one.start()))
    assert proof is not None
    assert refused(other, altered(proof, 1, bytes(32))) is Code.AUTH
    assert refused(other, proof) is Code.PROTOCOL


def test_a_replayed_client_is_refused() -> None:
    hello, _challenge, proof, _welcome = messages(client(), server())
    other = server(nonce=b"t" * NONCE_SIZE)
    other.receive(hello)
    assert refused(other, proof) is Code.AUTH


def test_a_replayed_server_is_refused() -> None:
    _hello, challenge, _proof, welcome = messages(client(), server())
    one = client(nonce=b"d" * NONCE_SIZE)
    one.receive(challenge)
    assert refused(one, welcome) is Code.AUTH


def test_a_proof_sent_back_is_no_welcome() -> None:
    one = client()
    proof = one.receive(server().receive(one.start()))
    assert proof is not None
    mac = codec.decode(proof)[1]
    assert refused(one, codec.encode([4, mac])) is Code.AUTH


@given(st.integers(1, 8), st.data())
def test_an_altered_hello_is_noticed(field: int, data: st.DataObject) -> None:
    hello = client().start()
    value = codec.decode(hello)[field]
    wrong = {
        list: st.lists(st.integers(0, 5)),
        str: st.text(max_size=9),
        bytes: st.binary(min_size=len(value) if isinstance(value, bytes) else 0, max_size=32),
        int: st.integers(0, 9),
    }[type(value)]
    other_value = data.draw(wrong.filter(lambda drawn: drawn != value))
    one, other = client(), server()
    one.start()
    try:
        challenge = other.receive(altered(hello, field, other_value))
    except KaError:
        return
    proof = one.receive(challenge)
    assert proof is not None
    assert refused(other, proof) is Code.AUTH


@pytest.mark.parametrize(("field", "value"), [(2, b"x" * NONCE_SIZE), (3, [1])])
def test_an_altered_challenge_is_noticed_by_both(field: int, value: object) -> None:
    one, other = client(), server()
    proof = one.receive(altered(other.receive(one.start()), field, value))
    assert proof is not None
    assert refused(other, proof) is Code.AUTH


@pytest.mark.parametrize("size", [0, NONCE_SIZE - 1, NONCE_SIZE + 1])
def test_nonces_have_their_size(size: int) -> None:
    assert refused(server(), altered(client().start(), 7, bytes(size))) is Code.PROTOCOL
    one = client()
    challenge = server().receive(one.start())
    assert refused(one, altered(challenge, 2, bytes(size))) is Code.PROTOCOL


@given(st.binary(max_size=100))
def test_any_bytes_are_refused_cleanly(body: bytes) -> None:
    one, other = client(), server()
    assert refused(server(), body) is Code.PROTOCOL
    assert refused(client(), body) is Code.PROTOCOL
    one.receive(other.receive(one.start()))
    assert refused(other, body) is Code.PROTOCOL
    assert refused(one, body) is Code.PROTOCOL
