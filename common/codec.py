"""Control messages: msgpack with every option pinned.  The only importer of msgpack.

Values are None, bool, int (64 bits), float, bytes, str, and lists and maps of these.  Decoding
untrusted bytes is bounded: nothing in a message can be larger than the message, no extension
types, no unhashable map keys, no trailing bytes.  Of equal map keys the last one counts.
"""

from __future__ import annotations

from typing import Any

import msgpack

from common.errors import Code, KaError

__all__ = ["Value", "decode", "encode"]

Value = Any
"""What a message may hold; the receiver validates the shape (see `common.messages`)."""

_pack = msgpack.Packer(
    use_bin_type=True,  # bytes and str stay apart: file names are bytes
    strict_types=False,  # tuples and NamedTuples are packed as lists
    autoreset=True,
).pack


def _refuse_extension(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code}")


def encode(value: Value) -> bytes:
    """Return *value* as bytes.

    Raises TypeError, ValueError or OverflowError for what a message cannot hold: our own bug.
    """
    packed: bytes = _pack(value)
    return packed


def decode(data: bytes | bytearray | memoryview) -> Value:
    """Return the value in *data*.

    Raises KaError PROTOCOL when *data* is not exactly one well-formed value.
    """
    size = len(data)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=False,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=size,
            max_map_len=size,
            max_ext_len=0,
            ext_hook=_refuse_extension,  # max_ext_len lets an empty one pass
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise KaError(Code.PROTOCOL, f"malformed message: {error}") from None
