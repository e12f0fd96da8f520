"""Every program of the table, decoded: best states against brute force, draws against smoothing."""

import warnings

import pytest
import torch
from joint_tables import log_weight
from program_table import Program
from programs import PROGRAMS
from reference import double_precision, draw_values
from torch.testing import assert_close

import symhmm
from symhmm.errors import SymhmmWarning
from symhmm.posterior.decode import sample_states, viterbi
from symhmm.posterior.marginals import smooth
from symhmm.posterior.traceback import choose, contract
from symhmm.semiring import MAX
from symhmm.testing import enumerate_joint

DRAWS = 1500


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_states_of_programs(program: Program) -> None:
    with double_precision():
        values = draw_values(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SymhmmWarning)
            density = symhmm.compile(program.model, *program.arguments())
        graph = density.graph_at(values)
        if not graph.variables:
            pytest.skip("no discrete latents")
        scaled = any(p.scale != 1 for p in graph.plates.values()) or any(f.scale != 1 for f in graph.factors)
        with torch.no_grad():
            found = contract(graph, density.plan, MAX)
            if program.small:
                assert_close(found.total, enumerate_joint(graph, MAX), rtol=1e-10, atol=1e-10)
            if not scaled:
                assert_close(log_weight(graph, choose(found))[0], found.total, rtol=1e-10, atol=1e-10)
        best, p = viterbi(density, values), smooth(density, values)
        drawn = sample_states(density, values, DRAWS)
        assert set(best) == set(p) == set(drawn)
        for site, x in drawn.items():
            wanted = p[site].values
            assert_close(wanted.sum(-1), torch.ones(wanted.shape[:-1]), rtol=1e-10, atol=1e-10)
            assert x.dims == ("draw", *p[site].dims[:-1])
            seen = torch.stack([(x.values == k).double().mean(0) for k in range(wanted.shape[-1])], -1)
            valid = torch.ones(wanted.shape[:-1], dtype=torch.bool) if x.valid is None else x.valid
            error = (seen - wanted).abs() / (wanted * (1 - wanted) / DRAWS + 1e-5).sqrt()
            assert error[valid].max() < 6
