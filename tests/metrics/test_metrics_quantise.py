import numpy as np
import pytest

from distill.metrics.quantise import Int8, bytes_per_vector, quantised, sign_bits, signs

VECTORS = (np.random.default_rng(0).standard_normal((300, 20)) * np.geomspace(0.01, 3, 20) + 0.5).astype(np.float32)


def test_bytes_are_those_of_what_is_stored():
    codes = Int8.of_range(VECTORS).encode(VECTORS)
    for precision, stored in {
        "float32": VECTORS,
        "float16": VECTORS.astype(np.float16),
        "int8": codes,
        "binary": sign_bits(VECTORS),
    }.items():
        assert bytes_per_vector(precision, 20) == stored[0].nbytes, precision


def test_int8_error_is_at_most_half_a_step_and_codes_reach_both_ends():
    int8 = Int8.of_range(VECTORS)
    codes = int8.encode(VECTORS)
    step = (VECTORS.max(axis=0) - VECTORS.min(axis=0)) / 255
    assert (np.abs(int8.decode(codes) - VECTORS) <= 0.5001 * step).all()
    assert codes.dtype == np.uint8 and (codes.min(axis=0) == 0).all() and (codes.max(axis=0) == 255).all()


def test_each_dimension_takes_its_own_range_from_the_calibration_vectors():
    int8 = Int8.of_range(VECTORS)
    assert int8.decode(int8.encode(VECTORS * 100)).max(axis=0) == pytest.approx(VECTORS.max(axis=0), rel=1e-5)
    narrow = Int8.of_range(VECTORS[:, :1] / 1000)
    assert np.abs(narrow.decode(narrow.encode(VECTORS[:, :1] / 1000)) - VECTORS[:, :1] / 1000).max() < 1e-6


def test_a_constant_dimension_is_kept_exactly():
    vectors = np.full((3, 2), 0.25, dtype=np.float32)
    int8 = Int8.of_range(vectors)
    assert (int8.decode(int8.encode(vectors)) == vectors).all()


def test_scores_are_dot_products_with_the_decoded_vectors():
    int8 = Int8.of_range(VECTORS)
    codes = int8.encode(VECTORS)
    assert int8.scores(VECTORS[0], codes) == pytest.approx(int8.decode(codes) @ VECTORS[0], rel=1e-4)


def test_bits_are_signs_and_hamming_distance_gives_the_dot_product_of_signs():
    bits = sign_bits(VECTORS)
    assert (signs(bits, 20) == np.where(VECTORS > 0, 1, -1)).all()
    differing = np.bitwise_count(bits[:1] ^ bits).sum(axis=1)
    assert (signs(bits, 20) @ signs(bits, 20)[0] == 20 - 2 * differing.astype(int)).all()


def test_quantised_vectors_are_as_near_as_their_precision_allows():
    vectors = np.random.default_rng(0).standard_normal((50, 12)).astype(np.float32)
    assert np.array_equal(quantised(vectors, "float32", vectors), vectors)
    assert np.abs(quantised(vectors, "float16", vectors) - vectors).max() < 2e-3
    steps = (vectors.max(axis=0) - vectors.min(axis=0)) / 255
    assert (np.abs(quantised(vectors, "int8", vectors) - vectors) <= steps * 0.501).all()
    assert (np.abs(quantised(vectors, "int8", vectors[:10]) - vectors) > steps).any()  # beyond the calibrated range
    assert np.array_equal(quantised(vectors, "binary", vectors), np.where(vectors > 0, 1, -1))
