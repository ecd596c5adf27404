"""Transition-aware weighted denoising: what a denoiser of clean classes has to do with noisy labels.

Let T[i, j] = p(given label j | clean class i) and q_i(x_t) = p(clean class i | x_t). Under class-conditional label
noise the score of the noisy conditional is a convex combination of the clean ones (Na et al., "Label-Noise Robust
Diffusion Models", ICLR 2024, arXiv 2402.17517, theorem 1 and proposition 2), and so are the ideal denoisers:

    D(x_t; noisy label j) = sum_i w_i(x_t, j) D(x_t; class i),    w_i(x_t, j) = p(clean class i | given label j, x_t).

By Bayes' rule w_i = T[i, j] q_i / sum_k T[k, j] q_k: neither T's inverse nor a prior is needed (the paper's equation 8
inverts T to recover q from the posterior of the noisy labels; with q at hand this is a softmax in log space, which has
no negative weights to clip). Fitting sum_i w_i D_theta(x_t; i) to the clean image, D_theta becomes the denoiser of the
clean classes (theorem 3 there). With T = I this is plain denoising score matching.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # the name everybody reads

Others = Literal["exact", "sampled"]

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""denoise(x [P, ...], sigma [P], label [P]) -> estimates like x."""


def log_transition(transition: Tensor) -> Tensor:
    """Logarithm of a transition matrix [K, K], in float32; exact zeros become -inf."""
    return transition.log().float()


def transition_weights(log_posterior: Tensor, label: Tensor, log_transition: Tensor) -> Tensor:
    """Weights of the classes given noisy images and their noisy labels.

    Args:
        log_posterior: log q, the log-probabilities of the clean classes given the noisy images, [B, K].
        label: Given labels, [B].
        log_transition: log T [K, K], clean classes in rows; see `log_transition`.

    Returns:
        w [B, K], rows non-negative and summing to 1. Where no class is possible (q is 0 wherever T is not), it is what
        the label alone says under equal class frequencies, T[i, j] / sum_k T[k, j].
    """
    of_label = log_transition[:, label].T
    log_w = log_posterior.float() + of_label
    impossible = log_w.isneginf().all(1, keepdim=True)
    return torch.where(impossible, of_label, log_w).softmax(1)


def reverse_weights(label: Tensor, reverse: Tensor) -> Tensor:
    """Weights that ignore the image: S[j, i] = p(clean class i | given label j), the limit of infinite noise.

    With these the minimiser is not the clean denoiser (proposition 4 of arXiv 2402.17517): the baseline "S-DSM".

    Args:
        label: Given labels, [B].
        reverse: S [K, K], given labels in rows.

    Returns:
        w [B, K].
    """
    return reverse[label].float()


def mixed_estimate(
    denoise: Denoise,
    x: Tensor,
    sigma: Tensor,
    label: Tensor,
    weights: Tensor,
    others: Others = "exact",
    threshold: float = 0.0,
    renormalize: bool = True,
    pairs_at_once: int | None = None,
) -> Tensor:
    """Estimate sum_i w_i D(x; sigma, i) of each image, with a gradient through the given label's term only.

    Leaving out the other terms' gradients costs nothing in the limit: the expected semi-gradient with respect to
    D(x; i) is T[i, i] q_i (sum_k w_k(x, i) D(x; k) - E[x_0 | x, i]), which vanishes at the same clean denoisers.

    Two ways to sum the other classes:

    - `exact`: every class whose weight is above `threshold`. All (image, class) pairs of the batch are gathered and go
      through the network together, `pairs_at_once` at a time. Dropping classes shrinks the sum: at high noise every
      other class of symmetric noise has weight rate / (K - 1), so with 100 classes the threshold of 0.01 in the
      released code drops all of them and the network learns images inflated by 1 / (1 - rate). `renormalize` divides by
      the weight that is kept.
    - `sampled`: one other class, drawn in proportion to the weights, stands for all of them with their joint weight
      1 - w_y. Its expectation is the exact sum, and the semi-gradient is linear in it: unbiased at the cost of at most
      one more forward pass, whatever K is.

    Args:
        denoise: The denoiser.
        x: Noisy images, [B, C, H, W].
        sigma: Their noise levels, [B].
        label: Given labels, [B].
        weights: w, [B, K].
        others: How the other classes are summed.
        threshold: Largest weight that `exact` drops; 0 drops what has no weight at all.
        renormalize: Whether `exact` scales the kept weights to sum to 1.
        pairs_at_once: Most pairs of one pass without gradient; None is B, so that such a pass needs no more memory
            than the one with gradient.

    Returns:
        Estimates [B, C, H, W]. Where the given label has all the weight they are D(x; sigma, label) to the last bit.
    """
    rows, classes, factor = _sampled_pairs(label, weights) if others == "sampled" else _pairs(label, weights, threshold)
    own = weights.gather(1, label[:, None]).squeeze(1)
    if others == "exact" and renormalize and threshold > 0:
        kept = own.index_add(0, rows, factor)
        # The given label is kept whatever its weight; if nothing weighs anything there is nothing to scale.
        scale = torch.where(kept > 0, 1 / kept, 1.0)
        own, factor = own * scale, factor * scale[rows]
    # The others first: what the pass with gradient keeps for the backward pass is not in memory yet.
    rest = _sum_of_others(denoise, x, sigma, rows, classes, factor, pairs_at_once or len(x)) if len(rows) else None
    estimate = _over_pixels(own, x) * denoise(x, sigma, label)
    return estimate if rest is None else estimate + rest


@torch.no_grad()
def _sum_of_others(
    denoise: Denoise, x: Tensor, sigma: Tensor, rows: Tensor, classes: Tensor, factor: Tensor, at_once: int
) -> Tensor:
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for begin in range(0, len(rows), at_once):
        row, its_class, its_factor = (values[begin : begin + at_once] for values in (rows, classes, factor))
        part = denoise(x[row], sigma[row], its_class).to(total.dtype)
        total.index_add_(0, row, _over_pixels(its_factor, x) * part)
    return total


def _pairs(label: Tensor, weights: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, classes and weights of all pairs but those of the given labels."""
    is_own = F.one_hot(label, weights.shape[1]).bool()
    rows, classes = ((weights > threshold) & ~is_own).nonzero(as_tuple=True)
    return rows, classes, weights[rows, classes]


def _sampled_pairs(label: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One other class for each image whose other classes weigh anything."""
    others = weights.scatter(1, label[:, None], 0.0)
    rest = others.sum(1)
    rows = rest.nonzero().squeeze(1)
    if len(rows) == 0:
        return rows, rows, rest[rows]
    return rows, torch.multinomial(others[rows], 1).squeeze(1), rest[rows]


def _over_pixels(factor: Tensor, x: Tensor) -> Tensor:
    return factor.view(-1, *([1] * (x.ndim - 1)))
