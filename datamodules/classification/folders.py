"""Images in folders named after their classes."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from datamodules.classification.contents import UNKNOWN, Contents, ImageSource, Role
from datamodules.loading import DATA_VARIABLE, resolve_root
from datamodules.segmentation.pairs import indent, list_files, relative_key

# Folders that are splits of a data set, and hardly ever classes.
_SPLITS = frozenset({"train", "val", "test"})


class _Listing:
    """Files found so far, as columns."""

    def __init__(self, root: Path, names: Sequence[str], layout: str) -> None:
        self.root, self.layout = root, layout
        self.ids = {name: number for number, name in enumerate(names)}
        self.paths: list[Path] = []
        self.labels: list[int] = []
        self.roles: list[Role] = []

    def add_classes(self, folder: Path, role: Role) -> None:
        for name in class_folders(folder):
            if name not in self.ids:
                msg = (
                    f"Expected folders of the {len(self.ids)} classes in {folder}, but got {name!r}, which is none of "
                    f"the images to train on. Remove or rename it.\nExpected layout:\n{indent(self.layout)}"
                )
                raise ValueError(msg)
            self.add(folder / name, self.ids[name], role)

    def add(self, folder: Path, label: int, role: Role) -> None:
        found = list_files(folder)
        self.paths += found
        self.labels += [label] * len(found)
        self.roles += [role] * len(found)

    def contents(self, given: Sequence[bool] | None = None) -> Contents:
        if not self.paths:
            msg = (
                f"Expected argument `root` to hold images, but {self.root} has none.\n"
                f"Expected layout:\n{indent(self.layout)}"
            )
            raise FileNotFoundError(msg)
        keys = [relative_key(self.root, path) for path in self.paths]
        usable = None if given is None else np.asarray(given)
        return Contents(keys, np.asarray(self.labels, dtype=np.int64), self.roles, usable, paths=self.paths)


class _RootedSource(ImageSource):
    """What sources with a folder share."""

    def __init__(self, root: str, grey: bool = False) -> None:
        self.root = root
        self.image_channels = 1 if grey else 3

    @property
    def place(self) -> Path:
        """The folder, wherever $FEWLIGHT_DATA puts it."""
        return resolve_root(self.root)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        self._require_root()
        folder = self._training_folder()
        names = class_folders(folder)
        if not names:
            msg = (
                f"Expected argument `root` to hold a folder for each class, but {folder} has no folders.\n"
                f"Expected layout:\n{indent(self.layout)}"
            )
            raise FileNotFoundError(msg)
        return names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders, sorted."""
        return self._names

    def _training_folder(self) -> Path:
        raise NotImplementedError

    def _require_root(self) -> None:
        if not self.place.is_dir():
            relative = not Path(self.root).expanduser().is_absolute()
            hint = f" A relative `root` is looked for under ${DATA_VARIABLE} when that is set." if relative else ""
            msg = (
                f"Expected argument `root` to be a folder, but got {self.place.absolute()}.{hint}\n"
                f"Expected layout:\n{indent(self.layout)}"
            )
            raise FileNotFoundError(msg)

    def _listing(self) -> _Listing:
        return _Listing(self.place, self.class_names, self.layout)


class FolderSource(_RootedSource):
    """One folder a class, as for torchvision's ImageFolder: `train/<class>/*`, and `test/` and `val/` alike.

    Without a folder `train`, the class folders are those in `root` itself, and all images are trained on. Which of them
    keep their labels is up to `num_labels` or `labels_per_class` of the datamodule; the labels of the others serve
    reports only.

    Args:
        root: Folder of the data set; a relative one is looked for under $FEWLIGHT_DATA when that is set.
        grey: Read the images as grey ones.
    """

    layout = "train/<class>/*.png\ntest/<class>/*.png (optional)\nval/<class>/*.png (optional)\nor <class>/*.png"

    def __init__(self, root: str, grey: bool = False) -> None:
        """Look at nothing yet."""
        super().__init__(root, grey)

    def _training_folder(self) -> Path:
        if (self.place / "train").is_dir():
            return self.place / "train"
        splits = [name for name in class_folders(self.place) if name.lower() in _SPLITS]
        if splits:
            # As classes they would train on the images to test on.
            msg = (
                f"Expected argument `root` to hold a folder 'train' beside {splits}, but {self.place} has none. Rename "
                f"what holds the images to train on.\nExpected layout:\n{indent(self.layout)}"
            )
            raise FileNotFoundError(msg)
        return self.place

    def read(self) -> Contents:
        """List the images of all splits."""
        listing = self._listing()
        folder = self._training_folder()
        listing.add_classes(folder, "train")
        if folder != self.place:
            listing.add_classes(self.place / "val", "val")
            listing.add_classes(self.place / "test", "test")
        return listing.contents()


class TwoFolderSource(_RootedSource):
    """Labelled images in one folder, unlabelled ones in another: `labelled/<class>/*` and `unlabelled/*`.

    Args:
        root: Folder of the data set; a relative one is looked for under $FEWLIGHT_DATA when that is set.
        labelled: Folder in it with a folder for each class.
        unlabelled: Folder in it with images of nobody knows which class, nested or not.
        test: Folder in it with a folder for each class; it may be missing.
        grey: Read the images as grey ones.
    """

    layout = "labelled/<class>/*.png\nunlabelled/*.png (nested or not)\ntest/<class>/*.png (optional)"

    def __init__(
        self,
        root: str,
        labelled: str = "labelled",
        unlabelled: str = "unlabelled",
        test: str = "test",
        grey: bool = False,
    ) -> None:
        """Look at nothing yet."""
        super().__init__(root, grey)
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.test = test

    def _training_folder(self) -> Path:
        for name in (self.labelled, self.unlabelled):
            if not (self.place / name).is_dir():
                msg = (
                    f"Expected argument `root` to hold a folder {name!r}, but {self.place} does not.\n"
                    f"Expected layout:\n{indent(self.layout)}"
                )
                raise FileNotFoundError(msg)
        return self.place / self.labelled

    def read(self) -> Contents:
        """List the images of all folders."""
        listing = self._listing()
        listing.add_classes(self.place / self.labelled, "train")
        listing.add(self.place / self.unlabelled, UNKNOWN, "train")
        listing.add_classes(self.place / self.test, "test")
        return listing.contents()


class ImageNetSource(_RootedSource):
    """ImageNet as torchvision lays it out, and a list of the training images that keep their labels.

    The official validation images (`val/`) are tested on. The labels of training images that are not in the list serve
    reports only.

    Args:
        root: Folder with `train/<class>/*` and `val/<class>/*`; a relative one is looked for under $FEWLIGHT_DATA when
            that is set.
        label_list: Text file with a training image a line: its path below `train`, or its name alone if that begins
            with its class and an underscore, as in the lists of 1 % and 10 % published with SimCLR (n01440764_18.JPEG).
            None labels all.
    """

    layout = "train/<class>/*.JPEG\nval/<class>/*.JPEG (tested on)"

    def __init__(self, root: str, label_list: str | None = None) -> None:
        """Look at nothing yet."""
        super().__init__(root)
        self.label_list = label_list

    def _training_folder(self) -> Path:
        return self.place / "train"

    def read(self) -> Contents:
        """List the images of both splits.

        Raises:
            FileNotFoundError: If root or list are missing.
            ValueError: If the list names images that are not there.
        """
        listing = self._listing()
        listing.add_classes(self.place / "train", "train")
        given = None
        if self.label_list is not None:
            wanted = self._listed(self.label_list)
            keys = [relative_key(self.place / "train", path) for path in listing.paths]
            missing = sorted(wanted - set(keys))
            if missing:
                msg = (
                    f"Expected argument `label_list` ({self.label_list}) to name images below {self.place / 'train'}, "
                    f"but {len(missing)} of {len(wanted)} are not there, for example {missing[0]}."
                )
                raise ValueError(msg)
            given = [key in wanted for key in keys]
        trained = len(listing.paths)
        listing.add_classes(self.place / "val", "test")
        if given is not None:
            given += [True] * (len(listing.paths) - trained)
        return listing.contents(given)

    @staticmethod
    def _listed(label_list: str) -> set[str]:
        path = Path(label_list).expanduser()
        if not path.is_file():
            path = resolve_root(label_list)
        if not path.is_file():
            msg = f"Expected argument `label_list` to be a text file, but got {path.absolute()}, which is none."
            raise FileNotFoundError(msg)
        lines = [line.strip() for line in path.read_text().splitlines()]
        return {line if "/" in line else f"{line.partition('_')[0]}/{line}" for line in lines if line}


def class_folders(folder: Path) -> tuple[str, ...]:
    """List the folders below a folder, which are the classes.

    Args:
        folder: Folder to look into; a missing one has none.

    Returns:
        Sorted names without hidden folders.
    """
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
