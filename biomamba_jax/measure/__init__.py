"""How fast things run on the device at hand, alone or beside other people's programs: what `benchmark` calls."""
