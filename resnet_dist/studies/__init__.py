"""Studies: several runs, with several seeds each, that answer one question."""
