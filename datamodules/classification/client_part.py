"""What one client has of a data set."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from datamodules.classification.contents import UNKNOWN, Contents, ImageSource, Int64Array, Role
from datamodules.partition import ClientRows, ClientSplit, client_split, client_tests, folds_of


class ClientPart(ImageSource):
    """The images of a client, and the labels that it has.

    Its unlabelled images keep their true label for reports, and it may not be used (`Contents.given`). Images that
    the source itself has to validate on are left out.

    Args:
        source: Images of all clients, or of this one alone if `split` is None.
        client: Number of the client, from 0.
        split: How the images of `source` are dealt out to clients; None leaves them all to this one.
        fold: Fold of the labelled images that is held out, to validate on; None holds none out.
        folds: Into how many folds the labelled images are split, each class evenly.

    Raises:
        ValueError: If there is no such client or fold.
    """

    is_part = True

    def __init__(
        self,
        source: ImageSource,
        client: int = 0,
        split: ClientSplit | None = None,
        fold: int | None = None,
        folds: int = 2,
    ) -> None:
        """Check the numbers; nothing is read."""
        if client < 0 or (split is not None and client >= split.num_clients):
            what = "at least 0" if split is None else f"from 0 to {split.num_clients - 1}"
            msg = f"Expected argument `client` to be {what}, but got {client}; clients are numbered from 0."
            raise ValueError(msg)
        if folds < 2 or (fold is not None and not 0 <= fold < folds):
            msg = (
                f"Expected at least two `folds` and argument `fold` to be one of them, counted from 0, but got {folds} "
                f"and {fold}; None holds no fold out."
            )
            raise ValueError(msg)
        self.source = source
        self.client = client
        self.split = split
        self.fold = fold
        self.folds = folds
        self.image_channels = source.image_channels
        self.native_size = source.native_size
        self.layout = source.layout

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the source, also of those that the client does not have."""
        return self.source.class_names

    @property
    def place(self) -> Path:
        """Where the images are, for messages."""
        return self.source.place

    def check(self) -> None:
        """Look whether there are images, as the source does."""
        self.source.check()

    def prepare(self) -> None:
        """Download what the source lacks, if it is told to."""
        self.source.prepare()

    def read(self) -> Contents:
        """List the images of the client, in the order of the source.

        Raises:
            FileNotFoundError: If the root or the images in it are missing.
            ValueError: If a label is no class id, or the split leaves a client without images.
        """
        contents = self.source.read()
        rows, tested = self._own(contents)
        roles: dict[int, Role] = dict.fromkeys(np.concatenate([rows.labeled, rows.unlabeled]).tolist(), "train")
        if self.fold is not None:
            # Turned by the client: many clients with one label each do not all have it in the same fold.
            seed, turned = self.split.seed if self.split is not None else 0, (self.fold + self.client) % self.folds
            held_out = rows.labeled[folds_of(contents.labels[rows.labeled], self.folds, seed)[turned]]
            roles |= dict.fromkeys(held_out.tolist(), "val")
        roles |= dict.fromkeys(tested.tolist(), "test")
        given = np.ones(len(contents.keys), dtype=bool)
        given[rows.unlabeled] = False
        # Entries that are no images belong to nobody: each client reports some.
        problems = contents.problems if self.split is None else contents.problems[self.client :: self.split.num_clients]
        kept = np.array(sorted(roles), dtype=np.int64)
        contents = replace(contents, given=given, problems=problems)
        return _taken(contents, kept, [roles[row] for row in kept.tolist()])

    def _own(self, contents: Contents) -> tuple[ClientRows, Int64Array]:
        """Rows to train on, labelled and unlabelled ones, and rows to test on."""
        roles = np.asarray(contents.roles)
        train, test = (np.flatnonzero(roles == role) for role in ("train", "test"))
        usable = contents.labels[train]
        if contents.given is not None:
            usable = np.where(contents.given[train], usable, UNKNOWN)
        if self.split is None:
            return ClientRows(train[usable != UNKNOWN], train[usable == UNKNOWN]), test
        own = client_split(usable, self.split)[self.client]
        tested = client_tests(contents.labels[test], self.split)[self.client]
        return ClientRows(train[own.labeled], train[own.unlabeled]), test[tested]


def _taken(contents: Contents, rows: Int64Array, roles: list[Role]) -> Contents:
    """Some rows, with other roles."""
    listed = rows.tolist()
    return replace(
        contents,
        keys=[contents.keys[row] for row in listed],
        labels=contents.labels[rows],
        roles=roles,
        given=None if contents.given is None else contents.given[rows],
        images=None if contents.images is None else contents.images[rows],
        paths=None if contents.paths is None else [contents.paths[row] for row in listed],
    )
