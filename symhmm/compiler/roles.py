"""Roles: what the program's sites are, read off the program and printed as a table."""

from dataclasses import dataclass

from symhmm.compiler.layout import Layout
from symhmm.graph import FactorGraph


@dataclass(frozen=True)
class Roles:
    """Names by role; prints as a table of name, role, shape or size, and plates."""

    rows: tuple[tuple[str, str, str, str], ...]

    def of(self, role: str) -> tuple[str, ...]:
        """Names whose role begins with ``role``, such as ``random effect`` or ``observed``."""
        return tuple(name for name, r, _, _ in self.rows if r.startswith(role))

    def __repr__(self) -> str:
        rows = [("name", "role", "shape", "plates"), *self.rows]
        widths = [max(len(r[c]) for r in rows) for c in range(4)]
        return "\n".join("  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def roles(graph: FactorGraph, layout: Layout) -> Roles:
    """The table of a graph: fixed and random effects in the order of the vector, then summed and observed sites."""
    rows = [(e.name, e.role, str(e.shape), " ".join(e.plates) or "-") for e in layout.entries]
    seen = _first_steps(graph)
    for name, v in graph.variables.items():
        site = v.site or name
        if site not in seen:
            seen.add(site)
            rows.append((site, "summed out", f"{v.size} states", " ".join(v.frames) or "-"))
    for name, o in graph.observed.items():
        if name not in seen:
            rows.append((name, "observed", f"{o.family} {o.shape}", " ".join(o.frames) or "-"))
    return Roles(tuple(rows))


def _first_steps(graph: FactorGraph) -> set[str]:
    """Sites of the steps before a time axis that its own sites stand for as well: ``z_0`` where there is ``z_{time}``."""
    names = {*graph.variables, *graph.observed}
    return {
        name.replace(f"{{{c.axis}}}", str(k)) for c in graph.chains.values() for name in names for k in range(c.first)
        if f"{{{c.axis}}}" in name
    }  # fmt: skip
