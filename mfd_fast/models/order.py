"""A shuffled order that is computed, not stored: any place of any epoch at once."""

from hashlib import blake2b

ROUNDS = 4  # of the Feistel network; Luby and Rackoff (1988): four make a strong permutation


def shuffled(position: int, count: int, seed: int) -> int:
    """The index at a position of an endless stream of epochs, each a permutation of 0 to count - 1.

    A Feistel network permutes the smallest range of 4^k numbers that holds ``count``; results
    outside are put through again until they fall inside, at most four times on average.  No state
    and no memory: a resumed run needs nothing but its position.
    """
    if count < 1 or position < 0:
        raise ValueError(f"expected count >= 1 and position >= 0, got {count} and {position}")
    epoch, index = divmod(position, count)
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    key = f"{seed} {epoch}".encode()
    while True:
        index = _feistel(index, half_bits, key)
        if index < count:
            return index


def _feistel(number: int, half_bits: int, key: bytes) -> int:
    """One permutation of the numbers below ``4 ** half_bits``."""
    mask = (1 << half_bits) - 1
    left, right = number >> half_bits, number & mask
    for turn in range(ROUNDS):
        mixed = blake2b(right.to_bytes(8, "little") + bytes([turn]), key=key, digest_size=8)
        left, right = right, left ^ (int.from_bytes(mixed.digest(), "little") & mask)
    return left << half_bits | right
