"""Tests, in the same rooms as what they test."""

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).resolve().parents[1]
