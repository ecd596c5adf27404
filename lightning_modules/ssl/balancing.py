"""As many pseudo-labelled images of one class as of another (Noisy Student, Xie et al., arXiv 1911.04252)."""

import math

import torch
from torch import Tensor


def balanced_copies(
    label: Tensor, confidence: Tensor, num_classes: int, threshold: float, per_class: int | None
) -> Tensor:
    """How often each image is to be drawn so that all classes are drawn alike.

    Of a class with too many images the most confident ones are kept. In a class with too few, each image is taken
    floor(n / count) times, and randomly chosen ones once more, so that it is n in all: each counts n / count times in
    expectation. A class without any image stays empty. Random numbers come from torch's global generator.

    Args:
        label: Pseudo-labels [N].
        confidence: [N]; images below the threshold are left out.
        num_classes: Classes K.
        threshold: The smallest confidence.
        per_class: Images n of each class; None is the mean over the classes that have any, rounded up.

    Returns:
        Copies [N], int64.
    """
    kept = confidence >= threshold
    copies = torch.zeros_like(label)
    count = torch.bincount(label[kept], minlength=num_classes)
    found = int((count > 0).sum())
    wanted = math.ceil(int(kept.sum()) / max(found, 1)) if per_class is None else per_class
    for number in count.nonzero()[:, 0]:
        members = (kept & (label == number)).nonzero()[:, 0]
        if len(members) >= wanted:
            best = confidence[members].sort(descending=True, stable=True).indices[:wanted]
            copies[members[best]] = 1
        else:
            whole, rest = divmod(wanted, len(members))
            copies[members] = whole
            # On the CPU: the same numbers whatever the device.
            copies[members[torch.randperm(len(members))[:rest].to(members.device)]] += 1
    return copies
