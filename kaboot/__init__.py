"""kaboot: what each machine boots over the network.  This is its public face.

with kaboot.Control.open(Path("/etc/kaboot/kaboot.toml")) as control:
    control.assign(["pc1", "pc2"], "install")
    control.events(after=last)
"""

from kaboot.control import Control, NodeStatus
from kaboot.model import Assignment, Inventory, Node, Step
from kaboot.steps import Report
from kaboot.store import Event, MachineRow

__all__ = [
    "Assignment",
    "Control",
    "Event",
    "Inventory",
    "MachineRow",
    "Node",
    "NodeStatus",
    "Report",
    "Step",
]
