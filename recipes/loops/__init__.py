"""Trainings as one plain loop each: to read before the stages, which do the same, and to test them against."""
