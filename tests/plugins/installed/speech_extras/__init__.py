"""A package with a teacher, an objective, a codec and a corpus format for ray-distill."""
