"""Power cuts, kills, stalls and lost answers in virtual time, on a file system that loses what was not synced."""
