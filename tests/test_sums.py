"""Eight sums of products at once, against numpy."""

import numpy as np
import pytest

from symhmm.chains import simd
from symhmm.chains.jit import kernel
from symhmm.chains.sums import eight_sums


@kernel
def product(out, matrix, shared, vector, count):
    width = simd.lanes_of(vector)
    one = 1 if shared else width
    eight_sums(out, 0, 2 * width, matrix, 0, count * one, one, shared, vector, width, 3 * width, count)


@kernel
def whole(count, like):
    return simd.vectors(count, like)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_eight_rows_times_a_vector_in_each_lane(dtype: type, shared: bool, count: int) -> None:
    generator = np.random.default_rng(count)
    width = 64 // np.dtype(dtype).itemsize
    matrix = generator.normal(size=(8, count) if shared else (8, count, width)).astype(dtype)
    vector = generator.normal(size=(count, 3, width)).astype(dtype)
    out = np.full((8, 2, width), 7, dtype)
    product(out.reshape(-1), matrix.reshape(-1), shared, vector.reshape(-1), count)
    lanes = matrix[..., None] if shared else matrix
    tolerance = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(out[:, 0], (lanes * vector[None, :, 1]).sum(1), rtol=tolerance, atol=tolerance)
    assert (out[:, 1] == 7).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_start_where_cache_lines_do(dtype: type) -> None:
    kept = [whole(count, np.empty(0, dtype)) for count in range(1, 9)]
    assert [x.nbytes for x in kept] == [64 * count for count in range(1, 9)]
    assert all(x.ctypes.data % 64 == 0 for x in kept)
