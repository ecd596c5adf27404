"""PH2: 200 dermoscopic images with lesion masks and diagnoses."""

import csv
from pathlib import Path

from datamodules.segmentation.base import SegmentationDataModule
from datamodules.segmentation.pairs import Pair, relative_key

_IMAGES = "PH2 Dataset images"
_TABLES = ("PH2_dataset.txt", "PH2_dataset.csv")
_NAME = "name"
_DIAGNOSIS = "clinical diagnosis"
# Codes of the table's legend.
_DIAGNOSES = {"0": "common nevus", "1": "atypical nevus", "2": "melanoma"}


class PH2DataModule(SegmentationDataModule):
    """PH2 (Mendonca et al., EMBC 2013): 80 common nevi, 80 atypical nevi and 40 melanomas.

    Labelled subsets keep the three diagnoses in proportion, which are read from `PH2_dataset.txt` or `.csv`.

    Args:
        root: Folder `PH2Dataset`, or the one that holds it; a relative one is looked for under $FEWLIGHT_DATA
            when that is set.
        kwargs: Passed on to SegmentationDataModule.
    """

    num_classes = 2
    class_names = ("background", "lesion")
    layout = f"""
PH2Dataset/PH2_dataset.txt (or .csv)
PH2Dataset/{_IMAGES}/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp
PH2Dataset/{_IMAGES}/IMD002/IMD002_lesion/IMD002_lesion.bmp"""

    def find_pairs(self, root: Path) -> list[Pair]:
        """Pair image and lesion mask of every case and look up its diagnosis.

        Args:
            root: Folder `PH2Dataset`, or the one that holds it.

        Returns:
            All pairs, sorted by key.

        Raises:
            FileNotFoundError: If `num_labels` is set and there is no table of diagnoses.
            ValueError: If the table lacks a column.
        """
        base = root / "PH2Dataset" if (root / "PH2Dataset").is_dir() else root
        cases = sorted(path for path in (base / _IMAGES).glob("IMD*") if path.is_dir())
        diagnoses = self._diagnoses(base) if cases else {}
        return [self._pair(root, case, diagnoses) for case in cases]

    def _pair(self, root: Path, case: Path, diagnoses: dict[str, str]) -> Pair:
        name = case.name
        image = case / f"{name}_Dermoscopic_Image" / f"{name}.bmp"
        mask = case / f"{name}_lesion" / f"{name}_lesion.bmp"
        problem = ""
        if not image.is_file():
            problem = "mask without image" if mask.is_file() else "neither image nor mask"
        elif not mask.is_file():
            problem = "image without mask"
        elif self.num_labels is not None and name not in diagnoses:
            problem = "no row in the table of diagnoses"
        return Pair(relative_key(root, image), image, (mask,), diagnoses.get(name, ""), problem=problem)

    def _diagnoses(self, base: Path) -> dict[str, str]:
        tables = [base / name for name in _TABLES if (base / name).is_file()]
        if tables:
            return read_diagnoses(tables[0])
        if self.num_labels is None:
            return {}
        msg = (
            f"Expected the table of diagnoses {base / _TABLES[0]} (or .csv), by which "
            "`num_labels` chooses in proportion, but it is missing. Copy it from the PH2 archive, "
            "or leave `num_labels` out."
        )
        raise FileNotFoundError(msg)


def read_diagnoses(table: Path) -> dict[str, str]:
    """Read which image has which diagnosis.

    Args:
        table: The official text with `||` between columns, or a CSV or tab-separated file; columns are found
            by their names in the header, legends around the rows are passed over.

    Returns:
        Diagnosis of each image name.

    Raises:
        ValueError: If there is no header with the columns Name and Clinical Diagnosis, or a code is unknown.
    """
    text = table.read_text(encoding="utf-8-sig", errors="replace")
    columns: list[str] | None = None
    diagnoses = {}
    for line in text.splitlines():
        cells = _cells(line)
        lowered = [cell.lower() for cell in cells]
        if _NAME in lowered and _DIAGNOSIS in lowered:
            columns = lowered
        elif columns is not None and len(cells) >= len(columns) and cells[columns.index(_NAME)].startswith("IMD"):
            code = cells[columns.index(_DIAGNOSIS)]
            if code not in _DIAGNOSES:
                msg = (
                    f"Expected the diagnosis of {cells[columns.index(_NAME)]} in {table} to be one of "
                    f"{_DIAGNOSES}, but got {code!r}."
                )
                raise ValueError(msg)
            diagnoses[cells[columns.index(_NAME)]] = _DIAGNOSES[code]
    if columns is None:
        msg = (
            f"Expected a header with the columns `Name` and `Clinical Diagnosis` in {table}, but found none. "
            "Use PH2_dataset.txt as it is in the PH2 archive."
        )
        raise ValueError(msg)
    return diagnoses


def _cells(line: str) -> list[str]:
    if "||" in line:
        # Rows of the official text begin and end with the separator, and some columns are separated by a
        # single bar.
        return [cell.strip() for cell in line.strip().strip("|").replace("||", "|").split("|")]
    separator = "\t" if "\t" in line else ","
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
