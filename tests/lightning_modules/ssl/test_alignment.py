"""Distribution alignment against its closed forms."""

import pytest
import torch
from ssl_logits import logit_host, on_two_ranks
from ssl_toys import ToyHost
from torch import Tensor

from lightning_modules.ssl.alignment import Alignment
from lightning_modules.ssl.thresholds import FixedThreshold
from lightning_modules.ssl.weak_to_strong import WeakToStrong


def aligner(alignment: Alignment, num_classes: int = 3) -> tuple[ToyHost, Alignment]:
    return logit_host(WeakToStrong(FixedThreshold(), alignment=alignment), num_classes), alignment


def drawn(size: int, num_classes: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(size, num_classes, generator=generator)).softmax(-1)


def test_one_batch_of_a_queue_has_the_closed_form() -> None:
    m, align = aligner(Alignment("uniform", length=4), 2)
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.9, 0.1], [0.7, 0.3]])  # mean (0.8, 0.2)
    out = align(m, p, p)
    assert out[0].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    assert align.aligned(torch.tensor([[0.5, 0.5]]))[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-5)
    torch.testing.assert_close(out.sum(-1), torch.ones(4))


@pytest.mark.parametrize("alignment", [Alignment("labeled", length=3), Alignment("uniform", decay=0.0)])
def test_it_changes_nothing_when_the_averages_agree(alignment: Alignment) -> None:
    m, align = aligner(alignment)
    p = torch.stack([torch.roll(torch.tensor([0.7, 0.2, 0.1]), i) for i in range(3)])
    torch.testing.assert_close(align(m, p, p), p)


def test_it_moves_log_odds_by_a_constant() -> None:
    m, align = aligner(Alignment("uniform", length=2))
    p = drawn(50)
    out = align(m, p, p)
    shift = (out[:, 0] / out[:, 1]).log() - (p[:, 0] / p[:, 1]).log()
    torch.testing.assert_close(shift, shift[:1].expand(50), rtol=1e-3, atol=1e-4)
    assert shift[0].item() == pytest.approx((p.mean(0)[1] / p.mean(0)[0]).log().item(), abs=1e-4)


def test_a_queue_forgets_all_but_its_last_batches() -> None:
    m, align = aligner(Alignment("uniform", length=3))
    batches = [drawn(8, seed=seed) for seed in range(5)]
    for p in batches[:-1]:
        align(m, p, p)
    out = align(m, batches[-1], batches[-1])
    mean = torch.stack([p.mean(0) for p in batches[-3:]]).mean(0)
    expected = batches[-1] / mean
    torch.testing.assert_close(out, expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_averages_start_uniform_and_move_by_the_decay() -> None:
    m, align = aligner(Alignment("labeled", decay=0.9))
    p, labeled = drawn(8), drawn(6, seed=1)
    out = align(m, p, labeled)
    source, target = 0.3 + 0.1 * p.mean(0), 0.3 + 0.1 * labeled.mean(0)
    expected = p * target / source
    torch.testing.assert_close(out, expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_class_that_is_never_predicted_does_no_harm() -> None:
    m, align = aligner(Alignment("uniform", length=2))
    p = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, 3)
    out = align(m, p, p)
    assert out.isfinite().all()
    torch.testing.assert_close(out, p)


def test_two_processes_align_like_one() -> None:
    def work(m: ToyHost, rank: int | None) -> tuple[Tensor, Tensor]:
        align = m.method.get_submodule("alignment")
        for step in range(3):
            p, x = drawn(8, seed=step), drawn(4, seed=10 + step)
            out = align(m, p, x) if rank is None else align(m, p[4 * rank :][:4], x[2 * rank :][:2])
        return out, align.get_buffer("target")

    def make() -> WeakToStrong:
        return WeakToStrong(FixedThreshold(), alignment=Alignment("labeled", length=2, decay=0.5))

    alone, target = work(logit_host(make()), None)
    (first, first_target), (second, second_target) = on_two_ranks(make, work)
    torch.testing.assert_close(torch.cat([first, second]), alone)
    torch.testing.assert_close(first_target, target)
    assert first_target.equal(second_target)


@pytest.mark.parametrize(("name", "value"), [("target", "model"), ("length", -1), ("decay", 1.0)])
def test_alignment_refuses_what_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        Alignment(**{name: value})  # type: ignore[arg-type]  # on purpose
