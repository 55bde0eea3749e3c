"""Paired differences, their intervals and p values."""

from __future__ import annotations

from typing import Any


def paired_delta(before: list[float], after: list[float], *, seed: int = 42) -> dict:
    """Mean of after - before over the same items, its 95 % bootstrap interval and a permutation p.

    scipy's BCa bootstrap with 9,999 resamples, and its paired permutation test (exact up to 13 items), both seeded.
    Where all differences are the same the interval is that one value. Without items everything but n is None.
    """
    import numpy as np
    from scipy import stats

    differences = np.subtract(after, before, dtype=np.float64)
    if not len(differences):
        return {"mean": None, "low": None, "high": None, "p": None, "n": 0}
    low, high = interval(differences, seed)
    p = 1.0
    if len(differences) > 1:
        test = stats.permutation_test(
            (np.asarray(after, np.float64), np.asarray(before, np.float64)),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(seed),
        )
        p = float(test.pvalue)
    return {"mean": float(differences.mean()), "low": low, "high": high, "p": p, "n": len(differences)}


def mcnemar(before: list[float], after: list[float], *, seed: int = 42) -> dict:
    """The difference in the share of right answers, its 95 % bootstrap interval, and the exact McNemar p.

    An answer is right (1 or True), wrong (0 or False) or neither (0.5).
    """
    import numpy as np
    from scipy import stats

    differences = np.subtract(after, before, dtype=np.float64)
    if not len(differences):
        return {"mean": None, "low": None, "high": None, "p": None, "n": 0}
    low, high = interval(differences, seed)
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"mean": float(differences.mean()), "low": low, "high": high, "p": p, "n": len(differences)}


def interval(differences: Any, seed: int) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean of `differences`, a float array (n,)."""
    import numpy as np
    from scipy import stats

    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():  # the bootstrap of a constant is not defined
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap((differences,), np.mean, n_resamples=9999, rng=np.random.default_rng(seed))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def in_per_cent(delta: dict) -> dict:
    return {**delta, **{key: 100 * delta[key] for key in ("mean", "low", "high")}}
