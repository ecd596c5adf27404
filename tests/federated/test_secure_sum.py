"""Masked sums: exact, and without all clients of a sum nothing but noise."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from federated.secure_sum import mask, new_private_key, public_key, unmask

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

KEYS = [new_private_key() for _ in range(12)]


def cohort_of(numbers: Sequence[int]) -> dict[int, bytes]:
    return {number: public_key(KEYS[number]) for number in numbers}


def masked_by(values: dict[int, Int64Array], nonce: str = "a") -> list[UInt64Array]:
    cohort = cohort_of(list(values))
    return [mask(own, number, KEYS[number], cohort, nonce) for number, own in values.items()]


def drawn(numbers: Sequence[int], shape: tuple[int, ...], most: int = 1000) -> dict[int, Int64Array]:
    return {number: np.random.default_rng(number).integers(-most, most, shape) for number in numbers}


@pytest.mark.parametrize("shape", [(), (1,), (10,), (3, 4), (7, 5, 5), (0,)])
@pytest.mark.parametrize("numbers", [(0, 1), (3, 1, 2), tuple(range(12))])
def test_masked_sums_are_plain_sums(shape: tuple[int, ...], numbers: tuple[int, ...]) -> None:
    values = drawn(numbers, shape)
    found = unmask(masked_by(values))
    assert found.dtype == np.int64
    assert found.shape == shape
    for place, one in enumerate(found.reshape(-1).tolist()):
        assert one == sum(int(value.reshape(-1)[place]) for value in values.values())


def test_numbers_near_the_ends_of_64_bits_are_exact() -> None:
    ends = np.array([2**62, -(2**62), 2**63 - 1, -(2**63)])
    found = unmask(masked_by({0: ends, 1: np.array([2**62 - 1, -(2**62), 0, 0]), 2: np.zeros(4, dtype=np.int64)}))
    assert found.tolist() == [2**63 - 1, -(2**63), 2**63 - 1, -(2**63)]


def test_the_order_of_answers_does_not_matter() -> None:
    masked = masked_by(drawn(range(5), (6,)))
    assert np.array_equal(unmask(masked), unmask(masked[::-1]))


def test_one_answer_looks_uniform() -> None:
    (found, _) = masked_by({0: np.zeros(20_000, dtype=np.int64), 1: np.zeros(20_000, dtype=np.int64)})
    # Each byte of uniform numbers has 256 values that are equally frequent: chi-squared with 255 degrees of freedom.
    for place in range(8):
        counts = np.bincount((found >> np.uint64(8 * place)).astype(np.uint8), minlength=256)
        expected = len(found) / 256
        # Mean 255, standard deviation 22.6: beyond six of these by chance once in a hundred million.
        assert ((counts - expected) ** 2 / expected).sum() == pytest.approx(255, abs=136)
    assert len(np.unique(found)) == len(found)


def test_the_mask_of_a_client_is_what_the_pair_shares() -> None:
    # Of zeros the masks themselves are sent, and those of two clients are each other's negative.
    first, second = masked_by({4: np.zeros(9, dtype=np.int64), 7: np.zeros(9, dtype=np.int64)})
    assert np.array_equal(first, (~second) + np.uint64(1))
    assert first.any()


@pytest.mark.parametrize("what", ["nonce", "cohort", "shape"])
def test_another_sum_has_other_masks(what: str) -> None:
    values, cohort = np.zeros(6, dtype=np.int64), cohort_of([0, 1])
    first = mask(values, 0, KEYS[0], cohort, "a")
    if what == "cohort":
        # A third client adds its own masks; those of the first two have to differ as well.
        three = cohort_of([0, 1, 2])
        whole = [mask(values, number, KEYS[number], three, "a") for number in (0, 1)]
        assert not np.array_equal(whole[0] + mask(values, 1, KEYS[1], cohort, "a"), np.zeros(6))
        assert not np.array_equal(whole[0], first)
        return
    other = mask(values.reshape(2, 3), 0, KEYS[0], cohort, "a") if what == "shape" else None
    second = mask(values, 0, KEYS[0], cohort, "b") if other is None else other.reshape(-1)
    assert (first != second).all()
    assert np.array_equal(first, mask(values, 0, KEYS[0], cohort, "a"))


def test_without_one_client_or_with_another_cohort_nothing_is_unmasked() -> None:
    values = drawn(range(3), (50,), most=5)
    masked = masked_by(values)
    some = unmask(masked[:2])
    assert (np.abs(some) > 10).all()
    # The third answered for a sum of two.
    other = mask(values[2], 2, KEYS[2], cohort_of([1, 2]), "a")
    assert (np.abs(unmask([*masked[:2], other])) > 15).all()
    late = mask(values[2], 2, KEYS[2], cohort_of(range(3)), "b")
    assert (np.abs(unmask([*masked[:2], late])) > 15).all()


def test_keys_are_x25519() -> None:
    first, second = KEYS[0], KEYS[1]
    assert first != second
    assert len(first) == len(public_key(first)) == 32
    ours = X25519PrivateKey.from_private_bytes(first).exchange(X25519PublicKey.from_public_bytes(public_key(second)))
    theirs = X25519PrivateKey.from_private_bytes(second).exchange(X25519PublicKey.from_public_bytes(public_key(first)))
    assert ours == theirs


def test_a_client_alone_is_refused_unless_there_never_was_another() -> None:
    values = np.array([1, -2])
    with pytest.raises(ValueError, match="at least two clients, got client 0 alone"):
        mask(values, 0, KEYS[0], cohort_of([0]), "a")
    alone = mask(values, 0, KEYS[0], cohort_of([0]), "a", only_client=True)
    assert unmask([alone]).tolist() == [1, -2]


@pytest.mark.parametrize(
    ("cohort", "nonce", "message"),
    [
        (cohort_of([1, 2]), "a", "`cohort` with the key of client 0, got another one or none"),
        ({0: public_key(KEYS[3]), 1: public_key(KEYS[1])}, "a", "with the key of client 0"),
        ({**cohort_of([0]), 1: public_key(KEYS[0])}, "a", "got one twice among"),
        ({**cohort_of([0]), 1: b"short"}, "a", "public key .X25519. for client 1, got none"),
        # Of small order: the secret would be known to everybody.
        ({**cohort_of([0]), 1: bytes(32)}, "a", "public key .X25519. for client 1, got none"),
        (cohort_of([0, 1]), "", "Expected `nonce`"),
    ],
)
def test_cohorts_that_hide_nothing_are_refused(cohort: dict[int, bytes], nonce: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask(np.array([1]), 0, KEYS[0], cohort, nonce)


def test_only_sums_of_integers_are_exact() -> None:
    with pytest.raises(TypeError, match="`values` of type int64, got float64"):
        mask(np.ones(2), 0, KEYS[0], cohort_of([0, 1]), "a")  # type: ignore[arg-type]  # what is refused


def test_answers_of_several_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="of one shape, got none"):
        unmask([])
    with pytest.raises(ValueError, match="of one shape, got shapes"):
        unmask([np.zeros(2, dtype=np.uint64), np.zeros(3, dtype=np.uint64)])
