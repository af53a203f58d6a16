"""How a configuration is composed of recipes, files and changes, and how that is shown."""
