"""The shelf of rewards: one file each; the file name is the name in the config."""
