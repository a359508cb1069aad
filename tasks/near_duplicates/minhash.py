"""MinHash signatures by rensa, cut into bands: two texts that agree in a band are candidates.

Results are stored, so a signature must be the same on every machine. rensa promises this for one version of its
algorithm, whatever the processor's vector units; `check_signatures` holds it to that on every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import metadata

import numpy as np

_SEED = 1
#: Of rensa's R-MinHash; signatures of another version are others.
_ALGORITHM_VERSION = 2
#: Digest of the signatures of `_probe`: few and many shingles, so that every way through the code is tried.
_PROBE_DIGEST = "2f7d91dfe84a27137c31ca1b3a7ffc011e2a07af7f1369f8f507dbc5a369ec66"


def signatures(sets: Sequence[Sequence[str]], num_perm: int) -> np.ndarray:
    """MinHash of every set of shingles. Order and repeats in a set make no difference.

    Returns: (N, num_perm) uint32
    """
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_token_sets(sets, num_perm, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(sets), num_perm)


def band_hashes(signed: np.ndarray, num_bands: int, rows_per_band: int) -> np.ndarray:
    """One number for the rows of each band: equal where these are equal. A collision only costs a comparison.

    signed   (N, num_perm) uint32
    Returns: (N, num_bands) uint64
    """
    parts = signed[:, : num_bands * rows_per_band].reshape(len(signed), num_bands, rows_per_band).astype(np.uint64)
    hashed = np.zeros(parts.shape[:2], np.uint64)
    for row in range(rows_per_band):
        # Two rounds of splitmix64 (Steele et al. 2014); arithmetic of uint64 wraps around.
        hashed = (hashed ^ parts[:, :, row]) + np.uint64(0x9E3779B97F4A7C15)
        hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashed


@cache
def check_signatures() -> str:
    """Library and version, once its signatures are those that this version of the stage was made with.

    Raises ValueError where rensa is not installed, or makes other signatures.
    """
    try:
        version = metadata.version("rensa")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "near_duplicates: needs the package rensa, which is not installed; install rensa>=0.5,<0.6"
        ) from None
    from rensa import RMinHash

    found = RMinHash.ALGORITHM_VERSION
    if found != _ALGORITHM_VERSION or probe_digest() != _PROBE_DIGEST:
        raise ValueError(
            f"near_duplicates: rensa {version} (algorithm version {found}) makes other signatures here than those that "
            f"stored results were made with (algorithm version {_ALGORITHM_VERSION}); install rensa>=0.5,<0.6"
        )
    return f"rensa {version}"


def probe_digest() -> str:
    """Digest of the signatures of sets of 1 to 4,000 shingles, in ASCII and not, for three numbers of permutations."""
    sets = [[f"shingle {number} ä{number * number}" for number in range(size)] for size in (1, 2, 5, 17, 60, 300, 4000)]
    sets.append([f"plain {number}" for number in range(100)])
    digest = hashlib.sha256()
    for num_perm in (16, 100, 128):
        digest.update(signatures(sets, num_perm).astype("<u4").tobytes())
    return digest.hexdigest()
