"""Where questions come from: the hub, folders of published files, the demo world."""
