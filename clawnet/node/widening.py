"""Nobody took a task: what it asked for that nobody has, and which option would widen the choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clawnet.market.capability import unmet
from clawnet.market.reasons import Reason, count_reasons
from clawnet.market.records import Task
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

SET_ENDPOINT: Final = "give this one an AI endpoint (clawnet config set openclaw.api_endpoint http://127.0.0.1:11434)"
OPTION: Final[dict[Reason, str]] = {
    Reason.LABELS: "--label {labels}: no node that was found has it (node.labels); without it there is more choice",
    Reason.OS: "--os {os}: no node that was found runs it; --os any asks every operating system",
    Reason.NO_GPU: "--gpu {gpu}: no node that was found has so many GPUs; fewer widen the choice",
    Reason.CPU: "--cpu {cpu}: no node that was found has so many processors; fewer widen the choice",
    Reason.MEMORY: "--memory: no node that was found gives tasks so much; less widens the choice",
}
"""By the reason for which whoever was found does not fit; in the order in which they are told."""


class Widening:
    """Looks at whoever is connected, and at this node, for what kept them from being asked."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    def unfit(self, task: Task) -> dict[str, int]:
        """Why those that are connected, in the rings that may see the task, do not fit it: how many for each reason."""
        members, requirements = self._rooms.members, task.requirements
        named, excluded = task.spec["peer"], task.spec["exclude"]
        asked = [peer for peer in named or self._ctx.links if peer in self._ctx.links and peer not in excluded]
        found = [
            members.index.unmet(task.kind, requirements, peer) for peer in asked if members.ring_of(peer) in task.stages
        ]
        if "self" in task.stages and (not named or self._ctx.me in named) and self._ctx.me not in excluded:
            found.append(unmet(task.kind, requirements, self._rooms.cards.own, "own"))
        return count_reasons(reason.value for reason in found if reason not in (None, Reason.OTHER))

    def hint(self, task: Task, refusals: dict[str, int], unfit: dict[str, int]) -> str:
        """What the requester could change so that somebody may take it."""
        why = f"clawnet market why {task.task_id.hex()[:8]} explains"
        spec, reasons = task.spec, refusals or unfit
        if task.kind == "prompt" and not set(refusals) - {"no_capability"} and not spec["peer"]:
            return f"{self._no_endpoint(task)}; {why}"
        if "no_model" in refusals:
            return f"--model names one model; leave it out to widen the choice; {why}"
        if "price" in refusals:
            return f"a higher --budget may help; {why}"
        wanted = {**spec["requirements"], "labels": " ".join(spec["requirements"]["labels"])}
        hints = [text.format(**wanted) for reason, text in OPTION.items() if reason.value in reasons]
        if hints and spec["ring"] == "own":
            hints.append("--ring member asks members too")
        if hints:
            return "; ".join([*hints, why])
        if spec["peer"]:
            return f"{self._about_named(task)}; {why}"
        if spec["ring"] == "own":
            return f"--ring member asks members too; {why}"
        if not self._ctx.links:
            return f"no peer is connected (clawnet peer list); {why}"
        return f"fewer --require, --label or a lower --min-reputation widen the choice; {why}"

    def _about_named(self, task: Task) -> str:
        """Why nobody of those that --peer names was asked, or took it."""
        members, named = self._rooms.members, task.spec["peer"]
        if all(members.banned(peer) for peer in named):
            return f"{members.name_of(named[0])} is asked nothing: it was banned or is no member any longer"
        beyond = [peer for peer in named if members.ring_of(peer) == "member"]
        if beyond and task.spec["ring"] == "own":
            name = members.name_of(beyond[0])
            return f"{name} is a member, and --ring own asks own machines alone: --ring member allows it"
        if not any(self._ctx.connected(peer) for peer in named):
            name = members.name_of(named[0])
            return f"{name} is not connected (clawnet peer list); without --peer there is more choice"
        return "--peer restricts who is asked; leave it out to widen the choice"

    def _no_endpoint(self, task: Task) -> str:
        """Nobody answers prompts: what this node's own endpoint lacks, how one is set, and what works without one."""
        trouble = self._rooms.cards.capacity.prompt_trouble
        lacking = f"the AI endpoint here does not serve: {trouble}" if trouble else "no connected node serves prompts"
        wider = "--ring member asks members too; " if task.spec["ring"] == "own" else ""
        if task.spec["requirements"]["model"]:
            wider += "--model asks for one model alone, without it any will do; "
        own = "clawnet doctor tells more" if trouble else SET_ENDPOINT
        return f"{lacking}; {wider}{own}; or run a command with --type shell"
