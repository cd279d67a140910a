"""The service: what each request and each line of dnsmasq's log means for a machine.

The one place where inventory, store, gate and scripts meet while kaboot serves.  Given the answers
to requests it does no I/O of its own but the store's, in one thread, one call at a time.

Invariants
  * a stage of a boot is in the store before the answer is sent, or its loss in the log;
  * a report moves a node only from the address the machine is known at;
  * what is kept in memory about strangers is bounded.

Interleavings: `script` reads the inventory, then awaits the store several times.  A reload between
two of them changes `self._inventory`, which is why it is read once, at the start of each request.
Two requests of one unknown machine may both want to name it: the store lets one.

Not here: HTTP (http.py), URLs (requests.py), processes (server.py).
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from common import log
from common.errors import KaError
from kaboot import naming, scripts
from kaboot.control import node_assignment
from kaboot.dnsmasq_log import LogEvent, neighbour, parse_line
from kaboot.gate import DELAY_S, Gate
from kaboot.http import FileBody, Incoming, Reply
from kaboot.model import Assignment, Firmware, Inventory, Machine, Mode, Node
from kaboot.requests import (
    BadRequest,
    EntryRequest,
    FileRequest,
    HealthRequest,
    LoaderRequest,
    ReportRequest,
    ScriptRequest,
    parse_request,
)
from kaboot.stage import GrubFiles, tftp_root
from kaboot.steps import Action, Kernel, Program, Wait, after, decide
from kaboot.store import Store

__all__ = ["Service"]

T = TypeVar("T")

ADDRESSES_MAX = 20_000
EARLY_MACHINES_MAX = 256
EARLY_EVENTS_MAX = 16
OFFERS_UNANSWERED = 4
"""After so many answers to a machine that then loads nothing, its firmware is said to ignore us."""

_NEIGHBOURS = Path("/proc/net/arp")

_log = log.get("kaboot.service")


class Service:
    """The state of a serving kaboot.  `inventory` is with what was learned."""

    def __init__(self, inventory: Inventory, store: Store) -> None:
        self._inventory = inventory
        self._store = store
        self._gate = Gate(inventory.site.boot_window, inventory.site.boot_hold_s)
        self._thread = trio.CapacityLimiter(1)
        self._macs: OrderedDict[str, str] = OrderedDict()  # address -> MAC
        self._grub = GrubFiles(inventory)
        self._grub_lock = trio.Lock()
        self._rendered: object = None
        self._early: OrderedDict[str, list[LogEvent]] = OrderedDict()
        self._offers: dict[str, int] = {}  # since the machine last loaded something

    def use(self, inventory: Inventory) -> None:
        """Go on with an inventory that was read again."""
        before, site = self._inventory.site, inventory.site
        if (before.boot_window, before.boot_hold_s) != (site.boot_window, site.boot_hold_s):
            self._gate = Gate(site.boot_window, site.boot_hold_s)
        self._inventory = inventory

    async def call(self, function: Callable[..., T], *arguments: object, **named: object) -> T:
        """Call the store, in its thread."""
        return await trio.to_thread.run_sync(
            partial(function, *arguments, **named), limiter=self._thread
        )

    # ------------------------------------------------------------ HTTP

    async def handle(self, incoming: Incoming) -> Reply:
        """Answer a request; raises BadRequest."""
        request = parse_request(incoming.method, incoming.target)
        if isinstance(request, ScriptRequest):
            return await self._script(request, incoming.peer)
        if isinstance(request, FileRequest):
            return await self._file(request, incoming)
        if isinstance(request, ReportRequest):
            return await self._report(request, incoming.peer)
        if isinstance(request, LoaderRequest):
            path = tftp_root(self._inventory) / request.name
            return await self._open(path, path.parent, "loader", request.name, incoming)
        if isinstance(request, EntryRequest):
            return Reply(200, scripts.entry_ipxe(self._inventory))
        assert isinstance(request, HealthRequest)
        return Reply(200, "kaboot serves\n")

    async def _script(self, request: ScriptRequest, peer: str) -> Reply:
        machine = replace(request.machine, address=peer)
        self._remember(peer, machine.mac)
        self._offers.pop(machine.mac, None)
        inventory, node = await self._meet(machine, "ipxe")
        assignment = Assignment(inventory.site.unknown)
        if node is not None:
            assignment = await self.call(node_assignment, self._store, node)
        action: Action = decide(inventory, machine.mac, node, assignment)
        if isinstance(action, Kernel | Program):
            verdict = self._gate.ask(machine.mac, trio.current_time())
            if not verdict.admitted:
                reason = f"{self._gate.loading} machines load, {verdict.ahead} wait before this one"
                action = Wait(verdict.delay_s, reason)
        stage = "wait" if isinstance(action, Wait) else "script"
        await self._saw(machine, node, stage, f"{assignment} ipxe")
        who = f"{node.name if node else machine.mac}: {assignment}"
        return Reply(200, scripts.to_ipxe(inventory, who, action))

    async def _meet(self, machine: Machine, program: str) -> tuple[Inventory, Node | None]:
        """Record that a machine asks what to do; name it if it is new and there is a name."""
        inventory = self._inventory
        node = inventory.by_mac.get(machine.mac)
        await self._flush(machine.mac, node)
        if node is None:
            await self._saw(machine, None, "unknown", program)
            inventory, node = await self._name(inventory, machine)
        return inventory, node

    async def _name(self, inventory: Inventory, machine: Machine) -> tuple[Inventory, Node | None]:
        """Give an unknown machine its name, if there is one for it."""
        queue = await self.call(self._store.queue)
        name = naming.name_for(inventory, machine, queue)
        if name is None:
            return inventory, None
        why = "by its serial" if inventory.nodes[name].serial else "in the order of switching on"
        if not await self.call(self._store.learn, machine.mac, name, time.time_ns(), why=why):
            return inventory, None
        _log.info("machine.learned", node=name, mac=machine.mac, why=why)
        inventory = inventory.with_learned({machine.mac: name})
        self._inventory = self._inventory.with_learned({machine.mac: name})
        return inventory, inventory.nodes[name]

    async def _file(self, request: FileRequest, incoming: Incoming) -> Reply:
        root = Path(self._inventory.site.files)
        stage = _kind_of(self._inventory, request.path)
        return await self._open(root / request.path, root, stage, request.path, incoming)

    async def _open(
        self, path: Path, root: Path, stage: str, name: str, incoming: Incoming
    ) -> Reply:
        begin = trio.current_time()
        mac = self._mac_at(incoming.peer)
        try:
            fd = await trio.to_thread.run_sync(_open_below, path, root)
        except OSError as error:
            await self._event_of(mac, incoming.peer, f"{stage}-failed", f"{name}: {error.strerror}")
            raise BadRequest(404, "no such file") from None

        async def done(sent: int, wanted: int) -> None:
            took_s = trio.current_time() - begin
            whole = "" if sent == wanted else f", broken off, of {wanted}"
            detail = f"{name} {sent} bytes in {took_s:.1f} s{whole}"
            await self._event_of(mac, incoming.peer, stage, detail)

        return Reply(200, file=FileBody(fd, done))

    async def _report(self, request: ReportRequest, peer: str) -> Reply:
        mac, report = request.mac, request.report
        node = self._inventory.by_mac.get(mac)
        other: str | None = self._mac_at(peer)
        if not other:
            other = await self.call(self._store.mac_at, peer)
        if other != mac and not _may_report(node, other, peer, self._inventory):
            _log.warning("report.refused", mac=mac, peer=peer, report=report.value)
            await self._event_of(other or "", peer, "refused", f"report {report.value} for {mac}")
            raise BadRequest(403, "this report is not from that machine's address")
        self._gate.done(mac)
        detail = f"{report.value} {request.detail}".strip()
        await self._saw(Machine(mac, address=peer), node, "report", detail)
        if node is not None:
            before = await self.call(node_assignment, self._store, node)
            step = after(before.step, report)
            if step is not before.step:
                await self.call(
                    self._store.advance, node.name, before, Assignment(step), time.time_ns(),
                    why=f"reported {report.value}",
                )  # fmt: skip
                _log.info("step.changed", node=node.name, before=before, now=step.value)
        # Before the answer: the machine may start anew at once.
        await self.render_grub()
        return Reply(200, "noted\n")

    # ------------------------------------------------------------ dnsmasq

    async def log_line(self, line: str) -> None:
        """Take a line of dnsmasq's log."""
        event = parse_line(line)
        if event is None:
            return
        mac = event.mac or self._mac_at(event.address)
        if event.stage == "lease":
            self._remember(event.address, mac)
        if not mac:
            return
        if event.stage == "pxe":
            self._offered(mac)
        node = self._inventory.by_mac.get(mac)
        if node is None and event.stage != "tftp":
            # Perhaps somebody's telephone.  What loads a boot program is a machine of ours.
            self._early_event(mac, event)
            return
        await self._flush(mac, node)
        machine = Machine(mac, address=event.address)
        if event.stage == "tftp":
            self._offers.pop(mac, None)
            await self._tftp(machine, node, event.detail)
        else:
            await self._saw(machine, node, event.stage, event.detail)

    async def _tftp(self, machine: Machine, node: Node | None, path: str) -> None:
        """A file was sent by TFTP; some say more than others."""
        inventory = self._inventory
        root = str(tftp_root(inventory))
        name = path.removeprefix(f"{root}/")
        if name.startswith("files/"):
            name = name.removeprefix("files/")
            await self._saw(machine, node, _kind_of(inventory, name), f"{name} by TFTP")
        elif name.startswith("grub/node/"):
            machine = replace(machine, platform="efi")
            inventory, node = await self._meet(machine, "grub")
            if node is None:
                await self._saw(machine, None, "script", f"{inventory.site.unknown.value} grub")
                return
            assignment = await self.call(node_assignment, self._store, node)
            await self._saw(machine, node, "script", f"{assignment} grub")
            self._gate.ask(machine.mac, trio.current_time())
            await self.render_grub()
        else:
            await self._saw(machine, node, "loader", name)

    async def render_grub(self) -> None:
        """Bring the files that GRUB fetches up to date.

        A file cannot tell who asks: while the gate is full, machines that do not load yet find
        that they must wait.  So many as ask at once may slip through together.
        """
        async with self._grub_lock:
            inventory = self._inventory
            assignments = await self.call(self._store.assignments)
            full = self._gate.full(trio.current_time())
            state = (inventory, assignments, self._gate.held() if full else None)
            if state == self._rendered:
                return
            self._rendered = state
            texts: dict[str, str] = {}
            for mac, node in inventory.by_mac.items():
                if node.firmware is Firmware.BIOS:
                    continue
                default = Assignment(node.step, node.profile)
                assignment, _ = assignments.get(node.name, (default, 0))
                action: Action = decide(inventory, mac, node, assignment)
                if full and isinstance(action, Kernel | Program) and mac not in self._gate.held():
                    action = Wait(DELAY_S, f"{self._gate.loading} machines load")
                texts[f"{mac}.cfg"] = scripts.to_grub(
                    inventory, f"{node.name}: {assignment}", action
                )
            stranger = decide(inventory, "", None, Assignment(inventory.site.unknown))
            texts[scripts.UNKNOWN_GRUB] = scripts.to_grub(inventory, "unknown machine", stranger)
            await trio.to_thread.run_sync(self._grub.put, texts)
            await trio.to_thread.run_sync(self._grub.keep, list(texts))

    def _offered(self, mac: str) -> None:
        """Count answers to a machine beside a foreign server; say when it seems deaf to them."""
        offers = self._offers.pop(mac, 0) + 1
        self._offers[mac] = offers  # moved to the end: the oldest is forgotten first
        if offers % OFFERS_UNANSWERED == 0:
            _log.warning(
                "offer.ignored",
                mac=mac,
                hint="its firmware may ignore proxy offers: kaboot render --site for your server",
            )
        while len(self._offers) > EARLY_MACHINES_MAX:
            del self._offers[next(iter(self._offers))]

    def _early_event(self, mac: str, event: LogEvent) -> None:
        events = self._early.setdefault(mac, [])
        self._early.move_to_end(mac)
        events.append(event)
        del events[:-EARLY_EVENTS_MAX]
        while len(self._early) > EARLY_MACHINES_MAX:
            self._early.popitem(last=False)

    async def _flush(self, mac: str, node: Node | None) -> None:
        """Record what a machine did before it was known to be one of ours."""
        for event in self._early.pop(mac, []):
            await self._saw(Machine(mac, address=event.address), node, event.stage, event.detail)

    # ------------------------------------------------------------ events

    async def _event_of(self, mac: str, peer: str, stage: str, detail: str) -> None:
        """Record a stage of whoever is at an address; of a stranger, in the log only."""
        if mac:
            node = self._inventory.by_mac.get(mac)
            await self._saw(Machine(mac, address=peer), node, stage, detail)
        else:
            _log.info("boot.stage", peer=peer, stage=stage, detail=detail)

    async def _saw(self, machine: Machine, node: Node | None, stage: str, detail: str) -> None:
        name = node.name if node is not None else ""
        _log.info("boot.stage", node=name or machine.mac, stage=stage, detail=detail)
        try:
            await self.call(self._store.saw, machine, name, stage, detail, time.time_ns())
        except KaError as error:
            # A full disk must not keep machines from booting.
            _log.error("event.lost", reason=error)

    def _mac_at(self, address: str) -> str:
        """Return the machine at an address, empty if it is not known.

        The kernel's neighbour table knows those in this segment that a foreign server gave
        addresses to.
        """
        return self._macs.get(address) or neighbour(_NEIGHBOURS.read_text(), address)

    def _remember(self, address: str, mac: str) -> None:
        self._macs[address] = mac
        self._macs.move_to_end(address)
        while len(self._macs) > ADDRESSES_MAX:
            self._macs.popitem(last=False)


def _may_report(node: Node | None, other: str | None, peer: str, inventory: Inventory) -> bool:
    """Whether a report may come from an address that is not the machine's last one.

    A system may get another address than the firmware had: it is believed if nobody else is known
    there, and the address is the node's own or one of a server that is not ours.
    """
    if node is not None and str(node.address) == peer:
        return True
    return other is None and inventory.site.mode is not Mode.DHCP


def _kind_of(inventory: Inventory, path: str) -> str:
    for profile in inventory.profiles.values():
        if path == profile.kernel:
            return "kernel"
        if path in profile.initrds:
            return "initrd"
        if path == profile.program:
            return "program"
    return "file"


def _open_below(path: Path, root: Path) -> int:
    """Open a regular file that lies below a directory, symbolic links followed; raises OSError."""
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        raise PermissionError(1, "leads out of the served directory")
    fd = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PermissionError(1, "not a file")
    return fd
