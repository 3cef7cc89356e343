"""The commands of capfilt, by what a person wants to do."""
