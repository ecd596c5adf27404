"""Training on the labelled images alone: what every method is compared with."""

from lightning_modules.ssl.base import Batch, Host, Loss, Method, Views
from lightning_modules.ssl.parts import cross_entropy


class Supervised(Method):
    """Cross-entropy on labelled images, nothing else."""

    views = Views(labeled=("weak",), unlabeled=())

    def loss(self, m: Host, labeled: Batch, unlabeled: Batch) -> Loss:
        """Ls = H(y, p(w(x)))."""
        return Loss(sup=cross_entropy(m.network(labeled["image"]), labeled["label"]))
