"""What a run leaves: records and their checks, reading and writing run folders."""
