"""Settings of a run: sections, rules, YAML files, the command line, recipes and warnings."""
