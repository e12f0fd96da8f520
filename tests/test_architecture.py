"""The house plan as data: who may import whom. Imports point down, and every module has a place in the table."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "symhmm"
MOST_LINES = 400

# From the ground up. A room (folder, or group of modules at the top of the package) may import every floor below it.
# Inside a room a module may import those to its left. Rooms on one floor are strangers.
FLOORS: list[dict[str, str]] = [
    {"": "errors memory"},
    {"": "semiring graph recorder", "distributions": "special chain circular positive unit counts atoms vectors"},
    {
        "chains": "layout reference jit careful joins simd tape_steps masked sums transpose lane_steps lanes_forward"
        " lanes_backward passes single_pass whole_pass best_lanes sizes threads places prepared square_steps squares stages"
        " stage_tables stage_blocks stage_products stage_steps stage_careful staged sparse evidence cpu whole segments"
        " path_steps stage_paths staged_paths staged_best best_path cpu_best cuda_steps cuda registered"
        " registered_evidence operator paths ranked_steps ranked filter_steps filters stage_filters staged_filters"
    },
    {
        "capture": "names marks time_index tracking inputs loops records stack verify observations enumeration giving"
        " sites deferred open factors program"
    },
    {
        "compiler": "steps order plan lower arguments transforms builder arithmetic laws weighted squares summands"
        " linear fused step tape taping taped layout roles free density expected marginal"
    },
    {
        "tables": "results bent arrow reweighted states support read gaps frame labels cells data naming scan formula design"
    },
    {
        "posterior": "series ends evaluated emissions filler mixture marginals traceback kbest decode prefix blocks"
        " pointwise forecast"
        " curves align forward simulate checks by_draws residuals inference_data"
    },
    {
        "infer": "progress restrict target lbfgs closed_forms expectation starts checkpoint information profile"
        " pooled points guide amortised pyro_guide minibatch objective importance bound occupied verdict warm modes"
        " arrows mle svi_state svi"
        " metric laplace_members laplace_modes laplace laplace_exact laplace_errors laplace_fit em noncentred whiten"
        " moving sampler draws pilot nuts"
    },
    {"simulators": "holes chains groups"},
    {"": "datasets questions effects components summary saved reorder fitting densities plots"},
    {
        "models": "emissions clusters spec inputs template starts order model_fit mixed_hmm glm_hmm base streams"
        " hmm gaussian mixture rows regression semi_markov continuous_time recapture"
    },
    {"": "report cli"},
]
# Beside the house: the public oracle may look at the lower floors, and nobody in the house may look at it.
SIDE = {"testing": "oracle random_graphs"}
SIDE_SEES = ("", "chains", "capture", "compiler")

# The waist is Density: who stands above it does not know how a program was captured or a plan carried out.
HIDDEN = {
    "infer": ("symhmm.capture", "symhmm.compiler.plan", "symhmm.compiler.lower", "funsor"),
    "posterior": ("symhmm.capture",),
    "compiler": ("symhmm.infer", "symhmm.posterior"),
    "tables": ("pyro", "funsor"),
}

# Slow or optional packages wait until they are needed; every other import stands at the top of its file.
LATE = {
    "arviz",
    "formulae",
    "hypothesis",
    "matplotlib",
    "narwhals",
    "nutpie",
    "pandas",
    "polars",
    "pyarrow",
    "safetensors",
    "scipy",
    "symhmm.chains.cpu",
    "symhmm.chains.cpu_best",
    "symhmm.chains.cuda",
    "symhmm.chains.filters",
    "symhmm.chains.paths",
    "symhmm.chains.ranked",
    "symhmm.chains.segments",
    "symhmm.chains.squares",
    "symhmm.chains.staged",
    "symhmm.chains.staged_best",
    "symhmm.chains.staged_filters",
    "symhmm.chains.staged_paths",
    "symhmm.chains.tape_steps",
    "symhmm.chains.whole",
    "symhmm.models.mixed_hmm",
    "triton",
    "xarray",
}


def modules() -> dict[str, Path]:
    """Dotted names of all modules of the package; a folder's ``__init__`` has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("symhmm", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def places() -> dict[str, tuple[str, int, int]]:
    """Room, floor and position in the room of every module in the table; a folder's own ``__init__`` stands last."""
    table = {"symhmm": ("roof", len(FLOORS) + 1, 0)}
    for floor, rooms in [*enumerate(FLOORS), (len(FLOORS), SIDE)]:
        for room, names in rooms.items():
            folder = f"symhmm.{room}" if room else "symhmm"
            order = names.split()
            table.update({f"{folder}.{name}": (room, floor, i) for i, name in enumerate(order)})
            if room:
                table[folder] = (room, floor, len(order))
    return table


PLACES = places()


def imported(tree: ast.AST) -> list[str]:
    """Modules imported anywhere under a node, functions included, each by its full name."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}: spell the module out"
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in below if name in MODULES]
            names += inside if len(inside) == len(below) else [*inside, str(node.module)]
    return names


TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
IMPORTS = {name: imported(tree) for name, tree in TREES.items()}


def within(name: str, prefixes: tuple[str, ...] | set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_place_and_imports_what_is_below_it(name):
    assert name in PLACES, f"{name} has no place: add it to FLOORS, where its imports point down"
    room, floor, position = PLACES[name]
    for other in IMPORTS[name]:
        if not within(other, ("symhmm",)):
            continue
        assert other in PLACES, f"{name} imports {other}, which is no module of the table"
        its_room, its_floor, its_position = PLACES[other]
        if room in SIDE:
            assert its_room in (*SIDE_SEES, room), f"{name} (side) looks at {other}, above the compiler"
        assert its_room == room or its_room not in SIDE, f"{name} imports {other}, which only tests may use"
        down = its_floor < floor or (its_floor == floor and its_room == room and its_position < position)
        assert down, f"{name} (floor {floor}) imports {other} (floor {its_floor}): sideways or up"


def test_no_import_cycles():
    graph = {name: [other for other in names if other in MODULES] for name, names in IMPORTS.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("room", HIDDEN)
def test_rooms_do_not_look_behind_the_waist(room):
    for name, names in IMPORTS.items():
        if within(name, (f"symhmm.{room}",)):
            seen = [other for other in names if within(other, HIDDEN[room])]
            assert not seen, f"{name} must not know {seen}"


@pytest.mark.parametrize("name", MODULES)
def test_late_imports_are_only_for_slow_or_optional_packages(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = [other for function in functions for other in imported(function)]
    unneeded = [other for other in late if not within(other, LATE)]
    assert not unneeded, f"{name} imports {unneeded} inside a function: move it to the top of the file"


@pytest.mark.parametrize("name", MODULES)
def test_one_module_one_story(name):
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MOST_LINES, f"{name} has {lines} lines: look for the second story and give it a file"


def test_the_table_catches_what_it_forbids():
    """The reader of imports itself: nested, aliased and from-package imports are all seen."""
    lines = [
        "def f():",
        "  from symhmm.infer import svi",
        "  import symhmm.graph as g",
        "from symhmm.errors import DataError",
    ]
    assert sorted(imported(ast.parse("\n".join(lines)))) == ["symhmm.errors", "symhmm.graph", "symhmm.infer.svi"]
    assert PLACES["symhmm.infer.svi"][1] > PLACES["symhmm.compiler.density"][1] > PLACES["symhmm.graph"][1]
