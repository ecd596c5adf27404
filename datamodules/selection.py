"""Images of the right kind from a large pool: by a classifier's confidence, or by similarity to one's own images.

A pool becomes unlabelled images in three steps: embed or classify it, choose, and write the choice as a table:

    data = SemiSupervisedDataModule(FolderSource("mine"), image_size=224, predict_images="pool")
    data.setup("fit")
    data.setup("predict")
    network = timm.create_model("resnet18", pretrained=True, num_classes=0)  # or any callable
    own = embed(network, data.sweep_dataloader("labeled"))
    pool = data.predict_dataloader()
    found = retrieve(own, data.labels_of("labeled"), embed(network, pool), k=1000)
    chosen = [Path("pool").absolute() / pool.dataset.keys[i] for i in found.position.unique().tolist()]
    write_table([*mine, *chosen], [*their_classes, *[None] * len(chosen)], "chosen.parquet")

`SemiSupervisedDataModule(TableSource("chosen.parquet"), image_size=224)` then trains on both.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Retrieved(NamedTuple):
    """What was found in a bank.

    Attributes:
        position: Positions in the bank [G, k], most similar first.
        similarity: Their cosine similarities [G, k].
    """

    position: Tensor
    similarity: Tensor


@torch.no_grad()
def embed(network: Callable[[Tensor], Tensor], batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Apply a network to all images of a loader.

    Args:
        network: Takes images [B, C, H, W] in [0, 1] and owns its normalisation; put it in evaluation mode before.
        batches: Batches with "image" and "index"; fillers (index -1) are left out.

    Returns:
        Results [N, ...] in the order of the index.

    Raises:
        ValueError: There are no images.
    """
    parts = [(batch["index"], network(batch["image"])) for batch in batches]
    if not parts:
        msg = "Expected argument `batches` to hold images, but got none."
        raise ValueError(msg)
    index, result = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    real = index >= 0
    return result[real.to(result.device)][index[real].argsort().to(result.device)]


def in_domain(probabilities: Tensor, per_class: int | None = None) -> Tensor:
    """Choose out-of-domain images that look like those of the classes (Xie et al. 2020, arXiv 1904.12848, appendix).

    Every image belongs to its most probable class; of each class the most confident ones are taken, equally many.

    Args:
        probabilities: Class probabilities of the pool [N, K], by a classifier trained on one's own images.
        per_class: Images of each class; one that has fewer gives all. None takes as many as the smallest class has,
            classes without any left aside.

    Returns:
        Positions in the pool, class by class, most confident first.

    Raises:
        ValueError: An argument has the wrong shape or is out of range.
    """
    if probabilities.dim() != 2 or not probabilities.numel():
        msg = f"Expected argument `probabilities` to have shape [N, K], but got {list(probabilities.shape)}."
        raise ValueError(msg)
    if per_class is not None and per_class < 1:
        msg = f"Expected argument `per_class` to be at least 1, or left out, but got {per_class}."
        raise ValueError(msg)
    confidence, label = probabilities.max(1)
    order = confidence.argsort(descending=True, stable=True)
    members = [order[label[order] == number] for number in range(probabilities.shape[1])]
    count = min(len(rows) for rows in members if len(rows)) if per_class is None else per_class
    return torch.cat([rows[:count] for rows in members])


def retrieve(
    query_embeddings: Tensor,
    query_labels: Tensor | None,
    bank_embeddings: Tensor,
    k: int,
    exclude: Tensor | None = None,
    chunk: int = 16384,
) -> Retrieved:
    """Find the images of a bank that are most similar to one's own, as SentAugment does for sentences.

    Du et al. 2021, arXiv 2010.02194. Similarity is the cosine. The search is exact: chunks of the bank are compared
    with all queries, on the device of the embeddings.

    Args:
        query_embeddings: Embeddings of one's own images [Q, D].
        query_labels: Their class ids [Q]: one query a class, the mean of its embeddings at unit length. None makes
            every image a query.
        bank_embeddings: Embeddings of the pool [M, D].
        k: How many to find for each query.
        exclude: Positions in the bank that are not to be found, for example copies of test images.
        chunk: Images of the bank that are compared at a time.

    Returns:
        For each query, or each class that occurs in ascending order, the k most similar; of equal ones the first.

    Raises:
        ValueError: Shapes do not fit, or fewer than k can be found.
    """
    if query_embeddings.dim() != 2 or query_embeddings.shape[1:] != bank_embeddings.shape[1:]:
        msg = (
            "Expected arguments `query_embeddings` [Q, D] and `bank_embeddings` [M, D], but got "
            f"{list(query_embeddings.shape)} and {list(bank_embeddings.shape)}; use one network for both."
        )
        raise ValueError(msg)
    size = len(bank_embeddings)
    allowed = torch.ones(size, dtype=torch.bool, device=bank_embeddings.device)
    if exclude is not None:
        allowed[exclude] = False
    if not 1 <= k <= int(allowed.sum()):
        msg = f"Expected argument `k` to be from 1 to {int(allowed.sum())}, the images to find, but got {k}."
        raise ValueError(msg)
    queries = normalize(query_embeddings, dim=1)
    if query_labels is not None:
        queries = torch.stack([queries[query_labels == label].mean(0) for label in torch.unique(query_labels)])
        queries = normalize(queries, dim=1)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    similarity = queries.new_empty(len(queries), 0)
    for rows in torch.split(allowed.nonzero().squeeze(1), chunk):
        found = queries @ normalize(bank_embeddings[rows], dim=1).T
        # What was found before comes first, so that a stable order prefers the first of equal ones.
        similarity, order = torch.sort(torch.cat([similarity, found], 1), dim=1, descending=True, stable=True)
        index = torch.cat([index, rows.expand(len(queries), -1)], 1).gather(1, order)[:, :k]
        similarity = similarity[:, :k]
    return Retrieved(index, similarity)
