"""Label propagation on a graph of nearest neighbours (Zhou et al., NIPS 2003; Iscen et al., arXiv 1904.04717)."""

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.linalg import cg
from torch import Tensor

# Elements of the block of inner products that is held at a time.
_BLOCK = 2**25

Array = npt.NDArray[np.float64]


@torch.no_grad()
def nearest_neighbors(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The images nearest to each image by inner product, exactly, without itself.

    Args:
        features: [N, D], N >= 2.
        count: How many neighbours; at most N - 1 are returned.

    Returns:
        Inner products [N, count], largest first, and the numbers of the neighbours [N, count].
    """
    size = len(features)
    count = min(count, size - 1)
    values, places = [], []
    for start in range(0, size, max(1, _BLOCK // size)):
        rows = torch.arange(start, min(size, start + max(1, _BLOCK // size)), device=features.device)
        products = features[rows] @ features.T
        products[torch.arange(len(rows), device=features.device), rows] = -math.inf
        value, place = products.topk(count, dim=1)
        values.append(value)
        places.append(place)
    return torch.cat(values), torch.cat(places)


def neighbor_graph(features: Tensor, neighbors: int, exponent: float) -> sparse.csr_matrix:
    """W = A + A^T with a_ij = max(v_i . v_j, 0)^gamma for the neighbours j of i, 0 else (Iscen et al.).

    Args:
        features: L2-normalised v [N, D].
        neighbors: Neighbours of an image k.
        exponent: gamma.

    Returns:
        Symmetric [N, N] with an empty diagonal.
    """
    size = len(features)
    value, place = nearest_neighbors(features.float(), neighbors)
    weight = value.clamp_min(0).double().pow(exponent).cpu().numpy()
    row = np.repeat(np.arange(size), weight.shape[1])
    one_way = sparse.csr_matrix((weight.ravel(), (row, place.cpu().numpy().ravel())), shape=(size, size))
    return sparse.csr_matrix(one_way + one_way.T)


def normalized(graph: sparse.csr_matrix) -> sparse.csr_matrix:
    """S = D^(-1/2) W D^(-1/2) with the degrees D; an image without neighbours stays alone."""
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale = np.where(degree > 0, 1.0 / np.sqrt(np.where(degree > 0, degree, 1.0)), 0.0)
    return sparse.csr_matrix(sparse.diags(scale) @ graph @ sparse.diags(scale))


def propagate(
    graph: sparse.csr_matrix, label: npt.NDArray[np.int64], num_classes: int, alpha: float, iterations: int
) -> Array:
    """Solve (I - alpha S) z_c = y_c for every class by conjugate gradients (Iscen et al.).

    y_c is 1 / n_c at the n_c images that are labelled c, so that classes with many labels do not win by that.

    Args:
        graph: S [N, N].
        label: Class ids [N], -1 where there is none.
        num_classes: Classes K.
        alpha: In [0, 1).
        iterations: Steps of the solver at most; it stops earlier at a relative residual of 1e-6.

    Returns:
        Probabilities [N, K]: z with what is negative set to 0, rows summing to 1; uniform where nothing arrived.
    """
    system = sparse.csr_matrix(sparse.identity(len(label)) - alpha * graph)
    scores = np.zeros((len(label), num_classes))
    for number in range(num_classes):
        seeds = (label == number).astype(np.float64)
        if seeds.any():
            scores[:, number], _ = cg(system, seeds / seeds.sum(), rtol=1e-6, maxiter=iterations)
    scores = scores.clip(min=0)
    total = scores.sum(axis=1, keepdims=True)
    return np.where(total > 0, scores / np.where(total > 0, total, 1.0), 1.0 / num_classes)


def certainty(probabilities: Array) -> Array:
    """How sure the labels are: omega = 1 - H(z) / log K, divided by the largest (Iscen et al.): [N] in [0, 1]."""
    clipped = probabilities.clip(min=np.finfo(np.float64).tiny)
    omega = (1.0 + (probabilities * np.log(clipped)).sum(axis=1) / math.log(probabilities.shape[1])).clip(min=0)
    return np.asarray(omega / max(omega.max(), np.finfo(np.float64).tiny))
