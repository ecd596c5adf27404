"""Requests for some of the images of a request."""

from dataclasses import asdict, replace

import pytest

from datamodules import DrawRequest


def test_a_request_for_some_images_names_these_alone() -> None:
    whole = DrawRequest(None, 6, first_seed=5, batch_size=2, images_per_class=[3, 1, 4], num_classes=3)
    some = replace(whole, only=[5, 7, 11, 13])
    assert (
        [whole.label(seed) for seed in (5, 7, 11, 13)] == [some.label(seed) for seed in (5, 7, 11, 13)] == [0, 2, 0, 2]
    )
    assert (some.counts, some.total, some.num_blocks) == ((2, 0, 2), 4, 2)
    assert [list(some.seeds(block)) for block in range(2)] == [[5, 7], [11, 13]]
    assert [some.block_of(seed) for seed in (5, 7, 11, 13)] == [0, 0, 1, 1]
    assert some.batch(1)["label"].tolist() == [0, 2]
    assert some.description()["images_per_class"] == [2, 0, 2]
    assert some.description()["only"] == [5, 7, 11, 13]
    # Folders that were begun before there was such a thing go on.
    assert "only" not in whole.description()
    assert asdict(some.trial())["only"] is None
    assert some.trial().counts == (1, 0, 0)


@pytest.mark.parametrize("only", [[], [6], [5, 5], [8, 5]])
def test_a_request_for_none_or_other_images_is_refused(only: list[int]) -> None:
    with pytest.raises(ValueError, match="argument `only` to be seeds of the request, the smallest first"):
        DrawRequest(None, 6, first_seed=5, images_per_class=[3, 0, 4], num_classes=3, only=only)
    with pytest.raises(ValueError, match="argument `only` with `images_per_class` and `num_classes`"):
        DrawRequest(4, 6, only=[0])
    with pytest.raises(ValueError, match="argument `only` with `images_per_class` and `num_classes`"):
        DrawRequest(None, 6, images_per_class=4, only=[0])
