"""Agreement is that of the worst text; vectors of another length, not finite or below the lowest cosine are refused."""

from __future__ import annotations

import numpy as np
import pytest

from distill.export import check
from distill.export.check import agreement, check_format
from distill.export.formats import FORMATS


@pytest.fixture
def unit():
    vectors = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_agreement_is_the_cosine_of_the_worst_text_and_the_mean(unit):
    found = unit.copy()
    found[17] = unit[18]
    worst, text, mean = agreement(found, unit)
    assert text == 17 and worst == pytest.approx(float(unit[17] @ unit[18]), abs=1e-6)
    assert mean == pytest.approx((49 + worst) / 50, abs=1e-6)


def test_vectors_that_are_not_of_length_1_or_not_finite_are_the_worst(unit):
    longer, broken = unit.copy(), unit.copy()
    longer[3] *= 1.5
    broken[9, 2] = np.nan
    assert agreement(longer, unit)[:2] == (pytest.approx(1 - 0.5**2 / 2, abs=1e-6), 3)
    assert np.isnan(agreement(broken, unit).worst) and agreement(broken, unit).text == 9


def test_what_a_format_must_reach():
    assert {name: each.lowest for name, each in FORMATS.items()} == {
        "sentence-transformers": 0.9999,
        "onnx": 0.9999,
        "onnx-int8": 0.99,
    }


@pytest.mark.parametrize("name, passes, fails", [("onnx", 0.99995, 0.9998), ("onnx-int8", 0.991, 0.989)])
def test_one_bad_text_in_any_reading_is_refused_by_its_index(unit, monkeypatch, tmp_path, name, passes, fails):
    def vectors(cosine):
        found = unit.copy()
        other = unit[5] - (unit[5] @ unit[4]) * unit[4]
        found[4] = cosine * unit[4] + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
        return found

    texts = [str(i) for i in range(50)]
    monkeypatch.setattr(check, "_vectors", lambda *_: iter([unit, vectors(passes)]))
    worst, text, mean = check_format(tmp_path, name, "student", texts, unit)
    assert worst == pytest.approx(passes, abs=1e-6) and text == 4 and worst < mean <= 1
    for bad in ([unit, vectors(fails)], [vectors(fails), unit]):
        monkeypatch.setattr(check, "_vectors", lambda *_, bad=bad: iter(bad))
        with pytest.raises(ValueError, match=rf"worst cosine {fails:.4f}\d?, of text 4 of 50; mean"):
            check_format(tmp_path, name, "student", texts, unit)
    monkeypatch.setattr(check, "_vectors", lambda *_: iter([unit, np.full_like(unit, np.nan)]))
    with pytest.raises(ValueError, match="worst cosine nan, of text 0"):
        check_format(tmp_path, name, "student", texts, unit)
