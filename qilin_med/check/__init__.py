"""Look before you launch: everything that a run will need, checked in a minute."""
