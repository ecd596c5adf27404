"""Choosing from a pool, against naive searches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datamodules import ArraySource, SemiSupervisedDataModule, TableSource, embed, in_domain, retrieve, write_table


def test_in_domain_takes_the_most_confident_of_each_class() -> None:
    probabilities = torch.rand(60, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    chosen = in_domain(probabilities, 5).tolist()
    expected = []
    for label in range(4):
        rows = [row for row in range(60) if int(probabilities[row].argmax()) == label]
        expected += sorted(rows, key=lambda row: -float(probabilities[row].max()))[:5]
    assert chosen == expected


def test_in_domain_with_small_classes() -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.7, 0.3, 0.0]])
    assert in_domain(probabilities, 2).tolist() == [0, 1, 2]
    assert in_domain(probabilities).tolist() == [0, 2]
    with pytest.raises(ValueError, match="`per_class` to be at least 1"):
        in_domain(probabilities, 0)
    with pytest.raises(ValueError, match=r"`probabilities` to have shape \[N, K\]"):
        in_domain(probabilities[0])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_retrieval_is_exact(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(9, 5, generator=generator), torch.randn(50, 5, generator=generator)
    bank[30] = 2 * bank[10]  # as similar as the first, which is to be preferred
    banned = torch.tensor([3, 4, 20])
    found = retrieve(queries, None, bank, 6, banned, chunk)
    for row, query in enumerate(queries.numpy().astype(np.float64)):
        cosine = {
            place: float(query @ other / np.linalg.norm(query) / np.linalg.norm(other))
            for place, other in enumerate(bank.numpy().astype(np.float64))
            if place not in {3, 4, 20}
        }
        best = sorted(cosine, key=lambda place: (-round(cosine[place], 5), place))[:6]
        assert found.position[row].tolist() == best
        assert found.similarity[row].tolist() == pytest.approx([cosine[place] for place in best], abs=1e-5)


def test_class_queries_are_means_at_unit_length() -> None:
    queries = torch.tensor([[10.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    bank = torch.tensor([[1.0, 1.0], [1.0, 0.0], [-2.0, 0.1]])
    found = retrieve(queries, torch.tensor([4, 4, 7]), bank, 1)
    # Not the sum (10, 1), which would be nearest to (1, 0).
    assert found.position.tolist() == [[0], [2]]


def test_retrieval_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="`k` to be from 1 to 2"):
        retrieve(torch.ones(1, 2), None, torch.ones(3, 2), 3, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"`query_embeddings`.*use one network"):
        retrieve(torch.ones(1, 2), None, torch.ones(3, 4), 1)


def test_from_a_pool_to_a_table(tmp_path: Path) -> None:
    levels = [250, 5, 130, 240, 10, 128]
    for number, level in enumerate(levels):
        Image.new("L", (8, 8), level).save(tmp_path / f"{number}.png")
    own = ArraySource(np.full((2, 8, 8), [[[255]], [[0]]], dtype=np.uint8), [0, 1])
    data = SemiSupervisedDataModule(own, predict_images=str(tmp_path), eval_batch_size=4)
    data.setup("fit")
    pool = data.predict_dataloader()
    assert isinstance(pool, DataLoader)

    def network(image: torch.Tensor) -> torch.Tensor:
        mean = image.mean((1, 2, 3))
        return torch.stack([mean, 1 - mean], 1)

    bank = embed(network, pool)
    assert bank[:, 0].tolist() == pytest.approx([level / 255 for level in levels])
    found = retrieve(embed(network, data.sweep_dataloader("labeled")), data.labels_of("labeled"), bank, 2)
    assert found.position.tolist() == [[0, 3], [1, 4]]
    with pytest.raises(ValueError, match="`batches` to hold images"):
        embed(network, [])
    names = [f"{place}.png" for place in found.position.flatten().tolist()]
    write_table([*names, "2.png"], ["light", "light", "dark", "dark", None], tmp_path / "chosen.parquet")
    chosen = SemiSupervisedDataModule(TableSource(str(tmp_path / "chosen.parquet"), grey=True), image_size=8)
    chosen.setup("fit")
    assert (chosen.class_names, chosen.num_labeled, chosen.num_unlabeled) == (("dark", "light"), 4, 5)
    with pytest.raises(ValueError, match="`labels` to have an entry for each of 2 paths"):
        write_table(["a", "b"], ["x"], tmp_path / "never.parquet")
