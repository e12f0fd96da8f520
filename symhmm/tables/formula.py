"""Formulas: the text ``~ temp + (1 | ID)`` taken apart into a fixed part and random parts, as in lme4 (Bates et al. 2015)."""

import re
from dataclasses import dataclass

from symhmm.errors import SpecError

_NAME = re.compile(r"[A-Za-z_][\w.]*|`[^`]+`")


@dataclass(frozen=True)
class Group:
    """One random part, ``(expr | by)``.

    Args:
        expr: what varies between the groups, ``1``, ``1 + x`` or ``0 + x``.
        by: the columns whose combinations are the groups; two for ``a:b``.
        correlated: whether the several effects of one group may be correlated; ``||`` says no.
    """

    expr: str
    by: tuple[str, ...]
    correlated: bool = True

    @property
    def name(self) -> str:
        """``ID`` or ``ID:session``."""
        return ":".join(self.by)

    def __str__(self) -> str:
        return f"({self.expr} {'|' if self.correlated else '||'} {self.name})"


@dataclass(frozen=True)
class Formula:
    """A formula taken apart; nested groups are written out, ``(1 | a/b)`` as ``(1 | a) + (1 | a:b)``.

    Args:
        fixed: the part without bars, in the language of formulae (that of R); ``1`` is the intercept, which is there
            unless ``0`` takes it away.
        groups: the random parts.
    """

    fixed: str
    groups: tuple[Group, ...] = ()

    def __str__(self) -> str:
        return "~ " + " + ".join([self.fixed, *map(str, self.groups)])

    @property
    def by(self) -> tuple[str, ...]:
        """Columns that name groups, each once."""
        return tuple(dict.fromkeys(column for g in self.groups for column in g.by))


def parse(text: str, what: str = "formula") -> Formula:
    """Take a formula apart.

    Args:
        text: ``~ temp + (1 | ID)``; the tilde may be left out. Random parts stand in brackets: ``(1 + x | ID)`` with
            correlated effects, ``(x || ID)`` without, ``(1 | a/b)`` nested, ``(1 | a:b)`` by combinations, ``(1 | a) +
            (1 | b)`` crossed.
        what: whose formula it is, for messages.

    Raises:
        SpecError: brackets that do not match, a bar outside brackets, a response, an empty term, a group that is no name.

    >>> parse("~ temp + (1 | herd/ID)")
    Formula(fixed='temp', groups=(Group(expr='1', by=('herd',), ...), Group(expr='1', by=('herd', 'ID'), ...)))
    """
    if not isinstance(text, str) or not text.strip(" ~"):
        raise SpecError(f"the {what} is empty.", details=[f"seen {text!r}"], suggestion="'~ 1' for an intercept alone")
    body = text.strip().removeprefix("~").strip()
    if "~" in body:
        raise SpecError(
            f"the {what} has a response.",
            details=[f"seen {text!r}"],
            suggestion=f"'~ {body.split('~', 1)[1].strip()}': what is modelled is named by the model",
        )
    fixed: list[str] = []
    groups: list[Group] = []
    for term in _split(body, "+", text, what):
        if not term:
            raise SpecError(
                f"the {what} has an empty term.", details=[f"seen {text!r}"], suggestion="remove the extra '+'"
            )
        inner = _bracketed(term)
        if inner is not None and "|" in inner:
            groups += _groups(inner, text, what)
        elif "|" in term:
            raise SpecError(
                f"the {what} has a bar outside brackets.",
                details=[f"seen {text!r}, at {term!r}"],
                suggestion="write random parts in brackets of their own, '(1 | ID)'",
            )
        else:
            fixed.append(term)
    if repeated := [g for i, g in enumerate(groups) if g in groups[:i]]:
        raise SpecError(
            f"the {what} has {repeated[0]} twice.", details=[f"seen {text!r}"], suggestion="keep one of them"
        )
    return Formula(" + ".join(fixed) or "1", tuple(groups))


def _split(body: str, mark: str, text: str, what: str) -> list[str]:
    """Pieces between marks that stand outside all brackets."""
    depth, pieces = 0, [""]
    for character in body:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            break
        if character == mark and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    if depth:
        raise SpecError(
            f"the brackets of the {what} do not match.",
            details=[f"seen {text!r}"],
            suggestion="close each '(' with ')'",
        )
    return [p.strip() for p in pieces]


def _bracketed(term: str) -> str | None:
    """What is inside, where one pair of brackets holds the whole term."""
    if not (term.startswith("(") and term.endswith(")")):
        return None
    depth = 0
    for i, character in enumerate(term):
        depth += (character == "(") - (character == ")")
        if depth == 0 and i < len(term) - 1:
            return None
    return term[1:-1].strip()


def _groups(inner: str, text: str, what: str) -> list[Group]:
    pieces = [p.strip() for p in re.split(r"\|\|?", inner)]
    correlated = "||" not in inner
    if len(pieces) != 2 or not all(pieces):
        raise SpecError(
            f"a random part of the {what} is not '(effects | group)'.",
            details=[f"seen ({inner}) in {text!r}"],
            suggestion="'(1 | ID)' for an intercept of each ID, '(1 + x | ID)' for a slope besides",
        )
    expr, found = pieces[0], []
    for one in _split(pieces[1], "+", text, what):
        nested = [level.strip() for level in one.split("/")]
        columns: tuple[str, ...] = ()
        for level in nested:
            names = tuple(n.strip() for n in level.split(":"))
            if bad := [n for n in names if not _NAME.fullmatch(n)]:
                raise SpecError(
                    f"a group of the {what} is not the name of a column.",
                    details=[f"seen {bad[0]!r} in {text!r}"],
                    suggestion="a column, 'a:b' for combinations, 'a/b' for b within a",
                )
            columns += tuple(n.strip("`") for n in names)
            found.append(Group(expr, columns, correlated))
    return found
