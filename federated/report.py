"""What a federated run shows while it goes on, and what it leaves behind: curves, pictures, a table, results."""

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from callbacks.class_counts import draw_class_counts
from callbacks.class_matrix import draw_class_matrix
from callbacks.drawing import Pixels
from callbacks.drawn_sheet import class_rows, shown_classes
from callbacks.metrics_report import markdown_table, print_table
from callbacks.summary_chart import Float64Array, draw_summary
from datamodules.artifact_files import read_json
from datamodules.atomic import write_atomically, write_json_atomically
from federated.rounds import RoundReport
from federated.table import HEAD, DrawnFacts, Int64Array, Row, SelectionFacts, cells, finite

STATE = "report.json"
RESULTS = "results.json"
TABLE = "results.md"
PICTURES = "pictures"
_IMAGES_A_CLASS = 10


class Report:
    """Shows a federated run in TensorBoard, and writes what it found into its folder.

    Whatever it is told is kept in `report.json`, so that a run that goes on need not tell it again; when it does, what
    is the same changes nothing. Pictures are in TensorBoard and, as PNG, in `pictures/`.

    Args:
        run_dir: Folder of the run.
        config_hash: Hash of its settings. What a run of other settings left in the folder is forgotten, and no longer
            shown by TensorBoard.
        console: Where the table is printed; standard output by default.
    """

    def __init__(self, run_dir: str | Path, config_hash: str = "", console: Console | None = None) -> None:
        """Read what an interrupted run has told."""
        self.folder = Path(run_dir)
        self.config_hash = config_hash
        self.console = console
        kept = self.folder / STATE
        before = read_json(kept, "run_dir") if kept.is_file() else {}
        same = before.get("config_hash") == config_hash
        anew: dict[str, Any] = {"config_hash": config_hash, "rounds": {}, "facts": {}, "pictures": {}}
        self._told = before if same else anew
        # purge_step 0: TensorBoard leaves out all that events of the folder say before.
        self._board = SummaryWriter(self.folder, purge_step=0 if before and not same else None)

    def round(self, task_name: str, found: RoundReport) -> bool:
        """Show a round of a network that clients train together.

        Args:
            task_name: Name of the step.
            found: What is known of the round.

        Returns:
            Whether that is new: false for what this run has told before it was stopped.
        """
        told = {
            "accuracy": found.accuracy,
            "clients": {str(client): share for client, share in sorted(found.per_client.items())},
            "losses": {str(client): loss for client, loss in sorted(found.losses.items())},
        }
        rounds = self._told["rounds"].setdefault(task_name, {})
        if rounds.get(str(found.number)) == told:
            return False
        rounds[str(found.number)] = told
        for tag, values in (("accuracy", found.per_client), ("loss", found.losses)):
            for client, value in sorted(values.items()):
                self._scalar(f"{tag}_of_clients/{task_name}/{client:02d}", value, found.number)
        self._scalar(f"accuracy/{task_name}", found.accuracy, found.number)
        counts = {client: found.trained[client][0] for client in found.losses}
        if counts:
            mean = sum(count * found.losses[client] for client, count in counts.items()) / sum(counts.values())
            self._scalar(f"loss/{task_name}", mean, found.number)
        self._keep()
        return True

    def client_classes(self, pixels: Pixels) -> None:
        """Show which client holds what.

        Args:
            pixels: [height, width, 3].
        """
        self._picture("client_classes", pixels)

    def confusion(self, counts: Int64Array, names: Sequence[str], of: str = "held-out labels") -> None:
        """Show which classes the classifier takes for which.

        Args:
            counts: Images [K, K] over all clients, a row for each true class, a column for each predicted one.
            names: Names of the K classes.
            of: Which images these are.
        """
        images, right = int(counts.sum()), int(np.trace(counts))
        share = f", {right / images:.1%} right" if images else ""
        drawn = draw_class_matrix(
            torch.from_numpy(counts).double(),
            names,
            f"Confusion of {of}, all clients: {images:,} images{share}",
            rows="true class",
            columns="predicted class",
            legend="the true class",
            write=lambda count: f"{count:.0f}" if count else "",
        )
        self._picture(f"confusion_{re.sub(r'[^a-z]+', '_', of)}", drawn)
        self._fact("confusion", self._told["facts"].get("confusion", {}) | {of: _plain(counts, names)})

    def selection(self, counts: Int64Array, names: Sequence[str]) -> None:
        """Show which pseudo-labels were selected, and how right they are where true labels are known.

        Args:
            counts: [K, 5] over all clients, see SelectionFacts.
            names: Names of the K classes.
        """
        facts = SelectionFacts.of(counts)
        labels, kept, known, right, right_of_kept = counts.T
        bars = draw_class_counts(kept, labels - kept, names, facts.sentence(), ("selected", "left out"))
        self._picture("selected_counts", bars)
        if facts.right is not None:
            whole = np.where(known == labels, kept, 0)
            before, after = _shares(right, known), _shares(right_of_kept, whole)
            runs = {"all pseudo-labels": facts.right, "selected": facts.right_of_kept}
            panels = {"share that is right, by predicted class (before and after selection)": (before, after)}
            title = "Pseudo-labels that are right: all of them, and those selected"
            self._picture("selected_precision", draw_summary(runs, "selected", panels, names, title))
        self._fact("selection", facts.to_plain() | _plain(counts, names))

    def drawn(self, counts: Int64Array, names: Sequence[str]) -> None:
        """Show how many images of each class were drawn and kept.

        Args:
            counts: [K, 2] over all clients, see DrawnFacts.
            names: Names of the K classes.
        """
        facts = DrawnFacts.of(counts)
        candidates, kept = counts.T
        bars = draw_class_counts(kept, candidates - kept, names, facts.sentence(), ("kept", "left out"))
        self._picture("drawn_counts", bars)
        self._fact("drawn", facts.to_plain() | _plain(counts, names))

    def samples(self, images: Tensor, labels: Tensor, names: Sequence[str]) -> None:
        """Show drawn images, a row a class.

        Args:
            images: [N, C, H, W] in [0, 1], C 1 or 3; the first ten of a class are shown, of 20 classes at most.
            labels: Class ids [N].
            names: Names of the K classes.
        """
        rows = []
        for k in shown_classes(sorted(set(labels.tolist()))):
            rows.append((str(names[k]), list(images[labels == k][:_IMAGES_A_CLASS])))
        if rows:
            self._picture("samples", class_rows(rows))

    def finish(self, rows: Sequence[Row]) -> None:
        """Print the table, write `results.json` and `results.md`, and close the logs.

        Args:
            rows: The classifiers in the order of the table; points are gained over the one called "labels".
        """
        table = Table(title="Federated training: test images of all clients", title_justify="left")
        for place, column in enumerate(HEAD):
            table.add_column(column, justify="right" if 0 < place < len(HEAD) - 1 else "left", overflow="fold")
        written = cells(rows)
        for row in written:
            table.add_row(*(escape(cell) for cell in row))
        console = self.console or Console()
        print_table(table, console)
        lines = self._sentences()
        for line in lines:
            console.print(escape(line), soft_wrap=True, highlight=False)
        write_json_atomically(self.folder / RESULTS, self._results(rows))
        text = "\n\n".join([markdown_table(HEAD, written), *lines])
        write_atomically(self.folder / TABLE, f"{text}\n".encode())
        self.close()

    def close(self) -> None:
        """Close the logs; what is told afterwards opens them again."""
        self._board.close()

    def _sentences(self) -> list[str]:
        """What there is to say of selection and drawing."""
        kinds: dict[str, type[SelectionFacts | DrawnFacts]] = {"selection": SelectionFacts, "drawn": DrawnFacts}
        facts = self._told["facts"]
        return [
            kind.of(np.asarray(facts[name]["counts"])).sentence() + "." for name, kind in kinds.items() if name in facts
        ]

    def _results(self, rows: Sequence[Row]) -> dict[str, Any]:
        rounds = {
            task: {number: told["accuracy"] for number, told in seen.items()}
            for task, seen in self._told["rounds"].items()
        }
        return {
            "config_hash": self.config_hash,
            "arms": {
                row.name: {
                    "accuracy": finite(row.accuracy),
                    "worst_client": finite(row.worst_client),
                    "clients": {str(client): finite(share) for client, share in sorted(row.clients.items())},
                    "note": row.note,
                }
                for row in rows
            },
            **{name: self._told["facts"].get(name, {}) for name in ("selection", "drawn", "confusion")},
            "rounds": rounds,
        }

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self._board.add_scalar(tag, value, step)

    def _fact(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what `results.json` says in the end."""
        if self._told["facts"].get(name) != facts:
            self._told["facts"][name] = facts
            self._keep()

    def _picture(self, name: str, pixels: Pixels) -> None:
        """Show a picture, unless it is the same as before."""
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        path = self.folder / PICTURES / f"{name}.png"
        if self._told["pictures"].get(name) == digest and path.is_file():
            return
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        write_atomically(path, buffer.getvalue())
        self._board.add_image(f"federated/{name}", pixels, 0, dataformats="HWC")
        self._told["pictures"][name] = digest
        self._keep()

    def _keep(self) -> None:
        """Write what was told; only when TensorBoard has it, so that a run that is killed here tells it again."""
        self._board.flush()
        write_json_atomically(self.folder / STATE, self._told)


def _shares(part: Int64Array, whole: Int64Array) -> Float64Array:
    """Part / whole, NaN where there is nothing to divide by."""
    shares = np.full(len(part), np.nan)
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares


def _plain(counts: Int64Array, names: Sequence[str]) -> dict[str, Any]:
    return {"names": list(names), "counts": counts.tolist()}
