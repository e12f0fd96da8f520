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
    seen = set()
    for name, v in graph.variables.items():
        site = v.site or name
        if site not in seen:
            seen.add(site)
            rows.append((site, "summed out", f"{v.size} states", " ".join(v.frames) or "-"))
    rows += [(n, "observed", f"{o.family} {o.shape}", " ".join(o.frames) or "-") for n, o in graph.observed.items()]
    return Roles(tuple(rows))
