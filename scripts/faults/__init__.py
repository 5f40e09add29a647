"""What can go wrong with a checkpoint, done on purpose: kills, damage and full disks. `scripts.crash_test` runs it."""
