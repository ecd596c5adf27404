"""Which items of a data set have labels, and which client has which: subsets in proportion, and out of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

# Tell the draws of one split apart.
_LABELED, _UNLABELED = 0, 1


def stratified_order(strata: Sequence[str], seed: int) -> list[int]:
    """Order items so that every prefix holds the groups in proportion.

    Inside a group the order is random. Which group comes next follows the chairman-assignment rule of R.
    Tijdeman (Discrete Mathematics 32, 1980): with m groups of shares s, the first k items hold k s of each
    group within 1 - 1 / (2 m - 2), which no rule can improve. Prefixes are nested by construction.

    Args:
        strata: Group of each item.
        seed: Seed of the order; ties between groups are broken by it too.

    Returns:
        A permutation of the positions of `strata`.
    """
    generator = np.random.default_rng(seed)
    every = np.asarray(strata)
    # Sorted, so that the result does not depend on which group happens to come first.
    members = {name: generator.permutation(np.flatnonzero(every == name)) for name in sorted(set(strata))}
    groups = [members[str(name)] for name in generator.permutation(sorted(members))]
    sizes = np.asarray([len(group) for group in groups], dtype=np.int64)
    total = len(strata)
    # Everything times `slack * total`: integers, so that no rounding decides a tie.
    slack = 2 * max(len(groups), 2) - 2
    taken, lag = np.zeros_like(sizes), np.zeros_like(sizes)
    order = []
    for _ in range(total):
        lag += slack * sizes
        # The group whose share will be overdue first.
        overdue = np.where((taken < sizes) & (lag >= total), ((slack - 1) * total - lag) / sizes, np.inf)
        chosen = int(overdue.argmin())
        order.append(int(groups[chosen][taken[chosen]]))
        taken[chosen] += 1
        lag[chosen] -= slack * total
    return order


def labelled_subset(strata: Sequence[str], num_labels: int, seed: int) -> list[int]:
    """Choose the items whose labels may be used.

    The subsets of one seed are nested: that of 20 contains that of 10.

    Args:
        strata: Group of each item.
        num_labels: How many to choose.
        seed: Seed of the choice.

    Returns:
        Positions in `strata`, in the order of choice.

    Raises:
        ValueError: If fewer items exist.
    """
    if not 1 <= num_labels <= len(strata):
        msg = (
            f"Expected argument `num_labels` to be from 1 to {len(strata)}, the number of labelled images, "
            f"but got {num_labels}. Leave it out to use them all."
        )
        raise ValueError(msg)
    return stratified_order(strata, seed)[:num_labels]


def carve_validation(strata: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split labelled items into training and validation.

    Args:
        strata: Group of each labelled item.
        share: Share to validate on, in [0, 1); above 0 at least one item is, unless that is the only one.
        seed: Seed of the split.

    Returns:
        Positions for training and positions for validation, both sorted; training is never empty.
    """
    wanted = max(round(share * len(strata)), 1) if share > 0 else 0
    wanted = min(wanted, len(strata) - 1)
    # Another stream than the labelled subset's, which was chosen by the same seed.
    order = stratified_order(strata, int(np.random.SeedSequence((seed, 1)).generate_state(1)[0]))
    return sorted(order[wanted:]), sorted(order[:wanted])


def balanced_order(labels: Int64Array, seed: int) -> list[int]:
    """Order items so that every prefix holds the classes as equally as it can.

    The classes take turns, in an order drawn anew for each round; one that has no items left is passed over. Prefixes
    are nested by construction, and the prefix of n K items holds n of each of K classes that are large enough.

    Args:
        labels: Class id of each item.
        seed: Seed of the order.

    Returns:
        A permutation of the positions of `labels`.
    """
    generator = np.random.default_rng(seed)
    members = {int(label): generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)}
    order: list[int] = []
    for turn in range(max((len(rows) for rows in members.values()), default=0)):
        for label in generator.permutation(list(members)):
            order += [int(row) for row in members[int(label)][turn : turn + 1]]
    return order


def per_class_subset(labels: Int64Array, counts: Sequence[int], seed: int) -> list[int]:
    """Choose a number of items of each class; the choices of one seed are nested, and in `balanced_order`'s order.

    Args:
        labels: Class id of each item.
        counts: How many of each class.
        seed: Seed of the choice.

    Returns:
        Sorted positions in `labels`.

    Raises:
        ValueError: A class has fewer items.
    """
    left = list(counts)
    chosen = []
    for position in balanced_order(labels, seed):
        label = int(labels[position])
        if label < len(left) and left[label] > 0:
            left[label] -= 1
            chosen.append(position)
    if any(left):
        label = next(label for label, missing in enumerate(left) if missing)
        available = int((labels == label).sum())
        msg = f"Expected at least {counts[label]} items of class {label}, but got {available}; choose fewer."
        raise ValueError(msg)
    return sorted(chosen)


def long_tailed_counts(largest: int, gamma: float, num_classes: int) -> list[int]:
    """Sizes of classes of a long-tailed data set, N_k = N_1 gamma^(-k / (K - 1)) (Cui et al. 2019, arXiv 1901.05555).

    Args:
        largest: Size of the first class N_1.
        gamma: Ratio of the largest and the smallest class, at least 1.
        num_classes: Number of classes K.

    Returns:
        K sizes, rounded, at least 1 each.

    Raises:
        ValueError: An argument is out of range.
    """
    if largest < 1 or gamma < 1 or num_classes < 1:
        msg = (
            f"Expected `largest`, `gamma` and `num_classes` to be at least 1, but got {largest}, {gamma}, "
            f"{num_classes}. A class that should be the smallest goes last."
        )
        raise ValueError(msg)
    last = max(num_classes - 1, 1)
    return [max(round(largest * gamma ** (-rank / last)), 1) for rank in range(num_classes)]


@dataclass(frozen=True)
class ClientSplit:
    """How a data set is dealt out to clients, where it is not theirs from the beginning.

    Attributes:
        num_clients: Number of clients.
        label_share: Share of the training images that keep their label, in (0, 1].
        alpha_labeled: Concentration of the labelled images of a class over clients; None deals them out evenly.
        alpha_unlabeled: That of the unlabelled images, and of the test images.
        seed: Seed of the split.
    """

    num_clients: int = 10
    label_share: float = 0.1
    alpha_labeled: float | None = None
    alpha_unlabeled: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        if self.num_clients < 1 or self.seed < 0:
            msg = (
                f"Expected `num_clients` to be at least 1 and `seed` at least 0, but got {self.num_clients} and "
                f"{self.seed}; `split: null` is for clients that have data of their own."
            )
            raise ValueError(msg)
        if not 0 < self.label_share <= 1:
            msg = f"Expected argument `label_share` to be in (0, 1], but got {self.label_share}; 1 keeps all labels."
            raise ValueError(msg)
        for name in ("alpha_labeled", "alpha_unlabeled"):
            alpha = getattr(self, name)
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                msg = f"Expected argument `{name}` to be above 0, but got {alpha}; null deals images out evenly."
                raise ValueError(msg)


@dataclass(frozen=True)
class ClientRows:
    """Training images of a client.

    Attributes:
        labeled: Rows of those whose label it has, sorted.
        unlabeled: Rows of the others, sorted.
    """

    labeled: Int64Array
    unlabeled: Int64Array


def client_split(labels: Int64Array, split: ClientSplit) -> list[ClientRows]:
    """Deal training images out to clients, labelled ones apart from unlabelled ones (dual heterogeneity).

    Which images are labelled is a stratified choice over all clients; the choices of one seed are nested. Of either
    part, client k gets the share p_k of each class, p ~ Dir(alpha 1) drawn anew for each class (Yurochkin et al. 2019,
    arXiv 1905.12022), so that classes differ across clients, and within a client between labelled and unlabelled
    images (FedDure, Bai et al., AAAI 2024). Without alpha, counts of a class differ by one at most.

    Args:
        labels: True class ids of the training images [N]; -1 for images that cannot be labelled, which are dealt out
            evenly.
        split: How.

    Returns:
        The rows of each client; every row belongs to one client.

    Raises:
        ValueError: A class would have no labelled image anywhere, or a client no image.
    """
    return list(_client_split(np.ascontiguousarray(labels, dtype=np.int64).tobytes(), split))


# Each client asks for its own part of the same split, and the stratified choice goes through the images one by one.
@lru_cache(maxsize=4)
def _client_split(data: bytes, split: ClientSplit) -> tuple[ClientRows, ...]:
    labels = np.frombuffer(data, dtype=np.int64)
    known = np.flatnonzero(labels >= 0)
    chosen = stratified_order([str(label) for label in labels[known]], split.seed)
    labeled = np.sort(known[np.asarray(chosen[: round(split.label_share * len(known))], dtype=np.int64)])
    lost = sorted(set(labels[known].tolist()) - set(labels[labeled].tolist()))
    if lost or not len(known):
        which = f"none of class {lost[0]}" if lost else "no image with a label that may be used"
        msg = (
            f"Expected a labelled image of each class at some client, but `label_share` {split.label_share} of "
            f"{len(known)} images leaves {which}; raise `label_share`, or label images."
        )
        raise ValueError(msg)
    unlabeled = np.setdiff1d(np.arange(len(labels)), labeled)
    dealt = (
        _deal(labeled, labels, split.num_clients, split.alpha_labeled, (split.seed, _LABELED)),
        _deal(unlabeled, labels, split.num_clients, split.alpha_unlabeled, (split.seed, _UNLABELED)),
    )
    rows = [ClientRows(*parts) for parts in zip(*dealt, strict=True)]
    empty = [client for client, own in enumerate(rows) if not len(own.labeled) + len(own.unlabeled)]
    if empty:
        msg = (
            f"Expected images for each of {split.num_clients} clients, but client {empty[0]} and {len(empty) - 1} more "
            f"get none of {len(labels)} with `alpha_labeled` {split.alpha_labeled}, `alpha_unlabeled` "
            f"{split.alpha_unlabeled} and `seed` {split.seed}; take fewer clients (`num_clients`), a larger alpha or "
            "another seed."
        )
        raise ValueError(msg)
    return tuple(rows)


def client_tests(labels: Int64Array, split: ClientSplit) -> list[Int64Array]:
    """Deal test images out to clients, each class in the same proportions as its unlabelled training images.

    Args:
        labels: True class ids of the test images [N].
        split: How training images are dealt out.

    Returns:
        Rows of each client, sorted; every row belongs to one client, and a client may have none.
    """
    rows = np.arange(len(labels))
    return _deal(rows, labels, split.num_clients, split.alpha_unlabeled, (split.seed, _UNLABELED))


def folds_of(labels: Int64Array, folds: int, seed: int) -> list[Int64Array]:
    """Split items into folds, each class evenly: its counts in two folds differ by one at most, and so do all counts.

    Args:
        labels: Class ids [N].
        folds: Number of folds.
        seed: Seed of the split.

    Returns:
        Positions of each fold, sorted; a fold is empty where there are fewer items than folds.
    """
    return _deal(np.arange(len(labels)), labels, folds, None, (seed, _LABELED))


def _deal(
    rows: Int64Array, labels: Int64Array, parts: int, alpha: float | None, key: tuple[int, int]
) -> list[Int64Array]:
    """Deal rows out class by class; the proportions of a class are a function of `alpha`, `key` and the class alone."""
    even, dealt = [], [[np.empty(0, dtype=np.int64)] for _ in range(parts)]
    for label in np.unique(labels[rows]).tolist():
        # Seeds may not be negative, labels may.
        generator = np.random.default_rng((*key, label + 1))
        shares = None if alpha is None or label < 0 else generator.dirichlet(np.full(parts, alpha))
        members = generator.permutation(rows[labels[rows] == label])
        if shares is None:
            even.append(members)
            continue
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, own in zip(dealt, np.split(members, cuts), strict=True):
            part.append(own)
    # One class after the other, in turns: where one class ends with a client, the next goes on with the next client.
    turns = np.concatenate([*even, np.empty(0, dtype=np.int64)])
    return [np.sort(np.concatenate([*part, turns[number::parts]])) for number, part in enumerate(dealt)]
