"""Paired differences with intervals and p values that agree, several p values at once, differences at equal length."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

from llm_alignment.files import InputError

RESAMPLES = 9999
ALL_SIGNS = 13  # up to this many units every sign pattern is tried: 2**13 is less than RESAMPLES
ENOUGH_TO_EXCLUDE = 70  # units
ENOUGH = 6  # units that must change before a two-sided sign-flip test can reach 0.05: 2 / 2**5 is more, 2 / 2**6 less


def paired_delta(
    before: Sequence[float], after: Sequence[float], *, clusters: Sequence[Hashable] | None = None, exact: bool = False
) -> dict:
    """Mean of after - before over the same items, with a 95 % interval and a p value that agree.

    p is that of the sign-flip (paired permutation) test: all sign patterns up to 13 changed units, else 9,999 random
    ones; with `exact` McNemar's. The interval is that test inverted, so it holds 0 exactly when p is above 0.05: the
    2.5 % and 97.5 % points of the means of random halves of the data (Hartigan 1969, Using subsample values as typical
    values, JASA 64, 1303). It assumes symmetric differences, so where the BCa bootstrap reaches further its end is
    taken, on the side of 0 that p says. Where fewer than 6 units changed, the ends reach as far as the exact bounds of
    their number allow.

    `clusters`: one label for each item. Items of one label, such as those with a common context, share a sign and are
    resampled together. Without it every item is its own cluster. The order of the items changes nothing.

    Returns {"mean", "low", "high", "p", "n", "changed", "clusters", "changed_clusters"}: the last four are counts of
    items, items that differ, labels (None without) and labels whose sum differs. With fewer than 6 units (clusters or
    items), and where none changed, no 95 % interval exists: low and high are None. With no item, or with a value that
    is not finite, everything but the counts is None. Raises InputError when the lengths differ."""
    import numpy as np
    from scipy.stats import binomtest

    if len(before) != len(after):
        raise InputError(f"{len(before)} items before and {len(after)} after; give the same items on both sides")
    if clusters is not None and len(clusters) != len(before):
        raise InputError(f"{len(clusters)} cluster labels for {len(before)} items; give one label for each item")
    differences = np.subtract(after, before, dtype=np.float64)
    labels = range(len(differences)) if clusters is None else clusters
    number = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    unit_of = np.array([number[label] for label in labels], dtype=np.int64)
    sizes = np.bincount(unit_of).astype(np.float64)
    sums = np.bincount(unit_of, weights=differences)
    sums[np.abs(sums) <= 1e-12 * np.abs(differences).sum()] = 0
    changes = differences[differences != 0]
    of_clusters = (None, None) if clusters is None else (len(number), int(np.count_nonzero(sums)))
    counts = (len(differences), len(changes), *of_clusters)
    delta: dict[str, Any] = dict.fromkeys(("mean", "low", "high", "p"))
    delta |= zip(("n", "changed", "clusters", "changed_clusters"), counts, strict=True)
    if not len(differences) or not np.isfinite(differences).all():
        return delta
    # the random parts must not depend on the order of the rows, nor on which side is called before: no fall, sorted
    sides = ((math.fsum(sign * sums), sorted(zip(sign * sums, sizes, strict=True)), sign) for sign in (1, -1))
    _, units, sign = max(sides)
    sums, sizes = np.array(units).T
    parts = _random_parts(sums, sizes)
    if exact:
        p = float(binomtest(int((changes > 0).sum()), len(changes)).pvalue) if len(changes) else 1.0
    else:  # flipping the signs of a part lowers the total when the part's sum is positive
        changed = sums[sums != 0]
        flipped = _random_parts(changed, changed)[0] if len(changed) <= ALL_SIGNS < len(sums) else parts[0]
        p = float(min(1.0, 2 * min((flipped <= 0).mean(), (flipped >= 0).mean())))
    delta |= {"mean": float(differences.mean()), "p": p}
    if len(sums) < ENOUGH or not sums.any():
        return delta
    low, high = sorted(sign * end for end in _interval(sums, sizes, *parts, p))
    return {**delta, "low": low, "high": high}


def mcnemar(before: Sequence[float], after: Sequence[float], *, clusters: Sequence[Hashable] | None = None) -> dict:
    """`paired_delta` of answers that are right (1, True), wrong (0, False) or neither (0.5), with McNemar's exact p;
    with `clusters` that of the sign-flip test on their sums, the same test where each answer is a cluster."""
    return paired_delta(before, after, clusters=clusters, exact=clusters is None)


def _random_parts(sums: Any, sizes: Any) -> tuple[Any, Any]:
    """Sums and sizes, (parts,) each: of no unit (no sign flipped), then of random halves; of few units all parts."""
    import numpy as np

    units = np.stack([sums, sizes], axis=1)
    if len(sums) <= ALL_SIGNS:
        is_in = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        part_sums, part_sizes = (is_in @ units).T
    else:
        rng, width, parts = np.random.default_rng(42), -(-len(sums) // 8), [np.zeros((1, 2))]
        for start in range(0, RESAMPLES, 1000):
            bits = np.frombuffer(rng.bytes(min(1000, RESAMPLES - start) * width), np.uint8).reshape(-1, width)
            parts.append(np.unpackbits(bits, axis=1, count=len(sums)).astype(np.float64) @ units)
        part_sums, part_sizes = np.concatenate(parts).T
    part_sums[np.abs(part_sums) <= 1e-12 * np.abs(sums).sum()] = 0  # sums that cancel, up to rounding
    return part_sums, part_sizes


def _interval(sums: Any, sizes: Any, part_sums: Any, part_sizes: Any, p: float) -> tuple[float, float]:
    """The 95 % interval; the sum of `sums` is 0 or more. An end that would contradict `p` is not taken."""
    import numpy as np

    empty = part_sizes == 0
    means = part_sums / np.where(empty, 1, part_sizes)
    skip = int(0.025 * len(means))
    low = np.sort(np.where(empty, -np.inf, means))[skip]
    high = -np.sort(np.where(empty, -np.inf, -means))[skip]
    boot_low, boot_high = _bootstrap(sums, sizes)
    if p > 0.05:
        few_low, few_high = _few_changed(sums, sizes) if np.count_nonzero(sums) < ENOUGH else (0, 0)
        return float(min(low, boot_low, few_low, 0)), float(max(high, boot_high, few_high, 0))
    low = min([end for end in (low, boot_low) if end > 0], default=means[means > 0].min())
    return float(low), float(max(high, boot_high))


def _few_changed(sums: Any, sizes: Any) -> tuple[float, float]:
    """The exact 95 % bounds (Clopper and Pearson 1934) of the shares that fall and rise, times the mean change."""
    from scipy.stats import binomtest

    size = abs(sums[sums != 0]).mean() * len(sums) / sizes.sum()
    counts = int((sums < 0).sum()), int((sums > 0).sum())
    fall, rise = (binomtest(count, len(sums)).proportion_ci(method="exact").high for count in counts)
    return -float(fall) * size, float(rise) * size


def _bootstrap(sums: Any, sizes: Any) -> tuple[float, float]:
    """95 % BCa bootstrap interval of sum(sums) / sum(sizes) over whole units (Efron 1987). A sample shows too little
    of a long tail, so the unit furthest from the mean on each side is counted twice. Else 4 to 8 % of the losses that
    it excludes are there where differences are skewed (experiments/benchmarks/check_coverage.py)."""
    import numpy as np
    from scipy.stats import bootstrap

    observed = float(sums.sum() / sizes.sum())
    residuals = sums - observed * sizes
    if np.abs(residuals).max() <= 1e-12 * np.abs(sums).max():
        return observed, observed
    units = np.append(np.arange(len(sums)), sorted((residuals.argmin(), residuals.argmax())))
    interval = bootstrap(
        (sums[units], sizes[units]), lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis), paired=True,
        n_resamples=RESAMPLES, batch=1000, rng=np.random.default_rng(42),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def excluded(delta: dict, *, lower_is_better: bool = False) -> float | None:
    """The size of a loss (a rise where lower is better) above which the data exclude one; None where they do not tell,
    as with fewer than 70 units: of a loss in one item of twenty, these may well hold none (0.95 ** 70 = 3 %)."""
    units = delta["n"] if delta.get("clusters") is None else delta["clusters"]
    end = delta["high"] if lower_is_better else delta["low"]
    loss = 0.0 if end is None or units < ENOUGH_TO_EXCLUDE else float(end if lower_is_better else -end)
    return loss if loss > 0 else None


def too_few_changed(delta: dict) -> bool:
    """Whether so few items (or clusters) changed that the sign-flip test could not reach 0.05 in any case."""
    unit = "changed" if delta.get("clusters") is None else "changed_clusters"
    return delta.get(unit, ENOUGH) < ENOUGH  # a record of an earlier version does not tell


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method, in the order given (Holm 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        corrected[index] = highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
    return corrected


def equal_length_delta(differences: Sequence[float], length_differences: Sequence[float]) -> dict:
    """The difference that is left at equal length: the intercept of the differences regressed on those in length, both
    (n,): after - before of each item's score and of its answer's length. The 95 % interval and p are those of the t
    distribution with n - 2 degrees of freedom and errors that may differ in spread (HC3; MacKinnon and White 1985,
    https://doi.org/10.1016/0304-4076(85)90158-7). Returns the keys of `paired_delta` and "per_unit": the slope, for
    one unit of length. With fewer than 4 items, a difference that is not finite, or where one item alone decides the
    slope, everything but the counts is None; where no length changed, it is the mean difference."""
    import numpy as np
    from scipy import stats

    if len(differences) != len(length_differences):
        raise InputError(f"{len(differences)} differences and {len(length_differences)} of the lengths; give as many")
    y, x = np.asarray(differences, np.float64), np.asarray(length_differences, np.float64)
    if len(y) and not x.any():
        return {**paired_delta([0.0] * len(y), y.tolist()), "per_unit": 0.0}
    design = np.stack([np.ones_like(x), x], axis=1)
    nothing = {**paired_delta([], []), "n": len(y), "changed": int(np.count_nonzero(y)), "per_unit": None}
    if len(y) < 4 or not np.isfinite(y).all() or np.linalg.matrix_rank(design) < 2:
        return nothing
    inverse = np.linalg.inv(design.T @ design)
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    if leverage.max() > 1 - 1e-9:
        return nothing
    coefficients = inverse @ design.T @ y
    weighted = design * ((y - design @ coefficients) / (1 - leverage))[:, None]
    error = float(np.sqrt((inverse @ weighted.T @ weighted @ inverse)[0, 0]))
    mean, slope = map(float, coefficients)
    reach = float(stats.t.ppf(0.975, len(y) - 2)) * error
    rounding = 1e-12 * np.abs(y).max(initial=0)
    p = float(abs(mean) <= rounding) if error <= rounding else float(2 * stats.t.sf(abs(mean) / error, len(y) - 2))
    return {**nothing, "mean": mean, "low": mean - reach, "high": mean + reach, "p": p, "per_unit": slope}


def in_per_cent(delta: dict) -> dict:
    """A difference of shares in percentage points."""
    return {**delta, **{key: 100 * delta[key] for key in ("mean", "low", "high") if delta[key] is not None}}
