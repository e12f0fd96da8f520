"""Names of sites in a vectorised loop: pieces of text that stand for one text per time step."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_PIECE = re.compile(r"⟦\d+⟧|9\d{8}")


@dataclass(frozen=True)
class Token:
    """A piece of a name that differs between the steps of one loop.

    Args:
        loop: key of the loop.
        texts: what the piece reads at each of the vectorised steps.
        shift: how many steps away from the current step the piece points; None if it follows no such rule.
        number: order of making, which tells apart tokens without a shift.
    """

    loop: str
    texts: tuple[str, ...]
    shift: int | None
    number: int

    def written(self, axis: str) -> str:
        """The piece as it appears in templates: ``{time}``, ``{time-1}``, or ``{time:3}`` without a shift."""
        if self.shift is None:
            return f"{{{axis}:{self.number}}}"
        return f"{{{axis}}}" if self.shift == 0 else f"{{{axis}{self.shift:+d}}}"


class Names:
    """All tokens made during one run.

    >>> names = Names()
    >>> name = "y_" + names.text("loop", ("3", "4"), shift=-1)
    >>> names.resolve(name, {"loop": 0}), names.template(name, {"loop": "time"})
    ('y_3', 'y_{time-1}')
    """

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self._made: dict[tuple[str, tuple[str, ...], bool], str] = {}

    def text(self, loop: str, texts: tuple[str, ...], shift: int | None, *, digits: bool = False) -> str:
        """The placeholder for ``texts``; as nine digits where Python insists on an integer (``"%d" % t``)."""
        key = (loop, texts, digits)
        if key not in self._made:
            number = len(self.tokens)
            self._made[key] = str(900_000_000 + number) if digits else f"⟦{number}⟧"
            self.tokens[self._made[key]] = Token(loop, texts, shift, number)
        return self._made[key]

    def of(self, name: str) -> list[Token]:
        """The tokens in ``name``."""
        return [self.tokens[piece] for piece in _PIECE.findall(name) if piece in self.tokens]

    def resolve(self, name: str, index: Mapping[str, int]) -> str:
        """``name`` at step ``index[loop]`` of each loop mentioned in ``index``."""

        def replace(match: "re.Match[str]") -> str:
            token = self.tokens.get(match.group())
            return token.texts[index[token.loop]] if token is not None and token.loop in index else match.group()

        return _PIECE.sub(replace, name)

    def readable(self, text: str) -> str:
        """A message in which every site name is written as a template."""
        return self.template(text, {token.loop: "time" for token in self.tokens.values()})

    def template(self, name: str, axes: Mapping[str, str]) -> str:
        """``name`` with the tokens of each loop in ``axes`` written as templates of that axis."""

        def replace(match: "re.Match[str]") -> str:
            token = self.tokens.get(match.group())
            return token.written(axes[token.loop]) if token is not None and token.loop in axes else match.group()

        return _PIECE.sub(replace, name)
