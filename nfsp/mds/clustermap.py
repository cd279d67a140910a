"""The cluster map's life: what the configuration says becomes a map with an epoch.  Pure."""

from __future__ import annotations

from collections.abc import Iterable

from nfsp.model import Chain, ClusterMap, Iod

__all__ = ["first_map", "merge"]


def first_map(iods: Iterable[tuple[int, str, str]]) -> ClusterMap:
    """Return the map of a new cluster from (iod, address, socket): one chain for each iod."""
    members = tuple(Iod(iod, address, socket, "up") for iod, address, socket in sorted(iods))
    chains = tuple(Chain(member.iod, 1, (member.iod,)) for member in members)
    return ClusterMap(1, members, chains)


def merge(known: ClusterMap, iods: Iterable[tuple[int, str, str]]) -> ClusterMap:
    """Return the map after a restart with a configuration: the same one if nothing changed.

    New iods join with a chain of their own; moved ones get their new address; one that is no
    longer configured is `gone`: nothing new is placed there, its data are still looked for.
    """
    configured = {iod: (address, socket) for iod, address, socket in iods}
    members = []
    for member in known.iods:
        place = configured.pop(member.iod, None)
        if place is None:
            members.append(member._replace(state="gone"))
        else:
            state = "up" if member.state == "gone" else member.state
            members.append(Iod(member.iod, *place, state))
    added = first_map((iod, *place) for iod, place in configured.items())
    merged = ClusterMap(
        known.epoch, (*members, *added.iods), (*known.chains, *added.chains)
    )
    return known if merged == known else merged._replace(epoch=known.epoch + 1)
