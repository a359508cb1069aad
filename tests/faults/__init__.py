"""Fault campaign: kill, damage, starve; run again; compare with a run that nothing happened to."""
