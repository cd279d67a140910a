"""The journal's bytes, and what a restart makes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.checksum import digest
from common.errors import Code, KaError
from nfsp.mds import journal
from nfsp.mds.engine import KEY_SIZE_MAX, Batch
from nfsp.mds.journal import MARK_OFFSET, RECORDS_OFFSET, SegmentHeader
from nfsp.mds.journal_recovery import RecoveryPlan, plan_recovery

STORE = b"0123456789abcdef"
TAGS = (b"tag-zero", b"tag-one.")
SEGMENT_SIZE = RECORDS_OFFSET + 2048

batches = st.dictionaries(
    st.binary(min_size=1, max_size=20), st.none() | st.binary(max_size=40), max_size=5
)


class Image:
    """A segment's content under construction."""

    def __init__(self, index: int, generation: int, first_sequence: int) -> None:
        self.tag = TAGS[index]
        self.data = bytearray(SEGMENT_SIZE)
        self.offset = RECORDS_OFFSET
        self.starts: list[int] = []
        self.next_sequence = first_sequence
        header = SegmentHeader(generation, first_sequence, self.tag, STORE)
        encoded = journal.encode_header(header)
        self.data[: len(encoded)] = encoded

    def append(self, *batches: Batch, epoch: int = 1) -> Image:
        for batch in batches:
            record = journal.encode_record(
                batch, tag=self.tag, sequence=self.next_sequence, epoch=epoch
            )
            self.starts.append(self.offset)
            self.data[self.offset : self.offset + len(record)] = record
            self.offset += len(record)
            self.next_sequence += 1
        return self

    def mark(self, durable_sequence: int) -> Image:
        encoded = journal.encode_mark(durable_sequence, STORE)
        self.data[MARK_OFFSET : MARK_OFFSET + len(encoded)] = encoded
        return self


def blank() -> bytes:
    return bytes(SEGMENT_SIZE)


def plan(*segments: Image | bytes, checkpoint_sequence: int = 0) -> RecoveryPlan:
    contents = [bytes(s.data) if isinstance(s, Image) else s for s in segments]
    return plan_recovery(contents, store=STORE, checkpoint_sequence=checkpoint_sequence)


def sequences(found: RecoveryPlan) -> list[list[int]]:
    return [[record.sequence for record in records] for records in found.unsaved_records()]


@given(st.lists(batches, max_size=8), st.integers(0, 2**64 - 1))
def test_records_read_back_as_written(written: list[Batch], epoch: int) -> None:
    image = Image(0, 1, 7).append(*written, epoch=epoch)
    records, end = journal.read_records(bytes(image.data), tag=image.tag, first_sequence=7)
    assert [record.batch for record in records] == written
    assert [record.sequence for record in records] == list(range(7, 7 + len(written)))
    assert all(record.epoch == epoch for record in records)
    assert end == image.offset


@pytest.mark.parametrize("size", [0, KEY_SIZE_MAX + 1])
def test_key_of_a_forbidden_size_is_einval(size: int) -> None:
    with pytest.raises(KaError) as caught:
        journal.encode_record({b"k" * size: b""}, tag=TAGS[0], sequence=1, epoch=1)
    assert caught.value.code is Code.EINVAL


def test_torn_journal_tail_is_dropped_on_replay() -> None:
    image = Image(0, 1, 1).append({b"a": b"1"}, {b"b": b"2"}, {b"gone": None, b"last": b"value"})
    for cut in range(image.starts[-1], image.offset):
        torn = bytes(image.data[:cut]) + bytes(SEGMENT_SIZE - cut)
        assert torn != image.data, "the record must not end with a zero byte"
        found = plan(torn, blank())
        assert sequences(found) == [[1, 2]]
        assert found.active is not None
        assert found.active.end == image.starts[-1]


def test_flipped_bit_ends_the_journal_before_the_record() -> None:
    image = Image(0, 1, 1).append({b"a": b"1"}, {b"key": b"value"}, {b"c": b"3"})
    for position in range(image.starts[1], image.starts[2]):
        flipped = bytearray(image.data)
        flipped[position] ^= 1 << position % 8
        found = plan(bytes(flipped), blank())
        assert sequences(found) == [[1]]
        assert found.has_remains


def test_flipped_bit_in_a_record_marked_durable_is_damage() -> None:
    image = Image(0, 1, 1).append({b"a": b"1"}, {b"b": b"2"}, {b"c": b"3"}).mark(2)
    image.data[image.starts[1] + 20] ^= 1
    with pytest.raises(KaError) as caught:
        plan(image, blank())
    assert caught.value.code is Code.ENGINE_DAMAGED


def test_flipped_bit_after_the_durable_mark_is_a_torn_tail() -> None:
    image = Image(0, 1, 1).append({b"a": b"1"}, {b"b": b"2"}, {b"c": b"3"}).mark(2)
    image.data[image.starts[2] + 20] ^= 1
    assert sequences(plan(image, blank())) == [[1, 2]]


def test_flipped_bit_in_the_active_header_is_damage_where_its_records_were_durable() -> None:
    older = Image(0, 1, 1).append({b"a": b"1"})
    newer = Image(1, 2, 2).append({b"b": b"2"}).mark(2)
    newer.data[20] ^= 1
    with pytest.raises(KaError) as caught:
        plan(older, newer)
    assert caught.value.code is Code.ENGINE_DAMAGED


def test_torn_mark_is_no_mark() -> None:
    image = Image(0, 1, 1).append({b"a": b"1"}).mark(9)
    image.data[MARK_OFFSET + 12] ^= 1
    assert sequences(plan(image, blank())) == [[1]]


def test_mark_and_header_of_another_store_do_not_count() -> None:
    image = Image(0, 1, 1).append({b"a": b"1"})
    foreign = journal.encode_mark(9, b"another store...")
    image.data[MARK_OFFSET : MARK_OFFSET + len(foreign)] = foreign
    other = bytearray(blank())
    header = journal.encode_header(SegmentHeader(5, 1, TAGS[1], b"another store..."))
    other[: len(header)] = header
    assert sequences(plan(image, bytes(other))) == [[1]]


def test_both_segments_replay_in_the_order_of_their_generations() -> None:
    newer = Image(0, 8, 3).append({b"c": b"3"})
    older = Image(1, 7, 1).append({b"a": b"1"}, {b"b": b"2"})
    found = plan(newer, older)
    assert sequences(found) == [[1, 2], [3]]
    assert found.retired is not None
    assert found.active is not None
    assert (found.retired.index, found.active.index) == (1, 0)


def test_segment_that_the_main_store_has_is_free() -> None:
    older = Image(0, 1, 1).append({b"a": b"1"}, {b"b": b"2"})
    newer = Image(1, 2, 3).append({b"c": b"3"})
    found = plan(older, newer, checkpoint_sequence=2)
    assert found.retired is None
    assert sequences(found) == [[3]]


def test_segment_that_does_not_continue_its_predecessor_is_dropped() -> None:
    older = Image(0, 1, 1).append({b"a": b"1"}, {b"b": b"2"})
    newer = Image(1, 2, 3).append({b"c": b"3"})
    older.data[older.starts[1] + 3] ^= 1
    found = plan(older, newer)
    assert sequences(found) == [[1]]
    assert found.dropped == (1,)


def test_journal_that_ends_before_the_checkpoint_is_begun_anew_behind_it() -> None:
    found = plan(Image(0, 4, 1).append({b"a": b"1"}), blank(), checkpoint_sequence=3)
    assert found.active is None
    assert (found.begin_index, found.generation) == (1, 4)
    assert sequences(found) == []


def test_gap_between_checkpoint_and_journal_is_damage() -> None:
    with pytest.raises(KaError) as caught:
        plan(Image(0, 4, 5).append({b"a": b"1"}), blank(), checkpoint_sequence=3)
    assert caught.value.code is Code.ENGINE_DAMAGED


def test_journal_without_headers_is_damage() -> None:
    with pytest.raises(KaError) as caught:
        plan(blank(), blank())
    assert caught.value.code is Code.ENGINE_DAMAGED


def test_record_of_an_earlier_use_is_not_taken_for_content() -> None:
    """Sequence and sum are right, the place is right; only the tag is another."""
    image = Image(0, 2, 5).append({b"a": b"1"})
    stale = journal.encode_record({b"b": b"2"}, tag=TAGS[1], sequence=6, epoch=1)
    image.data[image.offset : image.offset + len(stale)] = stale
    found = plan(image, blank(), checkpoint_sequence=4)
    assert sequences(found) == [[5]]
    assert not found.has_remains


def test_unknown_version_is_refused() -> None:
    image = Image(0, 1, 1)
    header = bytearray(image.data[: journal.HEADER_SIZE])
    header[12] = 2
    body = bytes(header[8:])
    image.data[: journal.HEADER_SIZE] = digest(body).to_bytes(8, "little") + body
    with pytest.raises(KaError) as caught:
        plan(image, blank())
    assert caught.value.code is Code.WRONG_VERSION


@given(st.binary(max_size=300), st.integers(0, 5))
def test_garbage_is_no_record_and_never_raises(garbage: bytes, start: int) -> None:
    image = Image(0, 1, 1).append({b"a": b"1"})
    place = image.offset + start
    image.data[place : place + len(garbage)] = garbage
    assert sequences(plan(bytes(image.data[:SEGMENT_SIZE]), blank())) == [[1]]


def test_documented_example_is_what_is_written_and_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "on-disk-format.md").read_text()
    segment = bytearray(RECORDS_OFFSET)
    for place, data in re.findall(r"^([0-9a-f]{8})  ((?:[0-9a-f]{2} ?){1,16})", text, re.MULTILINE):
        piece = bytes.fromhex(data)
        segment[int(place, 16) : int(place, 16) + len(piece)] = piece
    header = journal.decode_header(bytes(segment))
    assert header == SegmentHeader(
        generation=1,
        first_sequence=1,
        tag=bytes.fromhex("9f1c52e007b36ad4"),
        store=b"ka metadata stor",
    )
    assert journal.decode_mark(bytes(segment[MARK_OFFSET:]), header.store) == 1
    records, end = journal.read_records(bytes(segment), tag=header.tag, first_sequence=1)
    expected: list[Batch] = [{b"a/one": b"hello"}, {b"a/one": None, b"a/two": b""}]
    assert [record.batch for record in records] == expected
    assert end == len(segment)
    written = [
        journal.encode_record(batch, tag=header.tag, sequence=number + 1, epoch=3)
        for number, batch in enumerate(expected)
    ]
    assert b"".join(written) == segment[RECORDS_OFFSET:]
    assert segment.startswith(journal.encode_header(header))
