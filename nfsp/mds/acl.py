"""POSIX access control lists: the value of `system.posix_acl_access` and `..._default`.

Pure.  The kernel checks permissions with these lists; the mds keeps them and the mode bits in
step, as POSIX 1003.1e draft 17 and acl(5) say:
  * setting an access ACL sets the permission bits; one that says no more than mode bits is not
    stored;
  * chmod changes the ACL's owner and other entries, and the mask (or, without one, the group);
  * what is made in a directory with a default ACL gets it as its access ACL, cut down to the
    requested mode; directories get it as their default ACL, too.

Format (linux/posix_acl_xattr.h): version 2 as u32, then entries of tag u16, permissions u16,
id u32, all little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from common.errors import Code, KaError

__all__ = ["ACCESS", "DEFAULT", "Acl", "Entry", "chmod", "decode", "encode", "inherit", "mode_of"]

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_ORDER = {tag: place for place, tag in enumerate((USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER))}
_VERSION = 2
NO_ID = 0xFFFFFFFF

_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")


class Entry(NamedTuple):
    """Who (tag, and id for named users and groups) may do what (rwx bits)."""

    tag: int
    permissions: int
    id: int


Acl = tuple[Entry, ...]


def decode(value: bytes) -> Acl:
    """Return the entries of an attribute's value, () if it has none; raises EINVAL.

    A valid list has its owner, group and other entries once each, named ones between them, in
    that order, and a mask when there are named ones.
    """
    size = len(value) - _HEADER.size
    if size < 0 or size % _ENTRY.size or _HEADER.unpack_from(value) != (_VERSION,):
        raise KaError(Code.EINVAL, "not a POSIX ACL")
    entries = tuple(Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :]))
    if not entries:
        return ()
    tags = [entry.tag for entry in entries]
    known = all(tag in _ORDER for tag in tags)
    if not known or tags != sorted(tags, key=_ORDER.__getitem__):
        raise KaError(Code.EINVAL, "a POSIX ACL is in order of its tags")
    named = USER in tags or GROUP in tags
    once = all(tags.count(tag) == 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER))
    if not once or not int(named) <= tags.count(MASK) <= 1:
        raise KaError(Code.EINVAL, "a POSIX ACL lacks an entry or has it twice")
    for tag, permissions, number in entries:
        if permissions & ~7 or (tag in (USER, GROUP) and number == NO_ID):
            raise KaError(Code.EINVAL, "a POSIX ACL entry is invalid")
    return tuple(
        entry if entry.tag in (USER, GROUP) else entry._replace(id=NO_ID) for entry in entries
    )


def encode(acl: Acl) -> bytes:
    """Return the attribute's value."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def mode_of(acl: Acl) -> tuple[int, bool]:
    """Return the nine permission bits an access ACL stands for, and whether they say it all."""
    bits = {entry.tag: entry.permissions for entry in acl}
    group = bits.get(MASK, bits[GROUP_OBJ])
    return bits[USER_OBJ] << 6 | group << 3 | bits[OTHER], len(acl) == 3


def chmod(acl: Acl, mode: int) -> Acl:
    """Return an access ACL after chmod."""
    bits = _bits(acl, mode)
    return tuple(
        entry._replace(permissions=bits.get(entry.tag, entry.permissions)) for entry in acl
    )


def inherit(default: Acl, mode: int) -> tuple[Acl, int]:
    """Return a new inode's access ACL (() when mode bits say it all) and its mode.

    *default* is the parent's default ACL, *mode* what the creator asked for, without umask.
    """
    bits = _bits(default, mode)
    access = tuple(
        entry._replace(permissions=entry.permissions & bits.get(entry.tag, 7)) for entry in default
    )
    permissions, minimal = mode_of(access)
    return (() if minimal else access), mode & ~0o777 | permissions


def _bits(acl: Acl, mode: int) -> dict[int, int]:
    """Return the permissions that mode bits give, by the tag they belong to in *acl*."""
    group_tag = MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ
    return {USER_OBJ: mode >> 6 & 7, group_tag: mode >> 3 & 7, OTHER: mode & 7}
