"""Templates: the text of the Pyro program of a bound specification, and the program that the text is."""

import hashlib
import json
import linecache
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import symhmm.distributions as ours
from symhmm.models.inputs import OTHER, SESSION, SUBJECT, Block, Bound, plates
from symhmm.models.spec import Predictor, Spec
from symhmm.tables.design import GroupDesign

CONSTRAINTS = {"log": "constraints.positive", "logit": "constraints.unit_interval", "softmax": "constraints.simplex"}
PRIORS = {"identity": "dist.Normal", "log": "dist.LogNormal", "logit": "dist.Beta", "softmax": "dist.Dirichlet"}
INDENT = "    "
WIDE = 100  # of a line before its indentation
ROW = "\0"  # stands for the index of the row in lines that are repeated for each step


def source(bound: Bound, prior: Mapping[str, Any] | None = None) -> str:
    """The text of a program ``model(data, start)``, or ``model(data, start, prior)`` with priors, that needs only imports.

    ``data`` are `symhmm.models.inputs.Inputs`, ``start`` starting values by parameter. With ``prior`` fixed effects are
    sampled: it has, by name, the arguments of the distribution in the text, or a distribution in its place.
    """
    return _Writer(bound, prior or {}).text()


@lru_cache(maxsize=64)
def program(text: str) -> Callable[..., None]:
    """The function ``model`` that a text defines. Tracebacks show its lines; equal texts give the same function."""
    name = f"<symhmm program {hashlib.sha1(text.encode()).hexdigest()[:10]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {"__name__": "symhmm_program"}
    exec(compile(text, name, "exec"), namespace)  # the text is ours: users' words stand in it as quoted names only
    model: Callable[..., None] = namespace["model"]
    return model


def sd_name(block: Block, g: GroupDesign) -> str:
    """Parameter with the standard deviations of a random part."""
    return f"{effect_name(block, g)}.sd"


def corr_name(block: Block, g: GroupDesign) -> str:
    """Parameter with the Cholesky factor of the correlations of a random part."""
    return f"{effect_name(block, g)}.corr"


def effect_name(block: Block, g: GroupDesign) -> str:
    """Site of a random part's effects: ``transitions|ID``, or ``transitions|ID[x]`` beside it for effects of their own."""
    same = [h for h in block.design.groups if h.group.name == g.group.name] if block.design else []
    return f"{block.name}|{g.group.name}" + (f"[{g.group.expr}]" if len(same) > 1 and same[0] is not g else "")


def correlated(g: GroupDesign) -> bool:
    """Whether a random part has correlations."""
    return g.group.correlated and len(g.coding.columns) > 1


def variable(name: str) -> str:
    """A Python name for a site.

    >>> variable("step.mean|ID.sd")
    'step_mean_ID_sd'
    """
    found = re.sub(r"\W+", "_", name).strip("_")
    return f"p_{found}" if not found or found[0].isdigit() or found in _TAKEN else found


_TAKEN = {
    "data",
    "start",
    "prior",
    "logits",
    "initial_",
    "dist",
    "pyro",
    "torch",
    "constraints",
    "Vindex",
    "K",
    "z",
    "t",
    "known",
}


class _Writer:
    """Collects the lines of a program, section by section."""

    def __init__(self, bound: Bound, prior: Mapping[str, Any]) -> None:
        self.bound, self.prior = bound, prior
        self.spec: Spec = bound.spec
        self.k = len(self.spec.states)
        self.head: list[str] = []  # free values
        self.plates: dict[str, list[str]] = {}  # effects by plate
        self.etas: list[str] = []  # linear predictors that do not change in time
        self.steps: dict[str, list[str]] = {}  # those that do, by predictor
        self.where: dict[str, str] = {}  # value of each predictor in a program
        self.used: dict[str, str] = {}  # Python names that are taken

    def text(self) -> str:
        for p in self.spec.predictors:
            if p.name != "transitions" or self.k > 1:
                self._predictor(p)
        loop = self._loop()
        body = [*self._named("Fixed effects.", self.head)]
        names = plates(self.bound.data)
        for plate, lines in self.plates.items():
            if self.bound.kinds[plate] == OTHER:
                # Sessions that several subjects have in common are no plate of the chains.
                called = f"{plate} in common" if plate in names else plate
                body += [f"with pyro.plate({_quoted(called)}, data.size[{_quoted(called)}], dim=-1):", *_in(lines)]
        inner = [*self.etas, *loop]
        subject = [line for plate, lines in self.plates.items() if self.bound.kinds[plate] == SUBJECT for line in lines]
        if len(names) > 1:
            session = names[1]
            own = [line for plate, lines in self.plates.items() if self.bound.kinds[plate] == SESSION for line in lines]
            inner = [
                f"with pyro.plate({_quoted(session)}, data.size[{_quoted(session)}], dim=-2):",
                *_in([*own, *inner]),
            ]
        body += [
            f"with pyro.plate({_quoted(names[0])}, data.size[{_quoted(names[0])}], dim=-1):",
            *_in([*subject, *inner]),
        ]
        signature = "data, start, prior" if self.prior else "data, start"
        lines = [
            f'"""{_plain(repr(self.spec))}\n"""',
            *self._imports("\n".join(body)),
            "",
            f"K = {self.k}  # states: {_plain(', '.join(self.spec.states))}",
            "",
            "",
            f"def model({signature}):",
            *_in(body),
        ]
        return "\n".join(lines) + "\n"

    def _imports(self, body: str) -> list[str]:
        found = [n for n in ours.__all__ if re.search(rf"(?<![\w.]){n}\(", body)]
        lines = ["import pyro", "import pyro.distributions as dist"]
        lines += ["import torch"] if "torch." in body else []
        lines += ["from pyro.ops.indexing import Vindex"] if "Vindex(" in body else []
        lines += ["from torch.distributions import constraints"] if "constraints." in body else []
        return [*lines, *(["", f"from symhmm.distributions import {', '.join(found)}"] if found else [])]

    @staticmethod
    def _named(title: str, lines: list[str]) -> list[str]:
        return [f"# {title}", *lines, ""] if lines else []

    def _variable(self, name: str) -> str:
        """A Python name that no other site has."""
        found = variable(name)
        while self.used.setdefault(found, name) != name:
            found += "_"
        return found

    def _free(self, name: str, constraint: str, prior: str, events: int, remark: str = "") -> str:
        """A line that makes a parameter, or samples it; returns its variable."""
        v = self._variable(name)
        if remark:
            self.head.append(f"# {_plain(remark)}")
        event = f".to_event({events})" if events else ""
        if not self.prior:
            given = f"start[{_quoted(name)}]" + (f", {constraint}" if constraint else "")
            self.head.append(f"{v} = pyro.param({_quoted(name)}, {given})")
        elif hasattr(self.prior[name], "log_prob"):
            self.head.append(
                f"{v} = pyro.sample({_quoted(name)}, prior[{_quoted(name)}].expand(start[{_quoted(name)}].shape){event})"
            )
        else:
            self.head.append(f"{v} = pyro.sample({_quoted(name)}, {prior}(*prior[{_quoted(name)}]){event})")
        return v

    def _predictor(self, p: Predictor) -> None:
        """Lines for one predictor; ``where`` has what stands for its value (logits, for transitions and starts)."""
        blocks = self.bound.blocks[p.name]
        if p.plain:
            transitions = p.name == "transitions"
            constraint = "" if p.link == "identity" or transitions else CONSTRAINTS[p.link]
            prior = PRIORS["identity" if transitions else p.link]
            # A simplex is one event of its last size.
            events = len(blocks[0].shape) - (constraint == CONSTRAINTS["softmax"])
            remark = "logits relative to staying: from, to" if transitions else ""
            self.where[p.name] = self._free(p.name, constraint, prior, events, remark)
            return
        sums = [self._linear(b) for b in blocks]
        v = self._variable(f"{p.name} logits" if p.name in ("transitions", "initial") else f"{p.name} value")
        lines = []
        if len(p.formulas) == 1:
            lines += _sum(v, sums[0])
        else:
            cells = self._variable(f"{p.name} cells")
            lines += [
                f"{cells} = [",
                *(f"{INDENT}{' + '.join(s)},  # {_plain(c)}" for s, c in zip(sums, p.cells, strict=True)),
                "]",
            ]
            shaped = f".unflatten(-1, {p.shape})" if len(p.shape) > 1 else ""
            lines.append(f"{v} = torch.stack(torch.broadcast_tensors(*{cells}), -1){shaped}")
        if p.link == "softmax" and p.name != "transitions":
            lines.append(f"{v} = torch.cat([torch.zeros_like({v}[..., :1]), {v}], -1)  # the first is the reference")
        elif p.link == "log" or (p.link == "logit" and not self._family(p).linked):
            lines.append(f"{v} = {v}.{'exp' if p.link == 'log' else 'sigmoid'}()")
        self.where[p.name] = v
        if any(self.bound.varies(b) for b in blocks):
            self.steps[p.name] = lines
        else:
            self.etas += lines

    def _family(self, p: Predictor) -> Any:
        return self.spec.emissions[p.name.rpartition(".")[0]]

    def _linear(self, b: Block) -> list[str]:
        """Lines for the free values of a block; returns the terms of its linear predictor."""
        d = b.design
        assert d is not None
        parts: list[str] = []
        ij = "ij"[: len(b.shape)]
        scale = "logit" if b.link == "softmax" else b.link
        if d.columns:
            slopes = not d.fixed.constant
            coefficients = self._free(
                b.name, "", "dist.Normal", len(b.shape) + slopes, f"{scale} scale: {', '.join(d.columns)}"
            )
            x = self._rows("x", d.fixed.expr)
            parts.append(f'torch.einsum("...p,{ij}p->...{ij}", {x}, {coefficients})' if slopes else coefficients)
        for g in d.groups:
            name, plate = effect_name(b, g), g.group.name
            slopes = not g.coding.constant
            sd = self._free(sd_name(b, g), "constraints.positive", "dist.HalfNormal", len(b.shape) + slopes)
            if correlated(g):
                corr = self._free(corr_name(b, g), "constraints.corr_cholesky", "dist.LKJCholesky", len(b.shape))
                tril = self._variable(f"{name}.tril")
                self.head.append(f"{tril} = {sd}[..., None] * {corr}")
                made = f"dist.MultivariateNormal(torch.zeros_like({sd}), scale_tril={tril})"
                events = len(b.shape)
            else:
                made, events = f"dist.Normal(torch.zeros_like({sd}), {sd})", len(b.shape) + slopes
            u = self._variable(name)
            made += f".to_event({events})" if events else ""
            self.plates.setdefault(plate, []).extend(_call(f"{u} = pyro.sample", _quoted(name), made))
            each = u if self.bound.kinds[plate] != OTHER else f"{u}[{self._rows('code', plate)}]"
            x = "" if g.coding.constant else self._rows("x", g.coding.expr)
            parts.append(f'torch.einsum("...q,...{ij}q->...{ij}", {x}, {each})' if slopes else each)
        return parts

    def _rows(self, kind: str, name: str) -> str:
        """A design matrix or codes of groups, with a place for the row where they change in time."""
        moving = self.bound.moves(kind, name)
        return f"data.{kind}[{_quoted(name)}]{ROW if moving else ''}"

    def _loop(self) -> list[str]:
        lines: list[str] = []
        # Only design matrices are indexed by the step, never what depends on a parameter: gradients stay small.
        row = "t" if self.spec.timing == "to" else "t - 1"
        logits = f"logits = with_zero_diagonal({self.where.get('transitions', '')})  # from, to"
        moving = self.steps.get("transitions", [])
        if self.k == 1:
            steps = ['z = pyro.sample(f"z_{t}", dist.Categorical(probs=torch.ones(1)))']
        else:
            lines += [] if moving else [logits]
            first = [*_at(moving, "0"), logits] if moving and self.spec.initial == "stationary" else []
            steps = [
                "if t == 0:",
                *_in(
                    [
                        *first,
                        *_at(self.steps.get("initial", []), "0"),
                        f'z = pyro.sample("z_0", dist.Categorical({self._begin()}))',
                    ]
                ),
                "else:",
                *_in([*_at(moving, row), *([logits] if moving else [])]),
                f'{INDENT}z = pyro.sample(f"z_{{t}}", dist.Categorical(logits=Vindex(logits)[..., z, :]))',
            ]
        if self.bound.inputs.states is not None:
            lines.append(
                'known = torch.where(torch.eye(K) > 0, 0.0, -float("inf"))  # certain of the state that is known'
            )
            steps += [
                "with pyro.poutine.mask(mask=data.states[t] >= 0):",
                f'{INDENT}pyro.sample(f"known_{{t}}", dist.Categorical(logits=known[z]), obs=data.states[t].clamp(min=0))',
            ]
        for name, own in self.steps.items():
            steps += _at(own, "t") if name not in ("transitions", "initial") else []
        for stream, family in self.spec.emissions.items():
            values = {p.name: self._emitted(f"{stream}.{p.name}", p.link) for p in family.parameters}
            linked = family.linked and f"{stream}.{family.parameters[0].name}" in self._linked
            text = (family.linked if linked else family.text).format(**values)
            site = _quoted(stream.replace("{", "{{").replace("}", "}}"))[:-1] + '_{t}"'
            steps += [
                f"with pyro.poutine.mask(mask=data.observed[{_quoted(stream)}][t]):",
                *_in(_call("pyro.sample", f"f{site}", text, f"obs=data.streams[{_quoted(stream)}][t]")),
            ]
        return [*lines, "for t in pyro.markov(range(data.num_steps)):", *_in(steps)]

    def _begin(self) -> str:
        """The argument of the first state's distribution."""
        kind = self.spec.initial
        if kind == "free":
            self._free("initial", CONSTRAINTS["softmax"], "dist.Dirichlet", 0)
        return {
            "stationary": "probs=stationary_distribution(logits.softmax(-1))",
            "uniform": "probs=torch.ones(K, dtype=torch.float64) / K",
            "fixed": 'probs=start["initial"]',
            "free": "probs=initial",
            "formula": f"logits={self.where.get('initial', '')}",
        }[kind]

    @property
    def _linked(self) -> set[str]:
        return {p.name for p in self.spec.parameters if not p.plain}

    def _emitted(self, name: str, link: str) -> str:
        """What stands for a parameter in state z at step t."""
        if name in self.spec.fixed:
            held = self.spec.fixed[name]
            return repr(held[0]) if len(held) == 1 else f"start[{_quoted(name)}][z]"
        if name not in self._linked:
            return f"{self.where[name]}[z]"
        return f"Vindex({self.where[name]})[..., z{', :' if link == 'softmax' else ''}]"


def _in(lines: list[str]) -> list[str]:
    return [INDENT + line if line else line for line in lines]


def _call(start: str, *arguments: str) -> list[str]:
    """A call on one line, or with a line for each argument where that would be long."""
    whole = f"{start}({', '.join(arguments)})"
    return [whole] if len(whole) <= WIDE else [f"{start}(", *_in([f"{a}," for a in arguments]), ")"]


def _sum(v: str, terms: list[str]) -> list[str]:
    """An assignment on one line, or with a line for each term where that would be long."""
    whole = f"{v} = {' + '.join(terms)}"
    if len(whole) <= WIDE or len(terms) == 1:
        return [whole]
    return [f"{v} = (", *_in([terms[0], *(f"+ {t}" for t in terms[1:])]), ")"]


def _at(lines: list[str], row: str) -> list[str]:
    return [line.replace(ROW, f"[{row}]") for line in lines]


def _plain(text: str) -> str:
    """Text that can stand in a comment or docstring."""
    return text.replace("\\", "/").replace('"""', "'''")


def _quoted(name: str) -> str:
    return json.dumps(name)
