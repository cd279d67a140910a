"""Scans through layers, against a dictionary that is sorted each time."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nfsp.mds.engine import Batch
from nfsp.mds.overlay import Overlay, Pair, merge_scan

keys = st.binary(min_size=1, max_size=1).map(lambda key: bytes([key[0] % 12]))
batches = st.dictionaries(keys, st.sampled_from([None, b"v"]), max_size=12)
bounds = st.integers(0, 13).map(lambda bound: bytes([bound]))


def overlay_of(batch: Batch) -> Overlay:
    overlay = Overlay()
    overlay.update(batch)
    return overlay


@settings(max_examples=500)
@example({}, [{b"z": b"v"}, {b"b": None, b"c": b"v", b"d": b"v"}], b"", b"~", 2)
@given(
    st.dictionaries(keys, st.just(b"main"), max_size=12),
    st.lists(batches, max_size=2),
    bounds,
    bounds,
    st.integers(0, 3),
)
def test_scan_through_layers_agrees_with_naive_model(
    main: dict[bytes, bytes], layers: list[Batch], start: bytes, end: bytes, limit: int
) -> None:
    def read_page(start: bytes, end: bytes, limit: int) -> list[Pair]:
        return sorted(pair for pair in main.items() if start <= pair[0] < end)[:limit]

    def decode_page(pairs: list[Pair]) -> list[Pair]:
        return pairs

    merged: dict[bytes, bytes | None] = dict(main)
    for layer in layers:
        merged.update(layer)
    expected = sorted(
        (key, value) for key, value in merged.items() if value is not None and start <= key < end
    )[:limit]
    overlays = [overlay_of(layer) for layer in layers]
    assert merge_scan(read_page, decode_page, overlays, start, end, limit) == expected


@given(st.lists(batches, max_size=4))
def test_overlay_built_at_once_equals_one_that_grew(several: list[Batch]) -> None:
    grown = Overlay()
    for batch in several:
        grown.update(batch)
    built = Overlay.from_batches(several)
    assert list(built.ordered()) == list(grown.ordered())
    assert built.size == grown.size
    assert list(built.keys) == sorted(built.entries)
