"""The errors a user of symhmm can meet: one tree, every message says what happened, where, and what to try."""


class SymhmmError(Exception):
    """Base of all errors raised on purpose by symhmm.

    Args:
        problem: one sentence, naming the site, plate or value it is about.
        details: the sizes or names seen and wanted, one line each.
        suggestion: the next thing to try.

    >>> print(ShapeError("mask of site 'y' has the wrong shape.", details=["seen (3,), wanted (4,)"], suggestion="mask[:4]"))
    mask of site 'y' has the wrong shape.
      seen (3,), wanted (4,)
      Try: mask[:4]
    """

    def __init__(self, problem: str, *, details: list[str] | tuple[str, ...] = (), suggestion: str = "") -> None:
        lines = [problem, *(f"  {line}" for line in details)]
        if suggestion:
            lines.append(f"  Try: {suggestion}")
        super().__init__("\n".join(lines))


class ProgramError(SymhmmError):
    """The user's program does something that has no meaning as a probability model, or that capture cannot follow."""


class StructureDependsOnInput(ProgramError):
    """While a program is traced, its control flow reads the value of something that is an input of the trace.

    Args:
        placeholder: name of the traced input that the value depends on.
    """

    def __init__(
        self, problem: str, *, placeholder: str, details: list[str] | tuple[str, ...] = (), suggestion: str = ""
    ) -> None:
        super().__init__(problem, details=details, suggestion=suggestion)
        self.placeholder = placeholder


class ShapeError(SymhmmError):
    """A tensor, mask or plate has a size that does not fit the others."""


class DataError(SymhmmError):
    """The data cannot be used as they are: NaN that is not masked, an empty sequence, a value outside the support."""


class IntractableError(SymhmmError):
    """Exact summation would need more joint states or memory than allowed. Raised before any tensor work."""


class GraphError(SymhmmError):
    """A factor graph is inconsistent: unknown names, sizes that disagree."""


class ValuesError(SymhmmError):
    """Parameter or latent values are missing, unknown, of the wrong shape or outside their support."""


class SpecError(SymhmmError):
    """A formula or a model's specification cannot be used: a name that is not there, a typo, a design of too low a rank."""


class FitError(SymhmmError):
    """A fit cannot start: no free values, a non-finite density at the start, an unknown method or option."""


class SymhmmWarning(UserWarning):
    """Something works, but slower or less surely than it could; the text says which line or site and why."""
