"""Sums of integers over clients of which nobody sees more than the sum: pairwise additive masking.

Bonawitz et al. (Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017), its first protocol:
clients u < v share a secret s_uv (X25519), and client u sends

    y_u = x_u + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)    mod 2^64,

so that every mask is in the sum once with each sign. The sum is exact, as nothing is rounded. There are no shares to
recover from a client that vanishes: without all of the cohort the masks stay, and the server has to ask the others anew
with another nonce. The server may be curious, but has to follow the protocol: one that passes keys of its own off as
those of other clients sees through the masks, and so does one that gets a late answer after it has the sum without that
client.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_PURPOSE = b"fewlight secure sum 1"
_WORD = 8


def new_private_key() -> bytes:
    """Make a private key of a client, which never leaves it.

    Returns:
        32 bytes (X25519, RFC 7748).
    """
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the public key that belongs to a private one.

    Args:
        private: What `new_private_key` made.

    Raises:
        ValueError: It is no key.
    """
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def mask(
    values: Int64Array,
    number: int,
    private: bytes,
    cohort: Mapping[int, bytes],
    nonce: str,
    only_client: bool = False,
) -> UInt64Array:
    """Hide numbers among those of other clients.

    Args:
        values: What to add up, int64 of any shape; the shapes of all clients have to be equal.
        number: The client's number.
        private: Its private key.
        cohort: Public keys of all clients of this sum by number, the own one among them.
        nonce: A name that no other sum has: masks of equal names are equal, and would cancel in a difference.
        only_client: Accept a cohort of this client alone. Its numbers are then sent as they are: there is nothing to
            hide them among, so this is for runs that never had another client.

    Returns:
        Numbers that look uniform in [0, 2^64), of the same shape.

    Raises:
        ValueError: The client is not in the cohort, is alone in it, or a key is none.
        TypeError: `values` are no int64 numbers.
    """
    if values.dtype != np.int64:
        msg = f"Expected `values` of type int64, got {values.dtype}; only sums of integers are exact."
        raise TypeError(msg)
    _require_cohort(number, private, cohort, nonce, only_client)
    masked = values.reshape(-1).astype(np.uint64)
    own = X25519PrivateKey.from_private_bytes(private)
    context = _context(cohort, nonce, values.shape)
    for other in sorted(cohort.keys() - {number}):
        try:
            secret = own.exchange(X25519PublicKey.from_public_bytes(cohort[other]))
        except ValueError as error:
            msg = f"Expected `cohort` with a public key (X25519) for client {other}, got none: {error}."
            raise ValueError(msg) from error
        stream = _stream(secret, context, (min(number, other), max(number, other)), len(masked))
        # Arrays of unsigned integers wrap around, which is what "mod 2^64" is.
        masked = masked + stream if number < other else masked - stream
    return masked.reshape(values.shape)


def unmask(masked: Sequence[UInt64Array]) -> Int64Array:
    """Add up what all clients of a cohort have sent.

    Args:
        masked: What `mask` returned, one for each client; with one of them missing the result means nothing.

    Returns:
        The sum of their numbers, exact where it fits into int64.

    Raises:
        ValueError: There is none, or shapes differ.
    """
    shapes = {array.shape for array in masked}
    if len(shapes) != 1:
        found = f"shapes {sorted(shapes)}" if shapes else "none"
        msg = f"Expected `masked` numbers of one shape, got {found}; ask all clients for the same."
        raise ValueError(msg)
    total = np.zeros(shapes.pop(), dtype=np.uint64)
    for array in masked:
        total = total + array.astype(np.uint64)
    return np.asarray(total, dtype=np.uint64).astype(np.int64)


def _require_cohort(number: int, private: bytes, cohort: Mapping[int, bytes], nonce: str, only_client: bool) -> None:
    if cohort.get(number) != public_key(private):
        msg = f"Expected `cohort` with the key of client {number}, got another one or none; describe the clients anew."
        raise ValueError(msg)
    if len(cohort) == 1 and not only_client:
        msg = (
            f"Expected a `cohort` of at least two clients, got client {number} alone: its numbers would be seen as "
            "they are. Wait for other clients."
        )
        raise ValueError(msg)
    if len(set(cohort.values())) < len(cohort):
        msg = f"Expected `cohort` with a key for each client, got one twice among {sorted(cohort)}; make new ones."
        raise ValueError(msg)
    if not nonce:
        msg = "Expected `nonce` to name this sum, got none; take a new one for each sum."
        raise ValueError(msg)


def _context(cohort: Mapping[int, bytes], nonce: str, shape: tuple[int, ...]) -> bytes:
    """What all of a cohort have to agree on: others have other masks."""
    known = [nonce, list(shape), [[number, key.hex()] for number, key in sorted(cohort.items())]]
    return hashlib.sha256(json.dumps(known).encode()).digest()


def _stream(secret: bytes, context: bytes, pair: tuple[int, int], count: int) -> UInt64Array:
    """Uniform numbers that only a pair of clients can tell: ChaCha20 (RFC 8439) with a key of its own (RFC 5869)."""
    info = b"|".join([_PURPOSE, context, *(str(number).encode() for number in pair)])
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)
    # Each key is used for one stream: its counter and nonce begin at 0.
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(_WORD * count)), dtype="<u8").astype(np.uint64)
