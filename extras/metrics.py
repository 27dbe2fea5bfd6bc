"""
The numbers that the papers report: retrieval ranks and recalls, accuracy and macro-F, PSNR and SSIM.

Departures from the authors' code: a tie or a NaN counts against us (theirs lists the truth first and stops at ties);
recalls are divided by the number of queries, not by 1000; PSNR is that of pixels in [0, 1] (theirs is 48 dB higher).
"""

import math
import statistics

import numpy as np
import torch
import torch.nn.functional as F


def ranks(scores, truth):
    """
    scores (Q, C), truth (Q,) the column of the right candidate -> (Q,) int64: 1 + the number of others that score as
    high or higher. A NaN truth is last, a NaN rival is ahead.
    """
    scores, truth = torch.as_tensor(scores).double(), torch.as_tensor(truth).long()
    return best_ranks(scores, F.one_hot(truth, scores.shape[1]).bool())


def best_ranks(scores, right):
    """As `ranks`, when several candidates may be right: right (Q, C) bool. The best right one among the wrong ones."""
    best = scores.masked_fill(~right | scores.isnan(), -math.inf).amax(dim=1, keepdim=True)
    ahead = ~right & ((scores >= best) | scores.isnan())
    return 1 + ahead.sum(dim=1)


def recalls(ranks):
    """R@k as shares of the queries, SumR = 100 (R@1 + R@5 + R@10), and the median rank."""
    ranks = np.asarray(ranks)
    result = {f"R@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
    return {**result, "SumR": 100 * sum(result.values()), "median_rank": float(np.median(ranks))}


def mean_and_sd(draws):
    """[{name: value}, ...], one per draw -> {name: mean, ..., "sd": {name: standard deviation, None for one draw}}."""
    means, deviations = {}, {}
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        means[name] = statistics.fmean(values)
        deviations[name] = statistics.stdev(values) if len(values) > 1 else None
    return {**means, "sd": deviations}


def accuracy(true, predicted):
    return float(np.mean(np.asarray(true) == np.asarray(predicted)))


def macro_f(true, predicted):
    """The mean F-measure, 2 TP / (2 TP + FP + FN), of all classes that occur, true or predicted (as the authors)."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.shape != predicted.shape or true.ndim != 1 or len(true) == 0:
        raise ValueError(f"macro_f: needs two sequences of one length above 0, got {true.shape} and {predicted.shape}")
    classes, ids = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = ids[: len(true)], ids[len(true) :]
    hits = np.bincount(true[true == predicted], minlength=len(classes))
    both = np.bincount(true, minlength=len(classes)) + np.bincount(predicted, minlength=len(classes))  # 2 TP + FP + FN
    return float((2 * hits / both).mean())


def psnr(a, b, where=None):
    """a, b (B, 3, H, W) in [0, 1] -> (B,) dB; where (B, 1, H, W) bool: over those pixels (NaN where there are none)."""
    error = (a.double() - b.double()) ** 2
    if where is None:
        mse = error.mean(dim=(1, 2, 3))
    else:
        mse = (error * where).sum(dim=(1, 2, 3)) / (error.shape[1] * where.sum(dim=(1, 2, 3)))
    return -10 * mse.log10()


def ssim(a, b):
    """
    a, b (B, 3, H, W) in [0, 1] -> (B,): Wang et al. 2004, Gaussian window of 11 x 11 with sigma 1.5, K 0.01 and 0.03,
    range 1, population covariance, windows that lie wholly within the picture, mean over channels.
    """
    if min(a.shape[2:]) < 11:
        raise ValueError(f"ssim: pictures must be at least 11 x 11, got {tuple(a.shape[2:])}")
    x = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image):  # (B, 3, H, W) -> (B, 3, H - 10, W - 10), along the columns and then along the rows
        blurred = F.conv2d(image.flatten(0, 1)[:, None], window.view(1, 1, 11, 1))
        blurred = F.conv2d(blurred, window.view(1, 1, 1, 11))
        return blurred.view(*image.shape[:2], *blurred.shape[2:])

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, covariance = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    means = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (means * (2 * covariance + c2) / (var_a + var_b + c2)).mean(dim=(1, 2, 3))
